"""How much a peer may send, and how often: arithmetic, with the time as an argument."""

WINDOW = 1 << 20  # bytes that a stream may send before its call has taken any
CONNECTION_WINDOW = 1 << 24  # bytes of all streams together; returned as they come, so that no call waits for another


def top_up(credit: int, held: int, missing: int) -> int:
    """By how many bytes a stream's window grows now; 0 for not yet.

    `credit` is what the peer may still send, `held` lies here unread, and `missing` is the rest of a message that has
    begun: it must fit, however long it is, or nobody could ever take it.
    """
    target = max(WINDOW - held, missing)
    return target - credit if credit < missing or target - credit >= WINDOW // 2 else 0


class Allowance:
    """How often a peer may do what costs us more than it: `burst` times at once, `per_s` times a second for long."""

    __slots__ = ("_burst", "_left", "_per_s", "_since_s")

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = burst
        self._left = float(burst)
        self._per_s = per_s
        self._since_s = 0.0

    def take(self, now_s: float) -> bool:
        """Whether this one is still allowed."""
        self._left = min(self._burst, self._left + (now_s - self._since_s) * self._per_s)
        self._since_s = now_s
        self._left -= 1
        return self._left >= 0


class PingGuard:
    """Whether the client pings too often: gRPC's rule of strikes, which sending it anything forgives."""

    __slots__ = ("_idle_interval_s", "_interval_s", "_last_s", "_most", "_strikes")

    def __init__(self, interval_s: float, idle_interval_s: float, most: int) -> None:
        """`most` strikes are forgiven, 0 means any number; `idle_interval_s` holds while there is no call."""
        self._interval_s = interval_s
        self._idle_interval_s = idle_interval_s
        self._most = most
        self._strikes = 0
        self._last_s: float | None = None

    def forgive(self) -> None:
        self._strikes = 0
        self._last_s = None

    def too_many(self, now_s: float, idle: bool) -> bool:
        """Count a ping that has come."""
        early = self._last_s is not None and now_s - self._last_s < (
            self._idle_interval_s if idle else self._interval_s
        )
        self._last_s = now_s
        self._strikes += early
        return bool(self._most) and self._strikes > self._most
