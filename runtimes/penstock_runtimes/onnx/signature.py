"""What an ONNX file says of its inputs and outputs, held against the configuration or written into it."""

import logging
import re
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.model_config import Note, controls, sequence_tensors, states, unheard
from penstock.model_config.records import DATATYPE_OF
from penstock.tensor import BY_ONNX_NAME, BYTES, Array, Datatype, show

logger = logging.getLogger(__name__)

# A shared first axis of one of these names is taken for the batch axis of a model that does not say.
BATCH_AXES = ("N", "batch", "batch_size", "Batch", "unk__batch")
COMPLETED_BATCH_SIZE = 64

Key: TypeAlias = int | str
What: TypeAlias = Literal["input", "output"]

_MAPS = re.compile(r"seq\(map\((?:int64|string),(tensor\(\w+\))\)\)")
_KINDS = {"seq": "SEQUENCE", "map": "MAP", "optional": "OPTIONAL", "sparse_tensor": "SPARSETENSOR"}
_NUMBERS = {datatype: cast(pb.DataType, number) for number, datatype in DATATYPE_OF.items()}


class OnnxTensor(Struct, frozen=True):
    """An input or output of the file. A sequence of maps (ZipMap) counts as the tensor [rows, labels] it becomes."""

    name: str
    datatype: Datatype | None  # None: not a type that the protocol has
    onnx_type: str
    axes: tuple[int | str, ...]  # a symbolic or unknown axis is a string, possibly ""
    maps: bool = False
    keys: tuple[Key, ...] = ()  # of the maps, in the order of the columns; empty where they are not known yet

    @property
    def shape(self) -> tuple[int, ...]:
        """With -1 for every axis that is not fixed."""
        return tuple(axis if isinstance(axis, int) else -1 for axis in self.axes)


class OnnxSignature(Struct, frozen=True):
    """All inputs and outputs of a file, in its order; `overridable` are initialisers that are graph inputs too."""

    inputs: dict[str, OnnxTensor]
    outputs: dict[str, OnnxTensor]
    overridable: dict[str, OnnxTensor] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, OnnxTensor]]:
        """Every input and output, behind what a message calls it."""
        for what, tensors in (("input", self.inputs), ("output", self.outputs)):
            yield from ((f"{what} '{tensor.name}'", tensor) for tensor in tensors.values())

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The labels of outputs that are maps, by output, as far as they are known."""
        return {tensor.name: tuple(map(str, tensor.keys)) for tensor in self.outputs.values() if tensor.keys}


def read(session: Any, model: str) -> OnnxSignature:
    """The signature of a session's model. Where outputs are maps, one row of zeros is run to see their labels."""
    inputs, outputs, overridable = (
        {node.name: tensor(node) for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs(), session.get_overridable_initializers())
    )
    for name, output in outputs.items():
        if output.maps and (keys := _learn_keys(session, model, inputs, name)):
            outputs[name] = replace(output, axes=("", len(keys)), keys=keys)
    return OnnxSignature(inputs, outputs, overridable)


def tensor(node: Any) -> OnnxTensor:
    """What ONNX Runtime tells of one input or output: a `NodeArg` with name, type and shape."""
    if (maps := _MAPS.fullmatch(node.type)) and (datatype := BY_ONNX_NAME.get(maps.group(1))) not in (None, BYTES):
        return OnnxTensor(node.name, datatype, node.type, ("", ""), maps=True)
    axes = tuple(axis if isinstance(axis, int) and axis >= 0 else str(axis or "") for axis in node.shape)
    return OnnxTensor(node.name, BY_ONNX_NAME.get(node.type), node.type, axes)


def _learn_keys(session: Any, model: str, inputs: dict[str, OnnxTensor], output: str) -> tuple[Key, ...]:
    try:
        [maps] = session.run([output], {name: _zeros(model, given) for name, given in inputs.items()})
    except Exception as error:  # noqa: BLE001 - zeros may be no valid input; the first request then tells the labels
        logger.info("model '%s': the labels of output '%s' are not known before it runs: %s", model, output, error)
        return ()
    return tuple(maps[0]) if maps else ()


