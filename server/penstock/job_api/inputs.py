"""A job's JSON input ↔ the tensors of its model. Protocol page jobs, section 6."""

import base64
import binascii
import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import orjson
from msgspec import Struct

from penstock import oip_json
from penstock.admission import Given, fits
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, JobContext
from penstock.model import Model
from penstock.model_config import Signature, TensorSpec
from penstock.tensor import BOOL, BYTES, Array, Tensor, count, objects, show, unpack_bytes

HANDLER = "handler"  # the backend whose models take a job's JSON as it is, and answer with JSON
INVALID_INPUT = "INVALID_INPUT"  # what is wrong is the model's input
VALIDATION_ERROR = "VALIDATION_ERROR"  # what is wrong is another field of the job request
INPUT, OUTPUT = "input", "output"  # the names of such a model's tensors

Write: TypeAlias = Callable[[InferResponse], bytes]  # one answer as the JSON of a job's output


class FieldError(ServingError):
    """A job request that is wrong, and where: INVALID. `field` is a dotted path such as `input.INPUT0`."""

    def __init__(self, field: str, reason: str, code: str = INVALID_INPUT) -> None:
        super().__init__(Kind.INVALID, f"{code}: {field}: {reason}" if code == INVALID_INPUT else f"{field}: {reason}")
        self.field = field
        self.reason = reason
        self.code = code

    def __reduce__(self) -> tuple[type["FieldError"], tuple[str, str, str]]:  # type: ignore[override]
        return FieldError, (self.field, self.reason, self.code)


class Prepared(Struct, frozen=True):
    """A job that is ready to run on one version of its model."""

    model: Model
    request: InferRequest
    write: Write


def prepare(model: Model, value: Any, text: bytes, context: JobContext, limits: oip_json.Limits) -> Prepared:
    """A request out of a job's input: `value` as it was parsed, `text` as it is stored. Raises FieldError."""
    signature = model.signature
    if is_handler(model):
        given = Tensor(INPUT, BYTES, objects([text], [1]))
        request = InferRequest(model.name, model.version, context.id, {INPUT: given}, {})
        write: Write = _untouched
    else:
        if type(value) is dict and len(value) == 1 and type(value.get(INPUT)) is dict and INPUT not in signature.inputs:
            value = value[INPUT]
        request, write = (_from_oip if is_oip(value) else _from_values)(model, value, context.id, limits)
    request.job = context
    return Prepared(model, request, write)


def is_handler(model: Model) -> bool:
    """Whether the model takes a job's JSON untouched."""
    return model.config.backend == HANDLER


def is_oip(value: Any) -> bool:
    """Whether an input is a whole OIP request (6.1, form 1)."""
    inputs = value.get("inputs") if type(value) is dict else None
    return type(inputs) is list and bool(inputs) and all(map(_is_oip_tensor, inputs))


def _is_oip_tensor(entry: Any) -> bool:
    if type(entry) is not dict or "name" not in entry:
        return False
    parameters = entry.get("parameters")
    return "datatype" in entry or (type(parameters) is dict and "shared_memory_region" in parameters)


def _untouched(response: InferResponse) -> bytes:
    text: bytes = response.outputs[0].array.reshape(-1)[0]
    return text


# -- form 1: an OIP request


def _from_oip(model: Model, document: Any, id: str, limits: oip_json.Limits) -> tuple[InferRequest, Write]:
    document, binary = _without_binary_outputs(document)
    try:
        decoded = oip_json.read(model.name, document, limits)
        request = decoded.admitted(model.signature, model.version)
    except ServingError as error:
        raise FieldError(INPUT, error.message) if error.kind is Kind.INVALID else error from error
    for name in binary:
        if name not in model.signature.outputs:
            raise FieldError("input.parameters.binary_outputs", f"unexpected output '{name}' for model '{model.name}'")
        decoded.forms.named[name] = True
    request.id = decoded.id or id
    return request, functools.partial(_to_oip, decoded.id, decoded.forms)


