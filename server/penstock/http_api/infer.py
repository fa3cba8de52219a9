"""All that an inference over HTTP means, whatever brings its bytes. Protocol page HTTP, section 3."""

import asyncio
import functools
import re
from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any
from urllib.parse import unquote_to_bytes

from msgspec import Struct

from penstock import oip_json
from penstock.access import ID_LIMIT, Visit, as_header, new_id
from penstock.auth import Category, Guard
from penstock.engine import Engine, Mailbox, Result
from penstock.errors import Kind, ServingError
from penstock.forwarding import HeaderPattern
from penstock.http_api import coding
from penstock.http_api.answers import Answer, Headers, Reply, answer, failed, failure, headers
from penstock.http_api.templates import Heads, Templates
from penstock.messages import InferRequest
from penstock.model import Model
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Credit
from penstock.settings import Settings
from penstock.tensor import BYTES

COMPRESSED_FROM = 16 << 10  # bytes: shorter JSON is sent as it is, unless every answer is to be compressed
LONG_JSON = 256 << 10  # bytes: read in 5 to 20 ms, against 0.1 ms for the way to a thread and back
LONG_TEXT = 1 << 20  # bytes of a body with BYTES tensors
INT32_END = 2**31
UNREAD = INT32_END  # more than a header can say
NO_FORMS = oip_json.Forms()
BEFORE = b"inference-header-content-length"
REQUEST_ID = b"x-request-id"  # what a client calls its request; the answer repeats it
_NUMBER = re.compile(rb"[ \t]*[+-]?[0-9]+")


class Door:
    """What every request over HTTP shares."""

    __slots__ = (
        "access_log", "compression", "engine", "forward", "guard", "heads", "limits", "non_finite", "templates",
    )  # fmt: skip

    def __init__(self, engine: Engine, settings: Settings, guard: Guard | None = None) -> None:
        """Raises ServingError(INVALID) where the header forward pattern is no regular expression."""
        self.engine = engine
        self.guard = guard
        self.limits = oip_json.Limits(settings.http_max_input_size, settings.max_tensors, settings.max_rank)
        self.access_log = settings.access_log
        self.non_finite = settings.json_non_finite
        self.compression = settings.http_response_compression
        self.templates = Templates(settings.http_max_input_size)
        self.heads = Heads()
        self.forward = HeaderPattern(settings.http_header_forward_pattern, "--http-header-forward-pattern")

    def head(self, model: str, version: str, headers: Mapping[bytes, bytes]) -> "Head":
        """The head of an inference. Raises ServingError where its sender may not infer: no body need be read then."""
        self.admit(Category.INFERENCE, headers)
        return Head(model, version, headers)

    def admit(self, category: Category | None, headers: Mapping[bytes, bytes], keyless: bool = False) -> None:
        """Raises ServingError where the guard does not let the request pass."""
        if self.guard is not None:
            self.guard.check(category, lambda name: headers.get(name.encode()), keyless)


class Head(Struct):
    """What came before the body, from `Door.head`. The method has been checked: it is POST."""

    model: str
    version: str  # "" where the path names none
    headers: Mapping[bytes, bytes]  # names in lower case
    # What they say, for one head may serve many requests.
    given_id: bytes | None = None
    id: str = ""  # the same, as far as it is used
    encoding: bytes = b""
    json_bytes: int | None = UNREAD  # before binary tensors; None where no header says so

    def __post_init__(self) -> None:
        self.given_id = self.headers.get(REQUEST_ID)
        self.id = self.given_id.decode("latin-1")[:ID_LIMIT] if self.given_id else ""
        self.encoding = self.headers.get(b"content-encoding", b"").lower()


