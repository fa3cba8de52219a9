"""From tensors as a client sent them to a request that agrees with the model's signature.

Every way in passes here once, so that a request inside the core needs no further checks. The order of the checks
and their texts are Triton's (protocol page "validation against the model").
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np
from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.model_config import Signature
from penstock.tensor import (
    BOOL,
    BYTES,
    DATATYPES,
    Array,
    Datatype,
    Tensor,
    count,
    count_bytes,
    objects,
    show,
    unpack_bytes,
)

MAX_SIZE = 2**63 - 1
SEQUENCE_ID_BYTES = 128
MOST_COUNTED = 2**20  # elements too many that are counted to be told: a wrong request must not hold up others
UNBATCHED_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


class Given(Struct):
    """An input tensor as it came: nothing about it has been checked.

    `data` is the tensor's bytes (memoryview or bytes, BYTES elements length-prefixed), or its elements as a
    flat array that a door has decoded already (BYTES: dtype object), in row-major order.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: memoryview | bytes | Array


def check_count(number: int, most: int) -> None:
    """Raises ServingError(INVALID) for more input tensors than a request may have."""
    if number > most:
        raise ServingError(
            Kind.INVALID, f"request has {number} inputs, the limit is {most}. Use --max-tensors to increase it."
        )


def check_rank(name: str, rank: int, most: int) -> None:
    """Raises ServingError(INVALID) for an input of more dimensions than a tensor may have."""
    if rank > most:
        raise ServingError(
            Kind.INVALID,
            f"invalid shape for input '{name}': it has {rank} dimensions, the limit is {most}. "
            "Use --max-rank to increase it.",
        )


def check_sequence_id(id: str) -> None:
    """Raises ServingError(UNSUPPORTED) for a text that is too long, in UTF-8, to be a sequence's id."""
    if len(id.encode(errors="replace")) > SEQUENCE_ID_BYTES:
        raise ServingError(
            Kind.UNSUPPORTED, f"string correlation ID cannot be longer than {SEQUENCE_ID_BYTES} characters"
        )


class Admitted(Struct):
    """The part of a request that depends on the model's signature."""

    inputs: dict[str, Tensor]
    rows: int  # of the batch axis; 1 for a model without one


def admit(signature: Signature, id: str, given: Sequence[Given], outputs: Iterable[str]) -> Admitted:
    """Check tensors and requested outputs against `signature` and view the bytes as arrays.

    Raises ServingError(INVALID) with the text of the first check that fails, in the protocol's order.
    """
    specs = signature.inputs
    tensors: dict[str, Tensor] = {}
    batched = signature.max_batch_size > 0
    rows = given[0].shape[0] if batched and given and given[0].shape else 1
    for tensor in given:
        spec = specs.get(tensor.name)
        if (
            spec is None
            or tensor.datatype != spec.datatype.name
            or not fits(tensor.shape, spec.shape)
            or (batched and tensor.shape[0] != rows)
        ):
            _refuse(signature, id, given, outputs)
        array = _view(spec.datatype, tensor, tensor.shape if len(tensor.shape) == len(spec.shape) else spec.shape)
        if array is None:
            _refuse(signature, id, given, outputs)
        tensors[tensor.name] = Tensor(tensor.name, spec.datatype, array)
    names = list(outputs)
    wanted = set(names)
    if (
        len(tensors) != len(given)
        or not signature.required <= tensors.keys()
        or len(wanted) != len(names)
        or not signature.outputs.keys() >= wanted
        or (batched and not 0 <= rows <= signature.row_limit)
    ):
        _refuse(signature, id, given, names)
    return Admitted(tensors, rows)


