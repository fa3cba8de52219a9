"""What lies on disk: a bare model file, a folder of them, or a Triton tree; versions, fingerprints, label files."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct, structs

from penstock.errors import Kind, ServingError
from penstock.model_config.completion import BACKENDS

RESERVED = ("warmup", "initial_state", "configs")  # directories of a model that are no versions
DEFAULT_FILENAME = "model.onnx"
HANDLERS = BACKENDS["handler"].filenames  # each makes the directory that it lies in a model


class ModelSource(Struct, frozen=True):
    """One model as it lies on disk, before anything of it is read."""

    name: str
    directory: Path  # holds labels and configuration; for a bare file, the folder it lies in
    versions: dict[int, Path]  # version → its directory or model file; without version directories, the model's own
    config: Path | None  # the configuration file, if there is one

    def fingerprint(self) -> dict[str, int]:
        """Modification times in ns: `config`, each version by number, and `other` for the rest of the directory."""
        prints = {str(number): _newest(path) for number, path in self.versions.items()}
        prints["config"] = self.config.stat().st_mtime_ns if self.config else 0
        if self.config or any(path.is_dir() for path in self.versions.values()):
            inside = {*self.versions.values(), self.config}
            prints["other"] = max((_newest(path) for path in self.directory.iterdir() if path not in inside), default=0)
        return prints


def scan(roots: Iterable[Path], config_name: str = "") -> dict[str, list[ModelSource]]:
    """Every model under `roots`, by name; a name found more than once serves none of them.

    `config_name` prefers `configs/<config_name>.pbtxt` of a model over its `config.pbtxt`.
    Raises ServingError: NOT_FOUND for a root that does not exist, INVALID for a file that is no model.
    """
    found: dict[str, list[ModelSource]] = {}
    for root in roots:
        # Not `resolve`: a link may point to a file whose name says nothing, as in caches that are keyed by content.
        for source in _sources(Path(os.path.abspath(root)), config_name):
            found.setdefault(source.name, []).append(source)
    return found


def _sources(root: Path, config_name: str) -> Iterator[ModelSource]:
    if not root.exists():
        raise ServingError(Kind.NOT_FOUND, f"model repository '{root}' does not exist")
    if root.is_file():
        if root.name in HANDLERS:
            yield structs.replace(_tree_model(root.parent, config_name), versions={1: root})
        elif root.suffix == ".onnx":
            yield _bare(root)
        else:
            raise ServingError(
                Kind.INVALID,
                f"'{root}' is no model: expected a file that ends in .onnx or is called {' or '.join(HANDLERS)}, "
                "or a folder",
            )
        return
    if not root.is_dir():
        raise ServingError(Kind.INVALID, f"'{root}' is no model repository: it is neither a file nor a folder")
    if _has_handler(root) or (_is_model(root) and not any(_is_model(path) for path in _subdirectories(root))):
        yield _tree_model(root, config_name)
        return
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix == ".onnx":
            yield _bare(path)
        elif path.is_dir() and _is_model(path):
            yield _tree_model(path, config_name)


def _bare(path: Path) -> ModelSource:
    return ModelSource(path.stem, path.parent, {1: path}, None)


def _is_model(directory: Path) -> bool:
    """Whether a directory is one model of a Triton tree: it has a configuration, a version or a handler file."""
    return (
        (directory / "config.pbtxt").is_file()
        or _has_handler(directory)
        or any(_version(path.name) is not None for path in _subdirectories(directory))
    )


def _has_handler(directory: Path) -> bool:
    return any((directory / name).is_file() for name in HANDLERS)


def _tree_model(directory: Path, config_name: str) -> ModelSource:
    versions = {number: path for path in _subdirectories(directory) if (number := _version(path.name)) is not None}
    if not versions and _has_handler(directory):
        versions = {1: directory}
    named = directory / "configs" / f"{config_name}.pbtxt"
    plain = directory / "config.pbtxt"
    config = named if config_name and named.is_file() else plain if plain.is_file() else None
    return ModelSource(directory.name, directory, dict(sorted(versions.items())), config)


def _subdirectories(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir() and path.name not in RESERVED]


def _version(name: str) -> int | None:
    """The number of a version directory. A leading zero makes it none, so that `01` cannot hide `1`."""
    return int(name) if name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0") else None


def _newest(path: Path) -> int:
    """The newest modification in a file or, recursively, a directory."""
    newest = path.stat().st_mtime_ns
    for directory, _, names in os.walk(path):
        newest = max(newest, os.stat(directory).st_mtime_ns)
        for name in names:
            newest = max(newest, os.lstat(os.path.join(directory, name)).st_mtime_ns)
    return newest


def read_labels(directory: Path, filename: str, output: str, model: str) -> tuple[str, ...]:
    """The lines of a label file, by class index.

    Raises ServingError(INVALID) for a path that leaves the model's directory or cannot be read.
    """
    path = (directory / filename).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise ServingError(
            Kind.INVALID,
            f"label file path '{filename}' for output '{output}' in model '{model}' is outside model directory",
        )
    try:
        lines = path.read_bytes().decode().split("\n")  # nowhere else: a label may hold what Unicode ends lines by
        return tuple(line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1]))
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(
            Kind.INVALID, f"label file '{filename}' for output '{output}' in model '{model}' cannot be read: {error}"
        ) from error
