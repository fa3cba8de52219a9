"""The HTTP door: in process where a call and its answer are the fact, over a real socket where the wire is."""

import asyncio
import functools
import gc
import gzip
import socket
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
import uvloop
from penstock import pb
from penstock.auth import Guard
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.http_api import Door, Exchange, Head, HttpApp, coding, make_server, serve_infer
from penstock.http_api.answers import STATUS, Body, Headers
from penstock.http_api.connection import MAX_CHUNKS, LimitedProtocol
from penstock.http_api.infer import LONG_JSON
from penstock.lifecycle import Lifecycle
from penstock.messages import InferRequest, InferResponse
from penstock.model import Loaded, Model
from penstock.model_config import signature
from penstock.runtime import Cancelled, ModelFiles, Reply
from penstock.settings import Settings
from penstock.tensor import Tensor

LIMIT_S = 20.0  # of a whole test: nothing in it takes long, but a lost answer must not hang it
JSON = b"application/json"
PATH = "/v2/models/m/infer"


class Doubler:
    """A model instance: Y = 2 A, and the request's parameters as the response's."""

    max_in_flight = 1
    inputs_ready_ns = 0
    outputs_came_ns = 0
    streams = False

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.seen: list[InferRequest] = []

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        self.inputs_ready_ns = self.outputs_came_ns = time.monotonic_ns()
        self.seen.extend(batch)
        return [self.answer(request) for request in batch]

    def answer(self, request: InferRequest) -> InferResponse | ServingError:
        given = request.inputs["A"]
        outputs = [Tensor("Y", given.datatype, given.array * 2)]
        return InferResponse(request.model, request.version, request.id, outputs, dict(request.parameters))

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        raise AssertionError("not a streaming model")

    def close(self) -> None:
        """There is nothing to release."""


class Gated(Doubler):
    """Runs only while its gate is open, on its worker's thread."""

    def __init__(self) -> None:
        super().__init__(device="cuda:0")  # such an instance never runs inline
        self.entered = threading.Event()
        self.gate = threading.Event()

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        self.entered.set()
        assert self.gate.wait(LIMIT_S)
        return super().execute(batch)


class Failing(Doubler):
    """Fails with what it is given, or answers with what cannot be encoded."""

    def __init__(self, failure: Exception | Any) -> None:
        super().__init__(device="cuda:0")
        self.failure = failure

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        if isinstance(self.failure, Exception):
            raise self.failure
        return [InferResponse("m", "1", request.id, self.failure) for request in batch]


def model(name: str, instance: Doubler, decoupled: bool = False) -> Model:
    config = pb.ModelConfig(
        name=name,
        backend="double",
        input=[pb.ModelInput(name="A", data_type=pb.TYPE_INT32, dims=[-1])],
        output=[pb.ModelOutput(name="Y", data_type=pb.TYPE_INT32, dims=[-1])],
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=decoupled),
    )
    loaded = Model(Loaded(ModelFiles(name, 1, Path("/"), Path("/1")), config, signature(config), 0.0), [instance])
    instance.seen.clear()  # of what it was probed with
    return loaded


class Shelf(Lifecycle):
    """A lifecycle whose models were made by hand."""

    def __init__(self, settings: Settings, models: Sequence[Model]) -> None:
        super().__init__(settings)
        self.shelf = {model.name: model for model in models}
        self.fault: Exception | None = None

    def get(self, name: str, version: str = "") -> Model:
        if self.fault is not None:
            raise self.fault
        found = self.shelf.get(name)
        return found if found is not None and version in ("", found.version) else super().get(name, version)

    def ready_versions(self, name: str) -> list[str]:
        return [self.shelf[name].version] if name in self.shelf else []

    def is_live(self) -> bool:
        return True

    def is_ready(self) -> bool:
        return self.fault is None


