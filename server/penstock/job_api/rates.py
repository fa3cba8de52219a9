"""How often an operation may be asked for: fixed windows, by operation, endpoint and caller."""

import time
from collections.abc import Callable, Sequence

from msgspec import Struct

from penstock.errors import Kind, ServingError

# Every operation that can be limited. TensorOne's names for the same things count with these.
OPERATIONS = (
    "run", "runsync", "status", "status-sync", "stream", "cancel", "retry", "purge-queue", "health", "requests",
    "batch", "details", "logs", "metrics",
)  # fmt: skip
MOST_WINDOWS = 100_000  # that are remembered; beyond, those that are over are forgotten


class Window(Struct):
    """What one caller has used of a rate."""

    limit: int
    seconds: int
    ends_s: float  # since the epoch
    used: int = 0
    now_s: float = 0.0  # of the last request

    @property
    def spent(self) -> bool:
        return self.used > self.limit

    @property
    def remaining(self) -> int:
        return max(0, self.limit - self.used)

    @property
    def reset_s(self) -> int:
        """Seconds until it is over, at least 1."""
        return max(1, round(self.ends_s - self.now_s + 0.5))


class Rates:
    """The limits, and who has used what of them. Used on the event loop."""

    def __init__(self, entries: Sequence[str], now_s: Callable[[], float] = time.time) -> None:
        """Of entries such as `run=1000/10`: requests, and seconds. Raises ServingError(INVALID) for anything else."""
        self._limits = dict(map(_parse, entries))
        self._now_s = now_s
        self._windows: dict[tuple[str, str, bytes], Window] = {}

    def take(self, operation: str, endpoint: str, who: bytes) -> Window | None:
        """Count a request; None where the operation is not limited. The request is refused if the window is spent."""
        limit = self._limits.get(operation)
        if limit is None:
            return None
        now_s = self._now_s()
        key = (operation, endpoint, who)
        window = self._windows.get(key)
        if window is None or window.ends_s <= now_s:
            if len(self._windows) >= MOST_WINDOWS:
                self._windows = {key: window for key, window in self._windows.items() if window.ends_s > now_s}
            window = self._windows[key] = Window(*limit, ends_s=now_s + limit[1])
        window.used += 1
        window.now_s = now_s
        return window


def _parse(entry: str) -> tuple[str, tuple[int, int]]:
    operation, _, rate = entry.partition("=")
    requests, _, seconds = rate.partition("/")
    if operation not in OPERATIONS or not (
        requests.isdecimal() and seconds.isdecimal() and int(requests) and int(seconds)
    ):
        raise ServingError(
            Kind.INVALID,
            f"--job-rate-limit expects OPERATION=REQUESTS/SECONDS with one of {', '.join(OPERATIONS)}, got '{entry}'",
        )
    return operation, (int(requests), int(seconds))
