"""A network in ONNX Runtime alone, in this process: what a server could give at best.

`python -m conformance_tests.gpu.reference NETWORK MODEL --device cuda` prints one JSON object: by rows of a batch, how
many rows per second with copies in and out by IO binding, how many without them, and the time of one run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from penstock_runtimes.onnx import providers

from conformance_tests.gpu.models import HEURISTIC, TINY, Sizes, inputs

HEURISTIC_NAME = "HEURISTIC"  # ONNX Runtime's for the value in HEURISTIC


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one size of a batch."""

    rows: int
    rows_per_s: float
    rows_per_s_without_copies: float
    p50_us: float  # of a run with its copies
    cpu_us: float  # of this process, for a run with its copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each size of a batch")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    session = _session(arguments.model, arguments.device, arguments.network == "conv")
    sizes = TINY if arguments.tiny else Sizes()
    speeds = [
        measure(session, arguments.device, arguments.network, sizes, rows, arguments.seconds) for rows in arguments.rows
    ]
    print(json.dumps([asdict(speed) for speed in speeds]))


def _session(model: Path, device: str, heuristic: bool) -> Any:
    asked: list[tuple[str, dict[str, str]]] = [(providers.CPU, {})]
    if device == "cuda":
        providers.prepare()
        chosen = dict.fromkeys(HEURISTIC, HEURISTIC_NAME) if heuristic else {}
        asked.insert(0, (providers.CUDA, {"device_id": "0", **chosen}))
    session = onnxruntime.InferenceSession(
        model, providers=[name for name, _ in asked], provider_options=[given for _, given in asked], enable_fallback=0
    )
    if asked[0][0] not in session.get_providers():
        raise SystemExit(f"{asked[0][0]} does not load: {providers.explain(asked[0][0], [asked[0][0]])}")
    return session


def measure(session: Any, device: str, network: str, sizes: Sizes, rows: int, seconds: float) -> Speed:
    bound = session.io_binding()
    arrays = inputs(network, sizes, rows)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0) for name, array in arrays.items()}
    for name, value in values.items():
        bound.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        bound.bind_output(output.name, device, 0)

    def with_copies() -> None:
        for name, array in arrays.items():
            values[name].update_inplace(array)
        session.run_with_iobinding(bound)
        bound.copy_outputs_to_cpu()

    runs, took_s, times_us, cpu_us = _repeat(with_copies, seconds)
    bare_runs, bare_s, _, _ = _repeat(lambda: session.run_with_iobinding(bound), seconds)
    return Speed(rows, rows * runs / took_s, rows * bare_runs / bare_s, statistics.median(times_us), cpu_us)


def _repeat(call: Callable[[], None], seconds: float) -> tuple[int, float, list[float], float]:
    """Number of calls, seconds they took, microseconds of each, CPU microseconds of one."""
    for _ in range(3):
        call()
    times_us: list[float] = []
    began_cpu_ns, began_s = time.process_time_ns(), time.perf_counter()
    while not times_us or time.perf_counter() - began_s < seconds:
        started_ns = time.perf_counter_ns()
        call()
        times_us.append((time.perf_counter_ns() - started_ns) / 1e3)
    took_s = time.perf_counter() - began_s
    return len(times_us), took_s, times_us, (time.process_time_ns() - began_cpu_ns) / len(times_us) / 1e3


if __name__ == "__main__":
    main()