@dataclass(slots=True)
class Got:
    """An answer."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> tuple[int, str]:
        assert self.headers[b"content-type"] == JSON
        return self.status, self.json["error"]


class Client:
    """Calls an application as a server would, one request at a time."""

    def __init__(self, *models: Model, guard: Guard | None = None, **options: Any) -> None:
        self.settings = Settings(**options)
        self.engine = Engine(self.settings)
        self.engine.lifecycle = self.shelf = Shelf(self.settings, models)
        self.app = HttpApp(self.engine, self.settings, guard)
        self.stop: Callable[[], object] = list  # on the wire, tells the server to

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[bytes, bytes] | None = None,
        receive: Callable[[], Awaitable[dict[str, Any]]] | None = None,
    ) -> Got:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole() -> dict[str, Any]:
            if not messages:
                await asyncio.Event().wait()  # the client stays
            return messages.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": list((headers or {}).items()),
        }
        await asyncio.wait_for(self.app(scope, receive or whole, send), LIMIT_S)
        if not sent:
            return Got(0, {}, b"")
        start, content = sent
        got_headers = dict(start["headers"])
        if method != "HEAD":
            assert int(got_headers[b"content-length"]) == len(content["body"])
        return Got(start["status"], got_headers, content["body"])

    def __call__(self, method: str, path: str, body: bytes = b"", headers: dict[bytes, bytes] | None = None) -> Got:
        return asyncio.run(self.call(method, path, body, headers))

    def infer(
        self, body: Any = None, headers: dict[bytes, bytes] | None = None, path: str = "/v2/models/m/infer"
    ) -> Got:
        return self("POST", path, body if isinstance(body, bytes) else orjson.dumps(body or INFER), headers)


INFER: dict[str, Any] = {"inputs": [{"name": "A", "shape": [2], "datatype": "INT32", "data": [1, 2]}]}
OUTPUT = {"name": "Y", "datatype": "INT32", "shape": [2], "data": [2, 4]}


def wide(count: int) -> dict[str, Any]:
    """A request whose answer is JSON of more than 2 * count bytes."""
    return {"inputs": [{"name": "A", "shape": [count], "datatype": "INT32", "data": [5] * count}]}


@pytest.fixture
def client() -> Client:
    return Client(model("m", Doubler()))


# -- inference


@pytest.mark.parametrize("path", ["/v2/models/m/infer", "/v2/models/m/versions/1/infer", "/v2/models/%6d/infer?x=y"])
def test_json_goes_in_and_out(client: Client, path: str) -> None:
    got = client.infer({"id": "w", **INFER}, path=path.partition("?")[0])
    assert (got.status, got.headers[b"content-type"]) == (200, JSON)
    assert got.json == {"id": "w", "model_name": "m", "model_version": "1", "outputs": [OUTPUT]}


def test_binary_goes_in_and_out(client: Client) -> None:
    head = orjson.dumps(
        {
            "inputs": [{"name": "A", "shape": [2], "datatype": "INT32", "parameters": {"binary_data_size": 8}}],
            "parameters": {"binary_data_output": True},
        }
    )
    got = client.infer(head + struct.pack("<2i", 1, 2), {b"inference-header-content-length": b"%d" % len(head)})
    assert (got.status, got.headers[b"content-type"]) == (200, b"application/octet-stream")
    length = int(got.headers[b"inference-header-content-length"])
    assert orjson.loads(got.body[:length])["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert got.body[length:] == struct.pack("<2i", 2, 4)


def test_a_raw_body_is_answered_in_binary(client: Client) -> None:
    got = client.infer(struct.pack("<i", 4), {b"inference-header-content-length": b"0"})
    assert got.body.endswith(b"}]}" + struct.pack("<i", 8))
    assert client.infer(b"").json["outputs"][0]["shape"] == [0]


def test_a_worker_answers_through_the_event_loop() -> None:
    gated = Gated()
    gated.gate.set()
    assert Client(model("m", gated)).infer().json["outputs"] == [OUTPUT]


def test_an_output_may_be_classified(client: Client) -> None:
    got = client.infer({**INFER, "outputs": [{"name": "Y", "parameters": {"classification": 1}}]})
    assert got.json["outputs"] == [{"name": "Y", "datatype": "BYTES", "shape": [1], "data": ["4:1"]}]


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_of_failure_has_a_status(kind: Kind) -> None:
    got = Client(model("m", Failing(ServingError(kind, "why")))).infer()
    assert got.error == (STATUS[kind], "why")
    assert got.headers.get(b"retry-after") == (b"1" if got.status in (429, 503) else None)
    assert got.headers.get(b"www-authenticate") == (b"Bearer" if kind is Kind.UNAUTHENTICATED else None)


def test_the_statuses_are_those_of_the_protocol() -> None:
    assert {kind.name: status for kind, status in STATUS.items()} == {
        "INVALID": 400, "UNAUTHENTICATED": 401, "FORBIDDEN": 403, "NOT_FOUND": 404, "EXISTS": 400, "TOO_LARGE": 413,
        "LIMITED": 429, "UNAVAILABLE": 503, "TIMED_OUT": 503, "DEADLINE": 504, "CANCELLED": 499, "UNSUPPORTED": 501,
        "INTERNAL": 500,
    }  # fmt: skip


def test_an_answer_that_cannot_be_encoded_is_logged_and_told_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    got = Client(model("m", Failing(["no tensor"]))).infer({"id": "w9", **INFER})
    assert got.error == (500, "[request id: w9] internal error: AttributeError; the server's log says more")
    [record] = caplog.records
    assert record.getMessage() == "request w9 failed"
    assert record.__dict__["request_id"] == "w9"
    assert record.exc_info is not None


@pytest.mark.parametrize(
    ("path", "body", "headers", "expected"),
    [
        ("/v2/models/nope/infer", b"{", {}, (404, "Request for unknown model: 'nope' is not found")),
        ("/v2/models/n%C3%A4%2Fpe/infer", b"{", {}, (404, "Request for unknown model: 'nä/pe' is not found")),
        (
            "/v2/models/m/infer",
            b"{",
            {},
            (400, "failed to parse the request JSON buffer: Missing a name for object member. at 1"),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"content-encoding": b"br", b"inference-header-content-length": b"x"},
            (501, "Unsupported compression type"),
        ),
        ("/v2/models/m/infer", b"", {b"content-encoding": b"gzip"}, (400, "nothing to be decompressed")),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"content-encoding": b"gzip"},
            (400, "encountered inconsistent stream state during decompression"),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b"x"},
            (400, "Unable to parse Inference-Header-Content-Length, got: x"),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b""},
            (400, "Unable to parse Inference-Header-Content-Length, got: "),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b"9" * 5000},
            (
                400,
                "Unable to parse Inference-Header-Content-Length, value is out of range "
                f"[ -2147483648, 2147483647 ], got: {'9' * 5000}",
            ),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b"3"},
            (400, "inference header size should be in range (0, 2), got: 3"),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b"-1"},
            (400, "inference header size should be in range (0, 2), got: -1"),
        ),
        (
            "/v2/models/m/infer",
            b"{}",
            {b"inference-header-content-length": b"2x"},
            (400, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
        ),
    ],
)
def test_a_request_at_fault_is_told_why(
    client: Client, path: str, body: bytes, headers: dict[bytes, bytes], expected: tuple[int, str]
) -> None:
    assert client.infer(body, headers, path).error == expected


def test_the_codings_that_are_understood_are_named(client: Client) -> None:
    got = client.infer(INFER, {b"content-encoding": b"gzip, deflate"})
    assert (got.status, got.headers[b"accept-encoding"]) == (501, b"gzip, deflate")


def test_a_decoupled_model_is_not_for_infer() -> None:
    text = "HTTP end point doesn't support models with decoupled transaction policy"
    assert Client(model("m", Doubler(), decoupled=True)).infer(b"{").error == (501, text)


def test_a_version_out_of_range_is_refused(client: Client) -> None:
    status, message = client.infer(path=f"/v2/models/m/versions/{2**63}/infer").error
    assert status == 400
    assert message.startswith(f"failed to get model version from specified version string '{2**63}' (details: sto")


def test_limits_are_statuses_of_their_own() -> None:
    client = Client(model("m", Doubler()), http_max_input_size=100, http_max_body_size=200)
    size = len(orjson.dumps(wide(60)))
    assert client.infer(wide(60)).error == (
        413,
        f"request JSON size of {size} bytes exceeds the maximum allowed input size of 100 bytes. "
        "Use --http-max-input-size to increase the limit.",
    )
    assert client.infer(bytes(201)).error == (
        413,
        "request body of at least 201 bytes exceeds the maximum allowed body size of 200 bytes. "
        "Use --http-max-body-size to increase the limit.",
    )
    # The names of codings know no case: RFC 9110, 8.4.1.
    assert client.infer(gzip.compress(bytes(101)), {b"content-encoding": b"GZip"}).error == (
        413,
        "Decompressed data size exceeds the maximum allowed value of 100 bytes. "
        "Use --http-max-input-size to increase the limit.",
    )


def test_a_body_that_is_declared_too_long_is_not_received(client: Client) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    headers = {b"content-length": b"3000000000", b"expect": b"100-continue"}
    got = asyncio.run(client.call("POST", "/v2/models/m/infer", headers=headers, receive=receive))
    assert got.error == (
        413,
        "request body of 3000000000 bytes exceeds the maximum allowed body size of 2147483647 bytes. "
        "Use --http-max-body-size to increase the limit.",
    )
    assert got.headers[b"connection"] == b"close"


def test_headers_are_forwarded_as_parameters() -> None:
    client = Client(model("m", Doubler()), http_header_forward_pattern="my_|priority")
    assert client.infer(INFER, {b"x-my_key": b"v", b"other": b"w"}).json["parameters"] == {"x-my_key": "v"}
    text = "Header 'priority' is reserved for Triton usage and cannot be forwarded."
    assert client.infer(INFER, {b"priority": b"1"}).error == (400, text)


@pytest.mark.parametrize(("pattern", "forwarded"), [("MY", True), ("(?-i)MY", False), ("(?-i)my", True)])
def test_case_counts_in_a_forward_pattern_only_where_it_says_so(pattern: str, forwarded: bool) -> None:
    client = Client(model("m", Doubler()), http_header_forward_pattern=pattern)
    assert ("parameters" in client.infer(INFER, {b"my-key": b"v"}).json) is forwarded


def test_a_forward_pattern_must_be_a_regular_expression() -> None:
    with pytest.raises(ServingError, match="--http-header-forward-pattern is no regular expression"):
        Client(http_header_forward_pattern="(")


# -- compression


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
@pytest.mark.parametrize("label", [b"gzip", b"deflate"])
def test_a_compressed_body_is_read_whatever_its_label(
    client: Client, pack: Callable[[bytes], bytes], label: bytes
) -> None:
    assert client.infer(pack(orjson.dumps(INFER)), {b"content-encoding": label}).json["outputs"] == [OUTPUT]


def test_the_header_length_of_a_compressed_body_counts_what_is_in_it(client: Client) -> None:
    body = orjson.dumps(INFER)
    headers = {b"content-encoding": b"gzip", b"inference-header-content-length": b"%d" % len(body)}
    assert client.infer(gzip.compress(body), headers).json["outputs"] == [OUTPUT]


def test_a_bomb_is_not_inflated_past_the_limit() -> None:
    with pytest.raises(ServingError) as caught:
        coding.decompress(zlib.compress(bytes(10_000_000)), 1000)
    assert caught.value.kind is Kind.TOO_LARGE
    assert coding.decompress(gzip.compress(b"a" * 999) + gzip.compress(b"b"), 1000) == b"a" * 999 + b"b"


@pytest.mark.parametrize("data", [gzip.compress(b"text")[:-1], gzip.compress(b"text") + b"x", b"text"])
def test_a_stream_must_be_whole(data: bytes) -> None:
    with pytest.raises(ServingError, match="inconsistent stream"):
        coding.decompress(data, 1000)


@pytest.mark.parametrize("data", [gzip.compress(b"text")[:-1], b"text"])
def test_a_stream_that_is_not_whole_is_forgotten(data: bytes) -> None:
    """Else what clients send would fill the memory, a body at a time."""
    body = memoryview(data)
    known = weakref.ref(body)
    with pytest.raises(ServingError, match="inconsistent stream"):
        coding.decompress(body, 1000)
    del body
    gc.collect()
    assert known() is None


@pytest.mark.parametrize(
    ("accepted", "coding_chosen"),
    [
        (b"", b"identity"),
        (b"gzip", b"gzip"),
        (b"deflate, gzip", b"deflate"),
        (b"gzip;q=0.5, deflate;q=0.8, identity;q=0.1", b"deflate"),
        (b"gzip;q=0.5,identity", b"identity"),
        (b"gzip;q=0", b"identity"),
        (b"gzip;q=x, deflate;q=0.1", b"deflate"),
        (b"br, *", b"identity"),
        (b"gzip; q=1.0", b"gzip"),
        (b"gzip ;q=0.2\t, deflate ; Q=0.9", b"deflate"),
        (b"gzip; q=0", b"identity"),
    ],
)
def test_the_coding_is_the_one_that_weighs_most(accepted: bytes, coding_chosen: bytes) -> None:
    assert coding.choose(accepted) == coding_chosen


@pytest.mark.parametrize(
    ("option", "count", "binary", "compressed"),
    [
        ("auto", 10_000, False, True),
        ("auto", 1_000, False, False),
        ("auto", 10_000, True, False),
        ("on", 1, False, True),
        ("on", 10_000, True, True),
        ("off", 10_000, False, False),
    ],
)
def test_an_answer_is_compressed_as_the_option_says(option: str, count: int, binary: bool, compressed: bool) -> None:
    client = Client(model("m", Doubler()), http_response_compression=option)
    body = {**wide(count), "parameters": {"binary_data_output": binary}}
    plain = client.infer(body)
    got = client.infer(body, {b"accept-encoding": b"gzip"})
    assert got.headers.get(b"content-encoding") == (b"gzip" if compressed else None)
    assert (gzip.decompress(got.body) if compressed else got.body) == plain.body
    assert got.headers.get(b"inference-header-content-length") == plain.headers.get(b"inference-header-content-length")
    assert (b"inference-header-content-length" in got.headers) is binary


def test_errors_are_never_compressed() -> None:
    client = Client(model("m", Doubler()), http_response_compression="on")
    assert b"content-encoding" not in client.infer(b"{", {b"accept-encoding": b"gzip"}).headers


# -- going away


def test_a_disconnect_cancels_the_request_that_waits() -> None:
    gated = Gated()
    client = Client(model("m", gated))

    async def run() -> Got:
        messages: Iterator[dict[str, Any]] = iter(
            [
                {"type": "http.request", "body": orjson.dumps({"id": "second", **INFER})},
                {"type": "http.request", "body": b""},
                {"type": "http.disconnect"},
            ]
        )

        async def receive() -> dict[str, Any]:
            return next(messages)

        first = [asyncio.create_task(client.call("POST", "/v2/models/m/infer", orjson.dumps(INFER))) for _ in range(2)]
        await asyncio.sleep(0)
        second = await client.call("POST", "/v2/models/m/infer", receive=receive)
        gated.gate.set()
        assert [got.status for got in await asyncio.gather(*first)] == [200, 200]
        return second

    assert asyncio.run(run()).error == (499, "the client went away")
    assert [request.id for request in gated.seen] == ["", ""]


def test_a_client_that_leaves_before_its_body_is_whole_gets_nothing(client: Client) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert asyncio.run(client.call("POST", "/v2/models/m/infer", receive=receive)).status == 0


@pytest.mark.parametrize("long", ["compressed", "json"])
def test_an_exchange_replies_once_though_cancelled_while_its_body_is_read(long: str) -> None:
    instance = Doubler()
    client = Client(model("m", instance))
    answers: list[tuple[int, Headers, Body]] = []
    ran = len(instance.seen)

    async def run() -> None:
        done = asyncio.Event()

        def reply(*answer: Any) -> None:
            answers.append(answer)
            done.set()

        body, headers = orjson.dumps(INFER) + b" " * LONG_JSON, dict[bytes, bytes]()
        if long == "compressed":
            body, headers = gzip.compress(orjson.dumps(INFER)), {b"content-encoding": b"gzip"}
        exchange = serve_infer(Door(client.engine, client.settings), Head("m", "", headers), body, reply)
        assert isinstance(exchange, Exchange)
        exchange.cancel(ServingError(Kind.CANCELLED, "enough"))
        await asyncio.wait_for(done.wait(), LIMIT_S)

    asyncio.run(run())
    assert [(status, bytes(body[0])) for status, _, body in answers] == [(499, b'{"error":"enough"}')]
    assert len(instance.seen) == ran


def test_an_inline_answer_comes_before_serve_infer_returns(client: Client) -> None:
    answers: list[int] = []

    async def run() -> None:
        door = Door(client.engine, client.settings)
        body = orjson.dumps(INFER)
        assert serve_infer(door, Head("m", "", {}), body, lambda status, *_: answers.append(status)) is None

    assert client.shelf.shelf["m"].inline_bytes >= 8
    asyncio.run(run())
    assert answers == [200]


# -- everything but inference


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/m/ready", {"name": "m", "ready": True}),
        ("/v2/models/%6D/versions/1/ready", {"name": "m", "ready": True}),
    ],
)
def test_control_methods_answer_on_their_paths(client: Client, path: str, body: Any) -> None:
    got = client("GET", path)
    assert (got.status, got.json, got.headers[b"content-type"]) == (200, body, JSON)


def test_metadata_configuration_and_statistics_are_served(client: Client) -> None:
    assert client("GET", "/v2").json["name"] == "penstock"
    assert client("GET", "/v2/").json == client("GET", "/v2").json
    assert client("GET", "/v2/models/m").json["inputs"] == [{"name": "A", "datatype": "INT32", "shape": [-1]}]
    assert client("GET", "/v2/models/m/config").json["name"] == "m"
    client.infer()
    assert client("GET", "/v2/models/m/versions/1/stats").json["model_stats"][0]["execution_count"] == 1
    assert "model_stats" in client("GET", "/v2/models/stats").json


def test_not_ready_is_a_status_with_a_body(client: Client) -> None:
    client.shelf.fault = ServingError(Kind.UNAVAILABLE, "Server not ready")
    assert (client("GET", "/v2/health/ready").status, client("GET", "/v2/health/ready").json) == (400, {"ready": False})
    assert client("GET", "/v2/models/m/ready").error == (503, "Server not ready")


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v2/health", "/v2/models/m/", "/v2/models//infer", "/v2/models/m/infer/", "/v2/models/m/versions/x",
     "/v2/models/m/versions/x/infer", "/v2/models/m/versions/-1/ready", "/v2/models/m/versions/1/versions/2/infer",
     "/v2/models/m/n/infer", "/v2/models/m%2Fready"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_paths_are_not_found(client: Client, path: str, method: str) -> None:
    if path == "/v2/models/m%2Fready" and method == "GET":
        assert client(method, path).error == (404, "Request for unknown model: 'm/ready' is not found")
    elif path == "/v2/models/m%2Fready":
        assert client(method, path).error == (405, "Method Not Allowed")
    else:
        assert client(method, path).error == (404, "Not Found")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v2/models/nope/infer"), ("HEAD", "/v2/models/m/infer"), ("OPTIONS", "/v2/models/m/infer"),
     ("POST", "/v2"), ("POST", "/v2/models/nope"), ("DELETE", "/v2/health/live"), ("OPTIONS", "/v2/health/live")],
)  # fmt: skip
def test_the_method_is_checked_before_the_model_is_looked_up(client: Client, method: str, path: str) -> None:
    got = client(method, path)
    assert got.status == 405
    assert got.body == (b"" if method == "HEAD" else b'{"error":"Method Not Allowed"}')
    assert b"allow" not in got.headers


def test_head_is_get_without_a_body(client: Client) -> None:
    got, asked = client("GET", "/v2/models/m"), client("HEAD", "/v2/models/m")
    assert (asked.status, asked.headers, asked.body) == (200, got.headers, b"")


def test_a_control_method_that_breaks_is_a_logged_500(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    client.shelf.fault = RuntimeError("secret")
    got = client("GET", "/v2/models/m")
    assert got.error == (500, "[request id: <id_unknown>] internal error: RuntimeError; the server's log says more")
    assert caplog.records[0].exc_info is not None


# -- on the wire


@dataclass(slots=True)
class Wire:
    """A connection to a server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: list[bytes] = field(default_factory=list)

    def send(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))

    async def answer(self, head_only: bool = False) -> Got:
        head = await self.reader.readuntil(b"\r\n\r\n")
        status, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        size = 0 if head_only else int(headers.get(b"content-length", b"0"))
        return Got(int(status.split(b" ")[1]), headers, await self.reader.readexactly(size))

    async def ended(self) -> bool:
        """Whether the server has closed without a further word."""
        return await self.reader.read() == b""


