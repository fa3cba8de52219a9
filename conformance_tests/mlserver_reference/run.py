"""Holds another server, MLServer, to the conformance tests, and so the tests to another server.

`python -m conformance_tests.mlserver_reference.run [OUT]` makes MLServer's environment, serves the models that it can
on free ports of this machine, runs the tests against it and writes RESULT.md, or OUT. A clause of the Open Inference
Protocol that fails there must be explained by a line of `differences.toml`: one that is not, or one that no longer
fails, is an error, for then either the clause or the explanation is wrong.
"""

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance_tests.clause_table import NAMES, Clause, Verdict, load
from conformance_tests.clients.environments import ROOT, python_for

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / "clients" / "mlserver"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
POLL_S = 0.2
LOCAL = "127.0.0.1"
DATATYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
             "BYTES")  # fmt: skip

Verdicts = Mapping[str, Mapping[str, str]]  # clause, protocol


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance_tests.mlserver_reference.run", description=__doc__)
    parser.add_argument(
        "out", type=Path, nargs="?", default=HERE / "RESULT.md", metavar="OUT", help="the page to write"
    )
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as scratch, mlserver(Path(scratch)) as (url, grpc):
        table = Path(scratch) / "clauses.json"
        tests = [sys.executable, "-m", "pytest", "conformance_tests", "--url", url, "--grpc", grpc]
        # MLServer fails clauses of Triton's and of Penstock's: pytest's 1 says so, and this run has not failed.
        status = subprocess.run([*tests, "--tb", "no", "--quiet", "--clauses-out", table], cwd=ROOT).returncode
        if status not in (0, 1):
            return status
        verdicts: Verdicts = json.loads(table.read_text(encoding="utf-8"))
    differences: dict[str, str] = tomllib.loads((HERE / "differences.toml").read_text(encoding="utf-8"))
    out.write_text(page(load(), verdicts, differences), encoding="utf-8")
    print(f"\nthe result is in {out}")
    unexplained = failing(load(), verdicts) ^ differences.keys()
    if unexplained:
        print(f"differences.toml does not explain, or no longer needs to: {', '.join(sorted(unexplained))}")
    return 1 if unexplained else 0


def failing(clauses: Mapping[str, Clause], verdicts: Verdicts) -> set[str]:
    """The clauses of OIP that fail over some protocol."""
    return {
        clause.id for clause in clauses.values() if clause.source == "OIP" and _overall(verdicts[clause.id]) == "failed"
    }


def page(clauses: Mapping[str, Clause], verdicts: Verdicts, differences: Mapping[str, str]) -> str:
    """RESULT.md: the clauses of OIP that fail and why, those that pass, those not tested."""
    own = [clause for clause in clauses.values() if clause.source == "OIP"]
    groups: dict[str, list[Clause]] = {word: [] for word in ("proved", "failed", "untested")}
    for clause in own:
        groups[_overall(verdicts[clause.id])].append(clause)
    lines = [
        f"# MLServer {_version()} under the conformance tests",
        "",
        "MLServer is another server of the Open Inference Protocol. It need not do what is Triton's or Penstock's.",
        "What is the protocol's own it should do, and where it does not, it differs or we have misread the protocol.",
        "MLServer leaves it to a model to look for its inputs and outputs; those here do (`mlserver_models.py`).",
        "`make conformance-mlserver` runs the tests against it and writes this page.",
        "",
        f"Of the protocol's {len(own)} clauses it passes {len(groups['proved'])} and fails {len(groups['failed'])}.",
    ]
    lines += [
        "",
        "## Clauses of the protocol that fail",
        "",
        "| Clause | It says | Over | MLServer |",
        "|---|---|---|---|",
    ]
    for clause in groups["failed"]:
        over = ", ".join(NAMES[protocol] for protocol, said in verdicts[clause.id].items() if said == "failed")
        lines.append(f"| `{clause.id}` | {clause.text} | {over} | {differences.get(clause.id, '**not explained**')} |")
    lines += ["", "## Clauses of the protocol that pass", "", "| Clause | It says | Over |", "|---|---|---|"]
    for clause in groups["proved"]:
        lines.append(f"| `{clause.id}` | {clause.text} | {', '.join(NAMES[each] for each in clause.protocols)} |")
    if groups["untested"]:
        lines += ["", "## Not tested, for want of the model", ""]
        lines += [f"- `{clause.id}`: {clause.text}" for clause in groups["untested"]]
    return "\n".join(lines) + "\n"


