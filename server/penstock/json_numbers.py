"""Long arrays of numbers, taken out of a request's JSON and read without a Python object per element.

Where simdjson is not installed (it has no wheel for Python 3.14 yet), nothing is taken out.
"""

import os
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from penstock.json_text import MAX_DEPTH

try:
    import simdjson
except ModuleNotFoundError:
    AVAILABLE = False
else:
    AVAILABLE = True

Form: TypeAlias = Literal["d", "i", "u"]  # FP64, INT64, UINT64

FROM_BYTES = 8 << 10  # of text: what is shorter costs more to take out than to read
# Of an array are parsed at a time: simdjson takes many times as much memory, and in parts of 512 KiB page faults made
# reading 1.6 to 2.2 times as long.
PART_BYTES = 128 << 10
MAX_BRACKETS = 1024 - MAX_DEPTH  # in what is left: then the whole text has no more levels than orjson allows
EDGE_BYTES = 256  # of space at a cut are more than usual
_DATA = re.compile(rb'[^\\]"data"[ \t\n\r]*:[ \t\n\r]*\[')
_SPACE = b" \t\n\r"
_FORMS: dict[Form, np.dtype[Any]] = {"d": np.dtype("<f8"), "i": np.dtype("<i8"), "u": np.dtype("<u8")}


class UnusualError(Exception):
    """The document must be parsed whole, for it is wrong, or has what is not read here."""


class Lifted(Struct, frozen=True):
    """A JSON text with `["key"]` in the place of each array that was taken out, and the texts of these by their keys.

    If it is JSON, and they are, the whole was. No client can know the keys.
    """

    text: bytes
    arrays: dict[str, bytes]


def lift(text: bytes) -> Lifted | None:
    """Take out the long arrays named `data`; None where there are none.

    An array ends before the next quote or brace, so it holds numbers, arrays of them, and literals. That its name is a
    name needs no proof: a quote that begins no string would end one, and then what is left is no JSON.
    """
    if not AVAILABLE or len(text) < FROM_BYTES:
        return None
    secret = os.urandom(8).hex()
    parts: list[bytes] = []
    arrays: dict[str, bytes] = {}
    done = at = 0
    while match := _DATA.search(text, at):
        begin = match.end() - 1
        at = max(text.rfind(b"]", begin, _end(text, begin)), begin) + 1
        if at - begin >= FROM_BYTES:
            key = f"{secret}.{len(arrays)}"
            arrays[key] = text[begin:at]
            parts += text[done:begin], b'["', key.encode(), b'"]'
            done = at
    rest = b"".join([*parts, text[done:]])
    return Lifted(rest, arrays) if arrays and rest.count(b"[") + rest.count(b"{") <= MAX_BRACKETS else None


def _end(text: bytes, begin: int) -> int:
    """Where the next quote or brace is; both stand right behind an array as a rule."""
    quote = text.find(b'"', begin)
    brace = text.find(b"}", begin, len(text) if quote < 0 else quote)
    return brace if brace >= 0 else quote


def read(text: bytes, form: Form, part_bytes: int = PART_BYTES) -> Iterator[npt.NDArray[Any]]:
    """All numbers of an array, whatever its nesting, as they stand in about `part_bytes` of it, one part after another.

    Of form "d" integers are converted. Raises UnusualError for an element that is no number or does not fit the form,
    for text that is no array of at most MAX_DEPTH levels, and for empty arrays.
    """
    parser = simdjson.Parser()
    for part in _parts(text, part_bytes):
        try:
            array = parser.parse(part)
            numbers = array.as_buffer(of_type=form)  # type: ignore[union-attr]
        except (ValueError, RuntimeError, TypeError) as error:  # simdjson has no class of its own
            raise UnusualError from error
        del array  # or the parser would refuse the next part
        yield np.frombuffer(numbers, _FORMS[form])


def _parts(text: bytes, part_bytes: int) -> Iterator[bytes]:
    """The array in pieces, cut at commas. Each gets the brackets that were open before it, and closes its own: so all
    pieces are arrays if the whole is one. The converse needs a look at both sides of each cut, for [1,] and [,1] become
    arrays when they are cut there.
    """
    opened, closed = _places(text, b"["), _places(text, b"]")
    levels = np.arange(1, len(opened) + 1) - np.searchsorted(closed, opened)
    if len(opened) != len(closed) or levels.max() > MAX_DEPTH:
        raise UnusualError
    cuts = [-1]
    while (cut := text.find(b",", cuts[-1] + part_bytes)) >= 0:
        cuts.append(cut)
    cuts.append(len(text))
    depths = (np.searchsorted(opened, cuts) - np.searchsorted(closed, cuts)).tolist()
    if min(depths[1:-1], default=1) < 1:
        raise UnusualError  # a comma that is in no array
    view = memoryview(text)
    for (before, after), (begin, end) in zip(pairwise(depths), pairwise(cuts), strict=True):
        begin += 1
        first = text[begin : min(begin + EDGE_BYTES, end)].lstrip(_SPACE)[:1]
        last = text[max(begin, end - EDGE_BYTES) : end].rstrip(_SPACE)[-1:]
        if first in (b"", b"]") or last in (b"", b"["):
            raise UnusualError
        yield b"".join((b"[" * before, view[begin:end], b"]" * after))


def _places(text: bytes, sign: bytes) -> npt.NDArray[np.intp]:
    """Where `sign` stands, which it does at least once."""
    first = text.find(sign)
    if first == text.rfind(sign):
        return np.array([first])
    return np.flatnonzero(np.frombuffer(text, np.uint8) == sign[0])
