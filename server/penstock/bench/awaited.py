"""A carrier made of a coroutine function, for clients that have no cheaper form."""

import asyncio
from collections.abc import Awaitable, Callable

from penstock.bench.load import Done


class AwaitedCarrier:
    """Runs `exchange` for each request; it returns "" for a good answer, else what was wrong."""

    def __init__(self, exchange: Callable[[], Awaitable[str]]) -> None:
        self._exchange = exchange
        self._done: Done | None = None
        self._wanted = asyncio.Event()
        self._task = asyncio.create_task(self._serve())

    def send(self, done: Done) -> None:
        self._done = done
        self._wanted.set()

    async def _serve(self) -> None:
        # One task for all requests: making one for each costs more than many a request.
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            self._finish(await self._exchange())

    def _finish(self, error: str) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(error)

    def abort(self, reason: str) -> None:
        self._task.cancel()
        self._wanted.clear()
        self._task = asyncio.create_task(self._serve())
        self._finish(reason)

    async def close(self) -> None:
        self._done = None
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()  # raises what `exchange` should have made an error of
