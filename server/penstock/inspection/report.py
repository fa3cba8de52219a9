"""What there is to know of a loaded model, as data, as text and as JSON."""

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from penstock import model_config, pb, samples
from penstock.members import HANDLER
from penstock.model import Model
from penstock.model_config import Choice, TensorSpec, instance_groups
from penstock.repository import ModelSource
from penstock.tensor import show

URL = "http://127.0.0.1:8000"  # where `penstock serve` listens without further words
MOST_LABELS = 5
RUNNING = ("device", "threads", "inline", "rows of a request")  # choices that are no fields of the configuration


class Step(Struct, frozen=True):
    """A model that an ensemble calls."""

    model: str
    version: str  # that serves
    inputs: dict[str, str]  # the model's input → the ensemble's tensor
    outputs: dict[str, str]
    after: list[int]  # the steps whose tensors it waits for


class Inspection(Struct, frozen=True):
    """A loaded model, and where it came from."""

    model: Model
    source: ModelSource
    stated: pb.ModelConfig  # what the configuration file says; empty where there is none

    @property
    def choices(self) -> dict[str, Choice]:
        return self.model.files.choices

    @property
    def instances(self) -> int:
        return sum(group.count * max(1, len(group.gpus)) for group in instance_groups(self.model.config))

    @property
    def file(self) -> Path:
        return _from_here(self.model.files.file(self.model.config.default_model_filename))

    @property
    def path(self) -> Path:
        """What `penstock serve` takes to serve this model."""
        if self.model.files.path.is_file():
            return self.file
        directory = self.source.directory
        return _from_here(directory.parent if self.model.members else directory)  # with what it calls

    @property
    def steps(self) -> list[Step]:
        """Of an ensemble, in the order of its configuration."""
        steps = self.model.config.ensemble_scheduling.step
        writers = {tensor: number for number, step in enumerate(steps) for tensor in step.output_map.values()}
        return [
            Step(
                member.name,
                member.version,
                dict(sorted(step.input_map.items())),
                dict(sorted(step.output_map.items())),
                sorted({writers[tensor] for tensor in step.input_map.values() if tensor in writers}),
            )
            for step, member in zip(steps, self.model.members, strict=True)
        ]

    @property
    def curl(self) -> str:
        return samples.curl(self.model.signature, URL, text=self._text)

    @property
    def infer(self) -> str:
        """A `penstock infer` line that needs no server."""
        return samples.infer(self.model.signature, ["--local", str(self.path)], self._text)

    @property
    def _text(self) -> str:
        """What the samples say where text is wanted: to a handler, an object that is still to be filled in."""
        return "{}" if self.model.config.backend == HANDLER else "1"


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def inspect(model: Model, source: ModelSource) -> Inspection:
    """All that is known of `model`, which was loaded from `source`."""
    stated = model_config.read(source.config) if source.config else pb.ModelConfig()
    return Inspection(model, source, stated)


def as_json(found: Inspection) -> str:
    """One object on one line."""
    model = found.model
    document = {
        "name": model.name,
        "version": model.version,
        "versions": list(found.source.versions),
        "file": str(found.file),
        "inputs": [_tensor(spec) for spec in model.signature.inputs.values()],
        "outputs": [_tensor(spec) for spec in model.signature.outputs.values()],
        "steps": [
            {
                "model": step.model,
                "version": step.version,
                "inputs": step.inputs,
                "outputs": step.outputs,
                "after": step.after,
            }
            for step in found.steps
        ],
        "config_file": str(found.source.config) if found.source.config else None,
        "stated": _stated(found),
        "config": model_config.to_json(model.config),
        "config_text": model_config.to_text(model.config),
        "choices": [
            {"field": choice.field, "value": choice.value, "reason": choice.reason} for choice in found.choices.values()
        ],
        "devices": list(model.devices),
        "instances": found.instances,
        "threads_per_instance": found.choices["threads"].value,
        "inline_bytes": model.inline_bytes,
        "load_s": round(model.load_s, 6),
        "samples": {"curl": found.curl, "infer": found.infer},
    }
    return json.dumps(document, ensure_ascii=False) + "\n"


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    document: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype.name, "shape": list(spec.shape)}
    if spec.optional:
        document["optional"] = True
    if spec.labels:
        document["labels"] = list(spec.labels)
    return document


