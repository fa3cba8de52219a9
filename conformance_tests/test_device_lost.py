"""A GPU is lost to the server: seen from outside, with a runtime that loses one that does not exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, HttpClient
from conformance_tests.models import fragile_gpu
from conformance_tests.server import SAMPLES, STOP_LIMIT_S, Running, penstock

LOST = "cuda:0 is lost to this process: CUDA failure 700: an illegal memory access"


@contextmanager
def server(directory: Path, request: pytest.FixtureRequest, *options: str) -> Iterator[Running]:
    """With `fragile` and `neighbour` on the GPU, and the samples on the CPU."""
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")
    fragile_gpu.install(directory / "packages")
    for name in ("fragile", "neighbour"):
        fragile_gpu.write_model(directory / "models", name)
    path = os.pathsep.join(filter(None, [str(directory / "packages"), os.environ.get("PYTHONPATH", "")]))
    chosen = [*request.config.getoption("--serve"), *options]
    log = directory / "server.log"
    with penstock([directory / "models", SAMPLES], log, *chosen, environment={"PYTHONPATH": path}) as running:
        yield running


def ask(http: HttpClient, model: str, number: float) -> Answer:
    tensor = {"name": "INPUT0", "datatype": "FP32", "shape": [1], "data": [number]}
    return http.post(f"/v2/models/{model}/infer", {"inputs": [tensor]})


@clause("lifecycle.device_lost")
def test_models_of_a_lost_gpu_are_unavailable_and_those_on_the_cpu_go_on(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with server(tmp_path, request) as running:
        http = HttpClient(running.http)
        assert ask(http, "neighbour", 7).json()["outputs"][0]["data"] == [7]
        lost = ask(http, "fragile", -1)
        assert (lost.status, lost.json()["error"]) == (500, LOST)
        refused = http.post("/v2/models/neighbour/versions/1/infer", {"inputs": []})
        assert refused.status == 503
        assert http.get("/v2/models/iris/ready").status == 200
        assert http.get("/v2/health/live").status == 200
        assert http.get("/v2/health/ready").status == 400
        assert "no longer served: fragile, neighbour" in running.log.read_text()
        assert running.stop() == 0


@clause("lifecycle.device_exit")
def test_a_supervisor_is_told_by_status_3(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with server(tmp_path, request, "--exit-on-device-error") as running:
        assert ask(HttpClient(running.http), "fragile", -1).status == 500
        assert running.process.wait(STOP_LIMIT_S) == 3, running.log.read_text()
