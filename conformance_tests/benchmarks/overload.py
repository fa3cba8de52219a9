"""Requests that come whether or not there is room for them: `python -m conformance_tests.benchmarks.overload`.

Prints what was answered, what was refused, and after how long, as JSON. Run it on a core of its own.
"""

import argparse
import asyncio
import json
from dataclasses import dataclass, field

import uvloop
from penstock.bench import payload
from penstock.bench.latencies import Latencies
from penstock.bench.load import Load, Outcome, drive
from penstock.bench.over_http import HttpTarget


@dataclass(slots=True)
class Divided(Outcome):
    """An outcome that keeps how long refusals took, by their text."""

    refused: dict[str, Latencies] = field(default_factory=dict)

    def add(self, latency_ns: int, error: str) -> None:
        if error:
            self.errors += 1
            self.refused.setdefault(error, Latencies()).add(latency_ns)
        else:
            self.latencies.add(latency_ns)


async def measure(url: str, model: str, load: Load) -> Divided:
    target = HttpTarget(url, binary=True)
    request = payload.request(model, "", target.metadata(model, ""), payload.Wanted())
    carriers = await target.connect(request, load.concurrency)
    outcome = Divided()
    try:
        await drive(carriers, load, outcome)
    finally:
        await asyncio.gather(*(carrier.close() for carrier in carriers))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--duration", type=float, required=True, help="seconds")
    given = parser.parse_args()
    load = Load(given.connections, given.rate, duration_s=given.duration)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(measure(given.url, given.model, load))
    answered, lateness = outcome.latencies, outcome.lateness
    print(
        json.dumps(
            {
                "answered": len(answered),
                "seconds": (outcome.ended_ns - outcome.started_ns) / 1e9,
                "answered_ms": [ns / 1e6 for ns in answered.percentiles(50, 99, 100)],
                "refused": {text: len(times) for text, times in outcome.refused.items()},
                "refused_ms": {
                    text: [ns / 1e6 for ns in times.percentiles(50, 99, 100)] for text, times in outcome.refused.items()
                },
                "late_ms": lateness.percentiles(99)[0] / 1e6,
                "waited": outcome.waited,
            }
        )
    )


if __name__ == "__main__":
    main()