def _zeros(model: str, given: OnnxTensor) -> Array:
    shape = [1 if dim < 0 else dim for dim in given.shape]
    datatype = _datatype(given, model, "input")
    return np.full(shape, "", object) if datatype is BYTES else np.zeros(shape, datatype.dtype)


def _named_axis(found: OnnxSignature) -> tuple[str | None, str]:
    """The name that axis 0 of every input and output bears, if they all bear the same and it names a batch; and why.

    The rows of a sequence of maps bear no name in a file, and are taken for those of the other tensors.
    """
    names: dict[int | str, str] = {}  # of axis 0, with the first tensor that bears it
    for what, given in found.tensors():
        if not given.maps:
            names.setdefault(given.axes[0] if given.axes else "", what)
    for name, what in names.items():
        if name not in BATCH_AXES:
            shown = f"is named '{name}', not one of {', '.join(BATCH_AXES)}" if name else "has no name"
            return None, f"axis 0 of {what} {shown}"
    if len(names) != 1:
        return None, "axis 0 is named " + " and ".join(f"'{name}' in {what}" for name, what in names.items())
    [name] = names
    return str(name), f"axis 0 of every input and output is named '{name}'"


def can_batch(found: OnnxSignature) -> bool:
    """Triton's rule: every input and output has a first axis that is not fixed."""
    return not _fixed_axis(found)


def _fixed_axis(found: OnnxSignature) -> str:
    """What keeps a model from being batched; "" where nothing does."""
    for what, given in found.tensors():
        if not given.axes:
            return f"{what} has no axes"
        if isinstance(given.axes[0], int):
            return f"axis 0 of {what} is fixed at {given.axes[0]}"
    return ""


def complete(
    config: pb.ModelConfig, found: OnnxSignature, default_batch_size: int, note: Note = unheard
) -> pb.ModelConfig:
    """Fill in missing inputs, outputs and batch size from the file (auto-complete, step B).

    Where both lists stand in the configuration, nothing is filled in. `default_batch_size` > 0 gives Triton's rule:
    whatever can be batched gets that `max_batch_size`. 0 gives ours: only a model whose first axes all bear one name
    out of BATCH_AXES, and whose configuration states no dims yet. Raises ServingError for types that the protocol does
    not have, and for a stated batch size that the file does not allow. `note` is told what was chosen and why.
    """
    done = pb.ModelConfig()
    done.CopyFrom(config)
    if (config.input or config.batch_input) and config.output:
        if not config.max_batch_size:
            note("max_batch_size", 0, "inputs and outputs are stated without it")
        return done
    if fixed := _fixed_axis(found):
        note("max_batch_size", 0, fixed)
        if config.max_batch_size:
            raise ServingError(
                Kind.INVALID,
                f"autofill failed for model '{config.name}': model does not support batching while non-zero "
                "max_batch_size is specified",
            )
    elif not config.max_batch_size:
        name, reason = _named_axis(found)
        if default_batch_size > 0:
            done.max_batch_size = default_batch_size
            reason = f"--default-max-batch-size is {default_batch_size}, and axis 0 of every input and output is open"
        elif config.input or config.output:
            reason = f"{'inputs' if config.input else 'outputs'} are stated without it"
        elif name:
            done.max_batch_size = COMPLETED_BATCH_SIZE
        note("max_batch_size", done.max_batch_size, reason)
    if done.max_batch_size > 1 and done.WhichOneof("scheduling_choice") is None:
        done.dynamic_batching.SetInParent()
        note("dynamic_batching", "on", "max_batch_size is over 1 and no scheduler is stated")
    batched = done.max_batch_size > 0
    without_batch = ", without the batch axis" if batched else ""
    carried = sequence_tensors(config)  # by the server, and no client sees them
    if not (done.input or done.batch_input):
        inputs = [given for given in found.inputs.values() if given.name not in carried]
        for given in inputs:
            _fill(done.input.add(), given, config.name, "input", batched)
        note("input", ", ".join(given.name for given in inputs), f"the model file has these{without_batch}")
    if not done.output:
        outputs = [given for given in found.outputs.values() if given.name not in carried]
        for given in outputs:
            _fill(done.output.add(), given, config.name, "output", batched)
        note("output", ", ".join(given.name for given in outputs), f"the model file has these{without_batch}")
    return done


