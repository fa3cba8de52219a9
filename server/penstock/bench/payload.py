"""The one request that a load sends, made from the model's metadata, and its JSON form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from penstock.client.transport import Metadata, TensorInfo
from penstock.client.values import convert
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.tensor import BOOL, BYTES, Array, Datatype, Tensor, count, objects, show

SEED = 20  # the same data in every run, so that runs can be compared


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user says about the inputs. `data`, arrays by name, excludes the other two."""

    rows: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)  # whole shapes, by input
    data: Mapping[str, Array] | None = None


def request(model: str, version: str, metadata: Metadata, wanted: Wanted) -> InferRequest:
    """All outputs are asked for. Inputs that `wanted.data` leaves out are not sent; without it, all are generated.

    Raises ServingError(INVALID) naming the input that cannot be made.
    """
    for name in (*wanted.shapes, *(wanted.data or ())):
        if name not in metadata.inputs:
            known = ", ".join(metadata.inputs)
            raise ServingError(Kind.INVALID, f"model '{model}' has no input '{name}'; its inputs are: {known}")
    if wanted.data is not None:
        arrays = {name: convert(metadata.inputs[name], array, name) for name, array in wanted.data.items()}
    else:
        random = np.random.default_rng(SEED)
        arrays = {
            name: _generate(info.datatype, wanted.shapes.get(name) or _closed(info, wanted.rows), random)
            for name, info in metadata.inputs.items()
        }
    inputs = {name: Tensor(name, metadata.inputs[name].datatype, array) for name, array in arrays.items()}
    return InferRequest(model, version, "", inputs, {})


def read(file: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name. Raises ServingError(INVALID)."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ServingError(Kind.INVALID, f"cannot read arrays from '{file}': {error}") from error


def _closed(info: TensorInfo, rows: int) -> list[int]:
    """The shape in the metadata with its first dimension as `rows`, if that is open. No other may be."""
    shape = info.shape
    closed = [rows, *shape[1:]] if shape and shape[0] < 0 else list(shape)
    if any(dim < 0 for dim in closed):
        raise ServingError(
            Kind.INVALID,
            f"input '{info.name}' has the shape {show(shape)}: state one with --shape {info.name}:DIM,DIM,...",
        )
    if rows != 1 and closed[:1] != [rows]:
        raise ServingError(Kind.INVALID, f"input '{info.name}' has the shape {show(shape)}: no room for {rows} rows")
    return closed


def _generate(datatype: Datatype, shape: Sequence[int], random: np.random.Generator) -> Array:
    """Floats from 0 to 1, integers 0 or 1 (which also index something), BOOL either, BYTES the text 1."""
    if datatype is BYTES:
        return objects([b"1"] * count(shape), shape)
    if datatype is BOOL or datatype.is_integer:
        return random.integers(0, 2, shape).astype(datatype.dtype)
    return random.random(shape, np.float32).astype(datatype.dtype)


def json_body(request: InferRequest) -> bytes:
    """The request over HTTP without binary tensors. Raises ServingError(INVALID) for data that JSON cannot carry."""
    inputs: list[dict[str, Any]] = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype.name,
            "shape": tensor.array.shape,
            "data": _elements(tensor),
        }
        for tensor in request.inputs.values()
    ]
    return orjson.dumps({"inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def _elements(tensor: Tensor) -> list[str] | Array:
    flat = np.ascontiguousarray(tensor.array).reshape(-1)
    if tensor.datatype is BYTES:
        try:
            return [element.decode() for element in flat]
        except UnicodeDecodeError as error:
            raise ServingError(Kind.INVALID, f"input '{tensor.name}' holds BYTES that are no UTF-8: {error}") from error
    if not tensor.datatype.is_float:
        return flat
    numbers = flat if tensor.datatype.itemsize > 2 else flat.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ServingError(Kind.INVALID, f"input '{tensor.name}' holds NaN or infinities, which are no JSON numbers")
    return numbers
