"""Environments of foreign code, each of its own: pins of two clients may exclude each other.

What a directory asks for stands in its `requirements.txt` (Python) and `package.json` (Node). An environment is made
when it is first needed and again when those files change.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL_LIMIT_S = 900.0
NODE = (20, 11)  # the first version with all that the suites use
STAMP = ".installed"


class MissingError(Exception):
    """A tool that an environment needs is not on this machine."""


class BrokenError(Exception):
    """An environment could not be made."""


def python_for(directory: Path) -> Path:
    """The interpreter of an environment with what `requirements.txt` pins. Raises BrokenError."""
    environment = ROOT / ".venv-clients" / directory.name
    python = environment / "bin" / "python"
    asked = (directory / "requirements.txt").read_text(encoding="utf-8")
    if _made(environment, asked):
        return python
    shutil.rmtree(environment, ignore_errors=True)
    _run([sys.executable, "-m", "venv", environment], directory)
    install = ["install", "--disable-pip-version-check", "--quiet", "--requirement", "requirements.txt"]
    _run([python, "-m", "pip", *install], directory)
    (environment / STAMP).write_text(asked, encoding="utf-8")
    return python


def node_for(directory: Path) -> str:
    """Node, after `node_modules` holds what `package.json` pins. Raises MissingError and BrokenError."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise MissingError("Node and npm are not on the PATH")
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(int(part) for part in said.removeprefix("v").split(".")[:2]) < NODE:
        raise MissingError(f"needs Node {'.'.join(map(str, NODE))} or newer, this is {said}")
    modules = directory / "node_modules"
    asked = (directory / "package.json").read_text(encoding="utf-8")
    if not _made(modules, asked):
        shutil.rmtree(modules, ignore_errors=True)
        # No lock file: it would name the platforms of the machine that wrote it, and npm adds the others to it.
        _run([npm, "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"], directory)
        (modules / STAMP).write_text(asked, encoding="utf-8")
    return node


def _made(environment: Path, asked: str) -> bool:
    stamp = environment / STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == asked


def _run(command: Sequence[str | Path], directory: Path) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise BrokenError(f"{' '.join(map(str, command))} took more than {INSTALL_LIMIT_S:.0f} s") from None
    if done.returncode:
        raise BrokenError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