def _fill(entry: pb.ModelInput | pb.ModelOutput, given: OnnxTensor, model: str, what: What, batched: bool) -> None:
    entry.name = given.name
    entry.data_type = _NUMBERS[_datatype(given, model, what)]
    dims = given.shape[1:] if batched else given.shape
    if batched and not dims:
        entry.dims.append(1)  # a batch of scalars: the client's [rows, 1] is the model's [rows]
        entry.reshape.SetInParent()
    else:
        entry.dims.extend(dims)


def _datatype(given: OnnxTensor, model: str, what: What) -> Datatype:
    if given.datatype is not None:
        return given.datatype
    kind = _KINDS.get(given.onnx_type.partition("(")[0])
    if kind is None:
        raise ServingError(
            Kind.INTERNAL, f"unsupported datatype {given.onnx_type} for {what} '{given.name}' for model '{model}'"
        )
    raise ServingError(
        Kind.UNSUPPORTED,
        f"Unsupported ONNX Type 'ONNX_TYPE_{kind}' for I/O '{given.name}', expected 'ONNX_TYPE_TENSOR'.",
    )


def check(config: pb.ModelConfig, found: OnnxSignature) -> None:
    """Raise ServingError where a complete configuration and the file disagree (the checks of Triton's ONNX backend)."""
    computed = [(target, entry) for entry in config.batch_input for target in entry.target_name]
    required = [entry for entry in config.input if not entry.optional]
    expected = len(required) + len(computed) + len(controls(config)) + len(states(config))
    if expected != len(found.inputs):
        raise ServingError(
            Kind.INVALID,
            f"unable to load model '{config.name}', configuration expects {expected} inputs, "
            f"model provides {len(found.inputs)}",
        )
    for name, made in computed:
        _check_computed(config, name, made, _find(name, "input", found.inputs))
    for entry in config.input:
        given = found.overridable.get(entry.name)
        if entry.optional and config.max_batch_size and given and given.shape[:1] != (-1,):
            raise ServingError(  # Triton's text for all of them; one with a batch axis is no trouble to ONNX Runtime
                Kind.INVALID,
                f"unable to load model '{config.name}', optional input '{entry.name}' is not supported for models "
                "that support batching",
            )
        _check_tensor(config, "input", entry, found.inputs | found.overridable if entry.optional else found.inputs)
    for output in config.output:
        _check_tensor(config, "output", output, found.outputs)


