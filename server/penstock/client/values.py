"""A value as it stands on the command line → the tensor that a model takes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from penstock.client import images
from penstock.client.transport import TensorInfo
from penstock.errors import Kind, ServingError
from penstock.tensor import BOOL, BYTES, Array, Tensor, objects, show

Mask: TypeAlias = npt.NDArray[np.bool_]

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # in JSON that has no literals for them


def read(info: TensorInfo, text: str, read_input: Callable[[], str]) -> Tensor:
    """The tensor that `text` stands for: JSON, or a file after `@`; `@-` is JSON from `read_input`, standard input.

    For BYTES, text that is no JSON string and no JSON list is one element as it stands, and a file that is not .npy
    or .json is one element too. A batch axis that the value lacks is added. Raises ServingError(INVALID) naming the
    input, what it expects and what came.
    """
    if not text.startswith("@"):
        array = _from_json(info, _literal(info, text))
    elif text == "@-":
        array = _from_json(info, _parse(info, "standard input", read_input()))
    else:
        array = _from_file(info, Path(text[1:]))
    return Tensor(info.name, info.datatype, _fit(info, array))


def _from_file(info: TensorInfo, path: Path) -> Array:
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return convert(info, _load(path), str(path))
        if suffix == ".json":
            return _from_json(info, _parse(info, str(path), path.read_text(encoding="utf-8")))
        if info.datatype is BYTES:
            return objects([path.read_bytes()], ())
        if suffix in images.SUFFIXES:
            return convert(info, images.read(info, path), str(path))
    except (OSError, ValueError, EOFError) as error:
        raise _invalid(info, f"cannot read '{path}': {error}") from error
    raise _invalid(info, f"'{path}' is none of .npy, .json, {', '.join(images.SUFFIXES)}")


def _load(path: Path) -> Array:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of several arrays")
    return array


# -- JSON


def _literal(info: TensorInfo, text: str) -> Any:
    """The JSON value of an argument; for BYTES also plain text."""
    if info.datatype is BYTES and not text.lstrip().startswith(("[", '"')):
        return text
    return _parse(info, f"'{_short(text)}'", text)


def _parse(info: TensorInfo, source: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = '; plain text must not begin with [ or ": write it as a JSON string' if info.datatype is BYTES else ""
        raise _invalid(info, f"{source} is no JSON: {error}{hint}") from None


def _from_json(info: TensorInfo, value: Any) -> Array:
    shape, flat = _flatten(info, value)
    datatype = info.datatype
    if not flat:
        return np.empty(shape, datatype.dtype)
    wanted, called = _LEAVES.get(datatype, ((int, float), "numbers"))
    if datatype.is_float:
        flat = [NON_FINITE.get(item, item) if isinstance(item, str) else item for item in flat]
    for index, item in enumerate(flat):
        if type(item) not in wanted:
            raise _invalid(info, f"expects {called}, got {json.dumps(item)} {_at(shape, index)}")
    if datatype is BYTES:
        return objects([_encode(info, item) for item in flat], shape)
    if datatype.is_float:
        return _floats(info, flat, shape)
    if datatype.is_integer:
        for index, item in enumerate(flat):
            if not datatype.low <= item <= datatype.high or item != int(item):
                raise _out_of_range(info, item, _at(shape, index))
    return np.array(flat, datatype.dtype).reshape(shape)


_LEAVES: dict[Any, tuple[tuple[type, ...], str]] = {BYTES: ((str,), "strings"), BOOL: ((bool,), "true or false")}


def _flatten(info: TensorInfo, value: Any) -> tuple[list[int], list[Any]]:
    """Shape and elements of nested lists. Raises ServingError(INVALID) where lists on one level differ in length."""
    shape: list[int] = []
    flat = [value]
    while any(isinstance(item, list) for item in flat):
        lengths = {len(item) if isinstance(item, list) else None for item in flat}
        if len(lengths) > 1:
            raise _invalid(info, f"its lists have different lengths on level {len(shape) + 1}")
        shape.append(len(flat[0]))
        flat = [element for item in flat for element in item]
    return shape, flat


def _encode(info: TensorInfo, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(info, f"a string is not Unicode text: {error}") from None


def _floats(info: TensorInfo, flat: list[int | float], shape: list[int]) -> Array:
    """Decimals are rounded to the nearest value that the datatype has, but nothing finite becomes infinite."""
    try:
        wide = np.array(flat, np.float64)
    except OverflowError:
        wide = np.array([math.inf if abs(item) > 1e308 else item for item in flat])
    with np.errstate(over="ignore"):
        narrow = wide.astype(info.datatype.dtype)
    for index in np.flatnonzero(np.isinf(narrow)).tolist():
        if not (isinstance(flat[index], float) and math.isinf(flat[index])):
            raise _out_of_range(info, flat[index], _at(shape, index))
    return narrow.reshape(shape)


# -- arrays


def convert(info: TensorInfo, array: Array, source: str) -> Array:
    """An array of any NumPy type as one of the input's, every value unchanged.

    Raises ServingError(INVALID) for a type that is of another kind, and for a value that would change.
    """
    datatype = info.datatype
    if array.dtype == datatype.dtype and datatype is not BYTES:
        return array
    kind = array.dtype.kind
    if datatype is BYTES and kind in "SU":
        flat = array.reshape(-1).tolist()
        return objects([item if isinstance(item, bytes) else _encode(info, item) for item in flat], array.shape)
    if kind not in "iuf" or datatype in (BYTES, BOOL):
        raise _invalid(info, f"'{source}' holds {array.dtype}, which is no {datatype}")
    if not array.size:
        return array.astype(datatype.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(datatype.dtype)
        same = _same(array, converted, datatype.low, datatype.high, datatype.is_integer)
    if not same.all():
        index = int(np.argmin(same.reshape(-1)))
        value = array.reshape(-1)[index].item()
        raise _invalid(
            info,
            f"'{source}' holds {array.dtype}, and not every value of it is a {datatype}: {value} "
            f"{_at(array.shape, index)}; convert it before saving it, where a loss is meant",
        )
    return converted


def _same(array: Array, converted: Array, low: int, high: int, to_integer: bool) -> Mask:
    """Where a conversion from numbers to numbers has kept the value."""
    from_integer = array.dtype.kind in "iu"
    if to_integer and from_integer:
        return _within(array, low, high)
    if to_integer:
        wide: npt.NDArray[np.float64] = array.astype(np.float64)
        # 2**63 and 2**64 are floats, the largest integers below them are not.
        whole: Mask = (wide >= float(low)) & (wide < float(high + 1)) & (np.trunc(wide) == wide)
        return whole
    if from_integer:
        exact = 2**53  # larger integers are refused, though FP64 has some of them
        equal: Mask = np.equal(converted.astype(np.float64), array)
        return _within(array, -exact, exact) & equal
    kept: Mask = np.equal(converted.astype(array.dtype), array) | np.isnan(array)
    return kept


def _within(array: Array, low: int, high: int) -> Mask:
    limits = np.iinfo(array.dtype)
    within: Mask = (array >= max(low, limits.min)) & (array <= min(high, limits.max))
    return within


# -- shapes and messages


def _fit(info: TensorInfo, array: Array) -> Array:
    """The array with the shape that the input expects: as it is, with a batch axis, or one element in all ones."""
    if _fits(array.shape, info.shape):
        return array
    if info.shape and info.shape[0] in (-1, 1) and _fits(array.shape, info.shape[1:]):
        return array[np.newaxis]
    if array.size == 1 and array.ndim <= 1 and set(info.shape) <= {-1, 1}:
        return array.reshape([1] * len(info.shape))
    raise _invalid(info, f"expects shape {show(info.shape)}, got {show(array.shape)}")


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(want in (-1, got) for got, want in zip(shape, expected, strict=True))


def _at(shape: list[int] | tuple[int, ...], index: int) -> str:
    return f"at {show(map(int, np.unravel_index(index, shape)))}" if shape else "as the only value"


def _out_of_range(info: TensorInfo, value: float, where: str) -> ServingError:
    datatype = info.datatype
    expected = f"integers from {datatype.low} to {datatype.high}" if datatype.is_integer else "values within its range"
    return _invalid(info, f"expects {expected}, got {value} {where}")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _invalid(info: TensorInfo, message: str) -> ServingError:
    return ServingError(Kind.INVALID, f"input '{info.name}' ({info.datatype}): {message}")