OnTheWire = Callable[[Client, Callable[[Callable[[], Awaitable[Wire]]], Awaitable[None]]], None]


@pytest.fixture(params=["lane", "asgi"])
def on_the_wire(request: pytest.FixtureRequest) -> OnTheWire:
    """Both ways to the models: what follows must hold on either."""
    return functools.partial(serve_on_the_wire, request.param == "lane")


def serve_on_the_wire(
    lane: bool, client: Client, talk: Callable[[Callable[[], Awaitable[Wire]]], Awaitable[None]]
) -> None:
    """Serve `client`'s application on a free port of loopback, and let `talk` connect to it."""

    async def run() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        address = listening.getsockname()
        server = make_server(client.app, client.settings, client.app.door if lane else None)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        client.stop = functools.partial(setattr, server, "should_exit", True)
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> Wire:
            reader, writer = await asyncio.open_connection(*address)
            writers.append(writer)
            return Wire(reader, writer)

        try:
            await asyncio.wait_for(talk(connect), LIMIT_S)
        finally:
            for writer in writers:
                writer.close()
            server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def until(fact: Callable[[], bool]) -> None:
    """Let the event loop turn until something is so."""
    while not fact():  # noqa: ASYNC110 - a queue's length is no event
        await asyncio.sleep(0)


LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([POST.rstrip(), *headers, b"Content-Length: %d" % len(body), b"", body])


def test_connections_stay_open_and_requests_may_be_pipelined(client: Client, on_the_wire: OnTheWire) -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        ids = [b"%d" % number for number in range(20)]
        bodies = [orjson.dumps({"id": id.decode(), **INFER}) for id in ids]
        wire.send(*(post(body) for body in bodies), LIVE, b"HEAD /v2/models/m HTTP/1.1\r\nHost: h\r\n\r\n")
        for id in ids:
            got = await wire.answer()
            assert (got.status, got.json["id"].encode()) == (200, id)
            assert not got.headers.keys() & {b"server", b"date", b"connection"}
        assert (await wire.answer()).json == {"live": True}
        assert (await wire.answer(head_only=True)).headers[b"content-type"] == JSON
        wire.send(LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert (await wire.answer()).headers[b"connection"] == b"close"
        assert await wire.ended()

    on_the_wire(client, talk)


def test_bodies_come_in_chunks_and_after_100_continue(client: Client, on_the_wire: OnTheWire) -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        body = orjson.dumps(INFER)
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:5], body[5:])]
        wire.send(POST, b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
        assert (await wire.answer()).json["outputs"] == [OUTPUT]
        wire.send(POST, b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert (await wire.answer()).status == 100
        wire.send(body)
        assert (await wire.answer()).json["outputs"] == [OUTPUT]

    on_the_wire(client, talk)


def test_an_early_answer_does_not_break_the_connection(on_the_wire: OnTheWire) -> None:
    client = Client(model("m", Doubler()), http_max_body_size=1000)

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(post(bytes(300_000)), LIVE)
        assert (await wire.answer()).status == 413
        assert (await wire.answer()).json == {"live": True}
        wire.send(POST, b"Transfer-Encoding: chunked\r\n\r\n", b"800\r\n" + bytes(2048) + b"\r\n", b"0\r\n\r\n", LIVE)
        assert (await wire.answer()).status == 413
        assert (await wire.answer()).json == {"live": True}

    on_the_wire(client, talk)


@pytest.mark.parametrize(
    "request_line",
    [b"GET / HTTP/1.1\r\nbad header\r\n\r\n", b"nonsense\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0",
     b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_told_so_after_the_answers_before_it(request_line: bytes, on_the_wire: OnTheWire) -> None:
    gated = Gated()
    client = Client(model("m", gated))

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(post(orjson.dumps(INFER)), LIVE, request_line)
        await until(gated.entered.is_set)
        gated.gate.set()
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).json == {"live": True}
        got = await wire.answer()
        status, message = got.error
        assert (status, got.headers[b"connection"]) == (400, b"close")
        assert message.startswith("malformed HTTP request: ")
        assert await wire.ended()

    on_the_wire(client, talk)


def test_broken_chunks_end_their_request_in_order(client: Client, on_the_wire: OnTheWire) -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(LIVE, POST, b"Transfer-Encoding: chunked\r\n\r\n", b"nope\r\n")
        assert (await wire.answer()).json == {"live": True}
        assert (await wire.answer()).error[0] == 400
        assert await wire.ended()

    on_the_wire(client, talk)


def test_chunks_are_counted(client: Client, on_the_wire: OnTheWire) -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(POST, b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * MAX_CHUNKS, b"0\r\n\r\n")
        assert (await wire.answer()).error[1].endswith("The document is empty. at 65536")
        wire.send(POST, b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * (MAX_CHUNKS + 1))
        assert (await wire.answer()).error == (
            400,
            "Chunked request body exceeds maximum of 65536 non-empty chunks. Send fewer or larger HTTP chunks.",
        )
        assert await wire.ended()

    on_the_wire(client, talk)


def test_heads_are_limited(on_the_wire: OnTheWire) -> None:
    client = Client(model("m", Doubler()), http_max_header_size=200)
    padded = LIVE.replace(b"\r\n\r\n", b"\r\nX: ")
    fitting = padded + b"x" * (200 - len(padded) - 4) + b"\r\n\r\n"
    refused = (
        431,
        "request line and headers exceed the maximum allowed size of 200 bytes. "
        "Use --http-max-header-size to increase the limit.",
    )

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(fitting, fitting, post(bytes(5000)))
        assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 400]
        wire.send(LIVE, padded, b"x" * 400)  # never complete
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).error == refused
        assert await wire.ended()
        for head in (padded + b"x" * 300 + b"\r\n\r\n", b"GET /" + b"y" * 300, b"\r\n" * 300):
            wire = await connect()
            wire.send(head)
            assert (await wire.answer()).error == refused
            assert await wire.ended()
        wire = await connect()
        wire.send(post(b"{}"), padded + b"x" * 210 + b"\r\n\r\n")  # begins in the middle of what is read at once
        assert (await wire.answer()).status == 400
        assert (await wire.answer()).error == refused

    on_the_wire(client, talk)


def test_a_head_must_come_in_time(on_the_wire: OnTheWire) -> None:
    client = Client(model("m", Doubler()), http_header_timeout_secs=0.05)

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(LIVE, LIVE[:-2])
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).error == (
            408,
            "request line and headers did not arrive within 0.05 seconds. "
            "Use --http-header-timeout-secs to increase the limit.",
        )
        assert await wire.ended()

    on_the_wire(client, talk)


