"""The file of API keys: what it holds, how it is read, and how it is changed.

A key is 256 random bits, so SHA-256 of it gives nothing away: nobody can guess what was hashed. A slow hash protects
passwords, which can be guessed; here it would protect nothing, and cost milliseconds on every request.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct, structs

from penstock.errors import Kind, ServingError

# What a key can be good for, and what that opens.
SCOPES = {
    "infer": "inference; metadata, configuration, statistics and readiness of models",
    "jobs": "the job API",
    "admin": "the model repository, shared memory, trace and log settings",
    "metrics": "the metrics port",
}
ID_LENGTH = len("penstock_01234567")  # a key begins with its id, which is no secret


class Key(Struct, frozen=True):
    """What the file knows of a key. The fields are those of the file."""

    name: str
    id: str
    sha256: str  # of the whole key, in hexadecimal
    scopes: tuple[str, ...]
    created: str  # ISO 8601, UTC
    rate: int = 0  # requests per second; 0 means: any


def make(name: str, scopes: Sequence[str], rate: int = 0) -> tuple[Key, str]:
    """A new key: what goes into the file, and its text. Raises ServingError(INVALID) for an unknown scope, or none."""
    id = f"penstock_{secrets.token_hex(4)}"
    text = f"{id}_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return _checked(Key(name, id, digest(text), tuple(dict.fromkeys(scopes)), created, rate)), text
    except ValueError as error:
        raise ServingError(Kind.INVALID, str(error)) from None


def digest(text: str) -> str:
    """What the file holds in place of a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> list[Key]:
    """The keys of a file, in its order. Raises ServingError(INVALID) that says what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or not isinstance(document.get("keys"), list) or len(document) != 1:
            raise ValueError('expected {"keys": [...]}')
        keys = [_parsed(entry) for entry in document["keys"]]
        for unique in ("name", "id"):
            if len({getattr(key, unique) for key in keys}) < len(keys):
                raise ValueError(f"two keys have the same {unique}")
    except (OSError, ValueError) as error:
        raise ServingError(Kind.INVALID, f"cannot read API keys from '{path}': {error}") from error
    return keys


@contextlib.contextmanager
def edit(path: Path) -> Iterator[list[Key]]:
    """The keys of a file, to be changed in the block and written back at its end; none where there is no file yet.

    Processes that edit wait for each other; one that reads sees the file as it was before or as it is after. Nobody
    but its owner may read it. A block that raises changes nothing. Raises ServingError(INVALID) where the file cannot
    be read or written.
    """
    path = path.resolve()  # a link stays one
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            keys = read(path) if path.exists() else []
            yield keys
            _write(path, keys)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ServingError(Kind.INVALID, f"cannot write API keys to '{path}': {error}") from error


def _write(path: Path, keys: Sequence[Key]) -> None:
    document = {"keys": [structs.asdict(key) for key in keys]}
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(made, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        try:
            if path.exists():
                os.fchown(file.fileno(), path.stat().st_uid, -1)  # the server's still where root has edited it
            file.write(json.dumps(document, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
            made.replace(path)
        except BaseException:
            made.unlink()
            raise


def _parsed(entry: object) -> Key:
    """Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object for each key, got {entry!r}")
    wanted = {"name": str, "id": str, "sha256": str, "scopes": list, "created": str, "rate": int}
    given = {"rate": 0, **entry}
    for member in given.keys() ^ wanted.keys():
        raise ValueError(f"key {entry.get('name')!r}: '{member}' is {'missing' if member in wanted else 'unknown'}")
    for member, kind in wanted.items():
        if type(given[member]) is not kind:
            raise ValueError(f"key {entry['name']!r}: '{member}' is no {kind.__name__}")
    return _checked(Key(**{**given, "scopes": tuple(given["scopes"])}))


def _checked(key: Key) -> Key:
    """Raises ValueError."""
    if not key.name or not key.name.isprintable():
        raise ValueError(f"a key needs a name that can be printed, got {key.name!r}")
    if len(key.id) != ID_LENGTH or len(key.sha256) != 64 or not key.sha256.isascii():
        raise ValueError(f"key '{key.name}': its id or its hash is damaged")
    unknown = [scope for scope in key.scopes if scope not in [*SCOPES]]
    if unknown or not key.scopes:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"key '{key.name}': expected scopes of {', '.join(SCOPES)}, got {got}")
    if key.rate < 0:
        raise ValueError(f"key '{key.name}': expected a number of requests per second, got {key.rate}")
    return key
