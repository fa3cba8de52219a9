"""What the checks need around them: packages, the path of Python, processes that print one JSON object."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Modules that the server or the checks import, by the package that brings each.
NEEDED = {
    "grpcio": "grpc", "hpack": "hpack", "httptools": "httptools", "ml_dtypes": "ml_dtypes", "msgspec": "msgspec",
    "numpy": "numpy", "onnx": "onnx", "onnxruntime-gpu": "onnxruntime", "orjson": "orjson",
    "protobuf": "google.protobuf", "pytest": "pytest", "python-rapidjson": "rapidjson", "starlette": "starlette",
    "tritonclient": "tritonclient", "uvicorn": "uvicorn", "uvloop": "uvloop",
}  # fmt: skip


def missing() -> list[str]:
    """The packages that are not there."""
    return [package for package, module in NEEDED.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # its parent is not there


def child_environment(scratch: Path) -> dict[str, str]:
    """Variables with which a child process finds this project, installed or not.

    Where it is not, `scratch` gets what an installation would tell of it: its entry points.
    """
    path = [str(ROOT), str(ROOT / "server"), str(ROOT / "runtimes")]
    try:
        importlib.metadata.distribution("penstock")
    except importlib.metadata.PackageNotFoundError:
        path.append(str(_describe(scratch)))
    path += filter(None, [os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": os.pathsep.join(path)}


def _describe(scratch: Path) -> Path:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    information = scratch / f"{project['name']}-{project['version']}.dist-info"
    information.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (information / "METADATA").write_text(head)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return scratch


def output(
    module: str, *arguments: object, environment: Mapping[str, str], timeout_s: float, good: Sequence[int] = (0,)
) -> str:
    """What `python -m MODULE ARGUMENTS` prints. Raises RuntimeError where it ends with another status."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **environment}
    )
    if done.returncode not in good:
        said = f"{done.stdout}\n{done.stderr}".strip()
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}\n{said}")
    return done.stdout


def result(module: str, *arguments: object, environment: Mapping[str, str], timeout_s: float) -> Any:
    """The last line that it prints, as JSON."""
    return json.loads(output(module, *arguments, environment=environment, timeout_s=timeout_s).splitlines()[-1])