@pytest.mark.parametrize("first", [b"", LIVE, b"\r\n", post(b"{}"), post(bytes(100))[:-1]])
def test_an_idle_connection_is_closed_after_a_while(first: bytes, on_the_wire: OnTheWire) -> None:
    client = Client(model("m", Doubler()), http_keep_alive_secs=0.05, http_max_body_size=10)

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        wire.send(first)
        if len(first) > 2:
            assert (await wire.answer()).status in (200, 400, 413)
        assert await wire.ended()

    on_the_wire(client, talk)


def test_an_upgrade_is_declined_and_the_body_is_read(client: Client, on_the_wire: OnTheWire) -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP")
        wire.send(post(orjson.dumps(INFER), *offer), LIVE)
        assert (await wire.answer()).json["outputs"] == [OUTPUT]
        assert (await wire.answer()).json == {"live": True}
        wire.send(b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await wire.answer()).error == (405, "Method Not Allowed")
        assert await wire.ended()

    on_the_wire(client, talk)


def test_a_closed_connection_cancels_what_waits(on_the_wire: OnTheWire) -> None:
    gated = Gated()
    client = Client(model("m", gated))

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        running, waiting = [await connect() for _ in range(2)], await connect()
        for wire in running:
            wire.send(post(orjson.dumps(INFER)))
        waiting.send(post(orjson.dumps({"id": "waiting", **INFER})))
        await until(lambda: client.shelf.shelf["m"].waiting == 2)
        waiting.writer.close()
        await until(lambda: client.shelf.shelf["m"].waiting == 1)
        gated.gate.set()
        assert [(await wire.answer()).status for wire in running] == [200, 200]

    on_the_wire(client, talk)
    assert [request.id for request in gated.seen] == ["", ""]


