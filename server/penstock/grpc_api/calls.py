"""A gRPC call, whichever transport carries it: the two kinds of row that serve one, and what they are given."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from enum import IntEnum
from functools import cached_property, partial
from typing import Any, Generic, Protocol, TypeVar, cast

from google.protobuf.message import DecodeError
from msgspec import Struct

from penstock.access import ID_LIMIT, Visit, names, plain
from penstock.auth import Category, Guard
from penstock.engine import Engine, Mailbox
from penstock.errors import Kind, ServingError
from penstock.forwarding import HeaderPattern
from penstock.grpc_api.bodies import Body, Encoded, length
from penstock.grpc_api.templates import Templates

logger = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Message = TypeVar("Message")

OK = "OK"  # the status of a call that did not fail
STOPPING = "GRPC server is shutting down and has stopped accepting new requests."
DETAILS_LIMIT = 2500  # bytes: percent-encoded three times that, and clients refuse trailers from 8 KiB on


class Status(IntEnum):
    """gRPC's status codes, as far as this server gives them."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


STATUS: dict[Kind, Status] = {
    Kind.INVALID: Status.INVALID_ARGUMENT,
    Kind.UNAUTHENTICATED: Status.UNAUTHENTICATED,
    Kind.FORBIDDEN: Status.PERMISSION_DENIED,
    Kind.NOT_FOUND: Status.NOT_FOUND,
    Kind.EXISTS: Status.ALREADY_EXISTS,
    Kind.TOO_LARGE: Status.RESOURCE_EXHAUSTED,
    Kind.LIMITED: Status.RESOURCE_EXHAUSTED,
    Kind.UNAVAILABLE: Status.UNAVAILABLE,
    Kind.TIMED_OUT: Status.UNAVAILABLE,
    Kind.DEADLINE: Status.DEADLINE_EXCEEDED,
    Kind.CANCELLED: Status.CANCELLED,
    Kind.UNSUPPORTED: Status.UNIMPLEMENTED,
    Kind.INTERNAL: Status.INTERNAL,
}


def details(error: ServingError) -> str:
    """The message as `grpc-message` can carry it: a longer one would cost the client the status as well."""
    return error.message.encode()[:DETAILS_LIMIT].decode(errors="ignore")


class Door:
    """What every call shares."""

    def __init__(self, engine: Engine, guard: Guard | None = None) -> None:
        """Raises ServingError(INVALID) where the header forward pattern is no regular expression."""
        self.engine = engine
        self.guard = guard
        self.access_log = engine.settings.access_log
        self.limit_bytes = engine.settings.grpc_max_message_size
        self.templates = Templates()
        self.stopping = asyncio.Event()  # nothing more is accepted: streams end once they are answered
        self.forward = HeaderPattern(engine.settings.grpc_header_forward_pattern, "--grpc-header-forward-pattern")

    @cached_property
    def mailbox(self) -> Mailbox:
        """That of the event loop which serves all calls. Kept: in Python 3.11 it takes a system call to ask for it."""
        return self.engine.mailbox()

    def admit(self, category: Category, call: "Call", keyless: bool = False) -> None:
        """Raises ServingError where the guard does not let the call pass."""
        if self.guard is not None:
            self.guard.check(category, call.find, keyless)


class Call(Struct):
    """What came beside the messages of one call."""

    metadata: Sequence[tuple[str, str | bytes]]  # keys in lower case
    deadline_ns: int = 0  # monotonic; 0 means: none
    visit: Visit | None = None  # what the access log will say, where it is on

    @property
    def id(self) -> str:
        """What the metadata call the request: what it is known by, unless it has an id of its own."""
        value = self.find("x-request-id")
        return value[:ID_LIMIT] if isinstance(value, str) else ""

    @property
    def name(self) -> str:
        """What the log calls a unary call, which may be known by its message's id; "" where it has none."""
        return self.visit.id if self.visit else self.id

    def find(self, key: str) -> str | bytes | None:
        """The first value of a key."""
        for name, value in self.metadata:
            if name == key:
                return value
        return None

    def gone(self) -> ServingError:
        """Why nobody waits for the answer any more: the deadline has passed, or else the client has cancelled."""
        if self.deadline_ns and time.monotonic_ns() >= self.deadline_ns:
            return ServingError(Kind.DEADLINE, "the deadline passed before the request was answered")
        return ServingError(Kind.CANCELLED, "the client cancelled the request")


class Cancellable(Protocol):
    """Work that a call waits for, such as a Pending."""

    def cancel(self, reason: ServingError) -> None: ...


