"""The fast lane: that nobody outside can tell it from the ASGI application, and what it does differently inside."""

import asyncio
import contextlib
import gzip
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import uvloop
from penstock.auth import HTTP, Keys, make_guard
from penstock.http_api import make_server
from penstock.http_api.lane import ALIGNMENT, FEW, HEADS_BYTES, KNOWN_HEADS, LANDING_BYTES, Lane, LaneProtocol
from starlette.types import Receive, Scope, Send

from .test_auth_http import add
from .test_http_api import (
    INFER,
    LIMIT_S,
    LIVE,
    Client,
    Doubler,
    Gated,
    Pipe,
    Wire,
    model,
    post,
    serve_on_the_wire,
    until,
)

LAST = LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
JSON = orjson.dumps(INFER)


def binary(*values: int, id: str | None = None) -> tuple[bytes, bytes]:
    """The header that a binary body needs, and the body."""
    head = {} if id is None else {"id": id}
    entry = {
        "name": "A",
        "shape": [len(values)],
        "datatype": "INT32",
        "parameters": {"binary_data_size": 4 * len(values)},
    }
    json = orjson.dumps({**head, "inputs": [entry], "parameters": {"binary_data_output": True}})
    return b"Inference-Header-Content-Length: %d" % len(json), json + struct.pack(f"<{len(values)}i", *values)


def post_binary(*values: int, id: str | None = None, headers: tuple[bytes, ...] = ()) -> bytes:
    header, body = binary(*values, id=id)
    return post(body, header, *headers)


HEADER, BODY = binary(1, 2)
SENT: dict[str, bytes] = {
    "json": post(JSON),
    "binary": post_binary(1, 2),
    "again with other data": post_binary(1, 2) + post_binary(3, 4),
    "ids": b"".join(post_binary(1, 2, id=id) for id in ("a", "b", 'quoted"', "umläut", "", "back\\slash", "\x7f")),
    "raw": post(struct.pack("<i", 4), b"Inference-Header-Content-Length: 0"),
    "an empty body": post(b""),
    "no length": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n\r\n",
    "a version": post(JSON).replace(b"/infer", b"/versions/1/infer"),
    "another version": post(JSON).replace(b"/infer", b"/versions/2/infer"),
    "no version": post(JSON).replace(b"/infer", b"/versions/x/infer"),
    "a query": post(JSON).replace(b"/infer ", b"/infer?x=/infer "),
    "a query alone": post(JSON).replace(b"/infer ", b"/nothing?x=/infer "),
    "a fragment": post(JSON).replace(b"/infer ", b"/infer#x "),
    "an encoded name": post(JSON).replace(b"/m/", b"/%6d/"),
    "an encoded slash": post(JSON).replace(b"/m/", b"/m%2Fx/"),
    "a doubled slash": post(JSON).replace(b"/m/", b"//m/"),
    "an absolute target": post(JSON).replace(b" /v2", b" http://h/v2"),
    "a target that is none": post(JSON).replace(b" /v2", b" *"),
    "an unknown model": post(JSON).replace(b"/m/", b"/nope/"),
    "broken JSON": post(b'{"inputs": ['),
    "no JSON": post(b""),
    "a wrong input": post(JSON.replace(b'"A"', b'"B"')),
    "a wrong datatype": post(JSON.replace(b"INT32", b"FP32")),
    "too little data": post(BODY[:-1], HEADER),
    "too much data": post(BODY + b"x", HEADER),
    "data known and then too short": post(BODY, HEADER) + post(BODY[:-1], HEADER) + post(BODY, HEADER),
    "a length that is no number": post(BODY, b"Inference-Header-Content-Length: x"),
    "a length beyond the body": post(BODY, b"Inference-Header-Content-Length: 999999"),
    "a doubled header": post(BODY, HEADER, b"Inference-Header-Content-Length: 0"),
    "gzip": post(gzip.compress(JSON), b"Content-Encoding: gzip"),
    "broken gzip": post(JSON, b"Content-Encoding: gzip"),
    "an unknown coding": post(JSON, b"Content-Encoding: br"),
    "an answer that may be compressed": post(orjson.dumps({"inputs": [{**INFER["inputs"][0], "shape": [9000],
                                                          "data": [1] * 9000}]}), b"Accept-Encoding: gzip"),
    "too long a body": post(bytes(200_001)),
    "a method that is not allowed": b"GET /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n\r\n",
    "PUT": post(JSON).replace(b"POST", b"PUT"),
    "HEAD": b"HEAD /v2/models/m/infer HTTP/1.1\r\nHost: h\r\n\r\n",
    "chunks": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
              % (len(JSON), JSON),
    "a length and chunks": post(b"0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "a client that expects to continue": post(JSON, b"Expect: 100-continue"),
    "an early answer to such a client": post(bytes(200_001), b"Expect: 100-continue"),
    "HTTP/1.0": post(JSON).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HTTP/1.0 that stays": post(JSON, b"Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a client that goes": post(JSON, b"Connection: close") + post(JSON) + LIVE,
    "another way to go": post(JSON, b"Connection: x, close") + post(JSON),
    "an upgrade": post(JSON, b"Connection: Upgrade", b"Upgrade: h2c") * 2,
    "a folded header": post(JSON, b"X-A: b\r\n c"),
    "a header of other bytes": post(JSON, "X-A: ä".encode()),
    "a header without a value": post(JSON, b"X-A:"),
    "a broken header": post(JSON, b"X A: b"),
    "bare newlines": post(JSON).replace(b"\r\n", b"\n"),
    "empty lines before": b"\r\n\r\n" + post(JSON) + b"\r\n" + post(JSON),
    "two lengths": post(JSON, b"Content-Length: 3"),
    "a negative length": post(JSON).replace(b"Content-Length: ", b"Content-Length: -"),
    "a padded length": post(JSON).replace(b"Content-Length: ", b"Content-Length:   00"),
    "too many digits": post(JSON).replace(b"Content-Length: ", b"Content-Length: 00000000000000"),
    "a pipeline": (post(JSON) + LIVE) * 3 + post_binary(1, 2) * 3 + LIVE,
    "nonsense after it": post(JSON) + b"nonsense\r\n\r\n",
    "nonsense after a known head": post(JSON) * 2 + b"nonsense\r\n\r\n",
}  # fmt: skip


class Counted:
    """An application, and how often it was called."""

    def __init__(self, client: Client) -> None:
        self._app = client.app
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        await self._app(scope, receive, send)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), LIMIT_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(limited())


