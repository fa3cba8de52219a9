"""An answer as text for people, or in the protocol's JSON."""

from collections.abc import Collection, Iterator

import numpy as np

from penstock import oip_json
from penstock.messages import InferResponse
from penstock.tensor import BF16, BYTES, Array, Tensor, show

MOST_SHOWN = 200  # elements; of a larger tensor, only its corners
LINE_WIDTH = 118


def as_json(response: InferResponse) -> str:
    """One line. Raises ServingError(INVALID) for BYTES that are no UTF-8, which JSON cannot carry."""
    _, buffers = oip_json.encode(response, oip_json.Forms(), "string")
    return bytes(b"".join(buffers)).decode() + "\n"


def as_text(response: InferResponse, classified: Collection[str]) -> str:
    """Each output with its datatype, shape and values; those in `classified` as value, index and label."""
    lines: list[str] = []
    for tensor in response.outputs:
        lines.append(f"{tensor.name}  {tensor.datatype}  {show(tensor.array.shape)}")
        lines += _classes(tensor) if tensor.name in classified else _values(tensor)
    return "".join(f"{line}\n" for line in lines)


def _values(tensor: Tensor) -> Iterator[str]:
    array: Array = tensor.array
    if tensor.datatype is BYTES:
        texts = np.empty(array.shape, dtype=object)
        texts.reshape(-1)[:] = [item.decode(errors="backslashreplace") for item in array.reshape(-1).tolist()]
        array = texts
    elif tensor.datatype is BF16:
        array = array.astype(np.float32)
    text = np.array2string(array, threshold=MOST_SHOWN, max_line_width=LINE_WIDTH)
    return (f"  {line}" for line in text.splitlines())


def _classes(tensor: Tensor) -> Iterator[str]:
    """Lines of `value  index  label` from elements `value:index:label`; a blank line ends each row but the last."""
    array = tensor.array
    rows = array.reshape(-1, array.shape[-1]) if array.size else array.reshape(0, 1)
    for number, row in enumerate(rows.tolist()):
        if number:
            yield ""
        for element in row:
            value, index, *label = element.decode(errors="backslashreplace").split(":", 2)
            yield f"  {value:>14}  {index:>5}  {''.join(label)}".rstrip()