class Unary(Struct, Generic[Request, Answer], frozen=True):
    """A row: one request, one answer.

    `serve` runs on the event loop and calls `reply` there exactly once, now or later, unless it raises. What it
    returns is cancelled when the client goes away.
    """

    path: str
    decode: Callable[[bytes], Request]  # is given any buffer, which protobuf's can read
    encode: Callable[[Answer], Encoded]
    serve: Callable[[Door, Request, Call, Callable[[Answer | ServingError], None]], Cancellable | None]
    category: Category
    keyless: bool = False  # whether callers without an API key may call it

    def answer(
        self, door: Door, body: Body, call: Call, reply: Callable[[Encoded | ServingError], None]
    ) -> Cancellable | None:
        """Serve a message: bytes in, bytes out. Never raises, and calls `reply` once on the event loop."""

        if door.access_log:
            call.visit = visit = Visit("grpc", self.path.rpartition("/")[2], self.path, call.id)
            visit.request_bytes = len(body)
            reply = partial(_noted, visit, reply)
        try:
            if door.guard is not None:
                door.admit(self.category, call, self.keyless)
            request: Any = body if self.decode is as_it_is else decoded(self.decode, body)
            return self.serve(door, request, call, partial(self._finish, door.limit_bytes, call, reply))
        except Exception as error:  # noqa: BLE001 - the client must be told of whatever it was
            reply(failure(self.path, error, call.name))
            return None

    def _finish(
        self,
        limit_bytes: int,
        call: Call,
        reply: Callable[[Encoded | ServingError], None],
        answer: Answer | ServingError,
    ) -> None:
        encoded: Encoded | ServingError
        if isinstance(answer, ServingError):
            encoded = answer
        else:
            try:
                encoded = self.encode(answer)
                if not isinstance(encoded, bytes) or len(encoded) > limit_bytes:
                    sized(encoded, limit_bytes)
            except Exception as error:  # noqa: BLE001 - as above
                encoded = failure(self.path, error, call.name)
        reply(encoded)


class Stream(Struct, Generic[Request, Answer], frozen=True):
    """A row: any number of messages either way. `serve` ends when it has answered and no more requests come.

    A client that goes away closes the iteration.
    """

    path: str
    decode: Callable[[bytes], Request]  # any buffer, in truth, as protobuf's do
    encode: Callable[[Answer], Encoded]
    serve: Callable[[Door, AsyncIterator[Request], Call], AsyncGenerator[Answer, None]]
    category: Category
    drains: bool  # whether a server that stops waits for its calls; others end at once
    keyless: bool = False  # as above

    async def answers(self, door: Door, bodies: AsyncIterator[Body], call: Call) -> AsyncGenerator[Encoded, None]:
        """Serve messages: bytes in, bytes out. Raises ServingError only. In the access log it has a line at its end."""
        visit = Visit("grpc", self.path.rpartition("/")[2], self.path, call.id) if door.access_log else None
        status: int | str = Status.CANCELLED.name
        sent = 0
        try:
            door.admit(self.category, call, self.keyless)
            async with aclosing(self.serve(door, self._messages(bodies), call)) as answers:
                async for answer in answers:
                    encoded = sized(self.encode(answer), door.limit_bytes)
                    sent += length(encoded)
                    yield encoded
            status = OK
        except ServingError as error:
            status = STATUS[error.kind].name
            raise
        except Exception as error:
            status = Status.INTERNAL.name
            raise failure(self.path, error, call.id) from error
        finally:
            if visit is not None:
                visit.end(status, sent)

    async def _messages(self, bodies: AsyncIterator[Body]) -> AsyncGenerator[Request, None]:
        async for body in bodies:
            yield decoded(self.decode, body)


def _noted(visit: Visit, reply: Callable[[Encoded | ServingError], None], answer: Encoded | ServingError) -> None:
    """Reply, and write the line of the access log."""
    reply(answer)
    if isinstance(answer, ServingError):
        visit.end(STATUS[answer.kind].name, 0)
    else:
        visit.end(OK, length(answer))


def failure(path: str, error: BaseException, id: str) -> ServingError:
    """What a client is told of an exception: ServingError as it is, anything else as INTERNAL, logged in full under the
    request's id.
    """
    if isinstance(error, ServingError):
        return error
    logger.error("%s failed on request %s", path, plain(id or "<id_unknown>"), exc_info=error, extra=names(id))
    return ServingError(Kind.INTERNAL, f"{path} failed: {type(error).__name__}: {error}")


def as_it_is(message: Message) -> Message:
    """A request for inference is parsed where it must be, and otherwise cut up; answers of streams are bytes."""
    return message


def decoded(decode: Callable[[bytes], Request], body: Body) -> Request:
    """Raises ServingError(INVALID) for bytes that are no such message."""
    try:
        return decode(cast(bytes, body))
    except DecodeError as error:
        raise ServingError(Kind.INVALID, f"malformed request message: {error}") from error


def sized(body: Encoded, limit_bytes: int) -> Encoded:
    """Raises ServingError(TOO_LARGE)."""
    if (size := length(body)) > limit_bytes:
        raise ServingError(
            Kind.TOO_LARGE,
            f"Response has byte size {size} which exceeds gRPC's byte size limit {limit_bytes}.",
        )
    return body