class Pipe(asyncio.Transport):
    """A connection without a socket. Like uvloop's it takes no more once it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed, "the handler is closed"
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """What is read comes from the test."""

    resume_reading = pause_reading


@pytest.mark.parametrize("pipelined", [1, 3])
def test_an_answer_to_a_client_that_has_just_left_is_dropped(pipelined: int, caplog: pytest.LogCaptureFixture) -> None:
    gated = Gated()
    client = Client(model("m", gated))

    async def run() -> None:
        server = make_server(client.app, client.settings)
        server.config.load()
        loop = asyncio.get_running_loop()
        connection = LimitedProtocol(client.settings, server.config, server.server_state, {}, loop)
        pipe = Pipe()
        connection.connection_made(pipe)
        connection.data_received(post(orjson.dumps(INFER)) * pipelined)
        assert await asyncio.to_thread(gated.entered.wait, LIMIT_S)
        connection.eof_received()
        pipe.close()  # by the event loop, which calls `connection_lost` in its next turn only
        gated.gate.set()
        await asyncio.wait_for(asyncio.gather(*server.server_state.tasks), LIMIT_S)
        connection.connection_lost(None)
        assert pipe.written == b""

    asyncio.run(run())
    assert caplog.records == []


def test_a_body_of_many_compressed_streams_is_refused() -> None:
    body = zlib.compress(b"") * 33
    with pytest.raises(ServingError, match="may consist of 32 streams in a row"):
        coding.decompress(body, 1000)
    assert coding.decompress(zlib.compress(b"a") * 32, 1000) == b"a" * 32


class Refusing(Doubler):
    """Fails as a runtime does: with an exception that is raised."""

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        super().execute(batch)
        raise ServingError(Kind.INVALID, "not that")


@pytest.mark.parametrize(
    ("instance", "status"),
    [(Doubler(), 200), (Doubler("cuda:0"), 200), (Refusing(), 400), (Refusing("cuda:0"), 400)],
    ids=["inline", "on a thread", "failing inline", "failing on a thread"],
)
def test_an_answered_exchange_is_forgotten_without_a_collection(instance: Doubler, status: int) -> None:
    """Else body and outputs of every request would lie in memory until Python's cyclic collector comes round."""
    client = Client(model("m", instance))
    gc.collect()
    gc.disable()
    try:
        before = exchanges()
        for _ in range(3):
            assert client.infer().status == status
        deadline_s = time.monotonic() + LIMIT_S
        while exchanges() - before and time.monotonic() < deadline_s:
            pass  # the worker's thread is about to let go of its last batch
        assert not exchanges() - before
    finally:
        gc.enable()


