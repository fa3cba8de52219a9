"""The protocol's JSON shape ↔ messages, with and without binary tensors. Protocol page HTTP, sections 3 and 5."""

import contextlib
import math
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
from msgspec import Struct, field

from penstock import json_numbers, json_text, messages
from penstock.admission import MAX_SIZE, Given, admit, check_count, check_rank, check_sequence_id
from penstock.errors import Kind, ServingError
from penstock.json_numbers import UnusualError
from penstock.messages import InferRequest, InferResponse, Parameter, RequestedOutput
from penstock.model_config import Signature
from penstock.tensor import BF16, BOOL, BYTES, DATATYPES, Array, Datatype, Tensor, count, objects, pack, show

UINT64 = DATATYPES["UINT64"]
UINT64_END = 2**64
EMPTY = memoryview(b"")
INT64_LOW = -(2**63)

NonFinite: TypeAlias = Literal["string", "literal"]  # how NaN and infinities stand in JSON: "NaN", or NaN


class Limits(Struct, frozen=True):
    """What a request may not exceed: the server options --http-max-input-size, --max-tensors and --max-rank."""

    input_bytes: int
    tensors: int
    rank: int


class Forms(Struct):
    """Which outputs an answer carries in binary: those that the request names as it says there, `default` the rest."""

    default: bool = False
    named: dict[str, bool] = field(default_factory=dict)


class Decoded(Struct):
    """A request as its body has it. Nothing has been compared with the model's signature yet."""

    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)
    priority: int = 0
    timeout_us: int = 0
    sequence: messages.Sequence | None = None
    given: list[Given] = field(default_factory=list)
    outputs: list[RequestedOutput] = field(default_factory=list)
    forms: Forms = field(default_factory=Forms)

    def admitted(self, signature: Signature, version: str) -> InferRequest:
        """The request for `version`, checked. Raises ServingError(INVALID)."""
        admitted = admit(signature, self.id, self.given, [output.name for output in self.outputs])
        return InferRequest(
            signature.model,
            version,
            self.id,
            admitted.inputs,
            {output.name: output for output in self.outputs},
            self.parameters,
            self.priority,
            timeout_us=self.timeout_us,
            sequence=self.sequence,
            rows=admitted.rows,
        )


def decode(signature: Signature, body: bytes | memoryview, header_length: int | None, limits: Limits) -> Decoded:
    """Read a body whose first `header_length` bytes are JSON (None: all of it) and the rest binary tensors.

    Binary tensors stay views over `body`. A length of 0 means that the body is the raw data of the only input.
    Raises ServingError: INVALID with Triton's texts, TOO_LARGE, UNSUPPORTED.
    """
    view = memoryview(body)
    json_bytes = len(view) if header_length is None else header_length
    if not json_bytes:
        return _raw(signature, view, limits)
    head = view[:json_bytes]
    if json_numbers.FROM_BYTES <= json_bytes <= limits.input_bytes:
        lifted = json_numbers.lift(bytes(head))
        if lifted is not None:
            # What is wrong, or only unusual, is found out by the way below, which has the texts.
            with contextlib.suppress(ServingError, UnusualError):
                return read(signature.model, json_text.loads(lifted.text), limits, view, json_bytes, lifted.arrays)
    return read(signature.model, parse(head, limits.input_bytes), limits, view, json_bytes)


def read(
    model: str,
    document: Any,
    limits: Limits,
    view: memoryview = EMPTY,
    json_bytes: int = 0,
    arrays: dict[str, bytes] | None = None,
) -> Decoded:
    """The request in a parsed document. Its binary tensors lie in `view`, from `json_bytes` on. Raises as `decode`.

    `arrays` were taken out of the document before it was parsed (`json_numbers.Lifted`) and are used up. Then it may
    raise UnusualError too.
    """
    members = document if type(document) is dict else {}
    decoded = Decoded()
    if "id" in members:
        decoded.id = _typed(members["id"], str, "id", "string")
    if "parameters" in members:
        _parameters(members["parameters"], decoded)
    inputs = _member(members, "inputs", list, "array")
    check_count(len(inputs), limits.tensors)
    decoded.given, offset = _inputs(inputs, model, view, json_bytes, limits, arrays)
    if offset < len(view):
        raise _invalid(f"unexpected additional input data for model '{model}'")
    if "outputs" in members:
        for entry in _typed(members["outputs"], list, "outputs", "array"):
            _output(entry, decoded)
    if arrays:
        raise UnusualError  # they stand where nobody reads them, so nobody knows whether they are JSON
    return decoded


