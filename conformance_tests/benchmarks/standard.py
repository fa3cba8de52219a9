"""`make bench`: the standard load, written into BENCHMARKS.md and into a record beside this file.

Every row is measured once per round and its median counts, so that whatever else the machine does falls on all rows
alike. Among them are references: what ONNX Runtime takes by itself and in a raw ASGI application, what a constant
answer costs on the same uvicorn and on grpcio, and what it costs to read and write as many bytes. `native` is Penstock
with `--grpc-transport native`, `asgi` with `--http-fast-lane false`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from conformance_tests.benchmarks import figures, page
from conformance_tests.benchmarks.clients import (
    ChangingCalls,
    Client,
    Figures,
    Load,
    PenstockBench,
    PerfAnalyzer,
    Server,
    plain_bytes,
    session_run,
)
from conformance_tests.models.fixtures import make_fixtures
from conformance_tests.server import penstock

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "model_repository"
RECORDS = Path(__file__).parent
ROUNDS = 3
DURATION_S = 1.5
FIGURES = "figures"  # what --only calls what is no load
PERF_ANALYZER = "PERF_ANALYZER"  # the environment variable that names its binary
VERSIONS = ("penstock", "onnxruntime", "onnxruntime-gpu", "numpy", "uvicorn", "uvloop", "grpcio", "protobuf")

OURS = PenstockBench.name
CHANGING = ChangingCalls.name
PICTURE = "INPUT0:1,150528"  # 3 · 224 · 224 FP32: 602112 bytes each way
LARGE = "INPUT0:1,1048576"  # 4 MiB each way
BYTES = {"bytes 602112": 602112, "bytes 4194304": 4194304}  # servers that read and write so many


@dataclass(frozen=True, slots=True)
class Row:
    """One load. `server` is ours in one of three forms, a reference, or none at all: `session.run` in process."""

    load: Load
    server: str = "penstock"
    client: str = OURS

    @property
    def name(self) -> str:
        what = {
            "penstock": self.load.model, "native": f"{self.load.model} (native)", "constant": "constant answer",
            "asgi inline": "session.run on uvicorn", "asgi": f"{self.load.model} (no lane)",
            "grpcio constant": "constant answer on grpcio", "none": "session.run", **dict.fromkeys(BYTES, "bytes"),
        }[self.server]  # fmt: skip
        size = {"": "", PICTURE: ", 602 KB", LARGE: ", 4 MB"}[self.load.shape]
        changing = ", changing metadata" if self.client == CHANGING else ""
        return f"{what}, {self.load.protocol}, {self.load.concurrency}{size}{changing}"


SESSION_RUN = Row(Load("simple", "in process", 1), server="none", client="none")
ROWS: tuple[Row, ...] = (
    SESSION_RUN,
    *(Row(Load("simple", "http-binary", count), server="constant") for count in (1, 16)),
    *(Row(Load("simple", protocol, count)) for protocol in ("http-binary", "http-json", "grpc") for count in (1, 16)),
    *(Row(Load("simple", "grpc", count), server="native") for count in (1, 16)),
    *(
        Row(Load("simple", "grpc", count), server=server, client=CHANGING)
        for count in (1, 16)
        for server in ("grpcio constant", "native")
    ),
    *(
        row
        for server, shape in zip(BYTES, (PICTURE, LARGE), strict=True)
        for row in (
            Row(Load("identity_fp32", "bytes", 4, shape), server=server, client="none"),
            Row(Load("identity_fp32", "http-binary", 4, shape)),
            Row(Load("identity_fp32", "grpc", 4, shape)),
            Row(Load("identity_fp32", "grpc", 4, shape), server="native"),
        )
    ),
    *(
        Row(Load("simple", "http-binary", count), server=server, client=PerfAnalyzer.name)
        for count in (1, 16)
        for server in ("asgi inline", "asgi", "penstock")
    ),
    *(Row(Load("simple", "grpc", count), client=PerfAnalyzer.name) for count in (1, 16)),
    *(
        Row(Load("simple", "grpc", count), server=server, client=PerfAnalyzer.name)
        for count in (1, 16)
        for server in ("grpcio constant", "native")
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure the standard load.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="print the figures and write nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows that have this in their name; records nothing")
    options = parser.parse_args(arguments)

    clients: dict[str, Client] = {OURS: PenstockBench(), CHANGING: ChangingCalls()}
    if binary := os.environ.get(PERF_ANALYZER):
        clients[PerfAnalyzer.name] = PerfAnalyzer(binary)
    rows = [row for row in ROWS if (row.client in clients or row.client == "none") and options.only in row.name]
    with tempfile.TemporaryDirectory() as scratch, _servers(Path(scratch)) as servers:
        kind = _kind(servers["penstock"])
        record = {"date": date.today().isoformat(), "kind": kind, "machine": machine(), "rounds": options.rounds}
        measured = _measure(rows, servers, clients, options.rounds)
    record["rows"] = [_summary(row, measured[row]) for row in rows]
    if not options.only or options.only in FIGURES:
        with tempfile.TemporaryDirectory() as scratch:
            found = figures.measure(Path(scratch), options.rounds)
        record["figures"] = [{**asdict(figure), "value": figure.value} for figure in found]

    last = page.last_record(RECORDS, kind)
    print(page.table(record, last))
    if "figures" in record:
        print(f"\n{page.figures(record)}")
    if not (options.no_record or options.only):
        path = RECORDS / f"{kind}-{record['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        page.write(ROOT / "BENCHMARKS.md", record)
        print(f"\nwritten to {path.relative_to(ROOT)} and BENCHMARKS.md")


def _measure(
    rows: Sequence[Row], servers: dict[str, Server], clients: dict[str, Client], rounds: int
) -> dict[Row, list[Figures]]:
    measured: dict[Row, list[Figures]] = {row: [] for row in rows}
    for number in range(rounds):
        for row in rows:
            if sys.stderr.isatty():
                print(f"\r\033[Kround {number + 1} of {rounds}: {row.name}, {row.client}", end="", file=sys.stderr)
            if row is SESSION_RUN:
                figures = session_run(SAMPLES / "simple" / "1" / "model.onnx", DURATION_S)
            elif row.server in BYTES:
                figures = plain_bytes(servers[row.server], BYTES[row.server], row.load.concurrency, DURATION_S)
            else:
                figures = clients[row.client].measure(servers[row.server], row.load, DURATION_S)
            measured[row].append(figures)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return measured


def _summary(row: Row, rounds: Sequence[Figures]) -> dict[str, Any]:
    shares = [one.client_cpu_share for one in rounds if one.client_cpu_share is not None]
    return {
        "name": row.name,
        "server": row.server,
        "client": row.client,
        **asdict(row.load),
        "cpu_us": statistics.median(one.cpu_us for one in rounds),
        "requests_per_s": statistics.median(one.requests_per_s for one in rounds),
        "p50_us": statistics.median(one.p50_us for one in rounds),
        "p99_us": statistics.median(one.p99_us for one in rounds),
        "client_cpu_share": statistics.median(shares) if shares else None,
        "each_round": [asdict(one) for one in rounds],
    }


@contextlib.contextmanager
def _servers(scratch: Path) -> Iterator[dict[str, Server]]:
    """All servers, each in a process of its own on free ports."""
    fixtures = scratch / "fixtures"
    fixtures.mkdir()
    make_fixtures(fixtures)
    models = {row.load.model for row in ROWS}
    chosen = ["--model-control-mode", "explicit", *(f"--load-model={model}" for model in sorted(models))]
    references = {
        "constant": ("penstock.bench.reference",),
        "grpcio constant": ("conformance_tests.benchmarks.references", "grpc"),
        "asgi inline": (
            "conformance_tests.benchmarks.references",
            "asgi",
            str(SAMPLES / "simple" / "1" / "model.onnx"),
        ),
        **{name: ("conformance_tests.benchmarks.references", "bytes", str(size)) for name, size in BYTES.items()},
    }
    with contextlib.ExitStack() as stack:
        servers = {}
        forms = {"penstock": (), "asgi": ("--http-fast-lane", "false"), "native": ("--grpc-transport", "native")}
        for name, more in forms.items():
            ours = stack.enter_context(penstock([SAMPLES, fixtures], scratch / f"{name}.log", *chosen, *more))
            servers[name] = Server(ours.http, ours.grpc, ours.process.pid)
        for name, module in references.items():
            process = stack.enter_context(subprocess.Popen([sys.executable, "-m", *module], stdout=subprocess.PIPE))
            stack.callback(process.terminate)
            assert process.stdout is not None
            line = process.stdout.readline().decode().strip()
            if name == "constant":
                http, grpc = json.loads(line)["http"], ""
            else:
                http, grpc = (f"http://{line}", "") if name == "asgi inline" else ("", line)
            servers[name] = Server(http, grpc, process.pid)
        yield servers


def _kind(server: Server) -> str:
    """`gpu` where `simple` runs on CUDA, else `cpu`."""
    with urllib.request.urlopen(f"{server.http}/v2/models/simple", timeout=10) as answer:
        device = json.load(answer).get("parameters", {}).get("device", "cpu")
    return "gpu" if "cuda" in device else "cpu"


def machine() -> dict[str, Any]:
    """Its kind, not its name; and what ran on it."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),  # of others, over a minute: a busy machine measures badly
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
