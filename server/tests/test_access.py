"""The access log: what a line says, and that the id in an answer leads to it."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import grpc
import orjson
import pytest
from penstock import pb
from penstock.access import LOGGER, Visit
from penstock.errors import Kind, ServingError
from penstock.logs import Formatter, JsonFormatter
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import Cancelled

from . import test_grpc_methods as over_grpc
from . import test_http_api as over_http
from .test_grpc_methods import Serve, serve
from .test_grpc_streaming import opened, rest, say

__all__ = ["serve"]  # the fixture


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The facts of each line, as JSON says them."""
    caplog.set_level("INFO", LOGGER)

    def read() -> list[dict[str, Any]]:
        return [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name == LOGGER]

    return read


def facts(line: dict[str, Any], *keys: str) -> tuple[Any, ...]:
    return tuple(line.get(key) for key in keys)


def test_a_line_says_who_asked_for_what_and_what_became_of_it(caplog: pytest.LogCaptureFixture, lines: Any) -> None:
    visit = Visit("http", "POST", "/v2/models/m/infer", "r\n7", "m", "1", request_bytes=12)
    visit.write(200, 34, 1.23456)
    assert Formatter(iso8601=True).format(caplog.records[0]).partition("] ")[2] == (
        "http POST /v2/models/m/infer 200 1.235 ms, model=m version=1 id=r\\n7 in=12 out=34"
    )
    [line] = lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "access",
        "message": "http POST /v2/models/m/infer 200 1.235 ms, model=m version=1 id=r\\n7 in=12 out=34",
        "door": "http",
        "method": "POST",
        "path": "/v2/models/m/infer",
        "model": "m",
        "version": "1",
        "status": 200,
        "duration_ms": 1.235,
        "request_id": "r\n7",
        "request_bytes": 12,
        "response_bytes": 34,
    }


def test_the_line_of_a_job_says_its_id_and_that_of_its_request(lines: Any) -> None:
    Visit("job", "run", "", "r7", "m", request_bytes=12, job="j1").write("COMPLETED", 34, 1.5)
    [line] = lines()
    assert line["message"] == "job run - COMPLETED 1.500 ms, model=m version=- job=j1 id=r7 in=12 out=34"
    assert facts(line, "door", "job", "request_id", "path") == ("job", "j1", "r7", None)


def test_without_the_access_log_there_is_no_line_and_the_answer_bears_what_it_was_given(lines: Any) -> None:
    client = over_http.Client(over_http.model("m", over_http.Doubler()))
    assert b"x-request-id" not in client.infer().headers
    assert client("GET", "/v2/health/live", headers={b"x-request-id": b"h"}).headers[b"x-request-id"] == b"h"
    got = client.infer(headers={b"x-request-id": b"r7"})
    assert (got.headers[b"x-request-id"], got.json["id"]) == (b"r7", "r7")
    got = client.infer({"id": "mine", **over_http.INFER}, {b"x-request-id": b"r7"})
    assert (got.headers[b"x-request-id"], got.json["id"]) == (b"r7", "mine")
    assert lines() == []


def test_every_request_over_http_has_a_line_with_the_id_of_its_answer(lines: Any) -> None:
    client = over_http.Client(over_http.model("m", over_http.Doubler()), access_log=True)
    body = orjson.dumps(over_http.INFER)
    answers = [
        client.infer(body),
        client.infer(body, path="/v2/models/m/versions/1/infer", headers={b"x-request-id": b"r7"}),
        client.infer(b"{", {b"x-request-id": b"wrong"}),
        client("GET", "/v2/models/m/infer"),
        client("GET", "/v2/models/m/ready"),
        client("GET", "/nowhere", headers={b"content-length": b"5"}),
    ]
    first, second, third, fourth, fifth, sixth = lines()
    keys = ("method", "path", "model", "status", "request_bytes")
    path = "/v2/models/m/infer"
    assert facts(first, *keys) == ("POST", path, "m", 200, len(body))
    assert facts(second, *keys) == ("POST", "/v2/models/m/versions/1/infer", "m", 200, len(body))
    assert facts(third, *keys) == ("POST", path, "m", 400, 1)
    assert facts(fourth, *keys) == ("GET", path, None, 405, 0)
    assert facts(fifth, *keys) == ("GET", "/v2/models/m/ready", None, 200, 0)
    assert facts(sixth, *keys) == ("GET", "/nowhere", None, 404, 5)
    for answer, line in zip(answers, lines(), strict=True):
        assert line["door"] == "http"
        assert line["request_id"] == answer.headers[b"x-request-id"].decode()
        assert line["response_bytes"] == len(answer.body)
        assert line["duration_ms"] >= 0
    assert (second["request_id"], third["request_id"]) == ("r7", "wrong")
    assert answers[0].json["id"] == first["request_id"] != fourth["request_id"]


