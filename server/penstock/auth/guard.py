"""What a door asks of its callers: an API key, the header of a restricted group, or both."""

import hmac
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import TypeAlias

from msgspec import Struct

from penstock.auth.keys import Keys
from penstock.errors import Kind, ServingError

Find: TypeAlias = Callable[[str], str | bytes | None]  # the value of a header by its name in lower case


class Category(Enum):
    """A group of methods that can be restricted by itself, in Triton's words."""

    HEALTH = "health"
    METADATA = "metadata"
    INFERENCE = "inference"
    SHARED_MEMORY = "shared-memory"
    MODEL_CONFIG = "model-config"
    MODEL_REPOSITORY = "model-repository"
    STATISTICS = "statistics"
    TRACE = "trace"
    LOGGING = "logging"

    @property
    def scope(self) -> str:
        """What a key must be good for."""
        return "admin" if self in ADMIN else "infer"


ADMIN = (Category.SHARED_MEMORY, Category.MODEL_REPOSITORY, Category.TRACE, Category.LOGGING)


class Wording(Struct, frozen=True):
    """How a door speaks of restricted groups: Triton's words."""

    flag: str
    what: str
    prefix: str  # of the headers' names
    kind: Kind


HTTP = Wording("--http-restricted-api", "API", "", Kind.FORBIDDEN)
GRPC = Wording("--grpc-restricted-protocol", "protocol", "triton-grpc-protocol-", Kind.UNAVAILABLE)


def make_guard(wording: Wording, keys: Keys | None, restricted: Sequence[str]) -> "Guard | None":
    """A door's guard; None where everything is open. `restricted` holds entries `CATEGORY,...:HEADER=VALUE`.

    Raises ServingError(INVALID) for an entry that is none, an unknown category, and one that stands twice.
    """
    groups: dict[Category, tuple[str, bytes]] = {}
    known = {category.value: category for category in Category}
    for entry in restricted:
        names, _, setting = entry.partition(":")
        header, _, value = setting.partition("=")
        if not names or not header or not value:
            raise ServingError(Kind.INVALID, f"{wording.flag} expects CATEGORY,...:HEADER=VALUE, got '{entry}'")
        for name in names.split(","):
            if name not in known:
                raise ServingError(Kind.INVALID, f"unknown restricted {wording.what.lower()} '{name}'")
            if known[name] in groups:
                raise ServingError(
                    Kind.INVALID,
                    f"restricted {wording.what.lower()} '{name}' can not be specified in multiple config groups",
                )
            groups[known[name]] = wording.prefix + header, value.encode()
    return Guard(wording, keys, groups) if keys is not None or groups else None


class Guard:
    """Used on one thread, as its keys."""

    def __init__(self, wording: Wording, keys: Keys | None, groups: Mapping[Category, tuple[str, bytes]]) -> None:
        self._wording = wording
        self._keys = keys
        self._groups = groups  # header and its value by category

    def check(self, category: Category | None, find: Find, keyless: bool = False) -> None:
        """Let pass who may call methods of the category; of one that is `keyless`, without a key.

        None is what the door does not have, which any known key may be told. Raises ServingError as Keys.check does,
        and of the door's own kind without the header of a restricted group.
        """
        if self._keys is not None and not keyless:
            value = find("authorization")
            authorization = value.decode("latin-1") if isinstance(value, bytes) else value
            if category is None:
                self._keys.identify(authorization)
            else:
                self._keys.check(authorization, category.scope)
        group = self._groups.get(category) if category is not None else None
        if group is not None:
            header, wanted = group
            value = find(header.lower()) or b""
            if not hmac.compare_digest(value.encode() if isinstance(value, str) else value, wanted):
                raise ServingError(
                    self._wording.kind, f"This {self._wording.what} is restricted, expecting header '{header}'"
                )