def parse(data: bytes | memoryview, limit_bytes: int) -> Any:
    """The value of a request's JSON. Raises ServingError: TOO_LARGE, INVALID."""
    if len(data) > limit_bytes:
        raise _too_large(
            f"request JSON size of {len(data)} bytes exceeds the maximum allowed input size of", limit_bytes
        )
    return json_text.loads(data)


def encode(response: InferResponse, forms: Forms, non_finite: NonFinite) -> tuple[int | None, list[bytes | memoryview]]:
    """The body as buffers: JSON, then binary tensors in its order; and the JSON's length, None without binary data.

    Data in JSON is flat. Raises ServingError(INVALID) for BYTES that JSON cannot carry.
    """
    outputs: list[dict[str, Any]] = []
    buffers: list[bytes | memoryview] = [b""]
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype.name, "shape": tensor.array.shape}
        if forms.named.get(tensor.name, forms.default):
            data = pack(tensor.array, tensor.datatype)
            entry["parameters"] = {"binary_data_size": len(data)}
            if len(data):
                buffers.append(data)
        else:
            entry["data"] = to_json(tensor, non_finite)
        outputs.append(entry)
    head: dict[str, Any] = {"id": response.id} if response.id else {}
    head["model_name"] = response.model
    head["model_version"] = response.version
    if response.parameters:
        words = _NON_FINITE[non_finite]
        head["parameters"] = {
            key: words[str(value)] if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in response.parameters.items()
        }
    head["outputs"] = outputs
    buffers[0] = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return (len(buffers[0]) if len(buffers) > 1 else None), buffers


# -- requests: everything but the data


def _parameters(given: Any, decoded: Decoded) -> None:
    """Request parameters (3.7): those with a meaning of their own, and those that are handed to the model."""
    if type(given) is not dict:
        raise _invalid("failed to get request params.: attempt to get members for non-object")
    sequence: dict[str, Any] = {}
    for key, value in given.items():
        match key:
            case "sequence_id":
                sequence["id"] = _sequence_id(value)
            case "sequence_start" | "sequence_end":
                sequence[key.removeprefix("sequence_")] = _typed(value, bool, key, "boolean")
            case "priority":
                decoded.priority = _unsigned(value, key)
            case "timeout":
                decoded.timeout_us = _unsigned(value, key)
            case "binary_data_output":
                decoded.forms.default = _typed(value, bool, key, "boolean")
            case _:
                decoded.parameters[key] = _parameter(key, value)
    if sequence.get("id"):
        decoded.sequence = messages.Sequence(**sequence)


