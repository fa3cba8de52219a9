"""Private database servers for the tests of the job stores: started on first use, stopped with the session."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

START_S = 30.0
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # nobody pulls the plug in a test
STORES = ("memory", "sqlite", "redis", "postgres")


@contextmanager
def redis_server(folder: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server that keeps its data in this folder and writes through, as a job store asks; its URL, and its process."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("neither redis-server nor valkey-server is installed")
    pytest.importorskip("redis")
    socket_path = f"{folder}/redis.sock"
    settings = ["--port", "0", "--unixsocket", socket_path, "--dir", folder, "--save", ""]
    command = [binary, *settings, "--appendonly", "yes", "--appendfsync", "always"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait(server, lambda: _listens(socket_path))
            yield f"unix://{socket_path}", server
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, redis_server(folder) as (url, _):
        yield url


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Of a cluster of its own; skips where there is none to start."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("postgres is not installed")
    pytest.importorskip("asyncpg")
    # The server refuses to run as root; "postgres" is the user that its packages make.
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        initdb = [*user, str(binaries / "initdb"), "-D", data, "-U", "penstock", "-A", "trust", "-E", "UTF8", "-N"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        command = [*user, str(binaries / "postgres"), "-D", data, "-k", folder, "-c", "listen_addresses="]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder) as server:
            try:
                ready = [str(binaries / "pg_isready"), "-q", "-h", folder]
                _wait(server, lambda: subprocess.run(ready).returncode == 0)
                yield f"postgresql://penstock@/postgres?host={folder}"
            finally:
                server.send_signal(signal.SIGQUIT)  # at once, without a last checkpoint


@pytest.fixture(params=STORES)
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Names an empty store of each kind at every call; "memory" is the model's."""
    kind: str = request.param
    match kind:
        case "sqlite":
            return lambda: f"sqlite:{tmp_path / uuid4().hex}.db"
        case "redis" | "postgres":
            url: str = request.getfixturevalue(f"{kind}_url")
            return lambda: f"{url}{'&' if '?' in url else '?'}prefix=t{uuid4().hex}"
        case _:
            return lambda: "memory"


def _postgres_binaries() -> Path | None:
    """The folder of initdb and postgres, which Debian keeps off the path."""
    found = [Path(path).resolve().parent for name in ("postgres",) if (path := shutil.which(name))]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _wait(server: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not ready():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.args!r} did not start")
        time.sleep(0.02)  # between two looks at a condition