class Exchange(Struct, eq=False):
    """One inference on its way. Used on the event loop's thread only, but for its call: it is the model's reply."""

    _door: Door
    _head: Head
    _reply: Reply
    _mailbox: Mailbox
    _id: str  # the head's, unless the body says another
    _forms: oip_json.Forms  # as far as they are known
    answered: bool = False  # it has been
    _pending: Pending | None = None
    _cancelled: ServingError | None = None
    _visit: Visit | None = None

    def log(self, request_bytes: int) -> None:
        """Have a line in the access log once this is answered."""
        self._id = self._id or new_id()
        self._visit = _visit(self._head)
        self._visit.request_bytes = request_bytes

    def cancel(self, reason: ServingError) -> None:
        """Nobody waits for the answer any more. It is given all the same: `reason`, or what is under way already."""
        self._cancelled = reason
        if self._pending is not None:
            self._pending.cancel(reason)

    def inflate(self, model: Model, body: bytes | memoryview) -> None:
        """As `submit`, of a body that is compressed. Off the event loop: a short one may become long."""
        loop = asyncio.get_running_loop()
        inflating = loop.run_in_executor(None, coding.decompress, body, self._door.limits.input_bytes)
        inflating.add_done_callback(functools.partial(self._go_on, self._inflated, model))

    def _inflated(self, model: Model, body: bytes) -> None:
        if self._cancelled is not None:
            self.fail(self._cancelled)  # raised, it would hold this frame
            return
        self.submit(model, body)

    def submit(self, model: Model, body: bytes | memoryview) -> None:
        """Read the body and give what it asks for to the model. What this raises is to become the answer."""
        door = self._door
        json_bytes = self._head.json_bytes
        if json_bytes == UNREAD:
            json_bytes = self._head.json_bytes = _header_length(self._head.headers.get(BEFORE))
        if json_bytes is not None and not 0 <= json_bytes <= len(body):
            raise ServingError(
                Kind.INVALID, f"inference header size should be in range (0, {len(body)}), got: {json_bytes}"
            )
        # Where headers are forwarded, every request may have parameters of its own.
        before = 0 if door.forward.any or json_bytes is None else json_bytes
        known = door.templates.read(model, body, before) if before else None
        if known is not None:
            request, self._forms = known
            request.id = self._id = request.id or self._id
            pending = door.engine.submit(model, request, self)
            if not self.answered:
                self._pending = pending
        elif _is_long(model, len(body), json_bytes):
            # Beside the event loop, which others wait for.
            reading = asyncio.get_running_loop().run_in_executor(None, self._read, model, body, json_bytes)
            reading.add_done_callback(functools.partial(self._go_on, self._was_read, model))
        else:
            decoded, request = self._read(model, body, json_bytes)
            if before:
                door.templates.learn(model, body, before, decoded, request)
            self._run_on(model, request)

    def _read(
        self, model: Model, body: bytes | memoryview, json_bytes: int | None
    ) -> tuple[oip_json.Decoded, InferRequest]:
        door = self._door
        decoded = oip_json.decode(model.signature, body, json_bytes, door.limits)
        self._id = decoded.id or self._id
        self._forms = decoded.forms
        if door.forward.any:
            decoded.parameters.update(door.forward.chosen(self._head.headers.items()))
        request = decoded.admitted(model.signature, model.version)
        request.id = self._id
        return decoded, request

    def _was_read(self, model: Model, read: tuple[oip_json.Decoded, InferRequest]) -> None:
        if self._cancelled is not None:
            self.fail(self._cancelled)
            return
        self._run_on(model, read[1])

    def _run_on(self, model: Model, request: InferRequest) -> None:
        pending = self._door.engine.submit(model, request, self)
        if not self.answered:
            self._pending = pending

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        """The model's reply, on any thread."""
        if not final or partial:
            return PLENTY
        if get_ident() != self._mailbox.thread:
            self._mailbox.post(functools.partial(self, result))
            return PLENTY
        door = self._door
        try:
            if isinstance(result, ServingError):
                self.fail(result)
                return PLENTY
            json_bytes, buffers = door.heads.encode(result, self._forms, door.non_finite)
            if (json_bytes is None or door.compression == "on") and self._deflates(json_bytes, buffers):
                return PLENTY
            if json_bytes is None:
                self.answer(answer(200, buffers))
            else:
                self.answer((200, _binary_headers(json_bytes, sum(map(len, buffers))), buffers))
        except Exception as error:  # noqa: BLE001 - as in `serve_infer`
            self.fail(error)
        return PLENTY

    def _go_on(self, step: Callable[..., None], *arguments: Any) -> None:
        """Take a further step, as `serve_infer`. The last argument is the future of what a thread came to."""
        *known, done = arguments
        try:
            # Raised here, it would hold this frame and so the future, which holds it: the body would wait for a
            # collection.
            if (error := done.exception()) is not None:
                self.fail(error)
            else:
                step(*known, done.result())
        except Exception as error:  # noqa: BLE001 - as above
            self.fail(error)

    def _deflates(self, json_bytes: int | None, buffers: list[bytes | memoryview]) -> bool:
        """Whether the answer is to be compressed, which has begun then."""
        compression = self._door.compression
        if compression == "off" or (compression == "auto" and len(buffers[0]) <= COMPRESSED_FROM):
            return False
        chosen = coding.choose(self._head.headers.get(b"accept-encoding", b""))
        if chosen == coding.IDENTITY:
            return False
        deflating = asyncio.get_running_loop().run_in_executor(None, coding.compress, buffers, chosen)
        deflating.add_done_callback(functools.partial(self._go_on, self._deflated, json_bytes, chosen))
        return True

    def _deflated(self, json_bytes: int | None, chosen: bytes, body: bytes) -> None:
        encoding = (b"content-encoding", chosen)
        if json_bytes is None:
            self.answer(answer(200, [body], encoding))
        else:
            self.answer((200, [*_binary_headers(json_bytes, len(body)), encoding], [body]))

    def fail(self, error: Exception) -> None:
        """Answer with what went wrong."""
        self.answer(failure(error, self._id))

    def answer(self, answer: Answer) -> None:
        """Send this, unless it has been answered."""
        if not self.answered:
            self.answered = True
            self._pending = None  # it leads back here through its reply: body and outputs would wait for a collection
            status, headers, body = answer
            given = self._head.given_id
            if self._visit is not None:
                self._visit.id = self._id
                given = given or as_header(self._id)
            self._reply(status, [*headers, (REQUEST_ID, given)] if given else headers, body)
            if self._visit is not None:
                self._visit.end(status, sum(map(len, body)))


