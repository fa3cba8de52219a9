"""What the client needs of a way to reach a model, and what the ways have in common."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.tensor import BYTES, DATATYPES, Array, Datatype, count, objects, show, unpack_bytes


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output as a model's metadata states it; -1 in `shape` is any."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a model takes and gives, by name."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]


class Transport(Protocol):
    """A way to reach a model. Every call may raise ServingError: a refusal names its status in that protocol."""

    def metadata(self, model: str, version: str) -> Metadata: ...

    def infer(self, request: InferRequest) -> InferResponse: ...

    def close(self) -> None: ...


def tensors(entries: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, TensorInfo]:
    """Rows of (name, datatype, shape) from a model's metadata, by name."""
    return {name: TensorInfo(name, datatype(given), tuple(map(int, shape))) for name, given, shape in entries}


def datatype(name: str) -> Datatype:
    """A row of the table. Raises ServingError(INTERNAL): servers send only such."""
    try:
        return DATATYPES[name]
    except KeyError:
        raise ServingError(Kind.INTERNAL, f"the server uses datatype '{name}', which the protocol lacks") from None


def unpack(name: str, of: Datatype, shape: Sequence[int], raw: bytes | memoryview) -> Array:
    """A tensor's bytes as an array over them. Raises ServingError(INTERNAL) where their number and `shape` disagree."""
    size = count(shape)
    if of is BYTES:
        elements, end = unpack_bytes(raw, size)
        if len(elements) == size and end == len(raw):
            return objects(elements, shape)
    elif len(raw) == size * of.itemsize:
        return np.frombuffer(raw, of.dtype).reshape(shape)
    raise ServingError(
        Kind.INTERNAL, f"the server sent {len(raw)} bytes for output '{name}' of type {of} and shape {show(shape)}"
    )


def from_elements(name: str, of: Datatype, shape: Sequence[int], elements: Sequence[Any]) -> Array:
    """A flat list of values as an array. Raises ServingError(INTERNAL) where it is none of `of` and `shape`."""
    try:
        if of is BYTES:
            return objects([item.encode() if isinstance(item, str) else bytes(item) for item in elements], shape)
        return np.array(elements, np.float64 if of.is_float else of.dtype).astype(of.dtype).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ServingError(
            Kind.INTERNAL, f"the server sent output '{name}', which is no {of} of shape {show(shape)}: {error}"
        ) from error


def refusal(status: str, code: int, message: str) -> ServingError:
    """What a server answered instead of a result; `code` is the status by its HTTP number."""
    kind = Kind.UNAVAILABLE if code == 503 else Kind.INVALID if code < 500 else Kind.INTERNAL
    return ServingError(kind, f"{status}: {message}")


def member(document: Mapping[str, Any], key: str, wanted: type) -> Any:
    """A member of the server's JSON. Raises ServingError(INTERNAL) where it lacks it."""
    value = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(value, wanted):
        raise ServingError(Kind.INTERNAL, f"the server's answer has no {wanted.__name__} '{key}'")
    return value
