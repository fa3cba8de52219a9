"""Prometheus text, rendered from `statistics` when it is scraped. Names, types and labels are Triton's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from penstock.engine import Engine
from penstock.model import Model

CONTENT_TYPE = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of every served version: its name, type, help, and the series of a model as (labels, value)."""

    name: str
    type: str
    help: str
    read: Callable[[Model], list[tuple[dict[str, str], float]]]


def _one(read: Callable[[Model], float]) -> Callable[[Model], list[tuple[dict[str, str], float]]]:
    return lambda model: [({}, read(model))]


def _failures(model: Model) -> list[tuple[dict[str, str], float]]:
    return [({"reason": reason}, number) for reason, number in model.statistics.failures.items()]


FAMILIES = (
    Family(
        "nv_inference_request_success",
        "counter",
        "Number of successful inference requests, all batch sizes",
        _one(lambda model: model.statistics.success.count),
    ),
    Family(
        "nv_inference_request_failure",
        "counter",
        "Number of failed inference requests, all batch sizes",
        _failures,
    ),
    Family(
        "nv_inference_count",
        "counter",
        "Number of inferences performed (does not include cached requests)",
        _one(lambda model: model.statistics.inference_count),
    ),
    Family(
        "nv_inference_exec_count",
        "counter",
        "Number of model executions performed (does not include cached requests)",
        _one(lambda model: model.statistics.execution_count),
    ),
    Family(
        "nv_inference_request_duration_us",
        "counter",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        _one(lambda model: model.statistics.success.ns // 1000),
    ),
    Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        _one(lambda model: model.statistics.queue.ns // 1000),
    ),
    Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        _one(lambda model: model.statistics.compute_input.ns // 1000),
    ),
    Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        _one(lambda model: model.statistics.compute_infer.ns // 1000),
    ),
    Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        _one(lambda model: model.statistics.compute_output.ns // 1000),
    ),
    Family(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
        _one(lambda model: model.waiting),
    ),
    Family(
        "nv_model_load_duration_secs",
        "gauge",
        "Model load time in seconds",
        _one(lambda model: model.load_s),
    ),
)


def render(engine: Engine) -> bytes:
    """Every metric that has a series, in Prometheus' text format."""
    return "".join(_lines(engine.lifecycle.models())).encode()


def _lines(models: list[Model]) -> Iterator[str]:
    if not models:
        return
    for family in FAMILIES:
        yield f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.type}\n"
        for model in models:
            with model.statistics.lock:
                series = family.read(model)
            for labels, value in series:
                pairs = sorted({"model": model.name, "version": model.version, **labels}.items())
                inside = ",".join(f'{key}="{_escape(text)}"' for key, text in pairs)
                yield f"{family.name}{{{inside}}} {value}\n"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
