"""A server's start and end, seen from outside: ports, announcement, exit status."""

import signal
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from conformance_tests.carriers import Call, Input, infer_message
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient, pb
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.models.fixtures import make_broken_fixtures, make_fixtures
from conformance_tests.server import PENSTOCK, SAMPLES, START_LIMIT_S, StartServer


@clause("lifecycle.announce", "lifecycle.ports")
def test_the_ports_announced_answer_at_once(process: StartServer) -> None:
    running = process([SAMPLES])
    assert HttpClient(running.http).get("/v2/health/ready").status == 200
    assert HttpClient(running.metrics).get("/metrics").status == 200
    client = GrpcClient(running.grpc)
    assert client.call("ServerReady", pb.ServerReadyRequest()).ready
    client.close()
    ports = {urlsplit(running.http).port, urlsplit(running.metrics).port, int(running.grpc.rpartition(":")[2])}
    assert len(ports) == 3


@clause("lifecycle.terminate")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_good_order(process: StartServer, number: signal.Signals) -> None:
    running = process([SAMPLES])
    running.process.send_signal(number)
    assert running.process.wait(START_LIMIT_S) == 0, running.log.read_text()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(running.http).hostname or "", urlsplit(running.http).port or 0)).close()


@clause("lifecycle.drain")
def test_what_was_accepted_is_answered_before_the_end(process: StartServer, tmp_path: Path) -> None:
    make_fixtures(tmp_path / "models")
    running = process([SAMPLES, tmp_path / "models"])
    http = HttpClient(running.http)
    body = encode(
        {
            "inputs": [
                {"name": "INPUT0", "datatype": "FP32", "shape": [1, 1], "data": [7]},
                {"name": "STEPS", "datatype": "INT64", "shape": [1], "data": [500]},
            ]
        }
    )
    with http.connect() as connection:
        fields = {"Content-Length": str(len(body))}
        connection.send(connection.head("POST", "/v2/models/slow_loop/infer", fields) + body)
        # A later request on a later connection has been answered: by then the earlier one has been read.
        assert http.get("/v2/models/slow_loop/ready").status == 200
        running.process.send_signal(signal.SIGTERM)
        answer = connection.receive()
        assert (answer.status, answer.json()["outputs"][0]["data"]) == (200, [7])
        assert running.process.wait(START_LIMIT_S) == 0, running.log.read_text()


@clause("lifecycle.drain")
def test_a_sequence_that_waits_for_a_slot_gets_one_before_the_end(process: StartServer, tmp_path: Path) -> None:
    """The only slot belongs to a sequence whose next request can come no more."""
    make_fixtures(tmp_path)
    running = process([tmp_path], "--model-control-mode", "explicit", "--load-model", "sequence_sum_one_slot")
    http = HttpClient(running.http)
    path = "/v2/models/sequence_sum_one_slot/infer"

    def first(id: int) -> dict[str, object]:
        tensor = {"name": "INPUT", "datatype": "INT32", "shape": [1, 1], "data": [id]}
        return {"inputs": [tensor], "parameters": {"sequence_id": id, "sequence_start": True}}

    assert http.post(path, first(1)).status == 200
    body = encode(first(2))
    with http.connect() as connection:
        connection.send(connection.head("POST", path, {"Content-Length": str(len(body))}) + body)
        assert http.get("/v2/models/sequence_sum_one_slot/ready").status == 200  # as above
        running.process.send_signal(signal.SIGTERM)
        answer = connection.receive()
        assert (answer.status, answer.json()["outputs"][0]["data"]) == (200, [2])
        assert running.process.wait(START_LIMIT_S) == 0, running.log.read_text()


@clause("lifecycle.drain")
def test_a_connection_that_was_kept_is_told_of_the_end_by_an_answer(process: StartServer) -> None:
    """A client that sends at the very moment the server is told to stop gets its answer, and knows not to come back."""
    running = process([SAMPLES])
    http = HttpClient(running.http)
    with http.connect() as connection:
        request = connection.head("GET", "/v2/health/live", {})
        connection.send(request)
        assert connection.receive().status == 200
        running.process.send_signal(signal.SIGTERM)
        while True:  # until the server has noticed
            connection.send(request)
            answer = connection.receive()
            assert answer.status == 200
            if answer.headers.get("connection") == "close":
                break
        assert connection.at_end()
    assert running.process.wait(START_LIMIT_S) == 0, running.log.read_text()


@clause("lifecycle.exit_on_error")
def test_a_model_that_does_not_load_stops_the_start(process: StartServer, tmp_path: Path) -> None:
    make_broken_fixtures(tmp_path / "models")
    command = [str(PENSTOCK), "serve", "--model-repository", str(tmp_path / "models"), "--http-port", "0",
               "--grpc-port", "0", "--metrics-port", "0"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, timeout=START_LIMIT_S, text=True)
    assert ended.returncode not in (0, -signal.SIGKILL)
    assert "broken" in ended.stderr


@clause("lifecycle.slow_run")
def test_a_model_that_is_slow_on_some_inputs_holds_up_nobody_else(process: StartServer, tmp_path: Path) -> None:
    """It is fast on zeros, so that its requests run where they arrive, until one would compute for hours."""
    make_fixtures(tmp_path)
    running = process([tmp_path], "--model-control-mode", "explicit", "--load-model", "slow_loop")
    http, grpc = HttpClient(running.http), GrpcClient(running.grpc)
    calls = [grpc.stub.ModelInfer.future(_slow_loop(steps), timeout=START_LIMIT_S) for steps in (1, 10**9)]
    assert calls[0].result(START_LIMIT_S).model_name == "slow_loop"
    for _ in range(3):
        assert http.get("/v2/health/live").status == 200
        assert grpc.call("ServerLive", pb.ServerLiveRequest()).live
    assert not calls[1].done()
    calls[1].cancel()
    assert grpc.stub.ModelInfer(_slow_loop(1), timeout=START_LIMIT_S).model_name == "slow_loop"
    grpc.close()


def _slow_loop(steps: int) -> Any:
    """A millisecond or so per step."""
    inputs = [Input("INPUT0", "FP32", np.ones((1, 1), np.float32)), Input("STEPS", "INT64", np.array([steps]))]
    message = infer_message(Call("slow_loop", inputs))
    message.raw_input_contents.extend(tensor.array.tobytes() for tensor in inputs)
    return message