def _parameter(key: str, value: Any) -> Parameter:
    if key.startswith("triton_"):
        raise _invalid(
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
        )
    if isinstance(value, str | bool | float):
        return value
    if isinstance(value, int):
        return value if value < UINT64_END // 2 else float(value)
    raise _invalid(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")


def _sequence_id(value: Any) -> int | str:
    if type(value) is int and value >= 0:
        return value
    text: str = _typed(value, str, "sequence_id", "string")
    check_sequence_id(text)
    return text


def _inputs(
    entries: list[Any], model: str, view: memoryview, offset: int, limits: Limits, arrays: dict[str, bytes] | None
) -> tuple[list[Given], int]:
    """The input tensors, and where in `view` the binary data that they took has ended."""
    given: list[Given] = []
    for entry in entries:
        members = entry if type(entry) is dict else {}
        parameters = members.get("parameters")
        if type(parameters) is not dict:
            parameters = {}
        if ("data" in members) + ("binary_data_size" in parameters) + ("shared_memory_region" in parameters) != 1:
            raise _sources(members, parameters)
        name = _member(members, "name", str, "string")
        datatype = _member(members, "datatype", str, "string")
        shape = _shape(name, _member(members, "shape", list, "array"), limits.rank)
        data: memoryview | Array
        if "data" in members:
            data = _data(name, datatype, shape, members["data"], limits.input_bytes, arrays)
        elif "binary_data_size" in parameters:
            end = offset + _unsigned(parameters["binary_data_size"], "binary_data_size")
            if end > len(view):
                raise _invalid(
                    f"unexpected size for input '{name}', expecting {end - len(view)} additional bytes "
                    f"for model '{model}'"
                )
            data, offset = view[offset:end], end
        else:
            raise _no_shared_memory(name, parameters)
        given.append(Given(name, datatype, shape, data))
    return given, offset


def _sources(members: dict[str, Any], parameters: dict[str, Any]) -> ServingError:
    found = [
        f" '{source}'"
        for source, holder in (
            ("data", members),
            ("binary_data_size", parameters),
            ("shared_memory_region", parameters),
        )
        if source in holder
    ]
    tail = " set" + "".join(found) if found else " no field is set"
    return _invalid(
        "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
        f"'shared_memory_region' in 'parameters'. But{tail}"
    )


def _shape(name: str, shape: list[Any], limit: int) -> list[int]:
    check_rank(name, len(shape), limit)
    for dim in shape:
        _unsigned(dim, "shape")
    if max(shape, default=0) > MAX_SIZE:
        wrapped = [dim if dim <= MAX_SIZE else dim - UINT64_END for dim in shape]
        raise _invalid(
            f"invalid shape for input '{name}': shape {show(wrapped)} contains one or more invalid dimensions"
        )
    return shape


def _output(entry: Any, decoded: Decoded) -> None:
    members = entry if type(entry) is dict else {}
    name = _member(members, "name", str, "string")
    parameters = members.get("parameters")
    if type(parameters) is not dict:
        parameters = {}
    classes, binary = 0, False
    if "classification" in parameters:
        classes = _unsigned(parameters["classification"], "classification", "Unable to set 'classification'")
    if "binary_data" in parameters:
        binary = _typed(parameters["binary_data"], bool, "binary_data", "boolean")
    if "shared_memory_region" in parameters:
        for option, wanted in (("classification", classes), ("binary_data", binary)):
            if wanted:
                raise _invalid(f"Output can't set both 'shared_memory_region' and '{option}'")
        raise _no_shared_memory(name, parameters)
    decoded.outputs.append(RequestedOutput(name, classes))
    decoded.forms.named[name] = binary


def _no_shared_memory(name: str, parameters: dict[str, Any]) -> ServingError:
    region = _typed(parameters["shared_memory_region"], str, "shared_memory_region", "string")
    for key in ("shared_memory_offset", "shared_memory_byte_size"):
        if key in parameters:
            _unsigned(parameters[key], key)
    return ServingError(
        Kind.UNSUPPORTED,
        f"tensor '{name}' cannot lie in shared memory region '{region}': this server has no shared memory",
    )


def _raw(signature: Signature, view: memoryview, limits: Limits) -> Decoded:
    """A raw binary request (3.6): the body is the data of the model's only input, one row of it."""
    prefix = "[request id: <id_unknown>] "
    if len(view) > limits.input_bytes:
        raise _too_large(
            f"Raw input has a byte_size ({len(view)} bytes) that exceeds the maximum allowed value of",
            limits.input_bytes,
        )
    if len(signature.inputs) != 1:
        raise _invalid(
            f"{prefix}Raw request must only have 1 input (found 1) to be deduced but got {len(signature.inputs)} "
            f"inputs in '{signature.model}' model configuration"
        )
    [spec] = signature.inputs.values()
    batch, dims = ([1], list(spec.shape[1:])) if signature.max_batch_size else ([], list(spec.shape))
    data: bytes | memoryview = view
    if spec.datatype is BYTES:
        if -1 in dims or count(dims) != 1:
            raise _invalid(f"{prefix}For BYTE datatype raw input '{spec.name}', the model must have input shape [1]")
        data = len(view).to_bytes(4, "little") + view
    else:
        if dims.count(-1) > 1:
            raise _invalid(
                f"{prefix}The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
                "variable-sized dimension"
            )
        if -1 in dims:
            others = count([dim for dim in dims if dim >= 0]) * spec.datatype.itemsize
            dims[dims.index(-1)] = len(view) // others if others else 0
        expected = count(dims) * spec.datatype.itemsize
        if expected != len(view):
            raise _invalid(
                f"{prefix}input byte size mismatch for input 'raw_input' for model '{signature.model}'. "
                f"Expected {expected}, got {len(view)}"
            )
    given = Given(spec.name, spec.datatype.name, batch + dims, data)
    return Decoded(given=[given], forms=Forms(default=True))


# -- requests: data in JSON


def _data(
    name: str, datatype_name: str, shape: list[int], data: Any, limit_bytes: int, arrays: dict[str, bytes] | None
) -> Array:
    """The elements as a flat array. Raises ServingError (3.4)."""
    datatype = DATATYPES.get(datatype_name)
    if datatype is None:
        raise _invalid(f"invalid datatype for input {name}")
    size = count(shape)
    if size > MAX_SIZE:
        raise _invalid(
            f"invalid shape for input '{name}': shape {show(shape)} causes total element count to exceed "
            f"maximum size of {MAX_SIZE}"
        )
    total = size * datatype.itemsize
    if total > MAX_SIZE:
        raise _invalid(
            f"byte size overflow for input '{name}': element count ({size}) * data type size ({datatype.itemsize}) "
            f"exceeds maximum allowed size ({MAX_SIZE})"
        )
    if total > limit_bytes:
        raise _too_large(
            f"JSON input '{name}' has a byte_size ({total} bytes) that exceeds the maximum allowed value of",
            limit_bytes,
        )
    nested = _typed(data, list, "data", "array")
    if not size:
        return np.empty(0, datatype.dtype)  # such data is not read at all
    if arrays and nested and type(nested[0]) is str and nested[0] in arrays:
        return _lifted(datatype, arrays.pop(nested[0]), size)
    if datatype is BYTES:
        return _strings(*_flat(nested, ""))
    flat, kinds = _flat(nested, "Unable to parse 'data': ")
    if len(flat) > size:
        raise _invalid("Unable to parse 'data': Shape does not match true shape of 'data' field")
    if len(flat) < size:
        raise _invalid("Failed to parse 'data' field: shape does not match true shape")
    return numbers(name, datatype, flat, kinds)


def _lifted(datatype: Datatype, text: bytes, size: int) -> Array:
    """What `numbers` makes of an array's text. Raises UnusualError unless it has `size` numbers within range."""
    if not (datatype.is_float or datatype.is_integer):
        raise UnusualError
    array = np.empty(size, datatype.dtype)
    at = 0
    for wide in json_numbers.read(text, "d" if datatype.is_float else "u" if datatype is UINT64 else "i"):
        end = at + len(wide)
        if end > size:
            raise UnusualError
        if datatype.is_float:
            array[at:end], over = _narrow(datatype, wide)
            if over >= 0:
                raise UnusualError
        else:
            if wide.min() < datatype.low or wide.max() > datatype.high:
                raise UnusualError
            array[at:end] = wide
        at = end
    if at < size:
        raise UnusualError
    return array


def numbers(name: str, datatype: Datatype, flat: list[Any], kinds: set[type]) -> Array:
    """JSON values as a flat array of any datatype but BYTES; `kinds` are their types. Raises ServingError(INVALID)."""
    if datatype is BOOL:
        if kinds != {bool}:
            raise _mistyped("data", "boolean")
        return np.array(flat, np.bool_)
    return (_integers if datatype.is_integer else _floats)(name, datatype, flat, kinds)


def _flat(nested: list[Any], prefix: str) -> tuple[list[Any], set[type]]:
    """The leaves of `nested`, whatever its nesting, and their types. One pass in C per level."""
    flat, kinds = nested, set(map(type, nested))
    for _ in range(json_text.MAX_DEPTH):
        if list not in kinds:
            return flat, kinds
        rows = flat if len(kinds) == 1 else [item if type(item) is list else [item] for item in flat]
        flat = list(chain.from_iterable(rows))
        kinds = set(map(type, flat))
    raise _invalid(prefix + json_text.TOO_DEEP)


def _strings(flat: list[Any], kinds: set[type]) -> Array:
    # Their number is not compared with the shape here: Triton reports it with the texts for string elements.
    if not kinds <= {str}:
        raise _invalid("Unable to parse JSON bytes array: attempt to access JSON non-string as string")
    return objects(list(map(str.encode, flat)), [len(flat)])


def _is_inexact(value: float) -> bool:
    """Whether a number written as a float, or made one by orjson because it is beyond 64 bits, is no integer for sure.

    The float nearest to the integer below INT64's lowest value is that lowest value, so it does not count.
    """
    return value != int(value) or value <= INT64_LOW


def _integers(name: str, datatype: Datatype, flat: list[Any], kinds: set[type]) -> Array:
    """Integers within the datatype's range; 3.0 counts as 3."""
    if kinds == {int}:
        try:
            wide = np.array(flat, np.int64)
            if datatype.low <= int(wide.min()) and int(wide.max()) <= datatype.high:
                return wide.astype(datatype.dtype, copy=False)
        except OverflowError:
            pass  # some are beyond int64; only UINT64 may hold them, as the slower way finds out
    if not kinds <= {int, float}:
        raise _mistyped("data", "unsigned-integer" if datatype.low == 0 else "signed-integer")
    for index, value in enumerate(flat):
        if not datatype.low <= value <= datatype.high or (type(value) is float and _is_inexact(value)):
            raise _invalid(
                f"Unable to parse 'data': element {index} of input '{name}' is {value}, but {datatype.name} expects "
                f"an integer from {datatype.low} to {datatype.high}"
            )
    return np.array(list(map(int, flat)), datatype.dtype)


def _floats(name: str, datatype: Datatype, flat: list[Any], kinds: set[type]) -> Array:
    """Numbers, rounded to nearest even; NaN and infinities also as strings."""
    if str in kinds:
        flat = [_WORDS.get(value, value) if type(value) is str else value for value in flat]
        kinds = set(map(type, flat))
    if not kinds <= {int, float}:
        raise _mistyped("data", "number", "double")
    wide = np.array(flat, np.float64)
    narrow, over = _narrow(datatype, wide)
    if over >= 0:
        raise _invalid(
            f"Unable to parse 'data': element {over} of input '{name}' is {flat[over]}, but {datatype.name} reaches "
            f"only to {_LARGEST[datatype.name]}"
        )
    return narrow


def _narrow(datatype: Datatype, wide: npt.NDArray[np.float64]) -> tuple[Array, int]:
    """Rounded to nearest even; and the index of the first finite element that is beyond the datatype, or -1."""
    if datatype.itemsize == 8:
        return wide, -1
    with np.errstate(over="ignore"):
        narrow = (_odd(wide) if datatype is BF16 else wide).astype(datatype.dtype)
    infinite = np.isinf(narrow)
    over = infinite & np.isfinite(wide) if infinite.any() else infinite
    return narrow, int(over.argmax()) if over.any() else -1


def _odd(wide: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """As FP32, inexact values with an odd last bit: rounding again, to BF16, then gives what rounding once would."""
    single = wide.astype(np.float32)
    inexact = np.isfinite(wide) & (single != wide)
    bits = single.view(np.uint32)
    bits[inexact & (np.abs(single) > np.abs(wide))] -= 1
    bits[inexact] |= 1
    return single


# -- answers: data in JSON

# By what str() makes of the float. A fragment goes into the JSON as it is.
_NON_FINITE: dict[NonFinite, dict[str, Any]] = {
    "string": {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"},
    "literal": {
        "nan": orjson.Fragment(b"NaN"),
        "inf": orjson.Fragment(b"Infinity"),
        "-inf": orjson.Fragment(b"-Infinity"),
    },
}
_LARGEST = {"FP16": 65504.0, "BF16": 3.3895313892515355e38, "FP32": 3.4028234663852886e38}
_WORDS = {word: float(word) for word in ("NaN", "Infinity", "-Infinity", "Inf", "-Inf")}


def to_json(tensor: Tensor, non_finite: NonFinite) -> Array | list[Any]:
    """The elements as a flat list, or as a flat array that orjson writes as one."""
    if tensor.datatype is BYTES:
        return _texts(tensor)
    flat = np.ascontiguousarray(tensor.array).reshape(-1)
    if not tensor.datatype.is_float:
        return flat
    wide = flat.astype(np.float64, copy=False)  # 0.1f is 0.10000000149011612, as in Triton's answers
    finite = np.isfinite(wide)
    if finite.all():
        return wide
    words = _NON_FINITE[non_finite]
    values: list[Any] = wide.tolist()
    for index in np.flatnonzero(~finite).tolist():
        values[index] = words[str(values[index])]
    return values


def _texts(tensor: Tensor) -> list[str]:
    elements: list[bytes] = tensor.array.reshape(-1).tolist()
    texts: list[str] = []
    try:
        texts.extend(map(bytes.decode, elements))
    except UnicodeDecodeError:
        raise _invalid(
            f"element {len(texts)} of output '{tensor.name}' is not UTF-8, so JSON cannot carry it. "
            f"Please use the binary data format for output '{tensor.name}'"
        ) from None
    return texts


# -- faults


def _invalid(message: str) -> ServingError:
    return ServingError(Kind.INVALID, message)


def _too_large(what: str, limit_bytes: int) -> ServingError:
    return ServingError(Kind.TOO_LARGE, f"{what} {limit_bytes} bytes. Use --http-max-input-size to increase the limit.")


def _mistyped(key: str, wanted: str, read_as: str = "", prefix: str = "") -> ServingError:
    prefix = prefix or f"Unable to parse '{key}'"
    return _invalid(f"{prefix}: attempt to access JSON non-{wanted} as {read_as or wanted}")


def _member(members: dict[str, Any], key: str, wanted: type, called: str) -> Any:
    """A member that must be there. Raises ServingError(INVALID) with the JSON reader's texts (section 5)."""
    if key not in members:
        raise _invalid(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'")
    return _typed(members[key], wanted, key, called)


def _typed(value: Any, wanted: type, key: str, called: str) -> Any:
    if type(value) is not wanted:
        raise _mistyped(key, called)
    return value


def _unsigned(value: Any, key: str, prefix: str = "") -> int:
    if type(value) is not int or value < 0:
        raise _mistyped(key, "unsigned-integer", prefix=prefix)
    return value
