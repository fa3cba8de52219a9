"""Builds an engine and its doors from settings, listens, and stops in order."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TextIO

import uvicorn
import uvloop
from msgspec import Struct

import penstock
from penstock import allocator, auth, logs, samples
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.grpc_api import Door
from penstock.http_api import HttpApp, MetricsApp, make_server
from penstock.job_api import JobService, open_service
from penstock.job_api.endpoints import is_endpoint
from penstock.job_api.inputs import is_handler
from penstock.lifecycle import State
from penstock.model import Model
from penstock.settings import Settings

logger = logging.getLogger(__name__)

OK, FAILED, DEVICE_LOST = 0, 1, 3
JOBS_SHARE = 0.8  # of the time to stop: jobs that run longer go back to the queue while their senders can be told


class GrpcServer(Protocol):
    """A transport of gRPC."""

    async def start(self, address: tuple[str, int]) -> int: ...

    async def stop(self, grace_s: float) -> None: ...


class Doors(Struct):
    """What listens, and where."""

    http: uvicorn.Server | None = None
    http_port: int = 0
    metrics: uvicorn.Server | None = None
    metrics_port: int = 0
    grpc: GrpcServer | None = None
    grpc_port: int = 0


def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit status. Raises ServingError where serving cannot start."""
    logs.set_up(settings)
    if settings.malloc_threshold:
        allocator.keep_blocks(settings.malloc_threshold)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status, lost = runner.run(_serve(settings))
        if status != OK or lost:
            # Threads that still load or run a model cannot be ended, and the interpreter would wait for them. Nor can
            # what lies on a lost GPU be released.
            logging.shutdown()
            sys.stdout.flush()
            os._exit(status)
    return status


async def _serve(settings: Settings) -> tuple[int, bool]:
    """The exit status, and whether a GPU was lost."""
    if not settings.model_repository:
        raise ServingError(Kind.INVALID, "--model-repository must be specified")
    _check_addresses(settings)
    keys = auth.Keys(Path(settings.api_keys)) if settings.api_keys else None
    http_guard = auth.make_guard(auth.HTTP, keys, settings.http_restricted_api)
    grpc_guard = auth.make_guard(auth.GRPC, keys, settings.grpc_restricted_protocol)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _on_signal, number, stop)
    http_socket = _bind(settings, "http") if settings.allow_http else None
    metrics_socket = _bind(settings, "metrics") if settings.allow_metrics else None
    if settings.allow_grpc:
        _bind(settings, "grpc").close()  # it binds for itself, once the models are loaded: fail before that

    engine = Engine(settings)
    engine.mailbox()  # this loop's
    # Before the models, for a setting may be wrong.
    jobs = await open_service(engine, settings, keys.check if keys else None) if settings.allow_http else None
    app = HttpApp(engine, settings, http_guard, jobs.app if jobs else None)
    door = Door(engine, grpc_guard)
    loading = loop.run_in_executor(None, engine.lifecycle.start)
    stopping = asyncio.ensure_future(stop.wait())
    if settings.exit_on_device_error:
        engine.lifecycle.watch(lambda: _on_change(engine, loop, stop))
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        logger.warning("stopped while models were loading")
        return FAILED, False
    loading.result()
    failures = engine.lifecycle.failures()
    if failures and settings.exit_on_error:
        logger.error("failed to load all models; --exit-on-error false would serve the others")
        await asyncio.to_thread(engine.lifecycle.stop, 0.0)
        return FAILED, False

    if jobs is not None:
        await jobs.start()
    doors = Doors()
    serving: list[asyncio.Task[None]] = []
    if http_socket is not None:
        doors.http = make_server(app, settings, app.door)
        doors.http_port = http_socket.getsockname()[1]
        serving.append(asyncio.create_task(doors.http.serve(sockets=[http_socket])))
    if metrics_socket is not None:
        doors.metrics = make_server(MetricsApp(engine, keys, jobs.metrics if jobs else None), settings)
        doors.metrics_port = metrics_socket.getsockname()[1]
        serving.append(asyncio.create_task(doors.metrics.serve(sockets=[metrics_socket])))
    if settings.allow_grpc:
        doors.grpc = _grpc_server(door, settings)
        doors.grpc_port = await doors.grpc.start(settings.address("grpc"))
    await _listening(doors, serving)
    _announce(engine, settings, doors, jobs)
    # What lives now lives on: collections need not look at it, and from here on they find what there is to find.
    gc.freeze()
    gc.enable()

    await stopping
    started_s = time.monotonic()
    door.stopping.set()
    engine.lifecycle.seal()
    finished = await _stop_doors(doors, serving, jobs, settings.exit_timeout_secs)
    if jobs is not None:
        await jobs.close()
    left_s = max(0.0, settings.exit_timeout_secs - (time.monotonic() - started_s))
    drained = await asyncio.to_thread(engine.lifecycle.stop, left_s)
    lost = bool(engine.lifecycle.device_lost)
    if lost and settings.exit_on_device_error:
        return DEVICE_LOST, lost
    if finished and drained:
        return OK, lost
    logger.error("Exit timeout expired. Exiting immediately.")
    return FAILED, lost


def _grpc_server(door: Door, settings: Settings) -> GrpcServer:
    """Of two transports the one that is asked for, imported only now."""
    if settings.grpc_transport == "native":
        from penstock.grpc_api.http2 import NativeServer

        return NativeServer(door, settings)
    from penstock.grpc_api.grpcio_transport import GrpcioServer

    return GrpcioServer(door, settings)


