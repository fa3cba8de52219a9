"""Figures as a table, for the terminal and for BENCHMARKS.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = Mapping[str, Any]

HEAD = ("load", "client", "CPU us", "x reference", "x session.run", "req/s", "p50 us", "p99 us", "client CPU")


def table(record: Record, last: Record | None = None) -> str:
    """A Markdown table, aligned for reading as it is; with `last`, the change of CPU time since then."""
    before = {_key(row): row for row in last["rows"]} if last else {}
    head: tuple[str, ...] = (*HEAD, f"since {last['date']}") if last else HEAD
    rows = [head]
    for row in record["rows"]:
        cells = _cells(row, record)
        if last:
            known = before.get(_key(row))
            cells = (*cells, f"{row['cpu_us'] / known['cpu_us'] - 1:+.0%}" if known else "new")
        rows.append(cells)
    return aligned(rows, texts=2)


def aligned(rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table whose first row is its head. The first `texts` columns are words, the others numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ) + " |"
        for row in rows
    ]  # fmt: skip
    rule = [("-" * width) if column < texts else ("-" * (width - 1) + ":") for column, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def figures(record: Record) -> str:
    """What is no load, as a Markdown table: measured, its reference where it has one, and the goal."""
    lines = ["| figure | measured | reference | ratio | goal |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in record["figures"]:
        measured, goal = f"{row['measured']:.1f} {row['unit']}", f"{row['most']:g}"
        if row["reference"]:
            against, ratio = f"{row['reference']:.1f} {row['unit']}", f"{row['value']:.2f}"
        else:
            against, ratio, goal = "-", "-", f"{goal} {row['unit']}"
        lines.append(f"| {row['name']} | {measured} | {against} | {ratio} | {goal} |")
    return "\n".join(lines)


def _key(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["name"], row["client"]


def _cells(row: Mapping[str, Any], record: Record) -> tuple[str, ...]:
    share = row["client_cpu_share"]
    return (
        row["name"],
        "-" if row["client"] == "none" else row["client"],
        f"{row['cpu_us']:.1f}",
        _ratio(row, record, _reference(row), row["concurrency"]),
        _ratio(row, record, "none", 1),
        f"{row['requests_per_s']:.0f}",
        f"{row['p50_us']:.0f}",
        f"{row['p99_us']:.0f}",
        "-" if share is None else f"{share:.0%}",
    )


def _ratio(row: Mapping[str, Any], record: Record, server: str, concurrency: int) -> str:
    """CPU time over that of the reference with the same model, client and number of requests at a time."""
    wanted = (server, row["model"], concurrency, "" if server == "none" else row["shape"])
    for reference in record["rows"]:
        shape = "" if server == "none" else reference["shape"]
        found = (reference["server"], reference["model"], reference["concurrency"], shape)
        if found == wanted and reference["client"] in (row["client"], "none"):
            return f"{row['cpu_us'] / reference['cpu_us']:.2f}"
    return "-"


def _reference(row: Mapping[str, Any]) -> str:
    """The server that answers with constant bytes to the row's protocol; of long tensors, the one that only copies; for
    perf_analyzer over HTTP, the one that computes.
    """
    if row["model"] != "simple":
        return {"INPUT0:1,150528": "bytes 602112"}.get(row["shape"], "bytes 4194304")
    if row["protocol"] == "grpc":
        return "grpcio constant"
    return "asgi inline" if row["client"] == "perf_analyzer" else "constant"


def last_record(directory: Path, kind: str) -> Record | None:
    """The newest record of a kind; None if there is none."""
    newest = max(directory.glob(f"{kind}-*.json"), default=None)
    if newest is None:
        return None
    record: Record = json.loads(newest.read_text())
    return record


def write(document: Path, record: Record) -> None:
    """Put the record's table into its section."""
    put(
        document,
        record["kind"],
        f"## {record['kind'].upper()}, {record['date']}\n\n{setting(record)}\n\n{table(record)}\n\n{figures(record)}",
    )


def setting(record: Record) -> str:
    """On what it was measured, and how."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['system']}, {machine['cores']} cores, Python {machine['python']}, {versions}. "
        f"Medians of {record['rounds']} rounds. Load average before: {machine['load_before']}."
    )


def put(document: Path, kind: str, content: str) -> None:
    """Put a section between the markers of its kind, or at the end of a document that has none of them."""
    begin, end = f"<!-- begin {kind} -->", f"<!-- end {kind} -->"
    section = f"{begin}\n{content}\n{end}"
    text = document.read_text()
    if begin in text and end in text:
        head, _, rest = text.partition(begin)
        text = head + section + rest.partition(end)[2]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    document.write_text(text)
