"""The long run: `python -m conformance_tests.fuzz`. Starts a server of its own unless --url names one."""

import argparse
import contextlib
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from conformance_tests.carriers import Call, Carrier, GrpcRaw, HttpBinary, HttpJson, Input, infer
from conformance_tests.fuzz import footprint
from conformance_tests.fuzz.campaign import KINDS, Tally, Unit, plan, run
from conformance_tests.fuzz.cases import read
from conformance_tests.fuzz.senders import Fault, Sender
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import HttpClient
from conformance_tests.models.digits_data import held_out
from conformance_tests.models.fixtures import make_fixtures
from conformance_tests.server import SAMPLES, Target, penstock
from conformance_tests.tensors import Array

# A line of a server of ours. What grpc's libraries log under their names is about bytes that they refuse.
OWN_ERROR = re.compile(r"^E\d{4} [\d:.]+ (?!grpc)[\w.]+\] .*", re.MULTILINE)
WARM_UP = 0.15  # of the cases: by then every pool has its threads and every allocator its arenas


def main() -> int:
    """Exit status 1 for any fault."""
    asked = _arguments()
    directory = Path(asked.directory or tempfile.mkdtemp(prefix="fuzz-"))
    directory.mkdir(parents=True, exist_ok=True)
    with _target(asked.url, asked.grpc, directory) as target:
        if asked.replay:
            return _replay(asked.replay, target)
        kinds = [kind for kind in asked.kind or KINDS if target.grpc or KINDS[kind].protocol == "http"]
        if not kinds:
            sys.exit("these kinds need --grpc")
        faults = _campaign(plan(asked.cases, asked.seed, kinds), target, directory, asked.workers)
    if target.running is not None:
        errors = OWN_ERROR.findall(target.running.log.read_text(errors="replace"))
        faults += [f"the server logged {len(errors)} errors: {errors[0]}"] if errors else []
    print("\n".join(faults) or "no faults", flush=True)
    return 1 if faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m conformance_tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="how many, of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="decides every case")
    parser.add_argument("--workers", type=int, default=2, help="processes that send")
    parser.add_argument("--kind", action="append", choices=[*KINDS], help="only this kind; may be repeated")
    parser.add_argument("--url", help="the server that answers HTTP here, such as http://localhost:8000")
    parser.add_argument("--grpc", default="", help="where that server answers gRPC, such as localhost:8001")
    parser.add_argument("--directory", help="where failing cases and the server's log go")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="send one case of an earlier run instead")
    return parser.parse_args()


@contextlib.contextmanager
def _target(url: str | None, grpc: str, directory: Path) -> Iterator[Target]:
    if url:
        yield Target(url.rstrip("/"), grpc, "")
        return
    make_fixtures(directory / "models")
    options = ("--exit-on-error", "false", *footprint.RETURNING)
    with penstock([SAMPLES, directory / "models"], directory / "server.log", *options) as running:
        yield Target(running.http, running.grpc, running.metrics, running)


def _replay(file: Path, target: Target) -> int:
    with Sender(target.http, target.grpc) as sender:
        try:
            print(sender.send(read(file)))
        except Fault as fault:
            print(f"FAULT: {fault}")
            return 1
    return 0


def _campaign(units: Sequence[Unit], target: Target, directory: Path, workers: int) -> list[str]:
    """Run the units and print the figures; returns what is at fault."""
    began_s, tally, faults = time.perf_counter(), Tally(), list[str]()
    digits = _digits(target)
    spawning = multiprocessing.get_context("spawn")  # grpc does not survive a fork
    with ProcessPoolExecutor(workers, spawning) as pool:

        def send(some: Sequence[Unit]) -> None:
            for done in as_completed([pool.submit(run, unit, target.http, target.grpc, directory) for unit in some]):
                tally.add(done.result())

        first = max(1, int(len(units) * WARM_UP))
        send(units[:first])
        before = footprint.measure(target.running.process.pid) if target.running is not None else None
        send(units[first:])
    print("\n".join(tally.report()))
    faults += [f"{len(tally.failures)} sorts of faults"] if tally.failures else []
    if target.running is not None and before is not None:
        if (status := target.running.process.poll()) is not None:
            return [*faults, f"the server ended with status {status}"]
        after = footprint.settled(target.running.process.pid, before, lambda: HttpClient(target.http).get("/v2"))
        print(f"after {first} of {len(units)} units: {before}\nat the end: {after}")
        faults += footprint.growth(before, after)
    print(f"{time.perf_counter() - began_s:.0f} s")
    if HttpClient(target.http).get("/v2/health/ready").status != 200:
        faults.append("the server is not ready any more")
    for carrier, (was, now) in zip(("JSON", "binary", "gRPC"), zip(digits, _digits(target), strict=True), strict=False):
        if not np.array_equal(was, now):
            faults.append(f"digits over {carrier} are not what they were")
    return faults


def _digits(target: Target) -> list[Array]:
    """Probabilities [20,10] of some held-out digits, on each way to carry them. Raises AssertionError where refused."""
    client = HttpClient(target.http)
    carriers: list[Carrier] = [HttpJson(client), HttpBinary(client)]
    call = Call("digits", [Input("image", "FP32", held_out()[0][:20])])
    if not target.grpc:
        return [infer(carrier, call)["probabilities"] for carrier in carriers]
    grpc = GrpcClient(target.grpc)
    try:
        return [infer(carrier, call)["probabilities"] for carrier in (*carriers, GrpcRaw(grpc))]
    finally:
        grpc.close()


if __name__ == "__main__":
    sys.exit(main())