def _overall(said: Mapping[str, str]) -> str:
    """`failed` over any protocol; `proved` over each; else `untested`."""
    if Verdict.FAILED.value in said.values():
        return "failed"
    return "proved" if {*said.values()} == {Verdict.PROVED.value} else "untested"


def _version() -> str:
    found = re.search(r"^mlserver==(\S+)$", (ENVIRONMENT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert found is not None, "requirements.txt pins MLServer"
    return found[1]


def models() -> Iterator[dict[str, Any]]:
    """The settings of each model: those of the conformance tests that need no more than MLServer and NumPy."""
    for name, datatype, implementation in (("simple", "INT32", "Simple"), ("simple_string", "BYTES", "SimpleString")):
        inputs = [_tensor(f"INPUT{i}", datatype, -1, 16) for i in (0, 1)]
        outputs = [_tensor(f"OUTPUT{i}", datatype, -1, 16) for i in (0, 1)]
        yield _settings(name, implementation, inputs, outputs)
    for datatype in DATATYPES:
        yield _identity(f"identity_{datatype.lower()}", [(datatype, (-1, -1))])
    yield _identity("identity_rank4_fp32", [("FP32", (-1, -1, -1, -1))])
    yield _identity("two_inputs_mixed", [("FP32", (-1,)), ("BYTES", (-1,))])
    versions = ("1", "2")
    for version in versions:
        x, y = _tensor("x", "FP32", -1), _tensor("y", "FP32", -1)
        yield _settings("times_version", "TimesVersion", [x], [y], version, versions)


def _identity(name: str, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    inputs = [_tensor(f"INPUT{i}", datatype, *shape) for i, (datatype, shape) in enumerate(tensors)]
    outputs = [_tensor(f"OUTPUT{i}", datatype, *shape) for i, (datatype, shape) in enumerate(tensors)]
    return _settings(name, "Identity", inputs, outputs)


def _tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def _settings(
    name: str,
    implementation: str,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    version: str = "1",
    versions: Sequence[str] = ("1",),
) -> dict[str, Any]:
    return {
        "name": name,
        "implementation": f"mlserver_models.{implementation}",
        "platform": "python",
        "versions": [*versions],
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {"version": version},
    }


@contextlib.contextmanager
def mlserver(scratch: Path) -> Iterator[tuple[str, str]]:
    """MLServer on `models()`, from the moment it is ready: its addresses for HTTP and gRPC."""
    python = python_for(ENVIRONMENT)
    for settings in models():
        directory = scratch / "models" / f"{settings['name']}-{settings['parameters']['version']}"
        directory.mkdir(parents=True)
        (directory / "model-settings.json").write_text(json.dumps(settings), encoding="utf-8")
    http_port, grpc_port, metrics_port = free_ports(3)
    environment = {
        "MLSERVER_HOST": LOCAL,
        "MLSERVER_HTTP_PORT": str(http_port),
        "MLSERVER_GRPC_PORT": str(grpc_port),
        "MLSERVER_METRICS_PORT": str(metrics_port),
        "MLSERVER_METRICS_DIR": str(scratch),
        "MLSERVER_PARALLEL_WORKERS": "0",
        "PYTHONPATH": str(HERE),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    log = scratch / "mlserver.log"
    command = [str(python.with_name("mlserver")), "start", str(scratch / "models")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output, cwd=scratch)
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