def _on_signal(number: int, stop: asyncio.Event) -> None:
    logger.info("Signal (%d) received.", number)
    stop.set()


def _on_change(engine: Engine, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """On any thread, after a model's state has changed."""
    if engine.lifecycle.device_lost:
        loop.call_soon_threadsafe(stop.set)


async def _listening(doors: Doors, serving: Sequence["asyncio.Task[None]"]) -> None:
    """Wait until uvicorn accepts connections; raise what kept it from doing so."""
    servers = [server for server in (doors.http, doors.metrics) if server is not None]
    while not all(server.started for server in servers):
        for task in serving:
            if task.done():
                task.result()
                raise ServingError(Kind.INTERNAL, "the HTTP server ended while it was starting")
        await asyncio.sleep(0)  # with sockets that are bound, uvicorn is there in a few turns of the loop


async def _stop_doors(
    doors: Doors, serving: list["asyncio.Task[None]"], jobs: JobService | None, timeout_s: float
) -> bool:
    """Take no new connections, answer what was asked, let jobs end. False when time ran out."""
    for server in (doors.http, doors.metrics):
        if server is not None:
            server.should_exit = True
    stopping: list[asyncio.Task[None]] = list(serving)
    if doors.grpc is not None:
        stopping.append(asyncio.create_task(doors.grpc.stop(timeout_s)))
    if jobs is not None:
        stopping.append(asyncio.create_task(jobs.stop(timeout_s * JOBS_SHARE)))
    if not stopping:
        return True
    _, unfinished = await asyncio.wait(stopping, timeout=timeout_s)
    for task in unfinished:
        task.cancel()
    return not unfinished


def _check_addresses(settings: Settings) -> None:
    taken: dict[tuple[str, int], str] = {}
    for door, allowed in (
        ("http", settings.allow_http),
        ("grpc", settings.allow_grpc),
        ("metrics", settings.allow_metrics),
    ):
        address = settings.address(door)  # type: ignore[arg-type]
        if not allowed or not address[1]:
            continue
        if address in taken:
            raise ServingError(
                Kind.INVALID,
                f"The server cannot listen to {taken[address]} requests and {door} requests at the same address and "
                f"port {address[0]}:{address[1]}",
            )
        taken[address] = door


def _literal(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind(settings: Settings, door: str) -> socket.socket:
    """A bound socket that does not listen yet. Raises ServingError(UNAVAILABLE) for a port that is taken."""
    host, port = settings.address(door)  # type: ignore[arg-type]
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        flag = f"--{door}-port"
        if error.errno == 98:
            raise ServingError(
                Kind.UNAVAILABLE, f"Socket '{host}:{port}' already in use; {flag} takes another port, 0 a free one"
            ) from error
        raise ServingError(Kind.UNAVAILABLE, f"cannot listen on '{host}:{port}' for {door}: {error}") from error
    return made


def _announce(engine: Engine, settings: Settings, doors: Doors, jobs: JobService | None) -> None:
    """Say where the server listens, what it serves on which device, and how to try it."""
    addresses = {}
    for door, port, scheme in (
        ("http", doors.http_port, "http://"),
        ("grpc", doors.grpc_port, ""),
        ("metrics", doors.metrics_port, "http://"),
    ):
        if port:
            host = settings.address(door)[0]  # type: ignore[arg-type]
            addresses[door] = f"{scheme}{_literal(host)}:{port}"
    machine = settings.announce == "json"
    out = sys.stderr if machine else sys.stdout
    if settings.log_info:
        _print_summary(engine, addresses, jobs.where if jobs else "", out)
    if machine:
        print(json.dumps(addresses), flush=True)


def _print_summary(engine: Engine, addresses: dict[str, str], jobs: str, out: TextIO) -> None:
    rows = [("MODEL", "VERSION", "STATE", "DEVICE")]
    failures = engine.lifecycle.failures()
    for name, version, state, reason in engine.lifecycle.index():
        device = reason
        if state is State.READY:
            device = ",".join(engine.model(name, str(version)).devices)
        elif name in failures:
            device = failures[name]
        shown = "UNAVAILABLE" if state is None and name in failures else state.value if state else "not loaded"
        rows.append((name, "-" if version is None else str(version), shown, device))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print(f"Penstock {penstock.__version__}", file=out)
    for row in rows:
        head = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
        print(f"  {head}  {row[3]}", file=out)
    for door, address in addresses.items():
        path = "/metrics" if door == "metrics" else ""
        print(f"{door:8}{address}{path}", file=out)
    if jobs:
        print(f"{'jobs':8}{jobs}", file=out)
    models = engine.lifecycle.models()
    if models and "http" in addresses:
        text = suggestion(models, addresses["http"], bool(jobs), bool(engine.settings.api_keys))
        print(f"\n{text}\n", file=out)
    out.flush()


def suggestion(models: Sequence[Model], url: str, jobs: bool, keyed: bool) -> str:
    """How to try one of the models, a handler only if there is nothing else: its input cannot be made up."""
    model = min(models, key=lambda model: (is_handler(model), *samples.difficulty(model.signature)))
    if not is_handler(model):
        return f"Try it:\n  {samples.curl(model.signature, url, keyed)}"
    if jobs and is_endpoint(model.name):
        line = samples.job(model.name, url, keyed)
    else:
        line = samples.curl(model.signature, url, keyed, text="{}")
    return f"Try it, with the input that its handler takes in place of {{}}:\n  {line}"