def _stated(found: Inspection) -> list[str]:
    return [field.name for field, _ in found.stated.ListFields()]


def as_text(found: Inspection) -> str:
    """Several paragraphs."""
    return "".join(f"{line}\n" for line in _lines(found))


def _lines(found: Inspection) -> Iterator[str]:
    model, source = found.model, found.source
    versions = ", ".join(map(str, source.versions))
    yield f"Model {model.name}, version {model.version}" + (f" of {versions}" if len(source.versions) > 1 else "")
    yield f"  {found.file}"
    for title, specs in (("Inputs", model.signature.inputs), ("Outputs", model.signature.outputs)):
        yield from ("", title)
        yield from _columns(_cells(spec) for spec in specs.values())
    if found.steps:
        yield from ("", "Steps")
        yield from _columns(_step(number, step) for number, step in enumerate(found.steps))
    yield from ("", "Configuration")
    yield from (f"  {line}" for line in model_config.to_text(model.config).splitlines())
    yield from ("", "Chosen")
    if source.config:
        yield f"  {_from_here(source.config)} states {', '.join(_stated(found)) or 'nothing'}; the rest was chosen:"
    else:
        yield "  there is no configuration file, so all of it was chosen:"
    chosen = [choice for choice in found.choices.values() if choice.field not in RUNNING]
    yield from _columns((choice.field, _plain(choice.value), f"because {choice.reason}") for choice in chosen)
    yield from ("", "Running")
    rows = _running_ensemble(found) if model.members else _running(found)
    yield from _columns((name, value, reason) for name, (value, reason) in rows.items())
    yield from ("", "Try it", f"  {found.infer}")
    yield from ("", f"Or, beside {shlex.join(['penstock', 'serve', str(found.path)])}", f"  {found.curl}")


def _running(found: Inspection) -> dict[str, tuple[str, str]]:
    return {
        "instances": (str(found.instances), "see instance_group"),
        "threads": _of(found, "threads", "for each instance: "),
        "device": (", ".join(found.model.devices), found.choices["device"].reason),
        "inline": _of(found, "inline"),
        **{field: _of(found, field) for field in RUNNING[3:] if field in found.choices},
        "load time": (f"{found.model.load_s:.3f} s", "with one run or more to warm up"),
    }


def _running_ensemble(found: Inspection) -> dict[str, tuple[str, str]]:
    return {
        "device": (", ".join(found.model.devices), "of the models that it calls"),
        "runs": (str(found.model.calls), "of models that call no others, for one request"),
        "load time": (f"{found.model.load_s:.3f} s", "without that of its models"),
    }


def _step(number: int, step: Step) -> tuple[str, str, str, str, str]:
    reads = ", ".join(f"{name} from {tensor}" for name, tensor in step.inputs.items())
    writes = ", ".join(f"{name} to {tensor}" for name, tensor in step.outputs.items())
    after = f"after {', '.join(map(str, step.after))}" if step.after else "at once"
    return str(number), f"{step.model} {step.version}", reads, writes, after


def _cells(spec: TensorSpec) -> tuple[str, str, str, str]:
    notes = ["optional"] if spec.optional else []
    if spec.labels:
        more = ", ..." if len(spec.labels) > MOST_LABELS else ""
        notes.append(f"{len(spec.labels)} labels: {', '.join(spec.labels[:MOST_LABELS])}{more}")
    return spec.name, spec.datatype.name, show(spec.shape), "; ".join(notes)


def _of(found: Inspection, field: str, before: str = "") -> tuple[str, str]:
    choice = found.choices[field]
    return _plain(choice.value), before + choice.reason


def _plain(value: str | int) -> str:
    return str(value) if value != "" else "none"


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of equal length as indented lines, their cells under each other."""
    table = [list(row) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
