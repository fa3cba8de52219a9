"""What stands on the command line → the input of a job."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from penstock.errors import Kind, ServingError

NAMED = re.compile(r"([^={}\[\]\"@\s]+)=(.*)", re.DOTALL)


def read(operands: Sequence[str], read_input: Callable[[], str]) -> Any:
    """JSON, `@FILE` that holds JSON, `@-` for `read_input`; or members of an object, `NAME=VALUE`.

    A VALUE is JSON, or a string where it is none; after `@`, a file: JSON in one that is called so, else its text.
    Raises ServingError(INVALID).
    """
    named = [NAMED.fullmatch(operand) for operand in operands]
    members: dict[str, Any] = {}
    if len(operands) == 1 and named[0] is None:
        return _whole(operands[0], read_input)
    for operand, match in zip(operands, named, strict=True):
        if match is None:
            raise ServingError(Kind.INVALID, f"expected one JSON value, or NAME=VALUE for each input, got '{operand}'")
        name, text = match.groups()
        if name in members:
            raise ServingError(Kind.INVALID, f"input '{name}' is given twice")
        members[name] = _value(name, text, read_input)
    return members


def _whole(text: str, read_input: Callable[[], str]) -> Any:
    if text == "@-":
        return _parse("standard input", read_input())
    if text.startswith("@"):
        return _parse(f"'{text[1:]}'", _content(text[1:]))
    return _parse(f"'{text}'", text, "; an input is JSON, @FILE or NAME=VALUE")


def _value(name: str, text: str, read_input: Callable[[], str]) -> Any:
    if text == "@-":
        return _parse(f"input '{name}': standard input", read_input())
    if text.startswith("@"):
        content = _content(text[1:])
        return _parse(f"input '{name}': '{text[1:]}'", content) if text.lower().endswith(".json") else content
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if text.startswith(("{", "[", '"')):  # which nobody means to be text
            return _parse(f"input '{name}': '{text}'", text)
        return text


def _parse(source: str, text: str, hint: str = "") -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ServingError(Kind.INVALID, f"{source} is no JSON: {error}{hint}") from None


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(Kind.INVALID, f"cannot read '{path}' as text: {error}") from error
