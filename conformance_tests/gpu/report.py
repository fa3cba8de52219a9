"""What was found, as a table for BENCHMARKS.md and as a record beside the others."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BROKEN = "broken"  # the value of a check that could not be made
BEGIN, END = "<!-- begin cuda -->", "<!-- end cuda -->"


@dataclass(frozen=True, slots=True)
class Finding:
    """A check, or a figure with the goal that it is held to."""

    name: str
    value: str
    goal: str = ""  # "" for what is only shown
    met: bool | None = None  # None where there is no goal
    detail: str = ""


def table(findings: Sequence[Finding]) -> str:
    """Markdown, aligned for reading as it is."""
    head = ("", "measured", "goal", "met", "")
    marks = {True: "yes", False: "**no**", None: ""}
    rows = [head, *((one.name, one.value, one.goal, marks[one.met], one.detail) for one in findings)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def record(findings: Sequence[Finding], machine: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    return {"machine": machine, "findings": [asdict(one) for one in findings], "raw": raw}


def write(directory: Path, document: Path, made: dict[str, Any], findings: Sequence[Finding]) -> Path:
    """The record into `directory`, the table between its markers in `document`. Returns the record's path."""
    machine = made["machine"]
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = directory / f"{slug}-{machine['date']}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    section = (
        f"{BEGIN}\n## {machine['gpu']}, {machine['date']}\n\nDriver {machine['driver']}, {machine['cores']} cores, "
        f"Python {machine['python']}, {versions}. `make gpu-check` wrote this; ratios are of one run.\n\n"
        f"{table(findings)}\n{END}"
    )
    text = document.read_text() if document.exists() else ""
    if BEGIN in text and END in text:
        head, _, rest = text.partition(BEGIN)
        document.write_text(head + section + rest.partition(END)[2])
    else:
        document.write_text(f"{text.rstrip()}\n\n{section}\n".lstrip())
    return path