def test_every_call_over_grpc_has_a_line_with_the_id_of_its_answer(serve: Serve, lines: Any) -> None:
    async def test() -> None:
        failing = over_grpc.Failing(ServingError(Kind.NOT_FOUND, "no luck"))
        models = over_grpc.model("m", over_grpc.Doubler()), over_grpc.model("bad", failing)
        async with serve(*models, access_log=True) as served:
            given = await served.infer(over_grpc.request("m", 1))
            known = await served.infer(over_grpc.request("m", 1), metadata=(("x-request-id", "r7"),))
            own = await served.infer(over_grpc.request("m", 1, id="own"), metadata=(("x-request-id", "r7"),))
            with pytest.raises(grpc.aio.AioRpcError):
                await served.infer(over_grpc.request("bad", 1, id="b"))
            await served.unary("ServerLive", pb.ServerLiveRequest())
        assert (known.id, own.id) == ("r7", "own")
        size = over_grpc.request("m", 1).ByteSize()
        assert [facts(line, "method", "model", "status", "request_id") for line in lines()] == [
            ("ModelInfer", "m", "OK", given.id),
            ("ModelInfer", "m", "OK", "r7"),
            ("ModelInfer", "m", "OK", "own"),
            ("ModelInfer", "bad", "NOT_FOUND", "b"),
            ("ServerLive", None, "OK", None),
        ]
        assert facts(lines()[1], "request_bytes", "response_bytes") == (size, known.ByteSize())

    over_grpc.run(test)


def test_a_stream_has_a_line_for_each_request_and_one_at_its_end(serve: Serve, lines: Any) -> None:
    async def test() -> None:
        async with serve(over_grpc.model("m", over_grpc.Doubler()), access_log=True) as served:
            call = opened(served, metadata=(("x-request-id", "s"),))
            await say(call, over_grpc.request("m", 1, id="a"), over_grpc.request("nope", id="b"))
            await rest(call)
            await over_grpc.until(lambda: len(lines()) == 3)
        assert [facts(line, "method", "model", "status", "request_id") for line in lines()] == [
            ("ModelStreamInfer", "m", "OK", "a"),
            ("ModelStreamInfer", None, "NOT_FOUND", "b"),
            ("ModelStreamInfer", None, "OK", "s"),
        ]

    over_grpc.run(test)


@pytest.mark.parametrize(("access_log", "id", "known"), [(True, "", "r7"), (False, "", "r7"), (True, "own", "own")])
def test_a_fault_over_grpc_is_logged_under_the_id_of_the_request(
    serve: Serve, caplog: pytest.LogCaptureFixture, access_log: bool, id: str, known: str
) -> None:
    async def test() -> None:
        async with serve(over_grpc.model("m", Unsendable()), access_log=access_log) as served:
            with pytest.raises(grpc.aio.AioRpcError, match="ModelInfer failed"):
                await served.infer(over_grpc.request("m", 1, id=id), metadata=(("x-request-id", "r7"),))
            call = opened(served, metadata=(("x-request-id", "r7"),))
            await say(call, over_grpc.request("m", 1, id=id))
            await rest(call)

    over_grpc.run(test)
    for name in ("ModelInfer", "ModelStreamInfer"):
        text = f"/inference.GRPCInferenceService/{name} failed on request {known}"
        [failure] = [record for record in caplog.records if record.getMessage() == text]
        assert json.loads(JsonFormatter().format(failure))["request_id"] == known


def test_a_fault_before_a_stream_s_request_was_read_is_logged_under_the_id_of_the_call(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with serve(over_grpc.model("m", over_grpc.Doubler())) as served:
            served.shelf.fault = ZeroDivisionError("oh")
            call = opened(served, metadata=(("x-request-id", "r7"),))
            await say(call, over_grpc.request("m", 1))
            await rest(call)

    over_grpc.run(test)
    [failure] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failure.getMessage() == "/inference.GRPCInferenceService/ModelStreamInfer failed on request r7"


class Unsendable(over_grpc.Doubler):
    """Gives a number that no message holds."""

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> list[InferResponse | ServingError]:
        return [InferResponse(one.model, "1", one.id, [], {"n": 2**64}) for one in batch]


def test_what_a_model_fails_with_is_logged_under_the_id_of_the_answer(
    caplog: pytest.LogCaptureFixture, lines: Any
) -> None:
    failing = over_http.Failing(ZeroDivisionError("no luck"))
    got = over_http.Client(over_http.model("m", failing), access_log=True).infer()
    id = got.headers[b"x-request-id"].decode()
    assert lines()[-1]["request_id"] == id
    [failure] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert failure.getMessage() == f"model m failed on request {id}"
