"""`make bench-scheduling`: what batching gains and costs, and what is left of a server that is asked for too much.

The server and everything that it is held against run on one core, the clients on another, one after the other and round
by round. Models are products of matrices: a batch of one reads as many weights as a batch of 32.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto
from penstock.bench import cpu

from conformance_tests.benchmarks import page
from conformance_tests.benchmarks.clients import Figures, Load, PenstockBench, Server
from conformance_tests.models.graphs import Directory, graph, node, tensor
from conformance_tests.server import Running, penstock

ROOT = Path(__file__).parents[2]
ROUNDS = 5
DURATION_S = 2.0
OVERLOAD_S = 30.0
CAPACITY_S = 5.0  # of the closed loops before and after it
IN_PROCESS_S = 0.5
CROWD = 32
SQUARES = 3  # matrices in turn: more than a cache of 32 MiB holds of the large ones
WIDTH = 64  # of a row that is sent
BATCH_SIZES = (1, 8, 16, 32, 64)
QUEUE = 8
QUEUE_TIMEOUT_MS = 200.0

LIMITED = f"""\
max_batch_size: 1
dynamic_batching {{
  default_queue_policy {{ max_queue_size: {QUEUE} default_timeout_microseconds: {QUEUE_TIMEOUT_MS * 1000:.0f} }}
}}
"""
DELAYED = f"max_batch_size: {CROWD} dynamic_batching {{ max_queue_delay_microseconds: 20000 }}\n"
BATCHED = f"max_batch_size: {CROWD} dynamic_batching {{ }}\n"
PLAIN = f"max_batch_size: {CROWD}\n"
ONE_THREAD = """\
instance_group { count: 1 kind: KIND_CPU }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 8 ] } ]
"""


@dataclass(frozen=True, slots=True)
class Product:
    """A model of `layers` products with square matrices, and how it is batched."""

    name: str
    side: int
    layers: int
    batching: str

    def graph(self) -> ModelProto:
        random = np.random.default_rng(5)

        def weights(rows: int, columns: int) -> Any:
            return (random.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

        middle = [
            node("MatMul", f"hidden{number} square{number % SQUARES}", f"hidden{number + 1}")
            for number in range(self.layers)
        ]
        return graph(
            self.name,
            [
                node("MatMul", "INPUT0 first", "hidden0"),
                *middle,
                node("MatMul", f"hidden{self.layers} last", "OUTPUT0"),
            ],
            [tensor("INPUT0", TensorProto.FLOAT, ("batch", WIDTH))],
            [tensor("OUTPUT0", TensorProto.FLOAT, ("batch", 8))],
            {
                "first": weights(WIDTH, self.side),
                **{f"square{number}": weights(self.side, self.side) for number in range(SQUARES)},
                "last": weights(self.side, 8),
            },
        )

    def write(self, directory: Path) -> Path:
        """The model file, in a directory that is a repository."""
        config = self.batching + ONE_THREAD
        Directory(self.name, {"1/model.onnx": self.graph(), "config.pbtxt": config}).write(directory)
        return directory / self.name / "1" / "model.onnx"


OVERLOADED = Product("overloaded", 2048, 12, LIMITED)
HEAVY, HEAVY_EAGER = Product("heavy", 2048, 32, DELAYED), Product("heavy_eager", 2048, 32, BATCHED)
LIGHT, LIGHT_PLAIN = Product("light", 512, 4, BATCHED), Product("light_plain", 512, 4, PLAIN)
PRODUCTS = (OVERLOADED, HEAVY, HEAVY_EAGER, LIGHT, LIGHT_PLAIN)


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, and what it shall be."""

    what: str
    figure: str
    wanted: str
    holds: bool


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread, and the processes that it starts, on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class Bench:
    """A server on a core of its own, and the core for its clients."""

    running: Running
    server_core: int
    client_core: int

    def closed(self, model: Product, concurrency: int, duration_s: float = DURATION_S) -> Figures:
        server = Server(self.running.http, self.running.grpc, self.running.process.pid)
        with on_core(self.client_core):
            return PenstockBench().measure(server, Load(model.name, "http-binary", concurrency), duration_s)

    def open(self, model: Product, rate: float, duration_s: float) -> dict[str, Any]:
        command = [
            sys.executable, "-m", "conformance_tests.benchmarks.overload", self.running.http, model.name,
            "--rate", str(rate), "--duration", str(duration_s),
        ]  # fmt: skip
        with on_core(self.client_core):
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=duration_s + 60)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def in_process(self, file: Path, rows: int) -> Figures:
        """Of `session.run` on the server's core, on one thread; a request is a row."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        with on_core(self.server_core):
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            feed = {"INPUT0": np.random.default_rng(1).random((rows, WIDTH), np.float32)}
            session.run(None, feed)
            times_us, began_s, began_cpu_ns = list[float](), time.monotonic(), time.thread_time_ns()
            while (took_s := (now_s := time.monotonic()) - began_s) < IN_PROCESS_S:
                session.run(None, feed)
                times_us.append((time.monotonic() - now_s) * 1e6)
            used_ns = time.thread_time_ns() - began_cpu_ns
        number = rows * len(times_us)
        return Figures(
            used_ns / number / 1e3, number / took_s, statistics.median(times_us), float(np.percentile(times_us, 99))
        )


class Memory:
    """Samples a process's resident memory until the block ends, in MiB."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/statm")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.seen: list[float] = []

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            pages = int(self._file.read_text().split()[1])
            self.seen.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    @property
    def growth(self) -> float:
        """From the first third, when all that is ever needed is there, to the end."""
        return max(self.seen[-3:]) - max(self.seen[: max(1, len(self.seen) // 3)])


def overload(bench: Bench, seconds: float) -> list[Row]:
    """Twice as many requests as the server can answer, as it says before and after."""
    lone_ms = bench.closed(OVERLOADED, 1).p50_us / 1e3
    pid = bench.running.process.pid
    first = bench.closed(OVERLOADED, QUEUE, CAPACITY_S)
    before = first.requests_per_s
    used_ns = cpu.used_ns([pid]) or 0
    with Memory(pid) as memory:
        seen = bench.open(OVERLOADED, 2 * before, seconds)
    used_ns = (cpu.used_ns([pid]) or 0) - used_ns
    last = bench.closed(OVERLOADED, QUEUE, CAPACITY_S)
    capacity = statistics.mean((before, last.requests_per_s))
    closed_us, open_us = statistics.mean((first.cpu_us, last.cpu_us)), used_ns / 1e3 / seen["answered"]
    goodput = seen["answered"] / seen["seconds"]
    median_ms, p99_ms, _ = seen["answered_ms"]
    refused = sum(seen["refused"].values())
    [full] = [text for text in seen["refused"] if "Exceeds maximum queue size" in text]
    refused_ms = seen["refused_ms"][full]
    return [
        Row("one request alone, ms", f"{lone_ms:.1f}", "at least 5", lone_ms >= 5),
        Row(
            f"goodput at {2 * before:.0f}/s, twice the capacity, for {seconds:.0f} s",
            f"{goodput:.0f}/s of {capacity:.0f}/s: {goodput / capacity:.0%}",
            "at least 90%",
            goodput >= 0.9 * capacity,
        ),
        Row(
            "CPU us of the server for each request answered at capacity, of that under overload",
            f"{closed_us:.0f} of {open_us:.0f}: {closed_us / open_us:.0%}",
            "",
            True,
        ),
        Row(
            f"refused because {QUEUE} wait already, of all that was refused",
            f"{seen['refused'][full]} of {refused}: {seen['refused'][full] / refused:.1%}",
            "at least 99%; the others timed out",
            seen["refused"][full] >= 0.99 * refused,
        ),
        Row(
            "those refused after, ms, median and 99th percentile",
            f"{refused_ms[0]:.1f}, {refused_ms[1]:.1f}",
            "at once: before half of the accepted ones are answered",
            refused_ms[1] < median_ms,
        ),
        Row(
            "accepted ones answered after, ms, median and 99th percentile",
            f"{median_ms:.0f}, {p99_ms:.0f}",
            f"at most {QUEUE_TIMEOUT_MS:.0f} in the queue, and one run",
            p99_ms <= QUEUE_TIMEOUT_MS + lone_ms,
        ),
        Row(
            "the server's memory at the end, over that of the first third, MiB",
            f"{memory.growth:+.1f} of {memory.seen[-1]:.0f}",
            "flat: within 2",
            abs(memory.growth) < 2,
        ),
    ]


def throughput(bench: Bench, file: Path, rounds: int) -> list[Row]:
    """Rows per second over HTTP beside those of ONNX Runtime by itself at each batch size, on the same core.

    Without a delay a batch takes what has come back since the last one left, and grows and shrinks in turn. With one
    that is shorter than what a full batch saves, it waits for those that are on their way.
    """
    inside: dict[int, list[Figures]] = {size: [] for size in BATCH_SIZES}
    served: dict[Product, list[Figures]] = {HEAVY: [], HEAVY_EAGER: []}
    for _ in range(rounds):
        for size in BATCH_SIZES:
            inside[size].append(bench.in_process(file, size))
        for model, figures in served.items():
            figures.append(bench.closed(model, CROWD))
    alone = {size: _rate(figures) for size, figures in inside.items()}
    best = max(alone, key=alone.__getitem__)
    delayed, eager = (_rate(figures) for figures in served.values())
    cpu_us = [statistics.median(one.cpu_us for one in figures) for figures in (inside[best], served[HEAVY])]
    return [
        Row(
            "time of a row in a batch of 32, over that of one alone",
            f"{alone[1] / alone[32]:.2f}",
            "at most 0.33",
            alone[32] >= 3 * alone[1],
        ),
        Row(
            f"rows/s at concurrency {CROWD}, delay 20 ms, of ONNX Runtime's at its best batch size, {best}",
            f"{delayed:.0f} of {alone[best]:.0f}: {delayed / alone[best]:.0%}",
            "at least 85%",
            delayed >= 0.85 * alone[best],
        ),
        Row("the same without a delay", f"{eager:.0f}: {eager / alone[best]:.0%}", "", True),
        Row(
            "CPU us of a row in ONNX Runtime, of the server's for a request, delay 20 ms",
            f"{cpu_us[0]:.0f} of {cpu_us[1]:.0f}: {cpu_us[0] / cpu_us[1]:.0%}",
            "",
            True,
        ),
    ]


def _rate(figures: Sequence[Figures]) -> float:
    return statistics.median(one.requests_per_s for one in figures)


def cost(bench: Bench, rounds: int) -> list[Row]:
    """The server's CPU time per request of one model with and without dynamic batching."""
    rows = []
    for concurrency in (1, CROWD):
        each: dict[Product, list[float]] = {LIGHT_PLAIN: [], LIGHT: []}
        for _ in range(rounds):
            for model, figures in each.items():
                figures.append(bench.closed(model, concurrency).cpu_us)
        plain, batched = (statistics.median(figures) for figures in each.values())
        rows.append(
            Row(
                f"CPU us per request with batching, over without, concurrency {concurrency}",
                f"{batched:.0f} - {plain:.0f} = {batched - plain:+.0f}",
                "less than 50 more" if concurrency == 1 else "less",
                batched - plain < (50 if concurrency == 1 else 0),
            )
        )
    return rows


def _word(row: Row) -> str:
    if not row.wanted:
        return ""
    return "yes" if row.holds else "**no**"


def section(rows: Sequence[Row], cores: int, load_before: float) -> str:
    lines = [f"| {row.what} | {row.figure} | {row.wanted} | {_word(row)} |" for row in rows]
    return "\n".join(
        (
            f"## Scheduling, {date.today().isoformat()}",
            "",
            f"On one of {cores} cores, clients on another. Load average before: {load_before}. "
            "`make bench-scheduling` writes this.",
            "",
            "| what | figure | shall be | holds |",
            "| --- | --- | --- | --- |",
            *lines,
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench-scheduling", description="What batching and queues do.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=OVERLOAD_S, help="of overload (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="print the figures and write nothing")
    parser.add_argument("--only", choices=("overload", "throughput", "cost"), help="one of them; records nothing")
    given = parser.parse_args(arguments)

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("the server and its clients need a core each")
    load_before = round(os.getloadavg()[0], 2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        files = {product: product.write(Path(scratch, "models")) for product in PRODUCTS}
        with on_core(cores[-1]):
            running = stack.enter_context(penstock([Path(scratch, "models")], Path(scratch, "server.log")))
        bench = Bench(running, cores[-1], cores[0])
        if given.only in (None, "overload"):
            rows += overload(bench, given.seconds)
        if given.only in (None, "throughput"):
            rows += throughput(bench, files[HEAVY], given.rounds)
        if given.only in (None, "cost"):
            rows += cost(bench, given.rounds)
    text = section(rows, len(cores), load_before)
    print(text)
    if not (given.no_record or given.only):
        page.put(ROOT / "BENCHMARKS.md", "scheduling", text)
        print("\nwritten to BENCHMARKS.md")


if __name__ == "__main__":
    main()
