"""The engine: all that a front end may ask. The only module of the core that knows an event loop."""

import asyncio
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

from msgspec import Struct

from penstock.errors import Kind, ServingError
from penstock.lifecycle import Lifecycle
from penstock.messages import InferRequest, InferResponse
from penstock.model import Model
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled, Credit, Find, Reply, find
from penstock.settings import Settings

STREAM_WINDOW = 32  # replies that a stream holds before its producer waits


class Mailbox:
    """Calls for one event loop, from any thread. The loop is woken once for all that has come by then."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.thread = threading.get_ident()  # the loop's
        self._calls: deque[Callable[[], object]] = deque()
        self._woken = False

    def post(self, call: Callable[[], object]) -> None:
        """Make `call` on the loop: at once if this is its thread, else soon."""
        if threading.get_ident() == self.thread:
            call()
            return
        self._calls.append(call)
        # Two threads may both see False and both wake the loop: a spare wake-up, never a lost one, for `_empty`
        # clears the flag before it looks into the box.
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._empty)
            except RuntimeError:  # the loop has closed: nobody is left to be told
                self._calls.clear()

    def _empty(self) -> None:
        self._woken = False
        while self._calls:
            try:
                self._calls.popleft()()
            except Exception as error:  # noqa: BLE001 - one reply that cannot be delivered must not hold up the others
                self._loop.call_exception_handler({"message": "a reply could not be delivered", "exception": error})


Result = InferResponse | ServingError


class Replied(Struct, frozen=True):
    """One of the answers to a request: the last one or not; `partial` marks progress, which is no answer of its own."""

    response: InferResponse
    final: bool = True
    partial: bool = False


class Engine:
    """Models that are served, and the ways to use them. `submit` may be called on any thread."""

    def __init__(self, settings: Settings, find: Find = find) -> None:
        self.settings = settings
        self.lifecycle = Lifecycle(settings, find)
        self.started_s = time.time()
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}

    def model(self, name: str, version: str = "") -> Model:
        """The version to serve a request with. Raises ServingError with the texts for unknown and unready ones."""
        return self.lifecycle.get(name, version)

    def mailbox(self) -> Mailbox:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        box = self._mailboxes.get(loop)
        if box is None:
            box = self._mailboxes[loop] = Mailbox(loop)
        return box

    def submit(self, model: Model, request: InferRequest, reply: Reply) -> Pending:
        """Run an admitted request; `reply` is called on whatever thread has the answer, perhaps before this returns.

        Where `model` was replaced since it was looked up, its successor runs the request, if it has the same signature.
        Raises ServingError if the request cannot be accepted; then `reply` is never called.
        """
        pending = Pending(request, reply, Cancelled(), time.monotonic_ns(), request.deadline_ns)
        while True:
            try:
                model.submit(pending)
            except ServingError:
                if not model.draining or self.lifecycle.exiting:
                    raise
                successor = self.lifecycle.get(model.name, request.version)
                if successor is model or successor.signature != model.signature:
                    raise
                model = successor
            else:
                return pending

    async def infer(self, model: Model, request: InferRequest) -> InferResponse:
        """Run an admitted request that is answered once. Cancelling this cancels the request."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[InferResponse] = loop.create_future()
        pending = self.submit(model, request, OnLoop(self.mailbox(), functools.partial(_settle, future)))
        try:
            return await future
        except asyncio.CancelledError:
            pending.cancel(ServingError(Kind.CANCELLED, "the client went away"))
            raise

    async def stream(self, model: Model, request: InferRequest) -> AsyncGenerator[Replied, None]:
        """Run an admitted request that may be answered any number of times, in the order of its replies.

        Its producer waits while STREAM_WINDOW replies lie unread. Leaving the iteration cancels the request.
        Raises the ServingError that ends it.
        """
        window = Window(self.mailbox(), STREAM_WINDOW)
        pending = self.submit(model, request, window)
        try:
            while True:
                result, final, partial = await window.get()
                if isinstance(result, ServingError):
                    raise result
                yield Replied(result, final, partial)
                if final:
                    return
        finally:
            if not window.ended:
                pending.cancel(ServingError(Kind.CANCELLED, "the client went away"))
            window.open_wide()


def _settle(future: "asyncio.Future[InferResponse]", result: Result) -> None:
    if future.done():
        return  # cancelled meanwhile
    if isinstance(result, ServingError):
        future.set_exception(result)
    else:
        future.set_result(result)


class OnLoop:
    """A reply that hands the final answer to a callback on the event loop; progress and earlier answers are dropped."""

    __slots__ = ("_callback", "_mailbox")

    def __init__(self, mailbox: Mailbox, callback: Callable[[Result], None]) -> None:
        self._mailbox = mailbox
        self._callback = callback

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        if final and not partial:
            if threading.get_ident() == self._mailbox.thread:
                self._callback(result)
            else:
                self._mailbox.post(functools.partial(self._callback, result))
        return PLENTY


class Window:
    """A reply that holds answers until they are read; its credit is the room that is left. Read on one event loop.

    Owned by its lock: the producer may be any thread.
    """

    def __init__(self, mailbox: Mailbox, size: int, arrived: Callable[[], None] | None = None) -> None:
        """With `arrived`, that is called on the loop for each answer, which is then there to `take`; else use `get`."""
        self._mailbox = mailbox
        self._items: deque[tuple[Result, bool, bool]] = deque()
        self._left = size
        self.ended = False  # the final reply has come
        self._room = threading.Condition()
        self._room_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._news = asyncio.Event()
        self._arrived = arrived or self._news.set

    @property
    def left(self) -> int:
        return self._left

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        with self._room:
            self._items.append((result, final, partial))
            self.ended = self.ended or final
            self._left -= 1
        self._mailbox.post(self._arrived)
        return self

    def wait(self) -> None:
        with self._room:
            self._room.wait_for(lambda: self._left > 0)

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait_on_loop().__await__()

    async def _wait_on_loop(self) -> None:
        while True:
            event = asyncio.Event()
            with self._room:
                if self._left > 0:
                    return
                self._room_waiters.append((asyncio.get_running_loop(), event))
            await event.wait()

    async def get(self) -> tuple[Result, bool, bool]:
        """The next answer, whether it is the last, and whether it is but progress. Not to be asked after the last."""
        while not self._items:
            self._news.clear()
            await self._news.wait()
        return self.take()

    def take(self) -> tuple[Result, bool, bool]:
        """As `get`, of an answer that is there."""
        item = self._items.popleft()
        self._give(1)
        return item

    def open_wide(self) -> None:
        """Nobody reads any more: let the producer run on to its next look at `cancelled`."""
        self._give(2**31)

    def _give(self, room: int) -> None:
        with self._room:
            self._left += room
            self._room.notify_all()
            waiters, self._room_waiters = self._room_waiters, []
        for loop, event in waiters:
            loop.call_soon_threadsafe(event.set)
