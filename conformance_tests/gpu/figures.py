"""How fast a server on a GPU is, beside what ONNX Runtime gives by itself in the same run."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from penstock import pb
from penstock.tensor import BY_DTYPE, pack

from conformance_tests.gpu import constant, environment
from conformance_tests.gpu.checks import START_LIMIT_S, Ground
from conformance_tests.gpu.load import Generator, Measured
from conformance_tests.gpu.models import inputs
from conformance_tests.gpu.report import Finding
from conformance_tests.server import Running

CONCURRENCY = 64
GOALS = {"conv": 0.8, "transformer": 0.9}
CPU_GOAL_US = 150
LATENCY_GOAL = 1.3
DOORS = (("http-binary", "grpcio"), ("grpc", "grpcio"), ("grpc", "native"))  # protocol, and who speaks HTTP/2


@dataclass
class Bench:
    """Takes figures and keeps all of them for the record. `servers` are by who speaks HTTP/2 in them."""

    ground: Ground
    servers: dict[str, Running]
    generator: Generator
    seconds: float  # of each measurement
    rows: list[int]  # of a batch, in the reference
    raw: dict[str, Any] = field(default_factory=dict)

    def reference(self, network: str) -> list[dict[str, float]]:
        """ONNX Runtime alone, by rows of a batch, ascending."""
        key = f"reference {network}"
        if key not in self.raw:
            more = ["--tiny"] if self.ground.tiny else []
            model = self.ground.repository / network / "1" / "model.onnx"
            self.raw[key] = environment.result(
                "conformance_tests.gpu.reference", network, model, "--device", self.ground.device, "--rows",
                ",".join(map(str, self.rows)), "--seconds", self.seconds / 3, *more,
                environment=self.ground.child, timeout_s=START_LIMIT_S,
            )  # fmt: skip
        found: list[dict[str, float]] = self.raw[key]
        return found

    def data(self, model: str) -> Path:
        """One row for the model, as a file."""
        network = model.partition("_")[0]
        path = self.ground.scratch / f"{network}.npz"
        if not path.exists():
            np.savez(path, **inputs(network, self.ground.sizes, 1))  # type: ignore[arg-type]
        return path

    def measure(self, model: str, protocol: str, concurrency: int, transport: str = "grpcio") -> Measured:
        key = f"{model}, {protocol} ({transport}), {concurrency}"
        measured = self.generator.measure(self.servers[transport], model, self.data(model), protocol, concurrency)
        self.raw[key] = asdict(measured)
        return measured

    def throughput(self, network: str) -> Iterator[Finding]:
        """Requests of one row, many at a time, against the best batch of ONNX Runtime with as many copies."""
        speeds = self.reference(network)
        best = max(speeds, key=lambda speed: speed["rows_per_s"])
        bare = max(speed["rows_per_s_without_copies"] for speed in speeds)
        yield Finding(
            f"{network}: ONNX Runtime alone, IO binding", f"{best['rows_per_s']:.0f} rows/s",
            detail=f"at {best['rows']:.0f} rows of a batch; {bare:.0f} rows/s without copies",
        )  # fmt: skip
        with self._constant(network) as address:
            bound = self.generator.at(
                "", address.grpc, address.process.pid, network, self.data(network), "grpc", CONCURRENCY
            )
        self.raw[f"constant answer, {network}"] = asdict(bound)
        yield Finding(
            f"{network}: constant answer of as many bytes, gRPC", f"{bound.requests_per_s:.0f} requests/s",
            detail="what wire and client allow a server of one thread",
        )  # fmt: skip
        for protocol, transport in DOORS:
            measured = self.measure(network, protocol, CONCURRENCY, transport)
            ratio = measured.requests_per_s / best["rows_per_s"]
            goal = GOALS[network]
            yield Finding(
                f"{network}: {protocol}{' (native)' if transport == 'native' else ''}, {CONCURRENCY} at a time",
                f"{ratio:.2f}", f"≥ {goal:g} of ONNX Runtime alone", ratio >= goal,
                f"{measured.requests_per_s:.0f} requests/s, {measured.requests_per_s / bound.requests_per_s:.2f} of "
                f"the constant answer, p50 {measured.p50_us / 1e3:.1f} ms, server CPU {measured.server_cpu_us:.0f} us",
            )  # fmt: skip

    def latency(self) -> Iterator[Finding]:
        """One request at a time of a small network, over gRPC."""
        alone = self.reference("small")[0]
        for transport in ("grpcio", "native"):
            with self._constant("small") as constant:
                bare = self.generator.at(
                    "", constant.grpc, constant.process.pid, "small", self.data("small"), "grpc", 1
                )
            self.raw[f"constant answer, small, beside {transport}"] = asdict(bare)
            measured = self.measure("small", "grpc", 1, transport)
            name = f"small: gRPC{' (native)' if transport == 'native' else ''}, one at a time"
            above_us = measured.server_cpu_us - alone["cpu_us"]
            yield Finding(
                f"{name}: server CPU above ONNX Runtime alone", f"{above_us:.0f} us", f"≤ {CPU_GOAL_US} us",
                above_us <= CPU_GOAL_US, f"{measured.server_cpu_us:.0f} us, of which {alone['cpu_us']:.0f} us alone",
            )  # fmt: skip
            ratio = measured.p50_us / (bare.p50_us + alone["p50_us"])
            yield Finding(
                f"{name}: p50", f"{ratio:.2f}", f"≤ {LATENCY_GOAL:g} of constant answer + ONNX Runtime alone",
                ratio <= LATENCY_GOAL,
                f"{measured.p50_us:.0f} us against {bare.p50_us:.0f} + {alone['p50_us']:.0f} us",
            )  # fmt: skip

    def comparisons(self) -> Iterator[Finding]:
        """What each option is worth."""
        for network in ("conv", "transformer"):
            two, one = (self.measure(model, "grpc", CONCURRENCY) for model in (network, f"{network}_one"))
            yield _rates(f"{network}: two instances against one, {CONCURRENCY} at a time", two, one)
            numpy = self.measure(f"{network}_numpy", "grpc", CONCURRENCY)
            yield _rates(f"{network}: IO binding against NumPy arrays, {CONCURRENCY} at a time", two, numpy)
        for with_option, without, name in (
            ("small", "small_numpy", "small: IO binding against NumPy arrays, one at a time"),
            ("small_graph", "small", "small: CUDA graph against none, one at a time"),
            ("transformer_graph", "transformer_alone", "transformer: CUDA graph against none, one at a time"),
        ):
            mine, other = (self.measure(model, "grpc", 1) for model in (with_option, without))
            detail = f"p50 {mine.p50_us:.0f} us against {other.p50_us:.0f} us"
            yield Finding(name, f"{mine.p50_us / other.p50_us:.2f} of the time", detail=detail)

    @contextlib.contextmanager
    def _constant(self, model: str) -> Iterator[Running]:
        """A server that answers as ours did, and computes nothing."""
        directory = self.ground.scratch / f"constant {model}"
        if not directory.exists():
            constant.record(self.servers["grpcio"].grpc, directory, _requests(model, self.data(model)))
        command = [sys.executable, "-m", "conformance_tests.gpu.constant", str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **self.ground.child}) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().decode().strip()
                yield Running(process, "", address, "", directory / "ModelInfer")
            finally:
                process.terminate()


def _requests(model: str, data: Path) -> dict[str, bytes]:
    """What a client sends, by method."""
    message = pb.ModelInferRequest(model_name=model)
    with np.load(data) as arrays:
        for name, array in arrays.items():
            datatype = BY_DTYPE[array.dtype]
            message.inputs.add(name=name, datatype=datatype.name, shape=array.shape)
            message.raw_input_contents.append(bytes(pack(array, datatype)))
    metadata = pb.ModelMetadataRequest(name=model)
    return {
        "ServerLive": pb.ServerLiveRequest().SerializeToString(),
        "ModelMetadata": metadata.SerializeToString(),
        "ModelInfer": message.SerializeToString(),
    }


def _rates(name: str, mine: Measured, other: Measured) -> Finding:
    detail = f"{mine.requests_per_s:.0f} requests/s against {other.requests_per_s:.0f}"
    return Finding(name, f"{mine.requests_per_s / other.requests_per_s:.2f} of the rate", detail=detail)
