"""A gRPC call on one HTTP/2 stream: unary ones without a task, streams with one."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias

from penstock.errors import Kind, ServingError
from penstock.grpc_api.bodies import Body, Encoded
from penstock.grpc_api.calls import Call, Cancellable, Door, Stream, Unary, failure
from penstock.grpc_api.http2.flow import WINDOW, top_up
from penstock.grpc_api.http2.heads import Head
from penstock.grpc_api.http2.messages import PREFIX_BYTES, Assembler, Message, decompress

logger = logging.getLogger(__name__)

SPOKEN_S = 1.0  # a refused stream waits for its client to say something
INLINE_BYTES = 16 << 10  # what is larger is decompressed beside the event loop: a thousandfold of it takes 20 ms


class Link(Protocol):
    """What a call asks of its connection."""

    door: Door
    loop: asyncio.AbstractEventLoop

    def answer(self, call: "UnaryCall", body: Encoded) -> None:
        """Headers, the message and trailers; the stream is over."""

    def send(self, call: "AnyCall", body: Encoded) -> None:
        """Headers if they have not gone yet, and a message, as the windows allow; then `call.drained`."""

    def finish(self, call: "AnyCall", error: ServingError | None) -> None:
        """Trailers, behind what waits to be sent; the stream is over."""

    def grant(self, call: "AnyCall", more: int) -> None:
        """Allow the client `more` bytes on this stream."""

    def coming(self, call: "AnyCall") -> int:
        """Bytes of this call's DATA frame that has begun: they are on their way, and taken off its window already."""


class BaseCall:
    """What a stream is to its connection, which owns all fields that have no underscore."""

    __slots__ = (
        "_assembler", "_head", "_link", "_received", "call", "credit", "ended", "headed", "id", "last", "out",
        "timer", "window",
    )  # fmt: skip

    def __init__(self, link: Link, id: int, head: Head, window: int) -> None:
        self._link = link
        self._head = head
        self._received = 0  # bytes, as content-length counts them
        self._assembler: Assembler | None = None
        self.id = id
        self.call = Call(head.metadata)
        self.window = window  # bytes that we may send
        self.credit = WINDOW  # bytes that the client may send
        self.ended = False  # the client has said all
        self.headed = False  # response headers have gone
        self.last: bytes | None = None  # trailers that wait for `out` to be sent
        self.out: deque[memoryview] = deque()  # of messages, not sent yet
        self.timer: asyncio.TimerHandle | None = None

    def _checked_length(self, size: int, end: bool) -> bool:
        """Count a body's bytes. False where they are not as many as the client had said."""
        self._received += size
        length = self._head.length
        return length < 0 or (self._received == length if end else self._received <= length)

    def landing(self, most: int) -> memoryview | None:
        """Memory to read up to `most` bytes of the body into; None where they are better handed to `data`."""
        return None if self._assembler is None else self._assembler.landing(most)

    def _fed(self, data: Body) -> Assembler:
        """Raises ServingError(TOO_LARGE)."""
        if self._assembler is None:
            self._assembler = Assembler(self._link.door.limit_bytes)
        self._assembler.feed(data)
        return self._assembler


class UnaryCall(BaseCall):
    """One message, one answer. It is served when the client has said all, and answered by a callback."""

    __slots__ = ("_done", "_pending", "_row")

    def __init__(self, link: Link, id: int, head: Head, window: int, row: Unary[Any, Any]) -> None:
        super().__init__(link, id, head, window)
        self._row = row
        self._done = False
        self._pending: Cancellable | None = None

    def data(self, data: Body, end: bool) -> bool:
        """Take bytes of the body; `end` says that they are the last. False where they break HTTP/2's rules."""
        if self._head.length >= 0 and not self._checked_length(len(data), end):
            return False
        if self._done:
            return True
        size = len(data) - PREFIX_BYTES
        if (
            end
            and self._assembler is None
            and 0 <= size <= self._link.door.limit_bytes
            and int.from_bytes(data[:PREFIX_BYTES], "big") == size  # the first byte says that it is not compressed
        ):
            # The ordinary case: a whole message that came in one piece.
            self._serve(bytes(data[PREFIX_BYTES:]))
            return True
        try:
            assembler = self._fed(data)
        except ServingError as error:
            self.reply(error)
            return True
        self._look(assembler, end)
        return True

    def landed(self, size: int, end: bool) -> bool:
        """So many bytes have come where `landing` said. As `data` otherwise."""
        if not self._checked_length(size, end):
            return False
        if not self._done:
            assert self._assembler is not None
            self._assembler.landed(size)
            self._look(self._assembler, end)
        return True

    def reply(self, answer: Encoded | ServingError) -> None:
        """Answer, if nobody has yet."""
        if self._done:
            return
        self._done = True
        self._pending = None  # it leads back here through its reply: the message would wait for a collection
        if self.timer is not None:
            self.timer.cancel()
        if isinstance(answer, ServingError):
            self._link.finish(self, answer)
        else:
            self._link.answer(self, answer)

    def cancel(self) -> None:
        """The client has gone away."""
        self._done = True
        if self.timer is not None:
            self.timer.cancel()
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel(self.call.gone())

    def end(self, reason: ServingError) -> None:
        """Answer with an error now, whatever runs: the deadline has passed, or the server waits no longer."""
        if self._pending is not None:
            self._pending.cancel(reason)  # which replies, unless it runs already
        self.reply(reason)

    def drained(self) -> None:
        """A unary call sends one message and waits for nothing."""

    def _look(self, assembler: Assembler, end: bool) -> None:
        """Serve what has come if it is whole."""
        ready, between = len(assembler.ready), assembler.between
        if ready + (not between) > 1 or (end and not (ready and between)):
            self.reply(ServingError(Kind.UNSUPPORTED, f"this method takes one whole message, got {ready or 'none'}"))
        elif not end:
            # One message is all that comes, so its window grows by what it lacks, and in most calls never.
            if not ready and (more := assembler.missing - self._link.coming(self) - self.credit) > 0:
                self._link.grant(self, more)
        else:
            self._open(assembler.ready.popleft())

    def _serve(self, body: Body) -> None:
        pending = self._row.answer(self._link.door, body, self.call, self.reply)
        if not self._done:
            self._pending = pending

    def _open(self, message: Message) -> None:
        compressed, body = message
        if not compressed:
            self._serve(body)
            return
        arguments = (body, self._head.encoding, self._link.door.limit_bytes)
        if len(body) <= INLINE_BYTES:
            try:
                self._serve(decompress(*arguments))
            except ServingError as error:
                self.reply(error)
            return
        future = self._link.loop.run_in_executor(None, decompress, *arguments)
        future.add_done_callback(self._opened)

    def _opened(self, done: "asyncio.Future[bytes]") -> None:
        error = done.exception()
        if self._done:
            return  # the client has gone away meanwhile
        if error is None:
            self._serve(done.result())
        else:
            self.reply(failure(self._row.path, error, self.call.name))


