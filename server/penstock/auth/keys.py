"""API keys in force: who a request comes from, and what it may."""

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.auth.key_file import ID_LENGTH, Key, digest, read
from penstock.errors import Kind, ServingError

logger = logging.getLogger(__name__)

SECOND_NS = 10**9


class Keys:
    """The keys of a file, which is read again when it has changed. Used on one thread.

    The file is looked at when a request comes, at most once a second. One that cannot be read changes nothing but the
    log.
    """

    def __init__(self, path: Path, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """Raises ServingError(INVALID) where the file is missing or broken."""
        self._path = path
        self._now_ns = now_ns
        self._look_ns = now_ns() + SECOND_NS
        self._stamp = _stamp(path)  # of the file that was read last
        self._keys: dict[str, Key] = {}  # by id
        self._limits: dict[str, Limit] = {}  # by id, where the key has a rate
        self._take(read(path))

    def check(self, authorization: str | None, scope: str) -> None:
        """Let pass the value of an Authorization header whose key has the scope.

        Raises ServingError: UNAUTHENTICATED without a known key, LIMITED beyond its rate, FORBIDDEN without the scope.
        """
        key = self.identify(authorization)
        if scope not in key.scopes:
            raise ServingError(
                Kind.FORBIDDEN, f"API key '{key.name}' lacks the scope '{scope}'; it has {', '.join(key.scopes)}"
            )

    def identify(self, authorization: str | None) -> Key:
        """The key in `Bearer KEY`, or in `KEY` alone. Raises ServingError, UNAUTHENTICATED or LIMITED."""
        now_ns = self._now_ns()
        if now_ns >= self._look_ns:
            self._look(now_ns)
        if not authorization:
            raise ServingError(
                Kind.UNAUTHENTICATED, "an API key is required, in the header 'Authorization: Bearer KEY'"
            )
        scheme, _, credentials = authorization.partition(" ")
        text = credentials.strip() if scheme.lower() == "bearer" else authorization
        key = self._keys.get(text[:ID_LENGTH])
        if key is None or not hmac.compare_digest(digest(text), key.sha256):
            raise ServingError(Kind.UNAUTHENTICATED, "the API key is not known")
        if key.rate and not self._limits[key.id].take(now_ns):
            raise ServingError(Kind.LIMITED, f"API key '{key.name}' is limited to {key.rate} requests per second")
        return key

    def _look(self, now_ns: int) -> None:
        self._look_ns = now_ns + SECOND_NS
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(read(self._path))
        except ServingError as error:
            logger.error("%s; the API keys read before stay in force", error.message)
        else:
            logger.info("API keys were read again from '%s'", self._path)

    def _take(self, keys: Sequence[Key]) -> None:
        """Put keys in force. What one has used of its rate stays used."""
        limits = {key.id: Limit(key.rate) for key in keys if key.rate}
        for id, limit in self._limits.items():
            if id in limits and limits[id].rate == limit.rate:
                limits[id] = limit
        self._keys, self._limits = {key.id: key for key in keys}, limits


class Limit:
    """A rate: as many requests per second in the long run, and no more than a second's worth at once."""

    __slots__ = ("_due_ns", "_interval_ns", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._interval_ns = SECOND_NS // rate
        self._due_ns = 0  # when the next request would come if those so far had come evenly

    def take(self, now_ns: int) -> bool:
        due_ns = max(self._due_ns, now_ns)
        if due_ns - now_ns > self._interval_ns * (self.rate - 1):
            return False
        self._due_ns = due_ns + self._interval_ns
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Another one whenever the file has changed; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
