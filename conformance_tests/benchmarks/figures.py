"""What is no load: reading JSON, starting, and memory. Each beside its reference, in turn, and with its goal."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import orjson
from penstock import allocator, oip_json
from penstock.model_config import Signature, TensorSpec
from penstock.settings import Settings
from penstock.tensor import FP32

from conformance_tests.benchmarks.clients import Load, PenstockBench, Server
from conformance_tests.server import PENSTOCK, SAMPLES, penstock

ELEMENTS = 3 * 224 * 224
READINGS = 15
REQUESTS_S = 0.5  # on each protocol, before memory is looked at


@dataclass(frozen=True, slots=True)
class Figure:
    """One number; `reference` is what it was divided by, in the same unit as `measured`, or 0."""

    name: str
    unit: str
    measured: float
    reference: float
    most: float  # the goal: of the ratio, or of the number itself where there is no reference

    @property
    def value(self) -> float:
        return self.measured / self.reference if self.reference else self.measured


def measure(scratch: Path, rounds: int) -> list[Figure]:
    """All of them. `scratch` is an empty directory."""
    return [reading_json(), starting(scratch, rounds), memory(scratch)]


def reading_json() -> Figure:
    """From a body's bytes to the tensor, in this process, which keeps freed memory as the server does."""
    allocator.keep_blocks(Settings().malloc_threshold)
    array = np.random.default_rng(1).standard_normal(ELEMENTS).astype(np.float32)
    tensor = {"name": "A", "shape": [ELEMENTS], "datatype": "FP32", "data": array.astype(float)}
    body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)
    spec = TensorSpec("A", FP32, (-1,), (-1,))
    signature = Signature("m", {"A": spec}, {"A": spec}, frozenset({"A"}), 0, 0)
    limits = oip_json.Limits(len(body), 1, 1)

    def reference() -> None:
        np.array(orjson.loads(body)["inputs"][0]["data"], np.float32)

    ours, others = _in_turn(lambda: oip_json.decode(signature, body, None, limits), reference, READINGS)
    ours_s, reference_s = median(ours), median(others)
    return Figure(
        "150,528 FP32 read from JSON, x orjson.loads and np.array", "ms", ours_s * 1e3, reference_s * 1e3, 0.5
    )


def starting(scratch: Path, rounds: int) -> Figure:
    """From the command to the announcement that the server is ready, with compiled modules as an installation has."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(scratch / "compiled")
    serve = (
        str(PENSTOCK), "serve", "--model-repository", str(SAMPLES), "--model-control-mode", "explicit",
        "--load-model", "simple", "--announce", "json", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0",
        "--job-store", f"sqlite:{scratch / 'jobs.db'}",
    )  # fmt: skip

    def start() -> float:
        began_s = time.perf_counter()
        with subprocess.Popen(serve, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            took_s = time.perf_counter() - began_s
            process.terminate()
        if not line:
            raise RuntimeError(f"{' '.join(serve)} did not start")
        return took_s

    def imports() -> None:
        subprocess.run([sys.executable, "-c", "import numpy, onnxruntime, uvicorn"], env=environment, check=True)

    start()  # compiles what it imports
    ours, others = _in_turn(start, imports, 3 * rounds)
    ours_s, reference_s = min(ours), min(others)  # other load can only add; it varies all the same
    return Figure(
        "start to ready with simple, x importing numpy, onnxruntime and uvicorn",
        "ms",
        ours_s * 1e3,
        reference_s * 1e3,
        1.5,
    )


def memory(scratch: Path) -> Figure:
    """Resident, of a server with `simple` that has answered over HTTP and gRPC; with what it shares with others."""
    with penstock([SAMPLES], scratch / "log", "--model-control-mode", "explicit", "--load-model", "simple") as ours:
        server = Server(ours.http, ours.grpc, ours.process.pid)
        for protocol in ("http-binary", "http-json", "grpc"):
            PenstockBench().measure(server, Load("simple", protocol, 4), REQUESTS_S)
        status = Path(f"/proc/{ours.process.pid}/status").read_text()
    [resident] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return Figure("resident memory with simple, after requests", "MB", int(resident) / 1024, 0, 120)


def _in_turn(
    ours: Callable[[], object], reference: Callable[[], object], times: int
) -> tuple[list[float], list[float]]:
    """What both took, in seconds; what `ours` returns counts where it is a time itself."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for call, into in zip((ours, reference), taken, strict=True):
            began_s = time.perf_counter()
            own = call()
            into.append(own if isinstance(own, float) else time.perf_counter() - began_s)
    return taken