class StreamCall(BaseCall):
    """Any number of messages either way, in a task of its own."""

    __slots__ = ("_arrived", "_fault", "_held", "_reason", "_room", "_row", "_running", "_task")

    def __init__(self, link: Link, id: int, head: Head, window: int, row: Stream[Any, Any]) -> None:
        super().__init__(link, id, head, window)
        self._assembler = Assembler(link.door.limit_bytes)
        self._row = row
        self._held = 0  # bytes of messages that were not taken yet
        self._fault: ServingError | None = None  # of what the client sends
        self._reason: ServingError | None = None  # why the call is ended from outside
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._running = False
        self._task = link.loop.create_task(self._run())

    @property
    def drains(self) -> bool:
        """Whether a server that stops waits for this call."""
        return self._row.drains

    def data(self, data: Body, end: bool) -> bool:
        """As of UnaryCall."""
        assert self._assembler is not None
        if not self._checked_length(len(data), end):
            return False
        if self._fault is None:
            try:
                self._assembler.feed(data)
            except ServingError as error:
                self._fault = error
            else:
                self._look(len(data), end)
        self._arrived.set()
        return True

    def landed(self, size: int, end: bool) -> bool:
        """As of UnaryCall."""
        assert self._assembler is not None
        if not self._checked_length(size, end):
            return False
        self._assembler.landed(size)
        self._look(size, end)
        self._arrived.set()
        return True

    def _look(self, size: int, end: bool) -> None:
        assert self._assembler is not None
        self._held += size
        if end and not self._assembler.between:
            self._fault = ServingError(Kind.INVALID, "the last message is not whole")
        elif not end:
            self._top_up()

    def cancel(self) -> None:
        """The client has gone away."""
        if self.timer is not None:
            self.timer.cancel()
        self._task.cancel()

    def end(self, reason: ServingError) -> None:
        """As of UnaryCall."""
        self._reason = reason
        self._task.cancel()
        if not self._running:  # then the task will never see it
            self._link.finish(self, reason)

    def drained(self) -> None:
        """All that was to be sent has been written."""
        self._room.set()

    async def _run(self) -> None:
        self._running = True
        error: ServingError | None = None
        try:
            async with aclosing(self._row.answers(self._link.door, self._bodies(), self.call)) as answers:
                async for answer in answers:
                    self._room.clear()
                    self._link.send(self, answer)
                    while self.out:
                        await self._room.wait()
                        self._room.clear()
        except ServingError as raised:
            error = raised
            await self._spoken()
        except asyncio.CancelledError:
            if self._reason is None:
                raise
            error = self._reason
        if self.timer is not None:
            self.timer.cancel()
        self._link.finish(self, error)

    async def _spoken(self) -> None:
        """Wait a moment for the first message: grpcio's client takes an end that comes before it for a fault."""
        assert self._assembler is not None
        if not (self._assembler.ready or self.ended or self._arrived.is_set()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SPOKEN_S):
                    await self._arrived.wait()

    async def _bodies(self) -> AsyncGenerator[Body, None]:
        assert self._assembler is not None
        ready = self._assembler.ready
        while True:
            while not ready:
                if self._fault is not None:
                    raise self._fault
                if self.ended:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            compressed, body = ready.popleft()
            self._held -= PREFIX_BYTES + len(body)
            if not self.ended:
                self._top_up()
            if compressed:
                arguments = (body, self._head.encoding, self._link.door.limit_bytes)
                body = await self._link.loop.run_in_executor(None, decompress, *arguments)
            yield body

    def _top_up(self) -> None:
        assert self._assembler is not None
        coming = self._link.coming(self)
        # While whole messages wait to be taken, the next one need not come: else each would let one more begin.
        missing = 0 if self._assembler.ready else self._assembler.missing - coming
        if more := top_up(self.credit, self._held + coming, missing):
            self._link.grant(self, more)


AnyCall: TypeAlias = UnaryCall | StreamCall
