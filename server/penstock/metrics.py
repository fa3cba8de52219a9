"""Prometheus text, rendered from `statistics` when it is scraped. What is Triton's has its name, type and labels."""

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

from msgspec import Struct

from penstock import devices
from penstock.cache import ResponseCache
from penstock.engine import Engine
from penstock.gpu_metrics import GpuMetrics
from penstock.model import Model
from penstock.process_metrics import ProcessMetrics
from penstock.statistics import NO_GPU, Duration, Histogram, Histograms, Ran, Recent, Statistics, Summaries

LAST = ("le", "quantile")
CONTENT_TYPE = "text/plain; charset=utf-8"
US, SECOND = 1000, 1e9  # nanoseconds

Series: TypeAlias = tuple[str, dict[str, str], float | str]  # what is added to the family's name, further labels, value
Uuid: TypeAlias = Callable[[int], str]  # of the GPU with that number; "" where it is not known
Read: TypeAlias = Callable[[Model, Uuid], list[Series]]
Part: TypeAlias = tuple[dict[str, str], set[int]]  # labels, and the GPUs that it is about; with NO_GPU, also all else
Of: TypeAlias = Callable[[Model], bool]  # whether a model has a family


class Family(Struct, frozen=True):
    """One metric of every served version: its name, type, help, and the series of a model."""

    name: str
    type: str
    help: str
    read: Read
    option: str = ""  # of `--metrics-config` that shows it; "": always


def _one(read: Callable[[Model], float]) -> Read:
    return lambda model, _: [("", {}, read(model))]


def _parts(counts: Statistics, uuid: Uuid) -> list[Part]:
    """What ran on each GPU, and what is left: on the CPU, from the cache, or on GPUs whose UUID is not known."""
    known = {number: name for number in counts.gpus if (name := uuid(number))}
    parts: list[Part] = [({"gpu_uuid": name}, {number}) for number, name in known.items()]
    if counts.elsewhere or len(known) < len(counts.gpus):
        parts.append(({}, {NO_GPU, *counts.gpus} - known.keys()))
    return parts


def _share(counts: Statistics, gpus: set[int], read: Callable[[Ran], int]) -> int:
    """What is read of a part. Never becomes less, as a difference of rounded numbers might."""
    if NO_GPU not in gpus:
        return sum(read(counts.gpus[number]) for number in gpus)
    return read(counts) - sum(read(ran) for number, ran in counts.gpus.items() if number not in gpus)


