"""`make gpu-check`: what only a GPU can prove, in one command. Run as `python -m conformance_tests.gpu`.

Says in a word that there is no GPU and succeeds where there is none. Else it checks that models run on the device that
was asked for and answer as on the CPU, that the protocol's tests pass there, and that memory comes back; and measures a
server beside ONNX Runtime alone. It writes BENCHMARKS.md and a record beside the others. Nothing need be installed but
the packages that it names where they are missing. `--device cpu --tiny` tries the checks themselves, without a GPU.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from penstock import devices
from penstock.devices import Driver

from conformance_tests.gpu import environment, report
from conformance_tests.gpu.report import BROKEN, Finding

if TYPE_CHECKING:  # which need packages that may be missing
    from conformance_tests.gpu.checks import Ground, Start
    from conformance_tests.server import Running

RECORDS = environment.ROOT / "conformance_tests" / "benchmarks"
DOCUMENT = environment.ROOT / "BENCHMARKS.md"
VERSIONS = ("onnxruntime-gpu", "onnxruntime", "numpy", "uvicorn", "uvloop", "grpcio", "protobuf", "nvidia-cudnn-cu13")
SECONDS, TINY_SECONDS = 2.5, 0.1
CLIENTS = 4
START_LIMIT_S = 180.0  # of a server with a dozen models
PARTS = ("device", "agreement", "conformance", "memory", "lost", "speed")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks and times that prove nothing but that it works")
    parser.add_argument("--only", choices=PARTS, action="append", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where the record goes (default: %(default)s)")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="where the table goes (default: %(default)s)")
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION", help="start servers with this option")
    options = parser.parse_args(arguments)
    driver = devices.driver()
    if options.device == "cuda" and not driver.gpus:
        print(f"no GPU: {driver.fault}; nothing was checked")
        return 0
    if lacking := environment.missing():
        print(f"these packages are missing: {' '.join(lacking)}; with a network, pip install them", file=sys.stderr)
        return 1
    findings, raw = run(options.device, options.tiny, options.only or PARTS, options.serve)
    made = report.record(findings, _machine(driver, options.device), raw)
    path = report.write(options.records, options.document, made, findings)
    print(report.table(findings))
    unmet = [one.name for one in findings if one.met is False]
    print(f"\nwritten to {path} and {options.document}" + (f"; not met: {'; '.join(unmet)}" if unmet else ""))
    return 1 if any(one.value == BROKEN or (one.met is False and not _is_figure(one)) for one in findings) else 0


def _is_figure(finding: Finding) -> bool:
    """A goal of speed that is not met is a result; a check that fails is a fault."""
    return finding.name.split(":")[0] in ("conv", "transformer", "small")


def run(
    device: str, tiny: bool, parts: Sequence[str], further: Sequence[str] = ()
) -> tuple[list[Finding], dict[str, Any]]:
    """Everything, or the parts of it; what a check raises is its finding. Servers get the `further` options too."""
    from conformance_tests.gpu import checks, models

    found: list[Finding] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        scratch = Path(directory)
        sizes = models.TINY if tiny else models.Sizes()
        models.write(scratch / "models", sizes)
        child = environment.child_environment(scratch)
        ground = checks.Ground(
            device, scratch / "models", sizes, tiny, child, scratch, _starter(scratch, child), further
        )
        for part, name, check in _checks(ground, raw):
            if part in parts:
                _add(found, name, check)
        if not {"device", "agreement", "speed"} & {*parts}:
            return found, raw
        servers: dict[str, Running] = {}

        def start() -> Iterator[Finding]:
            for transport in ("grpcio", "native"):
                options = ("--device", device, "--grpc-transport", transport, *further)
                servers[transport] = stack.enter_context(ground.start(transport, [ground.repository], *options))
            yield Finding("servers start", f"{len(servers)} of 2", "all", True)

        _add(found, "servers start", start)
        if len(servers) == 2:
            for part, name, measure in _figures(ground, servers, raw):
                if part in parts:
                    _add(found, name, measure)
    return found, raw


Part: TypeAlias = tuple[str, str, Callable[[], Iterable[Finding]]]


def _checks(ground: "Ground", raw: dict[str, Any]) -> Iterator[Part]:
    """Those that bring their own process."""
    from conformance_tests.gpu import checks

    files = ("oip/test_precision.py",) if ground.tiny else checks.CONFORMANCE
    yield "device", "doctor", lambda: [checks.doctor(ground)]
    yield "device", "honest device: refusal", lambda: [checks.refuses_without_gpu(ground)]
    yield "device", "honest device: fall-back", lambda: [checks.falls_back_without_gpu(ground)]
    for model in ("conv", "transformer"):
        yield "memory", f"memory back: {model}", partial(checks.memory_returns, ground, model, raw)
    yield "conformance", "conformance", lambda: [checks.conformance(ground, files)]
    if ground.device == "cuda":
        yield "lost", "a lost GPU", lambda: [checks.lost_device(ground)]


def _figures(ground: "Ground", servers: "Mapping[str, Running]", raw: dict[str, Any]) -> Iterator[Part]:
    """Those that ask two servers that run."""
    from conformance_tests.gpu import checks, models
    from conformance_tests.gpu.figures import Bench
    from conformance_tests.gpu.load import Generator

    yield "device", "honest device: served", lambda: [checks.served_devices(ground, servers["grpcio"])]
    for model in checks.TOLERANCE:
        yield "agreement", f"agreement: {model}", partial(checks.agreement, ground, servers["grpcio"], model)
    seconds = TINY_SECONDS if ground.tiny else SECONDS
    clients = min(CLIENTS, max(1, devices.cpu_count() // 3))
    rows = [1 << power for power in range(models.Sizes().most_rows.bit_length())]
    rows = [size for size in rows if size <= ground.sizes.most_rows]
    bench = Bench(ground, dict(servers), Generator(ground.child, seconds, clients), seconds, rows, raw)
    yield "speed", "conv", lambda: bench.throughput("conv")
    yield "speed", "transformer", lambda: bench.throughput("transformer")
    yield "speed", "small", bench.latency
    yield "speed", "comparisons", bench.comparisons


def _add(found: list[Finding], name: str, check: Callable[[], Iterable[Finding]]) -> None:
    """What a check finds, as it comes; others go on after one that breaks."""
    started_s = time.monotonic()

    def say(finding: Finding) -> None:
        found.append(finding)
        print(f"{time.monotonic() - started_s:6.1f} s  {finding.name}: {finding.value}", file=sys.stderr, flush=True)

    try:
        for finding in check():
            say(finding)
    except Exception as error:  # noqa: BLE001 - whatever a check raises is its finding
        text = " ".join(str(error).split())
        say(Finding(name, BROKEN, "works", False, f"{type(error).__name__}: {text[-400:]}"))


def _starter(scratch: Path, child: Mapping[str, str]) -> "Start":
    from conformance_tests.server import Running, penstock

    def start(
        name: str, repositories: Sequence[Path], *options: str, environment: Mapping[str, str] | None = None
    ) -> AbstractContextManager[Running]:
        given = {**child, **(environment or {})}
        return penstock(repositories, scratch / f"{name}.log", *options, environment=given, limit_s=START_LIMIT_S)

    return start


def _machine(driver: Driver, device: str) -> dict[str, Any]:
    """Its kind, not its name; and what ran on it."""
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": driver.gpus[0].name if device == "cuda" else "no GPU",
        "driver": driver.version or "none",
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": devices.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