def _check_tensor(
    config: pb.ModelConfig, what: What, entry: pb.ModelInput | pb.ModelOutput, found: dict[str, OnnxTensor]
) -> None:
    given = _find(entry.name, what, found)
    _check_datatype(config, what, entry.data_type, given)
    if isinstance(entry, pb.ModelInput) and entry.allow_ragged_batch:
        if given.shape != (-1,):
            raise ServingError(
                Kind.INVALID,
                f"unable to load model '{config.name}', configuration expects model provides input with shape [-1]  "
                f"for ragged input '{entry.name}', model provides {show(given.shape)}",
            )
        return
    if any(entry.name in scattered.target_name for scattered in config.batch_output):
        _check_scattered(config, entry)
        return
    dims = list(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
    _check_shape(config, what, dims, given)


def _find(name: str, what: What, found: dict[str, OnnxTensor]) -> OnnxTensor:
    if name not in found:
        raise ServingError(
            Kind.INVALID, f"unexpected inference {what} '{name}', allowed {what}s are: {', '.join(sorted(found))}"
        )
    return found[name]


def _check_datatype(config: pb.ModelConfig, what: What, stated: int, given: OnnxTensor) -> None:
    datatype = _datatype(given, config.name, what)
    if DATATYPE_OF[stated] is not datatype:
        # Triton prints its own side by the configuration's names and the file's by the protocol's: TYPE_BYTES.
        raise ServingError(
            Kind.INVALID,
            f"unable to load model '{config.name}', configuration expects datatype "
            f"{DATATYPE_OF[stated].config_name} for {what} '{given.name}', model provides TYPE_{datatype.name}",
        )


def _check_computed(config: pb.ModelConfig, name: str, entry: pb.BatchInput, given: OnnxTensor) -> None:
    """Of an input that is computed from the batch. Triton leaves its shape to the first run."""
    _check_datatype(config, "input", entry.data_type, given)
    axes = 2 if entry.kind == pb.BatchInput.BATCH_ITEM_SHAPE else 1
    if len(given.shape) != axes or given.shape[0] != -1:
        raise ServingError(
            Kind.INVALID,
            f"unable to load model '{config.name}', batch input '{name}' of kind "
            f"{pb.BatchInput.Kind.Name(entry.kind)} has the shape {show([-1] * axes)}, "
            f"model provides {show(given.shape)}",
        )


def _check_scattered(config: pb.ModelConfig, entry: pb.ModelInput | pb.ModelOutput) -> None:
    """Of an output that is divided by an input's shapes: that shape must have the axes which the output leaves open."""
    for scattered in config.batch_output:
        [name] = scattered.source_input
        source = next(tensor for tensor in config.input if tensor.name == name)
        if entry.name in scattered.target_name and any(dim < 0 for dim in entry.dims[len(source.dims) :]):
            raise ServingError(
                Kind.INVALID,
                f"unable to load model '{config.name}', output '{entry.name}' with dims {show(entry.dims)} is to be "
                f"divided by input '{name}' with dims {show(source.dims)}, which has no such axis",
            )


def _check_shape(config: pb.ModelConfig, what: What, dims: list[int], given: OnnxTensor) -> None:
    model, shape = f"model '{config.name}', tensor '{given.name}'", given.shape
    stated, note = dims, ""
    if config.max_batch_size:
        if not shape or shape[0] != -1:
            raise ServingError(
                Kind.INVALID,
                f"{model}: for the model to support batching the shape should have at least 1 dimension and the "
                f"first dimension must be -1; but shape expected by the model is {show(shape)}",
            )
        stated = [-1, *dims]
        note = (
            "an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
            "making complete "
        )
    elif not shape:
        if dims not in ([], [1]):
            raise ServingError(
                Kind.INVALID,
                f"unable to load model '{config.name}', scalar tensor '{given.name}', should only provide 1 in the "
                "model configuration when the model doesn't support batching. Model configuration provided: "
                f"{show(dims)}.",
            )
        return

    def agrees(got: int, want: int) -> bool:
        # An input may be narrower than the file allows. An output is what the file gives, or a client is misled; of
        # the columns of maps the file says nothing.
        return got == want or (want == -1 and what == "input") or (given.maps and -1 in (got, want))

    if len(stated) != len(shape) or not all(map(agrees, stated, shape)):
        raise ServingError(
            Kind.INVALID,
            f"{model}: the model expects {len(shape)} dimensions (shape {show(shape)}) but the model configuration "
            f"specifies {len(stated)} dimensions ({note}shape {show(stated)})",
        )


def check_state(config: pb.ModelConfig, found: OnnxSignature) -> None:
    """Raise ServingError where the implicit state of a configuration and the file disagree, as `check` does."""
    for state in config.sequence_batching.state:
        taken = pb.ModelInput(name=state.input_name, data_type=state.data_type, dims=state.dims)
        given = pb.ModelOutput(name=state.output_name, data_type=state.data_type, dims=state.dims)
        _check_tensor(config, "input", taken, found.inputs)
        _check_tensor(config, "output", given, found.outputs)
