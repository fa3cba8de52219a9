"""JSON text → values, with orjson's speed, the literals NaN and Infinity, and RapidJSON's words for what is wrong."""

import json
import math
import re
from typing import Any

import orjson

from penstock.errors import Kind, ServingError

MAX_DEPTH = 100  # levels of nesting that are allowed where the protocol sets a limit
EXPLAINED_BYTES = 64 << 10  # a longer text that is at fault is not walked through again to find out why
TOO_DEEP = f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})"


def loads(data: bytes | memoryview) -> Any:
    """The value of a JSON document in UTF-8. Integers outside [-2^63, 2^64) become floats.

    Beyond RFC 8259, the literals NaN, Infinity and -Infinity are read. Of equal keys in an object the last one counts.
    Raises ServingError(INVALID) with the reason and its byte offset (protocol page HTTP, section 5).
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return _retry(bytes(data), error.pos)


def _retry(data: bytes, position: int) -> Any:
    """What orjson refuses at character `position`: it may be a NaN, which the standard library reads quickly too."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _fault("Invalid encoding in string.", error.start) from None
    try:
        value = json.loads(text, parse_float=_float, parse_int=_int)
        if "\\u" in text:
            orjson.dumps(value)  # raises for a lone surrogate, which the standard library lets through
        return value
    except (ValueError, TypeError, RecursionError):
        if len(data) <= EXPLAINED_BYTES:
            return _Parser(text).document()
    raise _fault("Unspecific syntax error.", len(text[:position].encode()))


def _fault(reason: str, offset: int) -> ServingError:
    return ServingError(Kind.INVALID, f"failed to parse the request JSON buffer: {reason} at {offset}")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:32]} is too big")
    return value


def _int(text: str) -> int | float:
    value: int | float = int(text) if len(text) <= 20 else _float(text)
    return value if -(2**63) <= value < 2**64 else float(value)


class _Parser:
    """The same grammar in Python, a step at a time, so that each fault gets RapidJSON's reason and offset."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def document(self) -> Any:
        if not self._peek():
            raise self._fault("The document is empty.")
        value = self._value(0)
        if self._peek():
            raise self._fault("The document root must not be followed by other values.")
        return value

    def _fault(self, reason: str, at: int | None = None) -> ServingError:
        return _fault(reason, len(self._text[: self._at if at is None else at].encode()))

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        self._at = _match(_SPACE, self._text, self._at).end()
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        """Step over `character` if it comes next."""
        taken = self._peek() == character
        self._at += taken
        return taken

    def _value(self, depth: int) -> Any:
        first = self._peek()
        if first in ("{", "["):
            if depth > MAX_DEPTH + 2:  # the data of a tensor is the fourth level of a request
                raise ServingError(Kind.INVALID, TOO_DEEP)
            self._at += 1
            return self._object(depth + 1) if first == "{" else self._array(depth + 1)
        if first == '"':
            return self._string()
        if number := _NUMBER.match(self._text, self._at):
            return self._number(number)
        for word, value in _LITERALS.items():
            if self._text.startswith(word, self._at):
                self._at += len(word)
                return value
        ahead = self._text[self._at : self._at + 9]
        right = next(size for size in range(9, -1, -1) if any(word[:size] == ahead[:size] for word in _LITERALS))
        raise self._fault("Invalid value.", self._at + right)

    def _object(self, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        if self._take("}"):
            return members
        while True:
            if self._peek() != '"':
                raise self._fault("Missing a name for object member.")
            name = self._string()
            if not self._take(":"):
                raise self._fault("Missing a colon after a name of object member.")
            members[name] = self._value(depth)
            if self._take("}"):
                return members
            if not self._take(","):
                raise self._fault("Missing a comma or '}' after an object member.")

    def _array(self, depth: int) -> list[Any]:
        elements: list[Any] = []
        if self._take("]"):
            return elements
        while True:
            elements.append(self._value(depth))
            if self._take("]"):
                return elements
            if not self._take(","):
                raise self._fault("Missing a comma or ']' after an array element.")

    def _number(self, match: re.Match[str]) -> int | float:
        start, self._at = match.span()
        if match["fraction"] == ".":
            raise self._fault("Miss fraction part in number.", match.end("fraction"))
        if match["exponent"] and not match["exponent"][-1].isdigit():
            raise self._fault("Miss exponent in number.", match.end("exponent"))
        try:
            return (_float if match["fraction"] or match["exponent"] else _int)(match[0])
        except ValueError:
            raise self._fault("Number too big to be stored in double.", start) from None

    def _string(self) -> str:
        self._at += 1
        parts: list[str] = []
        while True:
            plain = _match(_PLAIN, self._text, self._at)
            parts.append(plain[0])
            self._at = plain.end()
            end = self._text[self._at : self._at + 1]
            if end == '"':
                self._at += 1
                return "".join(parts)
            if end in ("", "\0"):
                raise self._fault("Missing a closing quotation mark in string.")
            if end != "\\":
                raise self._fault("Invalid encoding in string.")
            parts.append(self._escape())

    def _escape(self) -> str:
        start = self._at
        kind = self._text[start + 1 : start + 2]
        self._at += 2
        if kind != "u":
            if kind not in _ESCAPES:
                raise self._fault("Invalid escape character in string.", start)
            return _ESCAPES[kind]
        code = self._hex(start)
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)
        if code < 0xDC00 and self._text.startswith("\\u", self._at):
            self._at += 2
            low = self._hex(start)
            if 0xDC00 <= low <= 0xDFFF:
                return chr(0x10000 + (code - 0xD800 << 10) + (low - 0xDC00))
        raise self._fault("The surrogate pair in string is invalid.", start)

    def _hex(self, start: int) -> int:
        digits = _HEX.match(self._text, self._at)
        if digits is None:
            raise self._fault("Incorrect hex digit after \\u escape in string.", start)
        self._at = digits.end()
        return int(digits[0], 16)


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    """Of a pattern that matches nothing at the least."""
    match = pattern.match(text, at)
    assert match is not None
    return match


_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX = re.compile(r"[0-9A-Fa-f]{4}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?P<fraction>\.[0-9]*)?(?P<exponent>[eE][+-]?[0-9]*)?")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
    "Inf": math.inf,
    "-Inf": -math.inf,
}