LONG = b"1," * LONG_JSON
REFUSED = {
    "as it comes": (b"{", {}),
    "beside the event loop": (b"[" + LONG, {}),
    "for what its JSON says": (b'{"inputs":[{"name":"A","shape":[1],"datatype":"INT32","data":[%b1]}]}' % LONG, {}),
    "inflated": (b"x", {b"content-encoding": b"gzip"}),
    "once inflated": (gzip.compress(bytes(LONG_JSON + 1)), {b"content-encoding": b"gzip"}),
}


@pytest.mark.parametrize(("body", "headers"), REFUSED.values(), ids=REFUSED)
def test_a_refused_exchange_is_forgotten_without_a_collection(body: bytes, headers: dict[bytes, bytes]) -> None:
    client = Client(model("m", Doubler()))
    gc.collect()
    gc.disable()
    try:
        before = exchanges()
        for _ in range(3):
            assert client("POST", PATH, body, headers).status == 400
        assert not exchanges() - before
    finally:
        gc.enable()


def exchanges() -> set[int]:
    return {id(held) for held in gc.get_objects() if type(held) is Exchange}


def test_a_long_body_is_read_beside_the_event_loop_and_refused_as_a_short_one() -> None:
    client = Client(model("m", Doubler()))
    assert client.infer(wide(200_000)).json["outputs"][0]["data"] == [10] * 200_000
    broken = orjson.dumps(wide(200_000))[:-1]
    assert client.infer(broken).status == 400
    fraction = wide(200_000)
    fraction["inputs"][0]["data"][7] = 0.5
    status, text = client.infer(fraction).error
    assert (status, "element 7" in text) == (400, True)
