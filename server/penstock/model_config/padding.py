"""Padding: which axis of an input is filled up, with what and to which lengths, and how outputs are cut back.

    pad.INPUT.axis      the axis whose length may differ between requests of a batch; 0 is the batch axis
    pad.INPUT.value     what it is filled up with (default: 0; of BYTES: nothing)
    pad.INPUT.buckets   lengths to fill up to, such as 16,32,64; without them, the longest of the batch
    cut.OUTPUT.axis     the axis of an output that is as long as the input's, or `none`
    cut.OUTPUT.input    that input, where several are padded

These are parameters of a model, and Penstock's own. They count where the backend pads.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from msgspec import Struct

from penstock import pb
from penstock.model_config.completion import BACKENDS
from penstock.tensor import BOOL, BY_CONFIG_NAME, BYTES, Datatype

FORMS = {"pad": ("axis", "value", "buckets"), "cut": ("axis", "input")}
NONE = "none"  # as the axis of an output: it is never cut
TRUTHS = {"0": False, "false": False, "1": True, "true": True}

Stated: TypeAlias = dict[str, dict[str, dict[str, str]]]  # "pad" or "cut", tensor, what of it: the text
Shape: TypeAlias = tuple[int, ...]


class Padding(Struct, frozen=True):
    """An input whose requests share a batch though they differ in the length of one axis."""

    input: str
    axis: int  # of the shape on the wire, so never 0
    value: Any  # that numpy takes for the input's datatype
    buckets: tuple[int, ...] = ()  # ascending; empty: as long as the longest of the batch

    def length(self, longest: int) -> int:
        """What inputs of at most this length are filled up to. One that exceeds all buckets, or is empty, stays."""
        place = bisect_left(self.buckets, longest)
        return self.buckets[place] if longest and place < len(self.buckets) else longest

    def kind(self, shape: Shape) -> Shape:
        """What inputs that may share a batch have equal, from the shape of one without its batch axis."""
        length = self.length(shape[self.axis - 1]) if self.buckets else -1
        return (*shape[: self.axis - 1], length, *shape[self.axis :])


class Cut(Struct, frozen=True):
    """An output with an axis as long as the padded one of an input."""

    output: str
    axis: int
    input: str


def paddings(config: pb.ModelConfig) -> tuple[Padding, ...]:
    """The padded inputs of a complete and valid configuration, in its order."""
    stated = _stated(config).get("pad", {})
    return tuple(
        Padding(
            entry.name,
            int(fields["axis"]),
            _value(_datatype(entry), fields.get("value", "")),
            _buckets(fields.get("buckets", "")),
        )
        for entry in config.input
        if (fields := stated.get(entry.name))
    )


def cuts(config: pb.ModelConfig) -> dict[str, Cut | None]:
    """How outputs are cut back, as far as a complete and valid configuration says so; None: not at all."""
    stated = _stated(config)
    only = next(iter(stated.get("pad", {})), "")
    return {
        name: None if fields["axis"] == NONE else Cut(name, int(fields["axis"]), fields.get("input", only))
        for name, fields in stated.get("cut", {}).items()
    }


def complaints(config: pb.ModelConfig) -> Iterator[str]:
    """What is wrong with the parameters of a complete configuration."""
    stated, of = _stated(config), f"for {config.name}"
    for form, tensors in stated.items():
        known = {entry.name: entry for entry in (config.input if form == "pad" else config.output)}
        what = "input" if form == "pad" else "output"
        for name, fields in tensors.items():
            parameter = f"parameter '{form}.{name}"
            if name not in known:
                yield f"{parameter}.{next(iter(fields))}' names no {what}; there are: {', '.join(known)} {of}"
            for field in fields:
                if field not in FORMS[form]:
                    forms = ", ".join(f"{form}.{what.upper()}.{field}" for field in FORMS[form])
                    yield f"{parameter}.{field}' is none of {forms} {of}"
            if "axis" not in fields:
                yield f"{parameter}.axis' is missing {of}"
            if form == "cut" and fields["axis"] == NONE:
                continue
            dims, axis = (-1, *known[name].dims), fields["axis"]
            if not axis.isdecimal() or not 0 < int(axis) < len(dims):
                most = f"{len(dims) - 1}{' or none' if form == 'cut' else ''}"
                yield f"{parameter}.axis' expects an axis from 1 to {most}, got '{axis}' {of}"
            if dims[int(axis)] != -1:
                yield f"{parameter}.axis' is {axis}, but that axis always has {dims[int(axis)]} elements {of}"
    padded = stated.get("pad", {})
    if padded and not config.max_batch_size:
        yield f"inputs are padded for batches, but max_batch_size is 0 {of}"
    for entry in config.input:
        if entry.name in padded:
            yield from _faults(entry, padded[entry.name], of)
    for name, fields in stated.get("cut", {}).items():
        if fields["axis"] == NONE:
            continue
        if "input" not in fields and len(padded) != 1:
            yield f"parameter 'cut.{name}.input' is missing: {len(padded)} inputs are padded {of}"
        if "input" in fields and fields["input"] not in padded:
            yield f"parameter 'cut.{name}.input' expects a padded input, got '{fields['input']}' {of}"


def _faults(entry: pb.ModelInput, fields: Mapping[str, str], of: str) -> Iterator[str]:
    parameter = f"parameter 'pad.{entry.name}"
    if entry.allow_ragged_batch:
        yield f"input '{entry.name}' can not be both padded and 'allow_ragged_batch' {of}"
    if "value" in fields:
        try:
            _value(_datatype(entry), fields["value"])
        except (ValueError, KeyError, OverflowError):
            yield f"{parameter}.value' expects one of {_datatype(entry)}, got '{fields['value']}' {of}"
    if "buckets" in fields:
        try:
            buckets = _buckets(fields["buckets"])
        except ValueError:
            buckets = ()
        if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
            yield f"{parameter}.buckets' expects rising lengths such as 16,32,64, got '{fields['buckets']}' {of}"


def _stated(config: pb.ModelConfig) -> Stated:
    """The parameters that concern padding. A tensor's name may have dots in it."""
    stated: Stated = {}
    backend = BACKENDS.get(config.backend)
    if backend is None or not backend.pads:
        return stated
    for key, parameter in sorted(config.parameters.items()):
        form, _, rest = key.partition(".")
        if form in FORMS:
            name, _, field = rest.rpartition(".")
            stated.setdefault(form, {}).setdefault(name, {})[field] = parameter.string_value
    return stated


def _datatype(entry: pb.ModelInput) -> Datatype:
    return BY_CONFIG_NAME[pb.DataType.Name(entry.data_type)]


def _buckets(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()


def _value(datatype: Datatype, text: str) -> Any:
    """Raises ValueError, KeyError or OverflowError for a text that is no value of the datatype; "" is its zero."""
    if datatype is BYTES:
        return text.encode()
    if datatype is BOOL:
        return TRUTHS[text.lower() or "0"]
    return datatype.dtype.type((int if datatype.is_integer else float)(text or "0"))
