"""Tensors as views: the table of datatypes, the packing of BYTES, and the batch axis."""

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from penstock.errors import Kind, ServingError

Array: TypeAlias = npt.NDArray[Any]


class Datatype(Struct, frozen=True, eq=False):
    """One row of the protocol's type table. Rows are compared by identity, which pickling keeps."""

    name: str  # on the wire, such as "FP32"
    config_name: str  # in a model configuration, such as "TYPE_FP32"
    dtype: np.dtype[Any]
    itemsize: int  # bytes per element on the wire; 0 for BYTES, whose elements carry their length
    contents: str | None  # the typed list of gRPC that carries it; None: raw contents only
    onnx: str  # ONNX Runtime's name for a tensor of it
    low: int = 0  # smallest and largest value of an integer type
    high: int = -1

    @property
    def is_integer(self) -> bool:
        return self.high >= self.low

    @property
    def is_float(self) -> bool:
        return self.name in ("FP16", "BF16", "FP32", "FP64")

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Callable[[str], "Datatype"], tuple[str]]:
        return _row, (self.name,)


def _row(name: str) -> Datatype:
    return DATATYPES[name]


def _integer(name: str, bits: int, signed: bool, contents: str) -> Datatype:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    dtype = np.dtype(f"<{'i' if signed else 'u'}{bits // 8}")
    return Datatype(name, f"TYPE_{name}", dtype, bits // 8, contents, f"tensor({name.lower()})", low, high)


BYTES = Datatype("BYTES", "TYPE_STRING", np.dtype("O"), 0, "bytes_contents", "tensor(string)")
BOOL = Datatype("BOOL", "TYPE_BOOL", np.dtype("?"), 1, "bool_contents", "tensor(bool)")
FP16 = Datatype("FP16", "TYPE_FP16", np.dtype("<f2"), 2, None, "tensor(float16)")
BF16 = Datatype("BF16", "TYPE_BF16", np.dtype(ml_dtypes.bfloat16), 2, None, "tensor(bfloat16)")
FP32 = Datatype("FP32", "TYPE_FP32", np.dtype("<f4"), 4, "fp32_contents", "tensor(float)")
FP64 = Datatype("FP64", "TYPE_FP64", np.dtype("<f8"), 8, "fp64_contents", "tensor(double)")

DATATYPES: dict[str, Datatype] = {
    row.name: row
    for row in (
        BOOL,
        _integer("UINT8", 8, False, "uint_contents"),
        _integer("UINT16", 16, False, "uint_contents"),
        _integer("UINT32", 32, False, "uint_contents"),
        _integer("UINT64", 64, False, "uint64_contents"),
        _integer("INT8", 8, True, "int_contents"),
        _integer("INT16", 16, True, "int_contents"),
        _integer("INT32", 32, True, "int_contents"),
        _integer("INT64", 64, True, "int64_contents"),
        FP16,
        FP32,
        FP64,
        BYTES,
        BF16,
    )
}
BY_CONFIG_NAME = {row.config_name: row for row in DATATYPES.values()}
BY_ONNX_NAME = {row.onnx: row for row in DATATYPES.values()}
BY_DTYPE = {row.dtype: row for row in DATATYPES.values()}


class Tensor(Struct):
    """A named array. BYTES has dtype object and holds `bytes`; BF16 is `ml_dtypes.bfloat16`."""

    name: str
    datatype: Datatype
    array: Array  # its shape is the tensor's shape


def pack(array: Array, datatype: Datatype) -> memoryview | bytes:
    """The tensor's bytes as the wire has them: little-endian, row-major, BYTES with 4-byte lengths.

    Gives a view where the array is contiguous already, a copy otherwise.
    """
    if datatype is BYTES:
        return pack_bytes(array.reshape(-1).tolist())
    contiguous = np.ascontiguousarray(array, dtype=datatype.dtype)
    # Buffers of extension types such as bfloat16 cannot be exported; their bytes can.
    return contiguous.reshape(-1).view(np.uint8).data


def pack_bytes(elements: Iterable[bytes]) -> bytes:
    """Each element as a 4-byte little-endian length followed by its bytes; linear in the total size."""
    length = struct.Struct("<I").pack
    parts: list[bytes] = []
    for element in elements:
        parts.append(length(len(element)))
        parts.append(element)
    return b"".join(parts)


def unpack_bytes(data: memoryview | bytes, most: int) -> tuple[list[bytes], int]:
    """Read length-prefixed elements until the data ends or `most` are read: (elements, offset reached).

    Stops without an error before an element that is cut short: the caller knows how many it wanted
    and what to say. The offset is then that of the element's length prefix.
    """
    data = bytes(data)  # slices of bytes are one allocation each; of a memoryview, two
    read = struct.Struct("<I").unpack_from
    elements: list[bytes] = []
    offset, end = 0, len(data)
    while len(elements) < most and offset + 4 <= end:
        stop = offset + 4 + read(data, offset)[0]
        if stop > end:
            break
        elements.append(data[offset + 4 : stop])
        offset = stop
    return elements, offset


def count_bytes(data: memoryview | bytes, most: int) -> tuple[int, int]:
    """As `unpack_bytes`, without the elements: how many there are, `most` at the most, and the offset reached."""
    read = struct.Struct("<I").unpack_from
    number, offset, end = 0, 0, len(data)
    while number < most and offset + 4 <= end:
        stop = offset + 4 + read(data, offset)[0]
        if stop > end:
            break
        number, offset = number + 1, stop
    return number, offset


def objects(elements: Sequence[bytes], shape: Sequence[int]) -> Array:
    """An array of dtype object with `shape`, which must multiply to len(elements)."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def count(shape: Sequence[int]) -> int:
    """How many elements a shape has; 1 for a scalar."""
    return math.prod(shape)


def join(tensors: Sequence[Array], out: Array | None = None) -> Array:
    """Lay arrays end to end along the batch axis: k arrays [b_i, ...] become one [sum(b_i), ...].

    Writes into `out` when given; otherwise allocates. A single array is returned as the view it is.
    Raises ServingError(INVALID) if the trailing dimensions differ.
    """
    if len(tensors) == 1 and out is None:
        return tensors[0]
    tail = tensors[0].shape[1:]
    for array in tensors:
        if array.shape[1:] != tail:
            raise ServingError(
                Kind.INVALID,
                f"tensors of shapes {show(tensors[0].shape)} and {show(array.shape)} cannot share a batch: "
                "all dimensions but the first must be equal",
            )
    return np.concatenate(tensors, axis=0, out=out)


def split(array: Array, rows: Sequence[int]) -> list[Array]:
    """The inverse of `join`: views of `rows[i]` rows each. Raises ServingError(INTERNAL) if they do not add up."""
    if array.ndim == 0 or array.shape[0] != sum(rows):
        raise ServingError(
            Kind.INTERNAL, f"an output of shape {show(array.shape)} cannot be split into batches of {list(rows)} rows"
        )
    views, start = [], 0
    for number in rows:
        views.append(array[start : start + number])
        start += number
    return views


def show(shape: Iterable[int]) -> str:
    """A shape as messages print it: `[1,16]`."""
    return f"[{','.join(map(str, shape))}]"
