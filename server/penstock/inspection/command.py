"""The options of `penstock inspect`, and what it does."""

import argparse
import sys
from pathlib import Path

from msgspec import structs

from penstock.errors import Kind, ServingError
from penstock.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads besides the settings."""
    parser.add_argument(
        "model", metavar="MODEL",
        help="a model file, a model's directory, or with --model-repository the name of a model in it",
    )  # fmt: skip
    # Not `version`, which is the program's.
    parser.add_argument(
        "--version", dest="model_version", default="", help="of the model; else the highest", metavar="N"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Load the model as the server would, and print what came of it. Raises ServingError where it does not load."""
    from penstock import in_process
    from penstock.inspection import report

    settings, name = _locate(arguments.model, settings)
    source = in_process.find(name, settings)
    with in_process.loaded(name, settings) as engine:
        model = engine.model(name, arguments.model_version)
        found = report.inspect(model, source)
    sys.stdout.write(report.as_json(found) if arguments.json else report.as_text(found))
    return 0


def _locate(model: str, settings: Settings) -> tuple[Settings, str]:
    """The settings with the repository to look in, and the model's name. Raises ServingError(INVALID)."""
    from penstock import repository

    if settings.model_repository:
        return settings, model
    path = Path(model)
    names = list(repository.scan([path], settings.model_config_name))
    if len(names) != 1:
        there = f"{len(names)} models: {', '.join(names)}" if names else "no model"
        raise ServingError(
            Kind.INVALID, f"'{path}' holds {there}; name one with penstock inspect NAME --model-repository {path}"
        )
    return structs.replace(settings, model_repository=(model,)), names[0]
