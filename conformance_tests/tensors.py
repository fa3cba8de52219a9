"""Tensors as bytes, as JSON and as typed lists, written from the protocol's tables and from no server's code."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of the protocol. BYTES is an array of objects, each of them bytes."""

    name: str
    dtype: np.dtype[Any]
    typed: str = ""  # the list of InferTensorContents that carries it; "" for none


DATATYPES = {
    datatype.name: datatype
    for datatype in (
        Datatype("BOOL", np.dtype("?"), "bool_contents"),
        Datatype("UINT8", np.dtype("u1"), "uint_contents"),
        Datatype("UINT16", np.dtype("<u2"), "uint_contents"),
        Datatype("UINT32", np.dtype("<u4"), "uint_contents"),
        Datatype("UINT64", np.dtype("<u8"), "uint64_contents"),
        Datatype("INT8", np.dtype("i1"), "int_contents"),
        Datatype("INT16", np.dtype("<i2"), "int_contents"),
        Datatype("INT32", np.dtype("<i4"), "int_contents"),
        Datatype("INT64", np.dtype("<i8"), "int64_contents"),
        Datatype("FP16", np.dtype("<f2")),
        Datatype("BF16", np.dtype(ml_dtypes.bfloat16)),
        Datatype("FP32", np.dtype("<f4"), "fp32_contents"),
        Datatype("FP64", np.dtype("<f8"), "fp64_contents"),
        Datatype("BYTES", np.dtype("O"), "bytes_contents"),
    )
}


def texts(elements: Iterable[bytes | str], shape: Sequence[int] = (-1,)) -> Array:
    """A BYTES array."""
    encoded = [element.encode() if isinstance(element, str) else element for element in elements]
    flat = np.empty(len(encoded), object)
    flat[:] = encoded
    return flat.reshape(shape)


def pack(datatype: str, array: Array) -> bytes:
    """Little-endian, row-major; each element of BYTES behind its length in 4 bytes."""
    if datatype == "BYTES":
        return b"".join(len(element).to_bytes(4, "little") + element for element in array.ravel())
    return np.ascontiguousarray(array, DATATYPES[datatype].dtype).tobytes()


def unpack(datatype: str, data: bytes, shape: Sequence[int]) -> Array:
    """The inverse of `pack`. Raises ValueError if the bytes are not exactly those of the shape."""
    if datatype != "BYTES":
        return np.frombuffer(data, DATATYPES[datatype].dtype).reshape(shape)
    elements, at = [], 0
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            raise ValueError(f"an element runs to byte {at} of {len(data)}")
        elements.append(data[start:at])
    return texts(elements, shape)


def to_json(datatype: str, array: Array) -> list[object]:
    """A flat list; floats that JSON has no number for become the strings NaN, Infinity and -Infinity."""
    flat = array.ravel()
    if datatype == "BYTES":
        return [element.decode() for element in flat]
    if DATATYPES[datatype].dtype.kind in "biu":
        return list(flat.tolist())
    return [_json_float(float(value)) for value in flat]


def _json_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_json(datatype: str, data: Sequence[Any], shape: Sequence[int]) -> Array:
    """The inverse of `to_json`, of a list that is flat or nested like the shape."""
    if any(isinstance(element, list) for element in data):
        assert _nesting(data) == [*shape], f"data is nested like {_nesting(data)}, and its shape is {shape}"
        for _ in shape[1:]:
            data = [element for row in data for element in row]
    if datatype == "BYTES":
        return texts(data, shape)
    dtype = DATATYPES[datatype].dtype
    if dtype.kind == "b":
        assert all(isinstance(element, bool) for element in data), data
    elif dtype.kind in "iu":
        assert all(type(element) is int for element in data), data
    else:
        data = [float(element) for element in data]
    return np.array(data, dtype).reshape(shape)


def _nesting(data: Any) -> list[int]:
    """The shape that lists within lists have along their first elements."""
    return [len(data), *(_nesting(data[0]) if data else [])] if isinstance(data, list) else []


def same(datatype: str, got: Array, want: Array) -> bool:
    """Bit for bit, so that -0.0 is not 0.0 and a NaN is itself."""
    return got.shape == want.shape and pack(datatype, got) == pack(datatype, want)