async def everything(wire: Wire) -> bytes:
    """All that comes until the connection ends, in whichever way."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):  # where the server closes before it has read all
        while part := await wire.reader.read(1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("crowd", [0, FEW])
def test_no_client_can_tell_the_lane_from_the_application(crowd: int) -> None:
    """Nor while there are so many others that answers wait for one another."""
    answers: dict[bool, dict[str, list[bytes]]] = {}
    for lane in (True, False):
        client = Client(model("m", Doubler()), http_max_body_size=200_000)
        got = answers[lane] = {}

        async def talk(connect: Callable[[], Awaitable[Wire]], got: dict[str, list[bytes]] = got) -> None:
            others = [await connect() for _ in range(crowd)]
            for name, sent in SENT.items():
                for _ in range(2):  # the second time, heads and tensors are known
                    wire = await connect()
                    wire.send(sent, LAST)
                    got.setdefault(name, []).append(await everything(wire))
            assert not any(other.reader.at_eof() for other in others)

        serve_on_the_wire(lane, client, talk)
    for name, sent in answers[False].items():
        assert answers[True][name] == sent, name


def connected(client: Client) -> tuple[LaneProtocol, Pipe, Counted]:
    """A connection without a socket, and the application that it leaves to others what it does not serve itself."""
    app = Counted(client)
    server = make_server(app, client.settings, client.app.door)
    server.config.load()
    made: Any = server.config.http_protocol_class
    connection: LaneProtocol = made(config=server.config, server_state=server.server_state, app_state={})
    pipe = Pipe()
    connection.connection_made(pipe)
    return connection, pipe, app


def test_an_inference_is_served_without_the_application_wherever_it_is_cut() -> None:
    sent = post_binary(1, 2, id="x")

    async def test() -> None:
        client = Client(model("m", Doubler()))
        connection, pipe, app = connected(client)
        connection.data_received(sent)
        await until(lambda: bool(pipe.written))
        expected = pipe.written
        for cut in range(1, len(sent)):
            for known in (True, False):
                if not known:
                    connection, pipe, app = connected(client)
                pipe.written = b""
                connection.data_received(sent[:cut])
                connection.data_received(sent[cut:] + sent)
                await until(lambda pipe=pipe: len(pipe.written) == 2 * len(expected))  # type: ignore[misc]
                assert pipe.written == 2 * expected
                assert app.calls == 0

    run(test)


def test_the_parser_sees_a_head_only_once() -> None:
    async def test() -> None:
        connection, _, _ = connected(Client(model("m", Doubler())))
        connection.data_received(post(JSON))
        headers = connection.headers
        connection.data_received(post(JSON))
        assert connection.headers is headers
        connection.data_received(post(JSON, b"X-Request-ID: 1"))
        assert connection.headers is not headers

    run(test)


def test_as_many_heads_are_remembered_as_are_good_for_the_memory() -> None:
    client = Client(model("m", Doubler()))
    lane = Lane(client.app.door, client.settings)

    async def test() -> None:
        connection = LaneProtocol(lane, client.settings, make_server(client.app, client.settings).config, _state(), {})
        pipe = Pipe()
        connection.connection_made(pipe)
        for number in range(3 * KNOWN_HEADS):
            connection.data_received(post(JSON, b"X-Request-ID: %d" % number))
            assert 0 < len(lane.known) <= KNOWN_HEADS
        await until(lambda: pipe.written.count(b"HTTP/1.1 200 OK") == 3 * KNOWN_HEADS)
        lane.known.clear()
        for odd in (b"\r\n\r\n" + post(JSON), post(JSON, b"Connection: close")):
            connection, pipe = LaneProtocol(lane, client.settings, connection.config, _state(), {}), Pipe()
            connection.connection_made(pipe)
            connection.data_received(odd)
            assert not lane.known

    run(test)


def _state() -> Any:
    return make_server(Client().app, Client().settings).server_state


@pytest.mark.parametrize("count", [LANDING_BYTES // 4 - 1, LANDING_BYTES // 4, 300_000, 2_000_000])
def test_a_long_body_is_read_into_its_place(count: int) -> None:
    """Read right into aligned memory where it is long, and answered from where its tensors lie."""
    doubler = Doubler()
    client = Client(model("m", doubler))
    values = np.arange(count, dtype=np.int32)
    head = orjson.dumps(
        {
            "inputs": [
                {"name": "A", "shape": [count], "datatype": "INT32", "parameters": {"binary_data_size": 4 * count}}
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    sent = post(head + values.tobytes(), b"Inference-Header-Content-Length: %d" % len(head))

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        for more in (b"", LIVE, b"", post(JSON)):
            wire.send(sent, more)
            got = await wire.answer()
            length = int(got.headers[b"inference-header-content-length"])
            assert np.array_equal(np.frombuffer(got.body[length:], np.int32), values * 2)
            if more:
                assert (await wire.answer()).status == 200

    serve_on_the_wire(True, client, talk)
    given = [request.inputs["A"].array for request in doubler.seen if request.inputs["A"].array.size == count]
    assert len(given) == 4
    if count * 4 > LANDING_BYTES + HEADS_BYTES:
        assert {array.ctypes.data % ALIGNMENT for array in given} == {0}


def test_a_body_that_comes_in_pieces_may_be_followed_by_anything() -> None:
    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        sent = post_binary(*range(100_000))
        for at in range(0, len(sent), 30_000):
            wire.send(sent[at : at + 30_000])
            await wire.writer.drain()
            await asyncio.sleep(0)
        wire.send(LIVE)
        assert len((await wire.answer()).body) > 400_000
        assert (await wire.answer()).json == {"live": True}
        wire.send(b"nonsense\r\n\r\n")
        assert (await wire.answer()).status == 400
        assert await wire.ended()

    serve_on_the_wire(True, Client(model("m", Doubler())), talk)


def test_what_comes_behind_a_request_that_waits_is_answered_behind_it() -> None:
    gated = Gated()

    async def test() -> None:
        connection, pipe, app = connected(Client(model("m", gated), model("quick", Doubler())))
        connection.data_received(post(JSON) + post(JSON).replace(b"/m/", b"/quick/") + LIVE)
        assert await asyncio.to_thread(gated.entered.wait, LIMIT_S)
        assert (pipe.written, app.calls) == (b"", 0)
        gated.gate.set()
        await until(lambda: pipe.written.count(b"HTTP/1.1 200 OK") == 3)
        assert [pipe.written.index(part) for part in (b'"m"', b'"quick"', b"live")] == sorted(
            pipe.written.index(part) for part in (b'"m"', b'"quick"', b"live")
        )
        assert app.calls == 2

    run(test)


def test_a_client_that_does_not_read_is_not_served_past_what_the_transport_holds() -> None:
    async def test() -> None:
        connection, pipe, app = connected(Client(model("m", Doubler())))
        connection.pause_writing()
        connection.data_received(post(JSON))
        await until(lambda: app.calls == 1)
        assert pipe.written == b""
        connection.resume_writing()
        await until(lambda: b"200 OK" in pipe.written)

    run(test)


def test_a_client_that_leaves_cancels_what_it_asked_for() -> None:
    gated = Gated()
    client = Client(model("m", gated))

    async def test() -> None:
        first, _, _ = connected(client)
        second, pipe, _ = connected(client)
        first.data_received(post(JSON))
        assert await asyncio.to_thread(gated.entered.wait, LIMIT_S)
        second.data_received(post(JSON))
        second.data_received(post(JSON)[:-1])
        loaded = client.shelf.shelf["m"]
        assert loaded.waiting == 1
        second.eof_received()
        assert loaded.waiting == 0
        second.connection_lost(None)
        gated.gate.set()
        await until(lambda: loaded.statistics.success.count == 1)
        assert pipe.written == b""

    run(test)


@pytest.mark.parametrize("lane", [True, False])
def test_a_key_is_looked_at_once_for_each_request(tmp_path: Path, lane: bool) -> None:
    path = tmp_path / "keys.json"
    [(name, key)] = add(path, "ci", "infer", rate=3).items()
    header = name + b": " + key
    client = Client(model("m", Doubler()), guard=make_guard(HTTP, Keys(path, now_ns=lambda: 0), ()))

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        wire = await connect()
        statuses = []
        for sent in (post(JSON, header), post(JSON), post(JSON, header), post(JSON, header), post(JSON, header)):
            wire.send(sent)
            got = await wire.answer()
            statuses.append((got.status, got.headers.get(b"retry-after")))
        assert statuses == [(200, None), (401, None), (200, None), (200, None), (429, b"1")]

    serve_on_the_wire(lane, client, talk)


@pytest.mark.parametrize("lane", [True, False])
def test_a_server_that_stops_answers_what_was_on_its_way_and_says_that_it_goes(lane: bool) -> None:
    gated = Gated()
    client = Client(model("m", Doubler()), model("slow", gated))

    async def talk(connect: Callable[[], Awaitable[Wire]]) -> None:
        idle, other, waiting = [await connect() for _ in range(3)]
        for wire in (idle, other):
            wire.send(post(JSON))
            assert b"connection" not in (await wire.answer()).headers
        waiting.send(post(JSON).replace(b"/m/", b"/slow/"))
        await until(gated.entered.is_set)
        client.stop()
        got = None
        while got is None or b"connection" not in got.headers:  # until the server has noticed
            idle.send(post(JSON))
            got = await idle.answer()
            assert got.status == 200
        assert got.headers[b"connection"] == b"close"
        assert await idle.ended()
        gated.gate.set()
        got = await waiting.answer()
        assert (got.status, got.headers[b"connection"]) == (200, b"close")
        assert await waiting.ended()
        assert await other.ended()

    serve_on_the_wire(lane, client, talk)