def _visit(head: Head) -> Visit:
    version = f"/versions/{head.version}" if head.version else ""
    return Visit("http", "POST", f"/v2/models/{head.model}{version}/infer", model=head.model, version=head.version)


def infer_target(path: bytes) -> tuple[str, str] | None:
    """Model and version ("" where there is none) of a path that is an inference's; None for any other."""
    if not path.endswith(b"/infer") or not path.startswith(b"/v2/models/"):
        return None
    parts = path.split(b"/")
    if not parts[3] or not (len(parts) == 5 or (len(parts) == 7 and parts[4] == b"versions" and parts[5].isdigit())):
        return None
    name = unquote_to_bytes(parts[3]) if b"%" in parts[3] else parts[3]
    return name.decode(errors="replace"), parts[5].decode() if len(parts) == 7 else ""


def _is_long(model: Model, body_bytes: int, json_bytes: int | None) -> bool:
    """Whether reading a body would hold up others: much JSON, or much text. Binary numbers are only viewed."""
    if body_bytes <= LONG_JSON:
        return False
    if (body_bytes if json_bytes is None else json_bytes) > LONG_JSON:
        return True
    return body_bytes > LONG_TEXT and any(spec.datatype is BYTES for spec in model.signature.inputs.values())


def serve_infer(
    door: Door, head: Head, body: bytes | memoryview, reply: Reply, mailbox: Mailbox | None = None
) -> Exchange | None:
    """Serve one inference. Called on the event loop; `reply` is called there exactly once, perhaps before this returns.

    `reply(status, headers, buffers)` must not raise. `mailbox` is the event loop's, for who has it at hand. Returns
    what a client that goes away cancels; None if the answer has been given.
    """
    exchange = Exchange(door, head, reply, mailbox or door.engine.mailbox(), head.id, NO_FORMS)
    if door.access_log:
        exchange.log(len(body))
    try:  # the checks in the protocol's order (3.2)
        model = door.engine.lifecycle.get(head.model, head.version)
        if model.decoupled:
            raise ServingError(
                Kind.UNSUPPORTED, "HTTP end point doesn't support models with decoupled transaction policy"
            )
        encoding = head.encoding
        if not encoding or encoding == coding.IDENTITY:
            exchange.submit(model, body)
        elif encoding in coding.CODINGS:
            exchange.inflate(model, body)
        else:
            exchange.answer(failed(501, "Unsupported compression type", (b"accept-encoding", b"gzip, deflate")))
    except Exception as error:  # noqa: BLE001 - the client must be told of whatever it was
        exchange.fail(error)
    return None if exchange.answered else exchange


@functools.lru_cache(1024)
def _binary_headers(json_bytes: int, length: int) -> Headers:
    """Not to be changed: most answers share them with earlier ones."""
    return headers(length, (BEFORE, b"%d" % json_bytes), content_type=b"application/octet-stream")


def _header_length(value: bytes | None) -> int | None:
    """Inference-Header-Content-Length, read as C's `stoi` does: what follows the digits is ignored."""
    if value is None:
        return None
    match = _NUMBER.match(value)
    text = value.decode("latin-1")
    if match is None:
        raise ServingError(Kind.INVALID, f"Unable to parse Inference-Header-Content-Length, got: {text}")
    # Ten digits hold every int32; of absurdly many, no number need be made.
    length = int(match[0]) if len(match[0].strip()) <= 20 else INT32_END
    if not -INT32_END <= length < INT32_END:
        raise ServingError(
            Kind.INVALID,
            "Unable to parse Inference-Header-Content-Length, value is out of range "
            f"[ {-INT32_END}, {INT32_END - 1} ], got: {text}",
        )
    return length
