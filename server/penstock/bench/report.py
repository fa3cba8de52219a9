"""Results as a table for people."""

from collections.abc import Sequence

from penstock.bench.measure import Result

HEAD = ("protocol", "load", "req/s", "p50 us", "p90 us", "p99 us", "max us", "errors", "server CPU us", "client CPU")


def table(results: Sequence[Result]) -> str:
    """One row each, numbers aligned; below, whose CPU time was counted and what makes figures doubtful."""
    rows = [HEAD, *map(_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    servers = dict.fromkeys(result.server for result in results if result.server)
    lines += [f"server CPU per request is that of process {server}, its threads and children" for server in servers]
    lines += [f"note, {result.protocol} {load_of(result)}: {doubt}" for result in results for doubt in result.doubts]
    return "\n".join(lines)


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.protocol,
        load_of(result),
        f"{result.requests_per_s:.1f}",
        f"{result.p50_us:.0f}",
        f"{result.p90_us:.0f}",
        f"{result.p99_us:.0f}",
        f"{result.max_us:.0f}",
        str(result.errors),
        "-" if result.server_cpu_us is None else f"{result.server_cpu_us:.1f}",
        "-" if result.client_cpu_share is None else f"{result.client_cpu_share:.0%}",
    )


def load_of(result: Result) -> str:
    """`16` for sixteen at a time, `500/s` for an open loop."""
    return f"{result.rate:g}/s" if result.rate else str(result.concurrency)