def _ran(read: Callable[[Ran], int], unit: int = 1) -> Read:
    """Of what ran, apart for each GPU, in whole `unit`s of what is counted."""

    def series(model: Model, uuid: Uuid) -> list[Series]:
        counts = model.statistics
        return [("", labels, _share(counts, gpus, read) // unit) for labels, gpus in _parts(counts, uuid)]

    return series


def _failures(model: Model, _: Uuid) -> list[Series]:
    return [("", {"reason": reason}, number) for reason, number in model.statistics.failures.items()]


def _cached(read: Callable[[Model], float]) -> Read:
    """Of models that use the response cache only."""
    return lambda model, _: [("", {}, read(model))] if model.caches else []


def _departures(model: Model, _: Uuid) -> list[Series]:
    return [("", {"reason": reason}, number) for reason, number in model.statistics.departures.items()]


def _padded(model: Model, _: Uuid) -> list[Series]:
    """Of models that pad only."""
    parts = model.statistics.padded
    numbers = {"data": sum(part.data for part in parts), "padding": sum(part.padding for part in parts)}
    return [("", {"of": what}, number) for what, number in numbers.items()] if parts else []


def _histogram(
    name: str, help: str, choose: Callable[[Histograms], Histogram], unit: float = 1, option: str = ""
) -> Family:
    """A family of cumulative buckets, a sum and a count, in `unit`s of what is counted."""

    def read(model: Model, _: Uuid) -> list[Series]:
        histogram = choose(model.statistics.histograms)
        series: list[Series] = []
        below = 0
        for bound, number in zip((*histogram.bounds, None), histogram.counts, strict=True):
            below += number
            series.append(("_bucket", {"le": "+Inf" if bound is None else f"{bound / unit:g}"}, below))
        return [*series, ("_sum", {}, histogram.total / unit), ("_count", {}, below)]

    return Family(name, "histogram", help, read, option)


def _any(_model: Model) -> bool:
    return True


def _summary(
    name: str, help: str, choose: Callable[[Summaries], Recent], total: Callable[[Ran], Duration], of: Of = _any
) -> Family:
    """A family of quantiles over the last minute, in microseconds, and the sum and count of all there ever was.

    Of what ran, apart for each GPU.
    """

    def read(model: Model, uuid: Uuid) -> list[Series]:
        counts = model.statistics
        if counts.summaries is None or not of(model):
            return []
        series: list[Series] = []
        for labels, gpus in _parts(counts, uuid):
            number = _share(counts, gpus, lambda ran: total(ran).count)
            ns = _share(counts, gpus, lambda ran: total(ran).ns)
            series += _quantiles(counts.summaries, choose(counts.summaries), Duration(number, ns), labels, gpus)
        return series

    return Family(name, "summary", help, read, "summary_latencies")


def _cache_summary(
    name: str, help: str, choose: Callable[[Summaries], Recent], total: Callable[[Statistics], Duration]
) -> Family:
    """The same of the cache, of models that use it."""

    def read(model: Model, _: Uuid) -> list[Series]:
        counts = model.statistics
        if counts.summaries is None or not model.caches:
            return []
        return _quantiles(counts.summaries, choose(counts.summaries), total(counts), {}, {NO_GPU})

    return Family(name, "summary", help, read, "summary_latencies")


def _quantiles(
    kept: Summaries, recent: Recent, total: Duration, labels: dict[str, str], gpus: set[int]
) -> list[Series]:
    values = recent.at(kept.quantiles, time.monotonic_ns(), gpus)
    series: list[Series] = [
        ("", {**labels, "quantile": f"{quantile:g}"}, _number(value))
        for quantile, value in zip(kept.quantiles, values, strict=True)
    ]
    return [*series, ("_sum", labels, total.ns // US), ("_count", labels, total.count)]


def _number(ns: float) -> float | str:
    """Whole microseconds; Prometheus's word where there are none."""
    return "NaN" if math.isnan(ns) else int(ns) // US


FAMILIES = (
    Family(
        "nv_inference_request_success",
        "counter",
        "Number of successful inference requests, all batch sizes",
        _ran(lambda ran: ran.success.count),
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
        _ran(lambda ran: ran.inference_count),
    ),
    Family(
        "nv_inference_exec_count",
        "counter",
        "Number of model executions performed (does not include cached requests)",
        _ran(lambda ran: ran.execution_count),
    ),
    Family(
        "nv_inference_request_duration_us",
        "counter",
        "Cumulative inference request duration in microseconds (includes cached requests)",
        _ran(lambda ran: ran.success.ns, US),
        "counter_latencies",
    ),
    Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Cumulative inference queuing duration in microseconds (includes cached requests)",
        _ran(lambda ran: ran.queue.ns, US),
        "counter_latencies",
    ),
    Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        _ran(lambda ran: ran.compute_input.ns, US),
        "counter_latencies",
    ),
    Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        _ran(lambda ran: ran.compute_infer.ns, US),
        "counter_latencies",
    ),
    Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        _ran(lambda ran: ran.compute_output.ns, US),
        "counter_latencies",
    ),
    Family(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
        _one(lambda model: model.waiting),
    ),
    _histogram(
        "nv_inference_first_response_histogram_ms",
        "Duration from request to first response in milliseconds",
        lambda seen: seen.first_response,
        option="histogram_latencies",
    ),
    _summary(
        "nv_inference_request_summary_us",
        "Summary of inference request duration in microseconds (includes cached requests)",
        lambda kept: kept.request,
        lambda ran: ran.success,
        lambda model: not model.caches,
    ),
    _summary(
        "nv_inference_queue_summary_us",
        "Summary of inference queuing duration in microseconds (includes cached requests)",
        lambda kept: kept.queue,
        lambda ran: ran.queue,
    ),
    _summary(
        "nv_inference_compute_input_summary_us",
        "Cumulative compute input duration in microseconds (does not include cached requests)",
        lambda kept: kept.compute_input,
        lambda ran: ran.compute_input,
    ),
    _summary(
        "nv_inference_compute_infer_summary_us",
        "Cumulative compute inference duration in microseconds (does not include cached requests)",
        lambda kept: kept.compute_infer,
        lambda ran: ran.compute_infer,
    ),
    _summary(
        "nv_inference_compute_output_summary_us",
        "Cumulative inference compute output duration in microseconds (does not include cached requests)",
        lambda kept: kept.compute_output,
        lambda ran: ran.compute_output,
    ),
    _cache_summary(
        "nv_cache_hit_summary_per_model",
        "Summary of cache hit counts/durations per model, in microseconds.",
        lambda kept: kept.cache_hit,
        lambda counts: counts.cache_hit,
    ),
    _cache_summary(
        "nv_cache_miss_summary_per_model",
        "Summary of cache miss counts/durations per model, in microseconds.",
        lambda kept: kept.cache_miss,
        lambda counts: counts.cache_miss,
    ),
    Family(
        "nv_cache_num_hits_per_model",
        "counter",
        "Number of cache hits per model",
        _cached(lambda model: model.statistics.cache_hit.count),
    ),
    Family(
        "nv_cache_num_misses_per_model",
        "counter",
        "Number of cache misses per model",
        _cached(lambda model: model.statistics.cache_miss.count),
    ),
    Family(
        "nv_cache_hit_duration_per_model",
        "counter",
        "Total cache hit duration per model, in microseconds",
        _cached(lambda model: model.statistics.cache_hit.ns // 1000),
        "counter_latencies",
    ),
    Family(
        "nv_cache_miss_duration_per_model",
        "counter",
        "Total cache miss (insert+lookup) duration per model, in microseconds",
        _cached(lambda model: model.statistics.cache_miss.ns // 1000),
        "counter_latencies",
    ),
    Family(
        "nv_model_load_duration_secs",
        "gauge",
        "Model load time in seconds",
        _one(lambda model: model.load_s),
    ),
    Family(
        "penstock_running_requests",
        "gauge",
        "Requests that have left the queue and are not answered yet",
        _one(lambda model: model.running),
    ),
    Family(
        "penstock_batches_total",
        "counter",
        "Number of batches that left the batcher, by the reason why each did",
        _departures,
    ),
    Family(
        "penstock_model_memory_bytes",
        "gauge",
        "Main memory of a version's own processes",
        lambda model, _: [("", {}, memory_bytes)] if (memory_bytes := model.memory_bytes) else [],
    ),
    Family(
        "penstock_live_sequences",
        "gauge",
        "Sequences of a stateful model that have a slot",
        lambda model, _: [] if model.sequencer is None else [("", {}, model.sequencer.live)],
    ),
    Family(
        "penstock_padded_elements_total",
        "counter",
        "Elements of inputs that are padded: data that requests sent, and what it was filled up with",
        _padded,
    ),
    _histogram(
        "penstock_batch_wait_seconds",
        "How long an instance was free before an execution while a request waited: what a fuller batch cost",
        lambda seen: seen.gathered,
        SECOND,
    ),
    _histogram("penstock_batch_rows", "Rows of each execution", lambda seen: seen.rows),
    _histogram(
        "penstock_request_seconds",
        "From the arrival of a successful request to its answer",
        lambda seen: seen.request,
        SECOND,
    ),
    _histogram(
        "penstock_queue_seconds",
        "From the arrival of a successful request to the start of its execution",
        lambda seen: seen.queue,
        SECOND,
    ),
    _histogram(
        "penstock_compute_input_seconds",
        "Gathering the inputs of the batch that a request ran in",
        lambda seen: seen.compute_input,
        SECOND,
    ),
    _histogram(
        "penstock_compute_infer_seconds",
        "Computing the batch that a request ran in",
        lambda seen: seen.compute_infer,
        SECOND,
    ),
    _histogram(
        "penstock_compute_output_seconds",
        "Scattering the outputs of the batch that a request ran in",
        lambda seen: seen.compute_output,
        SECOND,
    ),
)


def render(
    engine: Engine,
    process: ProcessMetrics | None = None,
    gpus: GpuMetrics | None = None,
    uuid: Uuid = devices.gpu_uuid,
) -> bytes:
    """Every metric that has a series, in Prometheus' text format; with those of process and GPUs where given.

    `uuid` is asked for the names of GPUs that models run on, if GPUs are to be shown at all.
    """
    kept = engine.lifecycle.cache
    shown = engine.settings.metrics_options()
    families = [family for family in FAMILIES if not family.option or shown[family.option]]
    named = uuid if engine.settings.allow_gpu_metrics else lambda _: ""
    lines = (*_lines(families, engine.lifecycle.models(), named), *(_cache_lines(kept) if kept is not None else ()))
    return "".join((*lines, process.render() if process else "", gpus.render() if gpus else "")).encode()


CACHE_GAUGES: tuple[tuple[str, str, Callable[[ResponseCache], float]], ...] = (
    ("util", "Cache utilization [0.0 - 1.0]", lambda kept: kept.used_bytes / kept.size_bytes if kept.size_bytes else 0),
    ("num_entries", "Number of responses stored in the cache", len),
    ("num_hits", "Number of cache hits", lambda kept: kept.counts.hits),
    ("num_misses", "Number of cache misses", lambda kept: kept.counts.misses),
    ("num_lookups", "Number of cache lookups", lambda kept: kept.counts.lookup.count),
    ("num_evictions", "Number of cache evictions", lambda kept: kept.counts.evictions),
    ("lookup_duration", "Total cache lookup duration in microseconds", lambda kept: kept.counts.lookup.ns // 1000),
    (
        "insertion_duration",
        "Total cache insertion duration in microseconds",
        lambda kept: kept.counts.insertion.ns // 1000,
    ),
)


def _cache_lines(kept: ResponseCache) -> Iterator[str]:
    for name, help, read in CACHE_GAUGES:
        yield f"# HELP nv_cache_{name} {help}\n# TYPE nv_cache_{name} gauge\nnv_cache_{name} {read(kept)}\n"


def _lines(families: list[Family], models: list[Model], uuid: Uuid) -> Iterator[str]:
    for family in families:
        head = f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.type}\n"
        for model in models:
            with model.statistics.lock:
                series = family.read(model, uuid)
            for suffix, labels, value in series:
                yield f"{head}{family.name}{suffix}{{{_labels(model, labels)}}} {value}\n"
                head = ""  # stands once, before the first series; a family without one has none


def _labels(model: Model, further: dict[str, str]) -> str:
    """In alphabetical order, the bound of a bucket or a quantile last."""
    tags = {f"_{key}": value for key, value in model.config.metric_tags.items()}
    pairs = {**tags, "model": model.name, "version": model.version, **further}
    return ",".join(f'{key}="{_escape(pairs[key])}"' for key in sorted(pairs, key=lambda key: (key in LAST, key)))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
