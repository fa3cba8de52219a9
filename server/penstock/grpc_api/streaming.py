"""ModelStreamInfer: any number of requests and their answers over one call. Protocol page gRPC, "ModelStreamInfer"."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

from google.protobuf.message import DecodeError
from msgspec import Struct

from penstock import pb
from penstock.access import Visit
from penstock.engine import STREAM_WINDOW, OnLoop, Result, Window
from penstock.errors import Kind, ServingError
from penstock.grpc_api import tensors
from penstock.grpc_api.bodies import Body, Encoded, length
from penstock.grpc_api.calls import OK, STATUS, STOPPING, Call, Door, failure, sized
from penstock.grpc_api.infer import admitted
from penstock.messages import InferResponse
from penstock.queueing import Pending

PATH = "/inference.GRPCInferenceService/ModelStreamInfer"
# A client that sends and does not read is read no further, once so much of its stream lies here.
MOST_REQUESTS = 1024
MOST_BYTES = 64 << 20  # of requests that run and answers that wait; what runs is taken to answer as much as others did
BURST = 16  # answers at most that come before the first of them is written: short models answer while they are asked

ANSWER_TAG = bytes([pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER << 3 | 2])
FINAL = "triton_final_response"


def _flag(final: bool) -> bytes:
    """The parameter that every answer of a model bears. In bytes, messages put behind one another are one message."""
    return pb.ModelInferResponse(parameters={FINAL: pb.InferParameter(bool_param=final)}).SerializeToString()


FLAGS = (_flag(False), _flag(True))


async def stream_infer(door: Door, bodies: AsyncIterator[Body], call: Call) -> AsyncGenerator[Encoded, None]:
    """Answer requests as they come, until the client has said its last and everything is answered.

    What is refused or fails is an answer too. Raises ServingError for what a model fails with where the metadata
    `triton_grpc_error: true` ask for that, for a fault of what carries the messages, and when the server stops.
    """
    talk = Conversation(door, call)
    hearing = asyncio.create_task(talk.hear(bodies))
    stopping = asyncio.create_task(door.stopping.wait())
    for task in (hearing, stopping):
        task.add_done_callback(lambda _: talk.news.set())
    try:
        while True:
            talk.news.clear()
            while (answer := talk.next()) is not None:
                yield answer
            if hearing.done() and not hearing.cancelled():
                hearing.result()  # raises what it failed with
                if not talk.open:
                    return
            if stopping.done():
                if not talk.open:
                    raise ServingError(Kind.UNAVAILABLE, STOPPING)
                hearing.cancel()
            await talk.news.wait()
    finally:
        hearing.cancel()
        stopping.cancel()
        talk.leave(call.gone())
        await asyncio.gather(hearing, stopping, return_exceptions=True)


class Asked(Struct, eq=False):
    """A request that has not been answered for the last time."""

    id: str
    model: str = ""
    version: str = ""  # as the client said it
    empty_final: bool = False
    bytes: int = 0  # as which it counts
    pending: Pending | None = None
    window: Window | None = None  # the answers of a decoupled model
    result: Result | None = None  # the one answer of any other, or why it was refused
    began: bool = False  # it was given to the model
    visit: Visit | None = None  # where the access log is on
    sent_bytes: int = 0  # of its answers


class Conversation:
    """The requests of one stream on their way, and the answers that nobody has taken yet. Used on the event loop."""

    def __init__(self, door: Door, call: Call) -> None:
        self._door = door
        self._call = call
        self._mailbox = door.mailbox
        self._strict = call.find("triton_grpc_error") == "true"
        self._turns: deque[Asked] = deque()  # who is answered once, in the order in which they asked
        self._ready: deque[Asked] = deque()  # one entry for each answer that can be written
        self._held_bytes = 0
        self._largest = 0  # bytes of an answer
        self._room = asyncio.Event()
        self.open: set[Asked] = set()
        self.news = asyncio.Event()  # there may be an answer, or no more to come

    async def hear(self, bodies: AsyncIterator[Body]) -> None:
        """Take requests as long as there is room for what they bring about."""
        async for body in bodies:
            self._ask(body)
            while self._is_full():
                self._room.clear()
                await self._room.wait()
            if len(self._ready) >= BURST:
                await asyncio.sleep(0)

    def next(self) -> Encoded | None:
        """An answer to write; None where there is none. Raises ServingError where that ends the stream."""
        while self._ready:
            asked = self._ready.popleft()
            result, final, progress = (asked.result, True, False) if asked.window is None else asked.window.take()
            assert result is not None
            if final:
                self._close(asked)
            if progress:
                continue
            strict = self._strict and asked.began and isinstance(result, ServingError)
            answer = None if strict else self._written(asked, result, final)
            if asked.visit is not None:
                asked.sent_bytes += 0 if answer is None else length(answer)
                if final:
                    _note(asked, result if isinstance(result, ServingError) else None)
            if strict:
                assert isinstance(result, ServingError)
                raise result
            if answer is not None:
                return answer
        return None

    def leave(self, reason: ServingError) -> None:
        """Nobody waits any more: what is queued is dropped at once, what runs is told."""
        for asked in list(self.open):
            pending, asked.pending = asked.pending, None
            if pending is not None:
                pending.cancel(reason)
            if asked.window is not None:
                asked.window.open_wide()
            _note(asked, reason)

    def _ask(self, body: Body) -> None:
        """Hand a request to its model, or answer why not."""
        engine = self._door.engine
        asked = Asked("", bytes=max(len(body), self._largest))
        if self._door.access_log:
            asked.visit = self._call.visit = Visit("grpc", "ModelStreamInfer", PATH, request_bytes=len(body))
        self.open.add(asked)
        self._held_bytes += asked.bytes
        try:
            model, request = admitted(self._door, body, self._call, decoupled=True)
        except Exception as error:  # noqa: BLE001 - the client must be told of whatever it was
            asked.id = _id(body)
            self._turns.append(asked)
            self._answered(asked, failure(PATH, error, asked.id or self._call.id))
            return
        asked.id, asked.model, asked.version = request.id, request.model, request.version
        asked.empty_final = request.empty_final
        asked.began = True
        if model.decoupled:
            asked.window = Window(self._mailbox, STREAM_WINDOW, partial(self._came, asked))
        else:
            self._turns.append(asked)
        try:
            reply = asked.window or OnLoop(self._mailbox, partial(self._answered, asked))
            asked.pending = engine.submit(model, request, reply)
        except Exception as error:  # noqa: BLE001 - as above
            asked.began = False
            if asked.window is None:
                self._answered(asked, failure(PATH, error, asked.id))
            else:
                asked.window, asked.result = None, failure(PATH, error, asked.id)
                self._came(asked)
        if asked.result is not None:
            asked.pending = None  # it leads back here through its reply: all would wait for a collection

    def _answered(self, asked: Asked, result: Result) -> None:
        """The one answer to a request has come: it leaves once those before it have."""
        asked.result = result
        asked.pending = None
        if isinstance(result, InferResponse):
            size = sum(tensor.array.nbytes for tensor in result.outputs)
            self._largest = max(self._largest, size)
            self._held_bytes += size - asked.bytes
            asked.bytes = size
        while self._turns and self._turns[0].result is not None:
            self._came(self._turns.popleft())

    def _came(self, asked: Asked) -> None:
        self._ready.append(asked)
        self.news.set()

    def _close(self, asked: Asked) -> None:
        asked.pending = None
        self.open.discard(asked)
        self._held_bytes -= asked.bytes
        self._room.set()

    def _is_full(self) -> bool:
        return len(self.open) >= MOST_REQUESTS or (self._held_bytes >= MOST_BYTES and len(self.open) > 0)

    def _written(self, asked: Asked, result: Result, final: bool) -> Encoded | None:
        """An answer in bytes; None for the end of a request that nobody wants to be told of."""
        if isinstance(result, InferResponse) and final and asked.window is not None and not result.outputs:
            if not asked.empty_final:
                return None
            result = InferResponse(asked.model, asked.version, asked.id, [])
        try:
            if isinstance(result, InferResponse):
                return sized(_success(result, final), self._door.limit_bytes)
        except Exception as error:  # noqa: BLE001 - whatever cannot be sent fails alone
            result = failure(PATH, error, asked.id)
        return _error(asked, result, final)


def _success(response: InferResponse, final: bool) -> Encoded:
    """A ModelStreamInferResponse: the head of its one field, then the bytes of the answer."""
    answer = tensors.encode(response)
    flag = FLAGS[final]
    head = ANSWER_TAG + tensors.varint(len(flag) + length(answer)) + flag
    return head + answer if isinstance(answer, bytes) else [head, *answer]


def _error(asked: Asked, error: ServingError, final: bool) -> bytes:
    """What a client is told; of a request that its model never saw, the id alone beside it."""
    answer = pb.ModelInferResponse(id=asked.id)
    if asked.began:
        answer.model_name, answer.model_version = asked.model, asked.version
        answer.parameters[FINAL].bool_param = final
    return pb.ModelStreamInferResponse(error_message=error.message, infer_response=answer).SerializeToString()


def _note(asked: Asked, error: ServingError | None) -> None:
    """Write the line of the access log, where that is on."""
    if asked.visit is not None:
        asked.visit.id = asked.visit.id or asked.id
        asked.visit.end(OK if error is None else STATUS[error.kind].name, asked.sent_bytes)


def _id(body: Body) -> str:
    """Of a request that was refused; "" where its bytes are no message."""
    try:
        return pb.ModelInferRequest.FromString(bytes(body)).id
    except DecodeError:
        return ""
