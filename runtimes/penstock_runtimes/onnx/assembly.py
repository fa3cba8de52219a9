"""How requests become the inputs of one run, and its outputs theirs again, where rows alone do not say it.

Ragged inputs lie one after the other as one flat tensor, and inputs computed from the batch tell the model where each
begins (messages `BatchInput` and `BatchOutput`). Padded inputs are filled up to one length, and outputs cut back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from msgspec import Struct
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.model_config import Cut, Note, Padding, TensorSpec, cuts, paddings, signature, unheard
from penstock.model_config.records import DATATYPE_OF
from penstock.statistics import Padded
from penstock.tensor import Array, count, join, show, split

from penstock_runtimes.onnx.signature import OnnxSignature

Shape: TypeAlias = tuple[int, ...]
Batch: TypeAlias = Sequence[InferRequest]
Compute: TypeAlias = Callable[[Sequence[Shape], bool], Array]  # from the requests' shapes, and whether they have rows


def of(config: pb.ModelConfig, found: OnnxSignature, note: Note = unheard) -> "Assembly | None":
    """The assembly of a model whose configuration is complete and agrees with the file; None where rows say it all.

    Raises ServingError(INVALID) where the parameters for padding do not fit the file. `note` is told which outputs are
    cut back without a word in the configuration.
    """
    ragged = any(entry.allow_ragged_batch for entry in config.input)
    if not (ragged or config.batch_input or config.batch_output or paddings(config)):
        return None
    return Assembly(config, found, note)


class Rows:
    """Requests laid end to end along the batch axis."""

    changes_one = False  # whether a request that runs alone is not fed as it came
    padded: Padded | None = None  # what was filled up, where inputs are padded

    def __init__(self, joined: Callable[[Sequence[Array]], Array] = join) -> None:
        """`joined` lays arrays end to end."""
        self._joined = joined

    def gather(self, batch: Batch) -> dict[str, Array]:
        """The inputs of one run, by name. Raises ServingError(INVALID) for requests that cannot run together."""
        return {name: self._joined([request.inputs[name].array for request in batch]) for name in batch[0].inputs}

    def scatter(self, batch: Batch, name: str, array: Array) -> list[Array]:  # noqa: ARG002 - see below
        """The output `name` of that run, as each request gets it. Raises ServingError where it does not divide."""
        return [array] if len(batch) == 1 else split(array, [request.rows for request in batch])


class Assembly(Rows):
    """Ragged and padded inputs, and what is computed from them.

    Owned by one instance, and used by one thread at a time.
    """

    changes_one = True

    def __init__(self, config: pb.ModelConfig, found: OnnxSignature, note: Note) -> None:
        super().__init__()
        self._batched = config.max_batch_size > 0
        self._model = config.name
        self._ragged = frozenset(entry.name for entry in config.input if entry.allow_ragged_batch)
        self._computed = [
            _Computed(target, _KINDS[entry.kind], DATATYPE_OF[entry.data_type].dtype, entry.source_input[0])
            for entry in config.batch_input
            for target in entry.target_name
        ]
        outputs = signature(config).outputs
        self._scattered = {
            target: (outputs[target], entry.source_input[0])
            for entry in config.batch_output
            for target in entry.target_name
        }
        self._paddings = {padding.input: padding for padding in paddings(config)}
        self._together: list[list[Padding]] = []
        self._cuts: dict[str, Cut] = {}
        if self._paddings:
            self.padded = Padded()
            names = _names(config, found)
            self._together = _together(config.name, self._paddings.values(), names)
            self._cuts = {cut.output: cut for cut in _cuts(config, self._paddings.values(), names, note)}

    def gather(self, batch: Batch) -> dict[str, Array]:
        pads = bool(self._paddings) and self._agree(batch)
        feed: dict[str, Array] = {}
        for name in batch[0].inputs:
            arrays = [request.inputs[name].array for request in batch]
            if name in self._ragged:
                feed[name] = np.concatenate([array.reshape(-1) for array in arrays])
            elif pads and name in self._paddings:
                feed[name] = self._fill(self._paddings[name], arrays)
            else:
                feed[name] = join(arrays)
        for computed in self._computed:
            shapes = [request.inputs[computed.source].array.shape for request in batch]
            feed[computed.target] = computed.compute(shapes, self._batched).astype(computed.dtype)
        return feed

    def scatter(self, batch: Batch, name: str, array: Array) -> list[Array]:
        if name in self._scattered:
            spec, source = self._scattered[name]
            return self._divide(spec, [request.inputs[source].array.shape for request in batch], array)
        parts = super().scatter(batch, name, array)
        cut = self._cuts.get(name)
        if cut is None or cut.input not in batch[0].inputs or not self._agree(batch):
            return parts
        return self._cut(cut, batch, parts)

    def _agree(self, batch: Batch) -> bool:
        """Whether every request has one length in all axes that must be alike. One alone that has not runs as it came.

        Raises ServingError(INVALID) where it is one of several: together they would run, and alone it would not.
        """
        for padded in self._together:
            for request in batch:
                lengths = {
                    request.inputs[padding.input].array.shape[padding.axis]
                    for padding in padded
                    if padding.input in request.inputs
                }
                if len(lengths) > 1:
                    if len(batch) == 1:
                        return False
                    names = " and ".join(f"'{padding.input}'" for padding in padded)
                    raise ServingError(Kind.INVALID, f"inputs {names} of a request have the lengths {sorted(lengths)}")
        return True

    def _fill(self, padding: Padding, arrays: Sequence[Array]) -> Array:
        assert self.padded is not None
        filled = _filled(padding, arrays)
        data = sum(array.size for array in arrays)
        self.padded.data += data
        self.padded.padding += filled.size - data
        return filled

    def _cut(self, cut: Cut, batch: Batch, parts: list[Array]) -> list[Array]:
        padding = self._paddings[cut.input]
        lengths = [request.inputs[cut.input].array.shape[padding.axis] for request in batch]
        filled = padding.length(max(lengths))
        if all(length == filled for length in lengths):
            return parts
        if parts[0].shape[cut.axis] != filled:
            raise ServingError(
                Kind.INTERNAL,
                f"output '{cut.output}' of model '{self._model}' has {parts[0].shape[cut.axis]} elements along axis "
                f"{cut.axis}, and cannot be cut back like input '{cut.input}', which was padded to {filled}",
            )
        whole = (slice(None),) * cut.axis
        # A copy, as the wire needs it: a view would keep the padding in memory for as long as the answer lives.
        pairs = zip(parts, lengths, strict=True)
        return [np.ascontiguousarray(part[(*whole, slice(length))]) for part, length in pairs]

    def _divide(self, spec: TensorSpec, shapes: Sequence[Shape], array: Array) -> list[Array]:
        wanted = [tuple(shape[axis] if dim < 0 else dim for axis, dim in enumerate(spec.shape)) for shape in shapes]
        flat, start, parts = array.reshape(-1), 0, []
        for shape in wanted:
            end = start + count(shape)
            parts.append(flat[start:end])
            start = end
        if start != flat.size:
            raise ServingError(
                Kind.INTERNAL,
                f"output '{spec.name}' of model '{self._model}' has {flat.size} elements, but the shapes of its "
                f"requests, {', '.join(map(show, wanted))}, have {start}",
            )
        return [part.reshape(shape) for part, shape in zip(parts, wanted, strict=True)]


class _Computed(Struct, frozen=True):
    """An input that no request carries."""

    target: str
    compute: Compute
    dtype: np.dtype[Any]
    source: str


def _filled(padding: Padding, arrays: Sequence[Array]) -> Array:
    """The arrays end to end along the batch axis, filled up to one length."""
    axis, first = padding.axis, arrays[0]
    length = padding.length(max(array.shape[axis] for array in arrays))
    if all(array.shape[axis] == length for array in arrays):
        return join(arrays)
    shape = [sum(array.shape[0] for array in arrays), *first.shape[1:]]
    shape[axis] = length
    filled = np.full(shape, padding.value, first.dtype)
    row = 0
    for array in arrays:
        end = row + array.shape[0]
        filled[(slice(row, end), *map(slice, array.shape[1:]))] = array
        row = end
    return filled


def _counts(shapes: Sequence[Shape], _batched: bool) -> Array:
    return np.array([count(shape) for shape in shapes])


def _sums(shapes: Sequence[Shape], batched: bool) -> Array:
    return np.cumsum(_counts(shapes, batched))


def _sums_from_zero(shapes: Sequence[Shape], batched: bool) -> Array:
    return np.concatenate([[0], _sums(shapes, batched)])


def _longest(shapes: Sequence[Shape], batched: bool) -> Array:
    """Only its shape tells something: the largest number of elements. Triton leaves its content open."""
    return np.zeros(_counts(shapes, batched).max(), np.int64)


def _item_shapes(shapes: Sequence[Shape], batched: bool) -> Array:
    """The shape of every row: [rows, axes]."""
    rows = [list(shape[1:] if batched else shape) for shape in shapes for _ in range(shape[0] if batched else 1)]
    return np.array(rows).reshape(len(rows), -1)


_KINDS: dict[int, Compute] = {
    pb.BatchInput.BATCH_ELEMENT_COUNT: _counts,
    pb.BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT: _sums,
    pb.BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO: _sums_from_zero,
    pb.BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: _longest,
    pb.BatchInput.BATCH_ITEM_SHAPE: _item_shapes,
    pb.BatchInput.BATCH_ITEM_SHAPE_FLATTEN: lambda shapes, batched: _item_shapes(shapes, batched).reshape(-1),
}


def _names(config: pb.ModelConfig, found: OnnxSignature) -> dict[tuple[str, int], str]:
    """What the file calls the axes of inputs and outputs, by tensor and axis. A reshaped tensor has other axes."""
    given = found.overridable | found.inputs | found.outputs
    entries: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    return {
        (entry.name, axis): name
        for entry in entries
        if not entry.HasField("reshape")
        for axis, name in enumerate(given[entry.name].axes)
        if isinstance(name, str)
    }


def _together(model: str, padded: Iterable[Padding], names: dict[tuple[str, int], str]) -> list[list[Padding]]:
    """Padded inputs whose lengths are one, because the file calls them so. Those without a name might be anyone's."""
    named: defaultdict[str, list[Padding]] = defaultdict(list)
    for padding in padded:
        named[names.get((padding.input, padding.axis), "")].append(padding)
    for name, alike in named.items():
        for other in alike[1:]:
            if other.buckets != alike[0].buckets:
                axes = f"calls both axes '{name}'" if name else "has no names that tell their lengths apart"
                raise ServingError(
                    Kind.INVALID,
                    f"model '{model}' pads inputs '{alike[0].input}' and '{other.input}' to different buckets, but the "
                    f"model file {axes}",
                )
    return [alike for alike in named.values() if len(alike) > 1]