def _without_binary_outputs(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    parameters = document.get("parameters")
    if type(parameters) is not dict or "binary_outputs" not in parameters:
        return document, []
    names = parameters["binary_outputs"]
    if type(names) is not list or not all(type(name) is str for name in names):
        raise FieldError("input.parameters.binary_outputs", "expected a list of output names")
    others = {key: value for key, value in parameters.items() if key != "binary_outputs"}
    return {**document, "parameters": others}, names


def _to_oip(id: str, forms: oip_json.Forms, response: InferResponse) -> bytes:
    """The OIP response object. Outputs that were asked for in binary have `b64` in place of `data`."""
    response.id = id  # as it was sent, not the job's
    _, buffers = oip_json.encode(response, forms, "string")
    if not forms.default and not any(forms.named.values()):
        return bytes(buffers[0])
    head = orjson.loads(buffers[0])
    parts = iter(buffers[1:])
    for entry in head["outputs"]:
        size = entry.pop("parameters", {}).get("binary_data_size")
        if size is not None:
            entry["b64"] = base64.b64encode(next(parts) if size else b"").decode()
    return orjson.dumps(head)


# -- forms 2 and 3: values by name, or the only one


def _from_values(model: Model, value: Any, id: str, limits: oip_json.Limits) -> tuple[InferRequest, Write]:
    signature = model.signature
    given = [_given(signature, name, item, limits) for name, item in _named(signature, value).items()]
    lifted = _lifted(signature, given)
    for tensor in given:
        spec = signature.inputs[tensor.name]
        if lifted:
            tensor.shape = [1, *tensor.shape]
        if not fits(tensor.shape, spec.shape):
            shape = tensor.shape[1:] if lifted else tensor.shape
            raise FieldError(f"input.{spec.name}", f"expected {_declared(spec)}, got {show(shape)}")
    try:
        decoded = oip_json.Decoded(id=id, given=given)
        request = decoded.admitted(signature, model.version)
    except ServingError as error:
        raise FieldError(INPUT, error.message) from error
    return request, functools.partial(_to_values, lifted)


def _named(signature: Signature, value: Any) -> dict[str, Any]:
    names = signature.inputs
    if type(value) is not dict:
        if len(names) != 1:
            raise FieldError(INPUT, f"expected an object with the inputs {', '.join(names)}, got {_called(value)}")
        return {next(iter(names)): value}
    for name in value:
        if name not in names:
            raise FieldError(f"input.{name}", f"unknown input; model '{signature.model}' has {', '.join(names)}")
    if missing := [name for name in names if name in signature.required and name not in value]:
        raise FieldError(INPUT, f"missing required input {', '.join(missing)}")
    return value


def _lifted(signature: Signature, given: Sequence[Given]) -> bool:
    """Whether every value is one row of a model that takes any number: each lacks just the open batch dimension."""
    return (
        bool(given)
        and all(spec.shape[:1] == (-1,) for spec in signature.inputs.values())
        and all(len(tensor.shape) == len(signature.inputs[tensor.name].shape) - 1 for tensor in given)
    )


def _given(signature: Signature, name: str, value: Any, limits: oip_json.Limits) -> Given:
    """One named value as a tensor whose shape has not been compared yet (6.2). Raises FieldError naming the input."""
    spec = signature.inputs[name]
    try:
        if type(value) is dict:
            return _from_object(spec, value, limits)
        shape, flat = _flattened(value, limits.rank)
        return Given(name, spec.datatype.name, shape, _elements(spec, flat))
    except ServingError as error:
        reason = error.message.removeprefix("Unable to parse 'data': ")
        raise FieldError(f"input.{name}", f"expected {_declared(spec)}, {reason}") from error


def _from_object(spec: TensorSpec, value: dict[str, Any], limits: oip_json.Limits) -> Given:
    """`{"b64", "shape"}`: the tensor's bytes; `{"data", "shape", "datatype"}`: its values, flat or nested."""
    kind = "b64" if "b64" in value else "data"
    allowed = {"b64", "shape"} if kind == "b64" else {"data", "shape", "datatype"}
    if kind not in value or not value.keys() <= allowed:
        raise _fault(f"got an object with the members {', '.join(value) or 'none'}")
    shape = value.get("shape")
    if shape is not None and (type(shape) is not list or not all(type(dim) is int and dim >= 0 for dim in shape)):
        raise _fault("got a 'shape' that is no list of sizes")
    if shape is not None and len(shape) > limits.rank:
        raise _fault(f"got a 'shape' of {len(shape)} dimensions, the limit is {limits.rank}")
    if kind == "b64":
        return Given(spec.name, spec.datatype.name, *_from_base64(spec, value["b64"], shape))
    if value.get("datatype", spec.datatype.name) != spec.datatype.name:
        raise _fault(f"got datatype {value['datatype']}")
    found, flat = _flattened(value["data"], limits.rank)
    if shape is not None and found != shape and not (len(found) == 1 and found[0] == count(shape)):
        raise _fault(f"got data of shape {show(found)} for shape {show(shape)}")
    return Given(spec.name, spec.datatype.name, found if shape is None else shape, _elements(spec, flat))


def _from_base64(spec: TensorSpec, text: Any, shape: list[int] | None) -> tuple[list[int], bytes | Array]:
    data = _decoded(text)
    if shape is None:
        if spec.datatype is not BYTES:
            raise _fault("got 'b64' without 'shape'")
        return [], objects([data], [1])
    if spec.datatype is BYTES:
        elements, end = unpack_bytes(data, count(shape))
        if len(elements) != count(shape) or end != len(data):
            raise _fault(f"got bytes that are not the {count(shape)} length-prefixed elements of shape {show(shape)}")
        return shape, objects(elements, [len(elements)])
    expected = count(shape) * spec.datatype.itemsize
    if len(data) != expected:
        raise _fault(f"got {len(data)} bytes for shape {show(shape)}, which takes {expected}")
    return shape, data


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise _fault("got 'b64' that is no base64 text") from None


def _flattened(value: Any, most: int) -> tuple[list[int], list[Any]]:
    """The shape of nested lists, and their leaves. One pass in C per level; only ragged ones are walked through."""
    shape: list[int] = []
    flat = [value]
    kinds = {type(value)}
    while list in kinds:
        size = len(flat[0]) if type(flat[0]) is list else -1
        if len(kinds) > 1 or set(map(len, flat)) != {size}:
            odd = next(index for index, item in enumerate(flat) if type(item) is not list or len(item) != size)
            odd = odd or next(index for index, item in enumerate(flat) if type(item) is list)
            raise _fault(f"got ragged list at {_place(odd, shape)}")
        shape.append(size)
        if len(shape) > most:
            raise _fault(f"got more than {most} dimensions. Use --max-rank to increase the limit.")
        flat = list(chain.from_iterable(flat))
        kinds = set(map(type, flat))
    return shape, flat


def _place(index: int, shape: Sequence[int]) -> str:
    """`[2][0]`: where the element of this flat index lies in lists of this shape."""
    places: list[str] = []
    for size in reversed(shape):
        index, position = divmod(index, size)
        places.append(f"[{position}]")
    return "".join(reversed(places))


def _elements(spec: TensorSpec, flat: list[Any]) -> Array:
    """Leaves as a flat array of the declared datatype."""
    if not flat:
        return np.empty(0, spec.datatype.dtype)
    kinds = set(map(type, flat))
    if spec.datatype is BYTES:
        if kinds == {str}:
            return objects(list(map(str.encode, flat)), [len(flat)])
        return objects([_text(item, index) for index, item in enumerate(flat)], [len(flat)])
    fitting = {bool} if spec.datatype is BOOL else {int, float} if spec.datatype.is_integer else {int, float, str}
    if not kinds <= fitting:
        index, item = next((index, item) for index, item in enumerate(flat) if type(item) not in fitting)
        raise _fault(f"got {_called(item)} as element {index}")
    return oip_json.numbers(spec.name, spec.datatype, flat, kinds)


def _text(item: Any, index: int) -> bytes:
    if type(item) is str:
        return item.encode()
    if type(item) is dict and item.keys() == {"b64"}:
        return _decoded(item["b64"])
    raise _fault(f"got {_called(item)} as element {index}")


def _to_values(lifted: bool, response: InferResponse) -> bytes:
    """`{name: value}`; without the first dimension where one was added to the inputs and it is 1 (6.3)."""
    return orjson.dumps(
        {tensor.name: _value(tensor, lifted) for tensor in response.outputs}, option=orjson.OPT_SERIALIZE_NUMPY
    )


def _value(tensor: Tensor, lifted: bool) -> Any:
    shape = tensor.array.shape
    if lifted and shape[:1] == (1,):
        shape = shape[1:]
    if tensor.datatype is BYTES:
        return _nested([_shown(element) for element in tensor.array.reshape(-1)], shape)
    flat = oip_json.to_json(tensor, "string")
    if isinstance(flat, list):
        return _nested(flat, shape)
    nested = flat.reshape(shape)
    return nested if shape and flat.size else nested.tolist()  # orjson writes no arrays of rank 0


def _nested(flat: list[Any], shape: Sequence[int]) -> Any:
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape).tolist()


def _shown(element: bytes) -> Any:
    try:
        return element.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(element).decode()}


# -- faults


def _declared(spec: TensorSpec) -> str:
    return f"{spec.datatype.name} {show(spec.shape)}"


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _fault(reason: str) -> ServingError:
    return ServingError(Kind.INVALID, reason)
