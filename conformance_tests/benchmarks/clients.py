"""What makes a measurement: load generators, ours and others', plain bytes, and no server at all."""

import asyncio
import csv
import json
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
import onnxruntime
from penstock.bench import cpu
from tritonclient.grpc import service_pb2, service_pb2_grpc

from conformance_tests.server import PENSTOCK

WARMUP_S = 0.3
LIMIT_S = 60.0  # of one measurement: nothing here takes nearly as long
WINDOWS = 3  # the fewest that perf_analyzer takes
MOST_WINDOWS = 10  # on a busy machine it may find its first ones too unlike
BATCH = 500  # runs between two looks at the clock


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs on this machine in a process of its own."""

    http: str  # "" for one that does not speak it
    grpc: str
    pid: int


@dataclass(frozen=True, slots=True)
class Load:
    """One request over and over."""

    model: str
    protocol: str
    concurrency: int
    shape: str = ""  # NAME:DIM,DIM,... for an input with open dimensions


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one measurement. Times in microseconds; CPU time is the server's, or the process's where there is none."""

    cpu_us: float
    requests_per_s: float
    p50_us: float
    p99_us: float
    client_cpu_share: float | None = None


class Client(Protocol):
    """Puts a load on a server."""

    name: str

    def measure(self, server: Server, load: Load, duration_s: float) -> Figures:
        """Raises RuntimeError where a request failed."""


class PenstockBench:
    """`penstock bench`, in a process of its own."""

    name = "penstock bench"

    def measure(self, server: Server, load: Load, duration_s: float) -> Figures:
        where = ["--grpc", server.grpc] if load.protocol == "grpc" else ["--url", server.http]
        command = [
            str(PENSTOCK), "bench", load.model, *where, "--protocol", load.protocol, "--concurrency",
            str(load.concurrency), "--duration", str(duration_s), "--warmup", str(WARMUP_S), "--server-pid",
            str(server.pid), "--json", *(["--shape", load.shape] if load.shape else []),
        ]  # fmt: skip
        [result] = json.loads(_output(command))["results"]
        if result["errors"]:
            raise RuntimeError(f"{' '.join(command)}: {result['errors']} errors: {result['first_error']}")
        return Figures(
            result["server_cpu_us"],
            result["requests_per_s"],
            result["p50_us"],
            result["p99_us"],
            result["client_cpu_share"],
        )


class PerfAnalyzer:
    """NVIDIA's client, where there is one. It brings no libraries: LD_LIBRARY_PATH must lead to CUDA's runtime."""

    name = "perf_analyzer"

    def __init__(self, binary: str) -> None:
        self._binary = binary

    def measure(self, server: Server, load: Load, duration_s: float) -> Figures:
        address = server.grpc if load.protocol == "grpc" else server.http.removeprefix("http://")
        with tempfile.TemporaryDirectory() as scratch:
            table = Path(scratch, "table.csv")
            command = [
                self._binary, "-m", load.model, "-u", address, "-i", load.protocol.split("-")[0],
                "--concurrency-range", str(load.concurrency), "-p", str(int(duration_s * 1000 / WINDOWS)),
                "-r", str(MOST_WINDOWS), "-s", "999", "-f", str(table),
            ]  # fmt: skip
            used_ns, answered = cpu.used_ns([server.pid]), _answered(server, load.model)
            _output(command)
            # Its warm-up and its windows together: of what was counted, and of what it cost.
            used_ns = (cpu.used_ns([server.pid]) or 0) - (used_ns or 0)
            answered = _answered(server, load.model) - answered
            [row] = csv.DictReader(table.read_text().splitlines())
        return Figures(
            used_ns / answered / 1e3,
            float(row["Inferences/Second"]),
            float(row["p50 latency"]),
            float(row["p99 latency"]),
        )


