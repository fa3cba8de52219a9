"""Who waits for which key to change, and which have lately: what `watch` and `wait_work` of every store stand on."""

import asyncio
from collections.abc import Collection, Iterable
from itertools import islice

REMEMBERED = 4096  # keys whose last change is known; a wait that began before the oldest of them returns at once


def work(endpoint: str) -> str:
    """The key that changes when a job of an endpoint enters its queue; no job's id looks like it."""
    return f"/{endpoint}"


class Changes:
    """Belongs to one event loop. A key is a job's id, or `work(endpoint)`."""

    __slots__ = ("_forgotten", "_last", "_waiters", "tick")

    def __init__(self) -> None:
        self.tick = 0  # how many times something changed
        self._last: dict[str, int] = {}  # the tick of a key's last change, oldest first
        self._forgotten = 0  # no key that is not in `_last` has changed after this tick
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}

    @property
    def awaited(self) -> bool:
        return bool(self._waiters)

    def note(self, keys: Collection[str]) -> None:
        """These have changed: wake who waits for them."""
        if not keys:
            return
        self.tick += 1
        if len(keys) > REMEMBERED:
            self._last.clear()
            self._forgotten = self.tick
            self._wake(self._waiters.keys() & set(keys))
            return
        for key in keys:
            self._last.pop(key, None)
            self._last[key] = self.tick
        if (excess := len(self._last) - REMEMBERED) > 0:
            for key in list(islice(self._last, excess)):
                self._forgotten = self._last.pop(key)
        if self._waiters:
            self._wake(keys)

    def note_all(self) -> None:
        """Anything may have changed: wake everyone."""
        self.tick += 1
        self._last.clear()
        self._forgotten = self.tick
        self._wake(list(self._waiters))

    def _wake(self, keys: Iterable[str]) -> None:
        for key in keys:
            for waiter in self._waiters.get(key, ()):
                _settle(waiter)

    async def wait(self, keys: Collection[str], timeout_s: float, since: int) -> None:
        """Return when one of the keys may have changed after `tick` was `since`, or the time is over."""
        if since < self._forgotten or any(self._last.get(key, 0) > since for key in keys):
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        for key in keys:
            self._waiters.setdefault(key, set()).add(waiter)
        timer = loop.call_later(timeout_s, _settle, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            for key in keys:
                waiters = self._waiters.get(key)
                if waiters is not None:
                    waiters.discard(waiter)
                    if not waiters:
                        del self._waiters[key]


def _settle(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
