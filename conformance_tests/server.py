"""The server under test as a process of its own."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from conformance_tests.http_wire import HttpClient

START_LIMIT_S = 60.0
STOP_LIMIT_S = 40.0
SAMPLES = Path(__file__).parents[1] / "model_repository"
HANDLERS = Path(__file__).parent / "models" / "handlers"
PENSTOCK = Path(sys.executable).with_name("penstock")
COMMAND = [str(PENSTOCK)] if PENSTOCK.exists() else [sys.executable, "-m", "penstock.cli"]  # where it is not installed


@dataclass(frozen=True, slots=True)
class Running:
    """A started server: where its doors are, and what it has logged so far."""

    process: subprocess.Popen[bytes]
    http: str  # "http://127.0.0.1:PORT"
    grpc: str  # "127.0.0.1:PORT"
    metrics: str
    log: Path

    def stop(self) -> int:
        """End it in good order and return its exit status. Raises TimeoutError, after killing it, if it hangs."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(f"the server still ran {STOP_LIMIT_S} s after SIGTERM\n{self.log.read_text()}") from None


StartServer = Callable[..., Running]  # takes repositories, then options


@dataclass(slots=True)
class Target:
    """The server under test. `running` is None for one that was there before."""

    http: str
    grpc: str  # "" where it is not to be tested, as `metrics`
    metrics: str
    running: Running | None = None
    _known: dict[str, bool] = field(default_factory=dict)

    def require(self, model: str) -> None:
        """Skip the test if a server that is not ours lacks the model. Ours must have it: then the test itself fails."""
        if self.running is not None:
            return
        if model not in self._known:
            self._known[model] = HttpClient(self.http).get(f"/v2/models/{model}/ready").status == 200
        if not self._known[model]:
            pytest.skip(f"this server has no model '{model}'")


@contextlib.contextmanager
def penstock(
    repositories: Sequence[Path],
    log: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    limit_s: float = START_LIMIT_S,
) -> Iterator[Running]:
    """`penstock serve` on free ports, from its announcement until the end of the block.

    `environment` holds variables that it is given beside this process's; it may take `limit_s` to load its models.
    """
    command = serve(repositories, *options)
    process = spawn(command, log, environment)
    assert process.stdout is not None
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # The pipe is read to its end, so that nothing the server prints later can fill it and block the server.
    reader = threading.Thread(target=_read, args=[process.stdout, lines])
    reader.start()
    try:
        running = _announced(process, lines, log, command, limit_s)
        yield running
        if process.poll() is None:
            running.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()


def serve(repositories: Sequence[Path], *options: str) -> list[str]:
    """The command that serves on free ports."""
    command = [*COMMAND, "serve"]
    for repository in repositories:
        command += ["--model-repository", str(repository)]
    return [*command, "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--announce", "json", *options]


def spawn(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a server whose errors go to `log`, and whose jobs lie beside it unless an option says otherwise."""
    state = os.environ | {"XDG_STATE_HOME": str(log.parent)} | dict(environment or {})
    with log.open("ab") as errors:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=state)


def _read(pipe: IO[bytes], lines: "queue.SimpleQueue[bytes]") -> None:
    """Every line until the end, which is an empty one."""
    for line in pipe:
        lines.put(line)
    lines.put(b"")


def _announced(
    process: subprocess.Popen[bytes],
    lines: "queue.SimpleQueue[bytes]",
    log: Path,
    command: Sequence[str],
    limit_s: float,
) -> Running:
    try:
        line = lines.get(timeout=limit_s)
        doors = json.loads(line)
    except (queue.Empty, ValueError) as error:
        raise RuntimeError(f"{' '.join(command)} did not announce its ports\n{log.read_text()}") from error
    return Running(process, doors["http"], doors["grpc"], doors["metrics"], log)
