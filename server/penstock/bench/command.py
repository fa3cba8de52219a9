"""`penstock bench MODEL`: its options, and what it prints. Everything heavy is imported when it runs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msgspec import structs

from penstock.client import access
from penstock.errors import Kind, ServingError
from penstock.settings import Settings

if TYPE_CHECKING:
    from penstock.bench.load import Load
    from penstock.bench.measure import Result, Target

DESCRIPTION = """\
Send a model requests and measure rate, latencies and the server's CPU time per request, over HTTP or gRPC or in
process. Inputs are generated from the model's metadata. The client uses one core, and says when that was too little.
"""
PROTOCOLS = ("http-binary", "http-json", "grpc", "local")
HTTP, GRPC = "http://127.0.0.1:8000", "127.0.0.1:8001"
DURATION_S = 5.0
CLOSED, OPEN = [1, 4, 16], [64]  # how many at a time, where it is not said
FAILED, INTERRUPTED = 1, 130

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads."""
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument("--version", dest="model_version", default="", metavar="N", help="of the model")
    where = parser.add_argument_group("where")
    where.add_argument("--url", metavar="URL", help=f"where the server answers HTTP (default: {HTTP})")
    where.add_argument("--grpc", metavar="HOST:PORT", help=f"where it answers gRPC (default: {GRPC})")
    where.add_argument("--local", metavar="PATH", help="serve the model of this repository in process, to nobody else")
    where.add_argument(
        "--protocol", type=_list_of(_protocol), action="extend", metavar="P,...",
        help=f"of {', '.join(PROTOCOLS)} (default: one for each of the options above, else http-binary)",
    )  # fmt: skip
    access.add_options(parser)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency", type=_list_of(_count), action="extend", metavar="N,...",
        help="closed loop: so many requests at a time, one connection for each over HTTP (default: 1,4,16). With "
        "--rate: how many connections may be busy at once (default: 64)",
    )  # fmt: skip
    load.add_argument(
        "--rate", type=_list_of(_positive), action="extend", metavar="R,...",
        help="open loop: so many requests per second, whether answers come or not; latencies count from the moment "
        "at which each was due",
    )  # fmt: skip
    load.add_argument(
        "--arrivals",
        choices=("poisson", "even"),
        default="poisson",
        help="distances in an open loop (default: poisson)",
    )
    load.add_argument("--duration", type=_positive, metavar="S", help=f"seconds of each run (default: {DURATION_S:g})")
    load.add_argument("--requests", type=_count, metavar="N", help="end each run after so many requests")
    load.add_argument(
        "--warmup", type=_not_negative, default=1.0, metavar="S", help="seconds before each run (default: 1)"
    )
    load.add_argument(
        "--timeout", type=_positive, default=30.0, metavar="S",
        help="give up a request after so many seconds (default: 30)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--rows", type=_count, default=1, metavar="B", help="rows of a request: its first dimension")
    data.add_argument(
        "--shape", type=_shape, action="append", default=[], metavar="NAME:D,D,...", help="the whole shape of an input"
    )
    data.add_argument("--data", type=Path, metavar="FILE", help="send these arrays by name, from an .npz file")
    shown = parser.add_argument_group("results")
    shown.add_argument(
        "--server-pid", type=_count, metavar="PID",
        help="count the CPU time of this process (default: of whatever listens there, if it is on this machine)",
    )  # fmt: skip
    shown.add_argument("--json", action="store_true", help="print results as JSON")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Measure and print; 0 if every run had good answers. `settings` say how to load a model in process.

    Raises ServingError for options that contradict one another, and where a measurement cannot start.
    """
    import asyncio

    import uvloop

    protocols = arguments.protocol or _reachable(arguments)
    if "local" in protocols and not arguments.local:
        raise ServingError(Kind.INVALID, "--protocol local needs --local PATH")
    if set(protocols) == {"local"} and (option := access.given(arguments)):
        raise ServingError(Kind.INVALID, f"{option} needs a server: with --local alone there is none")
    if arguments.data and (arguments.shape or arguments.rows != 1):
        raise ServingError(Kind.INVALID, "--data brings its own shapes: it excludes --rows and --shape")
    results: list[Result] = []
    status = 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_measure_all(arguments, settings, protocols, results))
        except KeyboardInterrupt:
            status = INTERRUPTED
    _print(arguments, results)
    return status or (0 if all(result.requests for result in results) else FAILED)


def _reachable(arguments: argparse.Namespace) -> list[str]:
    chosen = [
        protocol
        for protocol, given in (("http-binary", arguments.url), ("grpc", arguments.grpc), ("local", arguments.local))
        if given
    ]
    return chosen or ["http-binary"]


async def _measure_all(
    arguments: argparse.Namespace, settings: Settings, protocols: Sequence[str], results: "list[Result]"
) -> None:
    from penstock.bench import payload
    from penstock.bench.measure import measure, server_pids

    data = payload.read(arguments.data) if arguments.data else None
    wanted = payload.Wanted(arguments.rows, dict(arguments.shape), data)
    for protocol in protocols:
        async with AsyncExitStack() as stack:
            target = _target(arguments, settings, protocol, stack)
            stack.push_async_callback(target.close)
            metadata = target.metadata(arguments.model, arguments.model_version)
            request = payload.request(arguments.model, arguments.model_version, metadata, wanted)
            pids = server_pids(target, arguments.server_pid)
            for load in _loads(arguments):
                progress = _show if sys.stderr.isatty() else None
                results.append(await measure(target, protocol, request, load, arguments.warmup, pids, progress))


def _target(arguments: argparse.Namespace, settings: Settings, protocol: str, stack: AsyncExitStack) -> "Target":
    if protocol == "grpc":
        from penstock.bench.over_grpc import GrpcTarget

        return GrpcTarget(arguments.grpc or GRPC, access.headers(arguments))
    if protocol == "local":
        from penstock import in_process
        from penstock.bench.local import LocalTarget

        settings = structs.replace(settings, model_repository=(arguments.local,))
        engine = stack.enter_context(in_process.loaded(arguments.model, settings))
        return LocalTarget(engine, arguments.local)
    from penstock.bench.over_http import HttpTarget

    return HttpTarget(arguments.url or HTTP, protocol == "http-binary", access.headers(arguments))


def _loads(arguments: argparse.Namespace) -> "list[Load]":
    from penstock.bench.load import Load

    duration_s = arguments.duration or (0.0 if arguments.requests else DURATION_S)
    return [
        Load(concurrency, rate, arguments.arrivals == "even", duration_s, arguments.requests or 0, arguments.timeout)
        for rate in arguments.rate or [0.0]
        for concurrency in arguments.concurrency or (OPEN if rate else CLOSED)
    ]


def _print(arguments: argparse.Namespace, results: "Sequence[Result]") -> None:
    from penstock.bench import report

    if arguments.json:
        document = {
            "model": arguments.model,
            "rows": arguments.rows,
            "client": "penstock bench",
            "results": [result.as_json() for result in results],
        }
        print(json.dumps(document, indent=2))
    elif results:
        print(report.table(results))


def _show(text: str) -> None:
    """Progress: the line replaces the one before."""
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _list_of(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    return lambda text: [parse(part) for part in text.split(",")]


def _protocol(text: str) -> str:
    if text not in PROTOCOLS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(PROTOCOLS)}, got '{text}'")
    return text


def _number(text: str, parse: Callable[[str], T], holds: Callable[[T], bool], wanted: str) -> T:
    try:
        number = parse(text)
    except ValueError:
        number = None
    if number is None or not holds(number):
        raise argparse.ArgumentTypeError(f"expected {wanted}, got '{text}'")
    return number


def _count(text: str) -> int:
    return _number(text, int, lambda number: number > 0, "a positive whole number")


def _positive(text: str) -> float:
    return _number(text, float, lambda number: 0 < number < float("inf"), "a positive number")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda number: 0 <= number < float("inf"), "a number from 0")


def _shape(text: str) -> tuple[str, list[int]]:
    name, colon, dims = text.rpartition(":")
    try:
        shape = [int(dim) for dim in dims.split(",")] if dims else []
    except ValueError:
        shape = [-1]
    if not colon or any(dim < 0 for dim in shape):
        raise argparse.ArgumentTypeError(f"expected NAME:DIM,DIM,... such as INPUT0:1,16, got '{text}'")
    return name, shape
