"""`penstock doctor`: what this machine can serve on, what is missing for the rest, and how to get it."""

import argparse
import json
import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from penstock.devices import Driver, cpu_count, driver
from penstock.settings import Settings

if TYPE_CHECKING:
    from penstock.runtime import Finding  # and numpy, which `--help` does without

SHARED_MEMORY = "/dev/shm"
LEAST_SHARED_BYTES = 256 << 20  # what Docker gives by itself, 64 MiB, holds a hundred images
LEAST_FILES = 4096  # each connection is one
SHOWN_WIDTH = 24


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give `parser` what `run` reads besides the settings."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """Look, print what was found, and return 0 where a server could run its models on the device of the settings."""
    from penstock.runtime import doctors

    shown = driver()
    found = [*machine(), *nvidia(shown)]
    for diagnose in doctors():
        found += diagnose([gpu.number for gpu in shown.gpus])
    found += own(found)
    faults = stopping(found, settings.device)
    if arguments.json:
        print(json.dumps(as_json(found, settings.device), indent=1))
    else:
        sys.stdout.write(as_text(found, settings.device))
    return 1 if faults else 0


def machine() -> "Iterator[Finding]":
    """Python, cores, shared memory and the limit on open files."""
    from penstock.runtime import Finding

    section = "Machine"
    yield Finding(section, "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Finding(section, "cores", str(cpu_count()))
    if os.path.isdir(SHARED_MEMORY):
        space = os.statvfs(SHARED_MEMORY)
        yield shared_memory(space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail)
    else:
        yield Finding(section, "shared memory", "none", f"there is no {SHARED_MEMORY}; clients cannot hand in regions")
    yield open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def shared_memory(size_bytes: int, free_bytes: int) -> "Finding":
    from penstock.runtime import Finding

    fault = "little for tensors; with Docker, --shm-size 2g gives more" if size_bytes < LEAST_SHARED_BYTES else ""
    return Finding("Machine", "shared memory", f"{_size(size_bytes)}, {_size(free_bytes)} free", fault)


def open_files(soft: int, hard: int) -> "Finding":
    from penstock.runtime import Finding

    few = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    most = "any number" if hard == resource.RLIM_INFINITY else str(hard)
    fault = f"each connection takes one; ulimit -n {LEAST_FILES} allows more (at most {most})" if few else ""
    return Finding("Machine", "open files", "any number" if soft == resource.RLIM_INFINITY else str(soft), fault)


def nvidia(shown: Driver) -> "Iterator[Finding]":
    """The driver and its GPUs."""
    from penstock.runtime import Finding

    section = "NVIDIA"
    known = f"{shown.version or 'of unknown version'}, for CUDA {shown.cuda[0]}.{shown.cuda[1]} and older"
    yield Finding(section, "driver", known if any(shown.cuda) else "none", shown.fault, ("cuda",))
    for gpu in shown.gpus:
        about = f"{gpu.name}, {_size(gpu.memory_bytes)}, compute capability {gpu.capability}"
        yield Finding(section, f"GPU {gpu.number}", about)


def own(found: "Iterable[Finding]") -> "Iterator[Finding]":
    """That there is a runtime at all."""
    from penstock.runtime import GROUP, Finding

    if not any(finding.section not in ("Machine", "NVIDIA") for finding in found):
        fault = f"no package with an entry point in {GROUP} tells what it can run on; reinstall penstock"
        yield Finding("Runtimes", "none", "", fault, ("cpu", "cuda"))


def stopping(found: "Iterable[Finding]", device: str) -> "list[Finding]":
    """The findings that keep a server with `--device` from running models; with `auto` those of the CPU."""
    needed = "cuda" if device == "cuda" else "cpu"
    return [finding for finding in found if finding.fault and needed in finding.stops]


def verdict(found: "Sequence[Finding]", device: str) -> str:
    if stops := stopping(found, device):
        names = ", ".join(dict.fromkeys(finding.name for finding in stops))
        return f"Serving with --device {device} will not work: see {names}."
    if device == "auto":
        where = "the CPU; CUDA does not work" if stopping(found, "cuda") else "CUDA"
        return f"Serving with --device auto will work, on {where}."
    return f"Serving with --device {device} will work."


def as_json(found: "Sequence[Finding]", device: str) -> dict[str, Any]:
    return {
        "device": device,
        "works": not stopping(found, device),
        "verdict": verdict(found, device),
        "findings": [structs.asdict(finding) for finding in found],
    }


def as_text(found: "Sequence[Finding]", device: str) -> str:
    """Sections of aligned rows; a fault stands below its row, marked."""
    lines: list[str] = []
    section = ""
    for finding in found:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        mark = "!" if finding.fault else " "
        head = f"{mark} {finding.name.ljust(SHOWN_WIDTH)}"
        lines.append(f"{head} {finding.value or finding.fault}".rstrip())
        if finding.value and finding.fault:
            lines.append(f"  {'':{SHOWN_WIDTH}} {finding.fault}")
    return "\n".join([*lines, "", verdict(found, device)]) + "\n"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
