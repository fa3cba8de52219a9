"""Holds another server, MLServer, to the conformance tests: which clauses does it prove, which does it fail?

`python -m conformance_tests.mlserver_reference.run OUT` makes MLServer's environment, serves `models/` on free ports of
this machine, runs the tests against it and writes the table of clauses to OUT. The table tells about the tests as well:
a clause of the Open Inference Protocol that MLServer fails is one to read again.
"""

import argparse
import contextlib
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from conformance_tests.clients.environments import ROOT, python_for

HERE = Path(__file__).parent
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
POLL_S = 0.2
LOCAL = "127.0.0.1"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance_tests.mlserver_reference.run", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="where the table goes, as Markdown")
    out = parser.parse_args().out.resolve()
    with mlserver() as (url, grpc):
        tests = [sys.executable, "-m", "pytest", "conformance_tests", "--url", url, "--grpc", grpc]
        # MLServer fails clauses of Triton's and of Penstock's: pytest's 1 says so, and this run has not failed.
        status = subprocess.run([*tests, "--tb", "no", "--quiet", "--clauses-out", out], cwd=ROOT).returncode
    return 0 if status == 1 else status


@contextlib.contextmanager
def mlserver() -> Iterator[tuple[str, str]]:
    """MLServer on `models/`, from the moment it is ready: its addresses for HTTP and gRPC."""
    python = python_for(HERE.parent / "clients" / "mlserver")
    http_port, grpc_port, metrics_port = free_ports(3)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "MLSERVER_HOST": LOCAL,
            "MLSERVER_HTTP_PORT": str(http_port),
            "MLSERVER_GRPC_PORT": str(grpc_port),
            "MLSERVER_METRICS_PORT": str(metrics_port),
            "MLSERVER_METRICS_DIR": scratch,
            "MLSERVER_PARALLEL_WORKERS": "0",
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        log = Path(scratch) / "mlserver.log"
        command = [str(python.with_name("mlserver")), "start", str(HERE / "models")]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=output, cwd=scratch)
        try:
            await_ready(process, http_port, log)
            yield f"http://{LOCAL}:{http_port}", f"{LOCAL}:{grpc_port}"
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held until all are found, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOCAL, 0))
        return [each.getsockname()[1] for each in sockets]


def await_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Return once the server says that it is ready. Raises RuntimeError, with its log, if it ends or takes too long."""
    until = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        if _is_ready(port):
            return
        time.sleep(POLL_S)
    raise RuntimeError(f"MLServer did not become ready\n{log.read_text(errors='replace')}")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(LOCAL, port, timeout=POLL_S)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == http.client.OK
    except OSError:  # nothing listens yet, or it is too busy to answer
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
