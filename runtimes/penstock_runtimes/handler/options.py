"""What a user can set: parameters of a model, or `--backend-config handler,KEY=VALUE` for all of them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from penstock import pb
from penstock.errors import Kind, ServingError


@dataclass(frozen=True, slots=True)
class Options:
    """One field for each key. Paths are relative to the model's directory."""

    python: str = ""  # the interpreter, such as .venv/bin/python (3.9 or newer); "": the server's own
    python_path: str = ""  # directories to import from, separated by colons, as `pip install --target site` fills one
    start_timeout_s: float = 600.0  # from the start of the process to the file's call of `start`
    cancel_grace_s: float = 2.0  # for an async handler or a generator to end by itself, before its process is killed
    max_output_bytes: int = 20 << 20  # of a result, of a chunk and of a progress report, as JSON

    @classmethod
    def of(cls, config: pb.ModelConfig, defaults: "Options") -> "Options":
        """Those of a model, over `defaults`. Keys that are none of these are information."""
        given = {key: parameter.string_value for key, parameter in config.parameters.items() if key in KEYS}
        return defaults.changed(f"model '{config.name}'", given)

    def changed(self, owner: str, given: Mapping[str, str]) -> "Options":
        """With the texts that `owner` gives. Raises ServingError(INVALID) for unknown keys and wrong values."""
        values: dict[str, str | float | int] = {}
        for key, text in given.items():
            if key not in KEYS:
                raise ServingError(Kind.INVALID, f"{owner} has no setting '{key}'; there are: {', '.join(KEYS)}")
            try:
                values[key] = kind(text) if (kind := type(getattr(self, key))) is not str else text
            except ValueError:
                values[key] = -1
            value = values[key]
            if not isinstance(value, str) and not 0 <= value < math.inf:
                expected = "a whole number" if isinstance(getattr(self, key), int) else "a number of seconds"
                raise ServingError(Kind.INVALID, f"{owner}: parameter '{key}' expects {expected}, got '{text}'")
        return dataclasses.replace(self, **values)  # type: ignore[arg-type] # each has the type of its field


KEYS = tuple(field.name for field in dataclasses.fields(Options))
