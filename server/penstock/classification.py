"""Top-k of an output as `value:index:label` strings (classification extension)."""

import numpy as np

from penstock.errors import Kind, ServingError
from penstock.tensor import BYTES, FP32, FP64, Tensor, objects

MAX_CLASSES = 1_000_000


def top(tensor: Tensor, k: int, labels: tuple[str, ...], batched: bool) -> Tensor:
    """The `k` largest elements of each batch row (of the whole tensor where there is no batch axis), largest first.

    Gives BYTES of shape [rows, min(k, classes)] or [min(k, classes)]; each element is `value:index`, or
    `value:index:label` where `labels` has a non-empty line for the index. Equal values: the lower index first.
    Raises ServingError(INVALID) for datatypes that have no order, and for too many classes.
    """
    datatype = tensor.datatype
    if not datatype.is_integer and datatype not in (FP32, FP64):
        raise ServingError(
            Kind.INVALID, f"class result not available for output due to unsupported type '{datatype.name}'"
        )
    rows = tensor.array.shape[0] if batched and tensor.array.ndim else 1
    values = tensor.array.reshape(rows, -1) if tensor.array.size else np.empty((rows, 0), datatype.dtype)
    if values.shape[1] > MAX_CLASSES:
        raise ServingError(Kind.INVALID, "classification output tensor too large")
    k = min(k, values.shape[1])
    # A stable sort of the reversed row, read backwards, keeps lower indices first among equals.
    order = values.shape[1] - 1 - np.argsort(values[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :k]
    show = "{:.6f}".format if datatype in (FP32, FP64) else "{}".format
    elements = []
    for row, indices in zip(values, order, strict=True):
        for index in indices.tolist():
            label = labels[index] if index < len(labels) else ""
            text = f"{show(row[index].item())}:{index}"
            elements.append((f"{text}:{label}" if label else text).encode())
    return Tensor(tensor.name, BYTES, objects(elements, [rows, k] if batched else [k]))