def _cuts(
    config: pb.ModelConfig, padded: Iterable[Padding], names: dict[tuple[str, int], str], note: Note
) -> Iterator[Cut]:
    """How outputs are cut back: as stated, else by an axis that bears the name of a padded one."""
    lengths: dict[str, str] = {}
    for padding in padded:
        if name := names.get((padding.input, padding.axis)):
            lengths.setdefault(name, padding.input)
    stated = cuts(config)
    for entry in config.output:
        if entry.name in stated:
            if cut := stated[entry.name]:
                yield cut
            continue
        open_axes = [axis for axis, dim in enumerate(entry.dims, 1) if dim < 0]
        named = [axis for axis in open_axes if names.get((entry.name, axis)) in lengths]
        if len(named) == 1:
            name = names[entry.name, named[0]]
            note(f"cut.{entry.name}.axis", named[0], f"it is called {name}, as a padded axis of '{lengths[name]}' is")
            yield Cut(entry.name, named[0], lengths[name])
        elif open_axes:
            raise ServingError(
                Kind.INVALID,
                f"model '{config.name}' pads its inputs, and nothing says which axis of output '{entry.name}' is as "
                f"long as a padded one: state the parameter 'cut.{entry.name}.axis', as one of "
                f"{', '.join(map(str, open_axes))} or none",
            )