def fits(shape: Sequence[int], expected: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape may be an input that is declared as `expected`, where -1 is any size."""
    if len(shape) != len(expected):
        return len(shape) + len(expected) == 1 and (tuple(shape) or expected) == (1,)  # a scalar, as [] or as [1]
    return all(got == want or (want == -1 and got >= 0) for got, want in zip(shape, expected, strict=True))


def _view(datatype: Datatype, tensor: Given, shape: Sequence[int]) -> Array | None:
    """The tensor's array, over the same memory where it can be; None where data and shape disagree."""
    data, size = tensor.data, count(shape)
    if not size and _overflows(shape, datatype):
        return None
    if isinstance(data, np.ndarray):
        return data.reshape(shape) if data.size == size and data.dtype == datatype.dtype else None
    if datatype is BYTES:
        elements, end = unpack_bytes(data, size)
        return objects(elements, shape) if len(elements) == size and end == len(data) else None
    if len(data) != size * datatype.itemsize:
        return None
    array = np.frombuffer(data, datatype.dtype)
    if datatype is BOOL and size and array.view(np.uint8).max() > 1:
        array = array.view(np.uint8) != 0  # any other byte than 0 and 1 is undefined to those who compute with it
    return array.reshape(shape)


def _overflows(shape: Sequence[int], datatype: Datatype) -> bool:
    """Whether no array can have this shape, not even one without elements."""
    return math.prod(dim for dim in shape if dim) * datatype.dtype.itemsize > MAX_SIZE


class _Sent(Struct, frozen=True):
    """A request that one of the checks below refuses."""

    signature: Signature
    given: Sequence[Given]
    outputs: list[str]
    prefix: str  # of most messages: the request's id

    @property
    def model(self) -> str:
        return self.signature.model


def _refuse(signature: Signature, id: str, given: Sequence[Given], outputs: Iterable[str]) -> NoReturn:
    """Walk the checks in the protocol's order and raise the first that fails."""
    sent = _Sent(signature, given, list(outputs), f"[request id: {id or '<id_unknown>'}] ")
    for check in _CHECKS:
        if message := check(sent):
            raise ServingError(Kind.INVALID, message)
    raise AssertionError(f"no check explains why {given} was refused")


def _duplicates(sent: _Sent) -> str | None:
    for what, names in (("input", [tensor.name for tensor in sent.given]), ("output", sent.outputs)):
        for name, times in Counter(names).items():
            if times > 1:
                return f"{sent.prefix}{what} '{name}' already exists in request"
    return None


def _unknown_outputs(sent: _Sent) -> str | None:
    for name in sent.outputs:
        if name not in sent.signature.outputs:
            return f"unexpected inference output '{name}' for model '{sent.model}'"
    return None


def _input_count(sent: _Sent) -> str | None:
    most, least = len(sent.signature.inputs), len(sent.signature.required)
    if least <= len(sent.given) <= most:
        return None
    names = {tensor.name for tensor in sent.given}
    missing = [name for name in sent.signature.inputs if name in sent.signature.required and name not in names]
    expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
    # Where nothing is missing because too many came, Triton's text has lost its opening bracket; clients compare it.
    lacking = f"[{_quoted(missing)}]" if missing else "]"
    return (
        f"{sent.prefix}expected {expected} but got {len(sent.given)} inputs for model '{sent.model}'. "
        f"Got input(s) [{_quoted(tensor.name for tensor in sent.given)}], "
        f"but missing required input(s) {lacking}. Please provide all required input(s)."
    )


def _quoted(names: Iterable[str]) -> str:
    return ",".join(f"'{name}'" for name in names)


def _unknown_inputs(sent: _Sent) -> str | None:
    for tensor in sent.given:
        if tensor.name not in sent.signature.inputs:
            return f"unexpected inference input '{tensor.name}' for model '{sent.model}'"
    for name in sent.signature.inputs:  # the right number of inputs, but an optional one in place of a required one
        if name in sent.signature.required and all(tensor.name != name for tensor in sent.given):
            return f"{sent.prefix}missing required input '{name}' for model '{sent.model}'"
    return None


def _batch_axis(sent: _Sent) -> str | None:
    if not sent.signature.max_batch_size:
        return None
    for tensor in sent.given:
        if not tensor.shape:
            return (
                f"{sent.prefix}input '{tensor.name}' has no shape but model requires batch dimension for '{sent.model}'"
            )
    for tensor in sent.given:
        if tensor.shape[0] != sent.given[0].shape[0]:
            return f"{sent.prefix}input '{tensor.name}' batch size does not match other inputs for '{sent.model}'"
    most = sent.signature.row_limit
    if not 0 <= sent.given[0].shape[0] <= most:
        return f"{sent.prefix}inference request batch-size must be <= {most} for '{sent.model}'"
    return None


def _datatypes(sent: _Sent) -> str | None:
    for tensor in sent.given:
        want = sent.signature.inputs[tensor.name].datatype.name
        got = tensor.datatype if tensor.datatype in DATATYPES else "<invalid>"
        if got != want:
            return (
                f"{sent.prefix}inference input '{tensor.name}' data-type is '{got}', "
                f"but model '{sent.model}' expects '{want}'"
            )
    return None


def _wildcards(sent: _Sent) -> str | None:
    for tensor in sent.given:
        if any(dim < 0 for dim in tensor.shape):
            return (
                f"{sent.prefix}All input dimensions should be specified for input '{tensor.name}' "
                f"for model '{sent.model}', got {show(tensor.shape)}"
            )
    return None


def _shapes(sent: _Sent) -> str | None:
    for tensor in sent.given:
        expected = sent.signature.inputs[tensor.name].shape
        if not fits(tensor.shape, expected):
            note = UNBATCHED_NOTE if sent.signature.max_batch_size else ""
            return (
                f"{sent.prefix}unexpected shape for input '{tensor.name}' for model '{sent.model}'. "
                f"Expected {show(expected)}, got {show(tensor.shape)}. {note}"
            )
    return None


def _overflow(sent: _Sent) -> str | None:
    for tensor in sent.given:
        datatype = sent.signature.inputs[tensor.name].datatype
        elements = math.prod(dim for dim in tensor.shape if dim)
        if elements > MAX_SIZE:
            return (
                f"invalid shape for input '{tensor.name}': shape {show(tensor.shape)} causes total element count "
                f"to exceed maximum size of {MAX_SIZE}"
            )
        if _overflows(tensor.shape, datatype):
            return (
                f"byte size overflow for input '{tensor.name}': element count ({elements}) * data type size "
                f"({datatype.dtype.itemsize}) exceeds maximum allowed size ({MAX_SIZE})"
            )
    return None


def _sizes(sent: _Sent) -> str | None:
    for tensor in sent.given:
        spec = sent.signature.inputs[tensor.name]
        if spec.datatype is BYTES:
            continue
        expected = count(tensor.shape) * spec.datatype.itemsize
        data = tensor.data
        got = data.nbytes if isinstance(data, np.ndarray | memoryview) else len(data)
        if expected != got:
            return (
                f"{sent.prefix}input byte size mismatch for input '{tensor.name}' for model '{sent.model}'. "
                f"Expected {expected}, got {got}"
            )
        if isinstance(data, np.ndarray) and data.dtype != spec.datatype.dtype:
            raise AssertionError(f"'{tensor.name}' was decoded as {data.dtype} though it says {spec.datatype}")
    return None


def _elements(sent: _Sent) -> str | None:
    for tensor in sent.given:
        spec = sent.signature.inputs[tensor.name]
        if spec.datatype is BYTES and (message := _element_fault(sent, tensor)):
            return message
    return None


def _element_fault(sent: _Sent, tensor: Given) -> str | None:
    expected = count(tensor.shape)
    where = f"for inference input '{tensor.name}' for model '{sent.model}'"
    if isinstance(tensor.data, np.ndarray):
        got, end, total = tensor.data.size, 0, 0
    else:
        got, end = count_bytes(tensor.data, expected + MOST_COUNTED)
        total = len(tensor.data)
    left = total - end
    if 0 < left < 4:
        return (
            f"{sent.prefix}incomplete string length indicator {where}, expecting 4 bytes but only {left} bytes "
            "available. Please make sure the string length indicator is in one buffer."
        )
    got += bool(left)  # one whose data is cut short counts, as in Triton
    if got > expected:
        return f"{sent.prefix}unexpected number of string elements {got} {where}, expecting {expected}"
    if got < expected:
        return f"{sent.prefix}expected {expected} string elements {where}, got {got}"
    if left:
        declared = int.from_bytes(bytes(tensor.data[end : end + 4]), "little")
        return (
            f"incomplete string data for inference input '{tensor.name}', "
            f"expecting string of length {declared} but only {left - 4} bytes available"
        )
    return None


_CHECKS: tuple[Callable[[_Sent], str | None], ...] = (
    _duplicates,
    _unknown_outputs,
    _input_count,
    _unknown_inputs,
    _batch_axis,
    _datatypes,
    _wildcards,
    _shapes,
    _overflow,
    _sizes,
    _elements,
)
