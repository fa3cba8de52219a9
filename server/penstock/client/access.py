"""What a client shows with every request: an API key, and headers of its user's choice."""

import argparse
import os
import re
from collections.abc import Mapping
from typing import TypeAlias

from penstock.errors import Kind, ServingError
from penstock.settings import KEY_VARIABLE

Headers: TypeAlias = tuple[tuple[str, str], ...]  # names and values, of HTTP headers or of gRPC metadata

NAME = re.compile(r"[A-Za-z0-9_.-]+")
TEXT = re.compile(r"[\x21-\x7e]+( +[\x21-\x7e]+)*")  # what both protocols carry unchanged
AUTHORIZATION = "authorization"
# What says where a message goes and how long it is: the client's own affair.
FRAMING = frozenset({
    "connection", "content-encoding", "content-length", "content-type", "host", "inference-header-content-length",
    "te", "transfer-encoding",
})  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `headers` reads."""
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"for a server that asks for keys (default: the variable {KEY_VARIABLE})"
    )
    group.add_argument(
        "--header", type=_header, action="append", default=[], metavar="NAME=VALUE",
        help="send this with every request: a header over HTTP, metadata over gRPC; may be repeated",
    )  # fmt: skip


def given(arguments: argparse.Namespace) -> str:
    """The option on the command line that needs a server; "" if there is none."""
    return "--api-key" if arguments.api_key is not None else "--header" if arguments.header else ""


def headers(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Headers:
    """What to send with every request. Raises ServingError(INVALID) for what is no key, and a header given twice."""
    shown: Headers = tuple(arguments.header)
    names = [name.lower() for name, _ in shown]
    if len(set(names)) < len(names):
        raise ServingError(Kind.INVALID, "--header gives one header twice")
    key, named = arguments.api_key, "--api-key"
    if AUTHORIZATION in names:
        if key is not None:
            raise ServingError(Kind.INVALID, "--api-key and --header Authorization say the same; give one of them")
        return shown
    if key is None:
        key, named = environment.get(KEY_VARIABLE) or None, KEY_VARIABLE
    if key is None:
        return shown
    if TEXT.fullmatch(key) is None or " " in key:
        raise ServingError(Kind.INVALID, f"{named} expects a key, which has no blanks and only ASCII characters")
    return ((AUTHORIZATION, f"Bearer {key}"), *shown)


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or NAME.fullmatch(name) is None or TEXT.fullmatch(value) is None:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE in ASCII, got '{text}'")
    if name.lower() in FRAMING or name.lower().startswith("grpc-") or name.lower().endswith("-bin"):
        raise argparse.ArgumentTypeError(f"'{name}' is no header that can be chosen")
    return name, value
