"""What the stand-in does not have."""

from __future__ import annotations

from typing import Any, NoReturn


class _Missing:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_given: Any, **_named: Any) -> NoReturn:
        self._refuse()

    def __getattr__(self, _name: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError(
            f"{self._name} needs the runpod package, and this is Penstock's stand-in for it: install runpod where the "
            "model's interpreter finds it"
        )


def missing(name: str) -> Any:
    """Stands for a function or class that raises NotImplementedError with its name when it is used."""
    return _Missing(name)