class ChangingCalls:
    """grpcio's asyncio client; each call has another deadline and another `x-request-id`, as calls of services have."""

    name = "grpcio client"

    def measure(self, server: Server, load: Load, duration_s: float) -> Figures:
        message: Any = service_pb2.ModelInferRequest(model_name=load.model)
        for name in ("INPUT0", "INPUT1"):
            message.inputs.add(name=name, datatype="INT32", shape=[1, 16])
            message.raw_input_contents.append(bytes(64))
        return asyncio.run(self._measure(server, message.SerializeToString(), load.concurrency, duration_s))

    async def _measure(self, server: Server, body: bytes, concurrency: int, duration_s: float) -> Figures:
        times_us: list[float] = []
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

            async def calls(end_s: float) -> None:
                while (now_s := time.monotonic()) < end_s:
                    number = len(times_us)
                    metadata = (("x-request-id", f"{now_s:.9f}-{number}"),)
                    await infer(body, timeout=5 + number % 1000 / 7, metadata=metadata)
                    times_us.append((time.monotonic() - now_s) * 1e6)

            async def load(seconds: float) -> None:
                end_s = time.monotonic() + seconds
                await asyncio.gather(*(calls(end_s) for _ in range(concurrency)))

            await load(WARMUP_S)
            times_us.clear()
            began_s, used_ns = time.monotonic(), cpu.used_ns([server.pid]) or 0
            await load(duration_s)
            used_ns = (cpu.used_ns([server.pid]) or 0) - used_ns
        return _figures(times_us, used_ns, time.monotonic() - began_s)


def plain_bytes(server: Server, size: int, concurrency: int, duration_s: float) -> Figures:
    """So many bytes to a server that sends as many back, on connections of their own."""
    host, _, port = server.grpc.rpartition(":")
    body, times_us = bytes(size), list[float]()

    def exchange(client: socket.socket) -> None:
        client.sendall(body)
        left = size
        while left:
            part = len(client.recv(min(left, 1 << 20)))
            if not part:
                raise RuntimeError("the server has closed the connection")
            left -= part

    def load(end_s: float) -> None:
        with socket.create_connection((host, int(port)), LIMIT_S) as client:
            while (now_s := time.monotonic()) < end_s:
                exchange(client)
                times_us.append((time.monotonic() - now_s) * 1e6)

    with ThreadPoolExecutor(concurrency) as threads:
        began_s, used_ns = time.monotonic(), cpu.used_ns([server.pid]) or 0
        list(threads.map(load, [began_s + duration_s] * concurrency))
        used_ns = (cpu.used_ns([server.pid]) or 0) - used_ns
    return _figures(times_us, used_ns, time.monotonic() - began_s)


def _figures(times_us: list[float], used_ns: int, took_s: float) -> Figures:
    return Figures(
        used_ns / len(times_us) / 1e3,
        len(times_us) / took_s,
        statistics.median(times_us),
        float(np.percentile(times_us, 99)),
    )


def session_run(model: Path, duration_s: float) -> Figures:
    """`session.run` on one row, in this process and on one thread: what the runtime itself takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feed = {item.name: np.ones((1, 16), np.int32) for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    for _ in range(BATCH):
        session.run(names, feed)
    times_us: list[float] = []
    began_cpu_ns, began_ns = time.process_time_ns(), time.monotonic_ns()
    while (now_ns := time.monotonic_ns()) - began_ns < duration_s * 1e9:
        for _ in range(BATCH):
            session.run(names, feed)
        times_us.append((time.monotonic_ns() - now_ns) / BATCH / 1e3)
    runs = BATCH * len(times_us)
    return Figures(
        (time.process_time_ns() - began_cpu_ns) / runs / 1e3,
        runs / ((time.monotonic_ns() - began_ns) / 1e9),
        statistics.median(times_us),
        float(np.percentile(times_us, 99)),
    )


def _answered(server: Server, model: str) -> int:
    """How many requests for a model the server has answered well, as it says itself."""
    if not server.http:
        with grpc.insecure_channel(server.grpc) as channel:
            stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            asked: Any = service_pb2.ModelStatisticsRequest(name=model)
            return sum(one.inference_stats.success.count for one in stub.ModelStatistics(asked).model_stats)
    with urllib.request.urlopen(f"{server.http}/v2/models/{model}/stats", timeout=LIMIT_S) as answer:
        return sum(entry["inference_stats"]["success"]["count"] for entry in json.load(answer)["model_stats"])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
