"""One model in this process, loaded as the server would load it, without a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import structs

from penstock import repository
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.repository import ModelSource
from penstock.settings import Settings


@contextmanager
def loaded(name: str, settings: Settings) -> Iterator[Engine]:
    """An engine that serves the model `name` of the repositories, and only while the block lasts.

    Raises ServingError(NOT_FOUND) with the names that there are, and what a load raises.
    """
    find(name, settings)
    engine = Engine(structs.replace(settings, model_control_mode="explicit", load_model=(name,)))
    try:
        engine.lifecycle.load(name)
        yield engine
    finally:
        engine.lifecycle.stop(timeout_s=0.0)


def find(name: str, settings: Settings) -> ModelSource:
    """Where the model lies. Raises ServingError(NOT_FOUND)."""
    sources = repository.scan(map(Path, settings.model_repository), settings.model_config_name)
    if name in sources:
        return sources[name][0]
    where = " and ".join(f"'{root}'" for root in settings.model_repository)
    raise ServingError(Kind.NOT_FOUND, f"no model '{name}' in {where}; there are: {', '.join(sources) or 'none'}")
