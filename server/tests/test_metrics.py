"""Metrics are the statistics under Triton's names, in Prometheus' text format."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from penstock import control, gpu_metrics, pb
from penstock.batching import DEPARTURES
from penstock.cache import ENTRY_BYTES
from penstock.engine import Engine
from penstock.job_api import metrics as job_metrics
from penstock.messages import Sequence
from penstock.metrics import CACHE_GAUGES, FAMILIES, render
from penstock.process_metrics import ProcessMetrics
from penstock.runtime import Host, Instance, ModelFiles, Placement, gpu_number
from penstock.settings import Settings
from penstock.statistics import NO_GPU, Duration, Execution, Padded, Recent

from .fakes import LIMIT_S, Answers, EchoInstance, FakeRuntime, GatedInstance, calling, request

NAMES = [
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
    "nv_model_load_duration_secs",
    "penstock_running_requests",
    "penstock_batch_wait_seconds",
    "penstock_batch_rows",
    "penstock_request_seconds",
    "penstock_queue_seconds",
    "penstock_compute_input_seconds",
    "penstock_compute_infer_seconds",
    "penstock_compute_output_seconds",
]


def engine(root: Path, *names: str, metrics_config: tuple[str, ...] = (), cache_config: str = "") -> Engine:
    for name in names:
        (root / f"{name}.onnx").write_text("scale 1")
    settings = Settings(
        model_repository=(str(root),), device="cpu", metrics_config=metrics_config, cache_config=cache_config
    )
    made = Engine(settings, FakeRuntime().find)
    made.lifecycle.start()
    return made


def test_there_is_nothing_before_a_model_serves(tmp_path: Path) -> None:
    made = engine(tmp_path)
    assert render(made) == b""
    assert made.lifecycle.stop(LIMIT_S)


def test_every_family_has_its_head_once_and_a_series_for_each_version(tmp_path: Path) -> None:
    made = engine(tmp_path, "a", "b")
    lines = render(made).decode().splitlines()
    assert made.lifecycle.stop(LIMIT_S)
    assert [line.split()[2] for line in lines if line.startswith("# HELP")] == NAMES
    assert [line.split()[2:] for line in lines if line.startswith("# TYPE")] == [
        [family.name, family.type] for family in FAMILIES if family.name in NAMES
    ]
    series = [line for line in lines if line.startswith("nv_inference_count")]
    assert series == ['nv_inference_count{model="a",version="1"} 0', 'nv_inference_count{model="b",version="1"} 0']


def test_failures_have_a_series_for_each_reason(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    made.model("a").statistics.failed("CANCELED", 10)
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert re.findall(r"^nv_inference_request_failure(.*)$", text, re.MULTILINE) == [
        f'{{model="a",reason="{reason}",version="1"}} {number}'
        for reason, number in (("REJECTED", 0), ("CANCELED", 1), ("BACKEND", 0), ("OTHER", 0))
    ]


def test_durations_are_whole_microseconds(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    served = made.model("a")
    made.submit(served, request(), answers := Answers())
    answers.one()
    served.statistics.success.ns = 12_999
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert 'nv_inference_request_duration_us{model="a",version="1"} 12\n' in text
    assert 'nv_inference_request_success{model="a",version="1"} 1\n' in text


def test_every_count_is_told_under_its_name(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    served = made.model("a")
    counts = served.statistics
    counts.inference_count, counts.execution_count = 1, 2
    counts.success, counts.queue = Duration(3, 13_999), Duration(4, 14_999)
    counts.compute_input, counts.compute_infer = Duration(5, 15_999), Duration(6, 16_999)
    counts.compute_output = Duration(7, 17_999)
    counts.padded = (Padded(data=20, padding=2), Padded(data=1, padding=1))
    counts.histograms.gathered.add(8 * 10**9)
    counts.histograms.rows.add(9)
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    told = dict(re.findall(r'^(\w+)\{model="a",version="1"\} (\S+)$', text, re.MULTILINE))
    expected = {
        "nv_inference_count": 1,
        "nv_inference_exec_count": 2,
        "nv_inference_request_success": 3,
        "nv_inference_request_duration_us": 13,
        "nv_inference_queue_duration_us": 14,
        "nv_inference_compute_input_duration_us": 15,
        "nv_inference_compute_infer_duration_us": 16,
        "nv_inference_compute_output_duration_us": 17,
        "nv_model_load_duration_secs": served.load_s,
        "penstock_batch_wait_seconds_sum": 8,
        "penstock_batch_rows_sum": 9,
    }
    assert {name: float(told[name]) for name in expected} == expected
    assert served.load_s > 0
    assert re.findall(r"^penstock_padded_elements_total(.*)$", text, re.MULTILINE) == [
        '{model="a",of="data",version="1"} 21',
        '{model="a",of="padding",version="1"} 3',
    ]


def test_what_waits_and_what_runs_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("gated 1")
    runtime = FakeRuntime()
    made = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"), runtime.find)
    made.lifecycle.start()
    instances = [instance for instance in runtime.instances if isinstance(instance, GatedInstance)]
    sent = [Answers() for _ in range(len(instances) + 3)]
    for answers in sent:
        made.submit(made.model("a"), request(), answers)
    for instance in instances:
        instance.wait_begun()
    busy = render(made).decode()
    for instance in instances:
        instance.gate.set()
    for answers in sent:
        answers.one()
    assert made.lifecycle.stop(LIMIT_S)
    assert 'nv_inference_pending_request_count{model="a",version="1"} 3\n' in busy
    assert f'penstock_running_requests{{model="a",version="1"}} {len(instances)}\n' in busy


class Measuring(FakeRuntime):
    """Its instances know what memory is theirs: so many bytes as their file says."""

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> Instance:
        return Weighed(int(files.file(config.default_model_filename or "model.txt").read_text()))


class Weighed(EchoInstance):
    def __init__(self, weight_bytes: int) -> None:
        super().__init__()
        self._weight_bytes = weight_bytes

    def memory_bytes(self) -> int:
        return self._weight_bytes


def test_memory_is_told_where_it_is_known(tmp_path: Path) -> None:
    for name, weight in (("heavy", "123"), ("unknown", "0")):
        (tmp_path / f"{name}.onnx").write_text(weight)
    made = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"), Measuring().find)
    made.lifecycle.start()
    text = render(made).decode()
    memory = {entry["name"]: entry["memory_usage"] for entry in control.model_statistics(made, {})["model_stats"]}
    total = made.model("heavy").workers * 123
    assert made.lifecycle.stop(LIMIT_S)
    assert re.findall(r"^penstock_model_memory_bytes(.*)$", text, re.MULTILINE) == [
        f'{{model="heavy",version="1"}} {total}'
    ]
    assert memory == {"heavy": [{"type": "CPU", "id": 0, "byte_size": total}], "unknown": []}


def test_families_can_be_switched(tmp_path: Path) -> None:
    switched = ("counter_latencies=false", "histogram_latencies=true")
    made = engine(tmp_path, "a", metrics_config=switched)
    made.model("a").statistics.executed([0], 1, Execution(0, 0, 600_900_000, 0, 600_900_000))
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert [name for name in names if name.endswith("_duration_us")] == []
    prefix = 'nv_inference_first_response_histogram_ms_%s{model="a",version="1"%s} %s\n'
    bounds = (("100", 0), ("500", 0), ("2000", 1), ("5000", 1), ("+Inf", 1))
    for le, number in bounds:
        assert prefix % ("bucket", f',le="{le}"', number) in text
    assert prefix % ("sum", "", "600.0") in text


def test_summaries_are_told_where_they_are_asked_for(tmp_path: Path) -> None:
    made = engine(tmp_path, "a", metrics_config=("summary_latencies=true", "summary_quantiles=0.5:0.05,0.9:0.01"))
    counts = made.model("a").statistics
    empty = render(made).decode()
    now_ns = time.monotonic_ns()
    for us in range(1, 101):
        counts.executed([now_ns - us * 1000], 1, Execution(2000, 7000, 3000, now_ns, now_ns + 12_000))
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert 'nv_inference_queue_summary_us{model="a",version="1",quantile="0.5"} NaN\n' in empty
    assert "# TYPE nv_inference_queue_summary_us summary\n" in text
    for quantile, us in (("0.5", 51), ("0.9", 91)):
        assert f'nv_inference_queue_summary_us{{model="a",version="1",quantile="{quantile}"}} {us}\n' in text
        assert f'nv_inference_request_summary_us{{model="a",version="1",quantile="{quantile}"}} {us + 12}\n' in text
        for phase, took_us in (("input", 2), ("infer", 7), ("output", 3)):
            name = f"nv_inference_compute_{phase}_summary_us"
            assert f'{name}{{model="a",version="1",quantile="{quantile}"}} {took_us}\n' in text
    assert 'nv_inference_queue_summary_us_sum{model="a",version="1"} 5050\n' in text
    assert 'nv_inference_queue_summary_us_count{model="a",version="1"} 100\n' in text
    assert "nv_cache_hit_summary_per_model" not in text


def test_summaries_of_the_cache_are_of_looking_up_and_keeping_together(tmp_path: Path) -> None:
    configured(tmp_path, "kept", "response_cache { enable: true }")
    made = engine(tmp_path, metrics_config=("summary_latencies=true",), cache_config="local,size=10000")
    counts = made.model("kept").statistics
    for insertion_us in (10, 20, 30):
        counts.missed(lookup_ns=5_000, insertion_ns=insertion_us * 1000)
    counts.hit(lookup_ns=7_000, queue_ns=1_000)
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    for family, median, total, count in (("miss", 25, 75, 3), ("hit", 7, 7, 1)):
        prefix = f'nv_cache_{family}_summary_per_model%s{{model="kept",version="1"%s}} %s\n'
        assert prefix % ("", ',quantile="0.5"', median) in text
        assert prefix % ("_sum", "", total) in text
        assert prefix % ("_count", "", count) in text
        assert f'nv_cache_{family}_duration_per_model{{model="kept",version="1"}} {total}\n' in text
    assert "nv_inference_request_summary_us" not in text  # as in Triton: only of models that do not cache


def test_cumulative_durations_of_the_cache_are_switched_with_the_others(tmp_path: Path) -> None:
    configured(tmp_path, "kept", "response_cache { enable: true }")
    made = engine(tmp_path, metrics_config=("counter_latencies=false",), cache_config="local,size=10000")
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert re.findall(r"^# TYPE (nv_\S*_per_model) ", text, re.MULTILINE) == [
        "nv_cache_num_hits_per_model",
        "nv_cache_num_misses_per_model",
    ]
    assert "nv_cache_lookup_duration " in text  # a gauge of the cache as a whole


def test_the_statistics_extension_and_the_metrics_tell_the_same(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    served = made.model("a")
    for _ in range(3):
        made.submit(served, request(), answers := Answers())
        answers.one()
    served.statistics.failed("CANCELED", 5_000)
    [told] = control.model_statistics(made, {})["model_stats"]
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    found = {
        name: float(value) for name, value in re.findall(r'^(\w+)\{model="a",version="1"\} (\S+)$', text, re.MULTILINE)
    }
    counted = told["inference_stats"]
    assert found["nv_inference_request_success"] == counted["success"]["count"] == 3
    assert found["nv_inference_count"] == told["inference_count"]
    assert found["nv_inference_exec_count"] == told["execution_count"]
    for phase, name in (
        ("success", "request"),
        ("queue", "queue"),
        ("compute_input", "compute_input"),
        ("compute_infer", "compute_infer"),
        ("compute_output", "compute_output"),
    ):
        assert found[f"nv_inference_{name}_duration_us"] == counted[phase]["ns"] // 1000
        assert found[f"penstock_{name}_seconds_sum"] == pytest.approx(counted[phase]["ns"] / 1e9)
        assert found[f"penstock_{name}_seconds_count"] == counted[phase]["count"]
    assert found["penstock_batch_rows_sum"] == told["inference_count"]
    assert found["penstock_batch_rows_count"] == found["penstock_batch_wait_seconds_count"] == told["execution_count"]
    failures = re.findall(r"^nv_inference_request_failure\{.*\} (\d+)$", text, re.MULTILINE)
    assert sum(map(int, failures)) == counted["fail"]["count"] == 1


UUIDS = {0: "GPU-a", 1: "GPU-b"}
OF_RUNS = {  # families of what ran, for which each GPU has series of its own, and what a run of `ran` adds to each
    "nv_inference_request_success": 1,
    "nv_inference_count": 3,
    "nv_inference_exec_count": 1,
    "nv_inference_request_duration_us": 112,
    "nv_inference_queue_duration_us": 2,
    "nv_inference_compute_input_duration_us": 10,
    "nv_inference_compute_infer_duration_us": 70,
    "nv_inference_compute_output_duration_us": 30,
}


class Spreading(FakeRuntime):
    """Puts the instances of the model `spread` on one device after the other."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.devices = devices

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> Instance:
        instance = super().open(files, config, place, host)
        if files.model == "spread":
            instance.device = self.devices[len(self.instances) - 1]
        return instance


def spread(root: Path, runtime: Spreading, text: str = "", **options: Any) -> Engine:
    """Serves `spread`, with an instance on each device, `plain` on the CPU, and `calls`, which calls `spread`."""
    configured(root, "spread", f"instance_group {{ kind: KIND_CPU count: {len(runtime.devices)} }} {text}")
    (root / "spread" / "1" / "model.txt").write_text("gated 2")
    (root / "plain.onnx").write_text("scale 1")
    (root / "calls" / "1").mkdir(parents=True)
    (root / "calls" / "config.pbtxt").write_text(calling("spread").replace('"m"', '"calls"'))
    settings = Settings(
        model_repository=(str(root),), device="cpu", model_control_mode="explicit", load_model=("spread",), **options
    )
    made = Engine(settings, runtime.find)
    made.lifecycle.start()
    for name in ("plain", "calls"):
        made.lifecycle.load(name)
    return made


def ran(gpu: int) -> Execution:
    """Three phases of 10, 70 and 30 us."""
    return Execution(10_000, 70_000, 30_000, started_ns=2_000, ended_ns=112_000, gpu=gpu)


def of(text: str, model: str) -> dict[str, float]:
    """The series of a model by their names and further labels."""
    found = re.findall(rf'^(\w+)\{{(.*)model="{model}",(.*)version="1"(.*)\}} (\S+)$', text, re.MULTILINE)
    return {name + "".join(labels): float(value) for name, *labels, value in found}


def test_what_ran_on_a_gpu_bears_its_uuid_and_nothing_else_does(tmp_path: Path) -> None:
    made = spread(tmp_path, Spreading("cuda:0", "cuda:1"))
    counts = made.model("spread").statistics
    for gpu in (0, 1, 1):
        counts.executed([0], 3, ran(gpu))
    counts.failed("BACKEND", 5)
    text = render(made, uuid=UUIDS.__getitem__).decode()
    assert made.lifecycle.stop(LIMIT_S)
    found = of(text, "spread")
    for family, value in OF_RUNS.items():
        assert found[f'{family}gpu_uuid="GPU-a",'] == value
        assert found[f'{family}gpu_uuid="GPU-b",'] == 2 * value
        assert family not in found  # there is no more to tell
    assert {name.partition("gpu_uuid")[0] for name in found if "gpu_uuid" in name} == set(OF_RUNS)
    assert found['nv_inference_request_failurereason="BACKEND",'] == 1
    assert {"nv_inference_pending_request_count", "nv_model_load_duration_secs"} <= found.keys()
    assert found["penstock_batch_rows_sum"] == 9  # of the model, wherever it ran
    for model in ("plain", "calls"):
        assert OF_RUNS.keys() <= of(text, model).keys()
        assert not any("gpu_uuid" in name for name in of(text, model))
    assert 'nv_inference_count{gpu_uuid="GPU-a",model="spread",version="1"} 3\n' in text


def test_series_of_gpus_are_there_before_anything_ran_and_sum_to_the_statistics_after(tmp_path: Path) -> None:
    runtime = Spreading("cuda:0", "cuda:1")
    made = spread(tmp_path, runtime)
    before = of(render(made, uuid=UUIDS.__getitem__).decode(), "spread")
    gates = [one for one in runtime.instances if isinstance(one, GatedInstance)]
    asked = [Answers() for _ in gates]
    for answers in asked:  # each of which keeps one instance busy
        made.submit(made.model("spread"), request(), answers)
    for gate in gates:
        gate.wait_begun()
    for gate in gates:
        gate.gate.set()
    for answers in asked:
        answers.one()
    found = of(render(made, uuid=UUIDS.__getitem__).decode(), "spread")
    [told] = control.model_statistics(made, {"name": "spread"})["model_stats"]
    assert made.lifecycle.stop(LIMIT_S)
    labels = [f'gpu_uuid="{uuid}",' for uuid in UUIDS.values()]
    assert [before[family + label] for family in OF_RUNS for label in labels] == [0] * 2 * len(OF_RUNS)
    assert [found[f"nv_inference_exec_count{label}"] for label in labels] == [1, 1]
    assert told["execution_count"] == told["inference_count"] == told["inference_stats"]["success"]["count"] == 2
    us = sum(found[f"nv_inference_request_duration_us{label}"] for label in labels)
    assert us == pytest.approx(told["inference_stats"]["success"]["ns"] / 1000, abs=2)


@pytest.mark.parametrize(
    ("devices", "uuids", "without"),
    [
        (("cuda:0", "cuda:1"), {0: "GPU-a", 1: ""}, 2),
        (("cuda:0", "cuda:1"), {0: "", 1: ""}, 3),
        (("cuda:0", "cpu"), {0: "GPU-a"}, 2),
    ],
    ids=["one uuid", "no uuid", "on the cpu too"],
)
def test_what_has_no_uuid_is_one_series_without_the_label(
    tmp_path: Path, devices: tuple[str, ...], uuids: dict[int, str], without: int
) -> None:
    made = spread(
        tmp_path, Spreading(*devices), metrics_config=("summary_latencies=true", "summary_quantiles=0.5:0.05")
    )
    counts = made.model("spread").statistics
    now_ns = time.monotonic_ns()
    for gpu, us in ((0, 10), (gpu_number(devices[1]), 20), (gpu_number(devices[1]), 30)):
        counts.executed([now_ns], 3, Execution(0, us * 1000, 0, now_ns, now_ns, gpu=gpu))
    found = of(render(made, uuid=uuids.__getitem__).decode(), "spread")
    made_without = of(render(made, uuid=lambda _: "").decode(), "spread")
    assert made.lifecycle.stop(LIMIT_S)
    summary = "nv_inference_compute_infer_summary_us"
    assert found["nv_inference_exec_count"] == found[f"{summary}_count"] == without
    assert found[f"{summary}_sum"] == found["nv_inference_compute_infer_duration_us"] == 20 + 30 + 10 * (without - 2)
    assert found[f'{summary},quantile="0.5"'] == (30 if without == 2 else 20)
    label = 'gpu_uuid="GPU-a",'
    assert found.get(f"nv_inference_count{label}") == (3 if without == 2 else None)
    assert found.get(f'{summary}{label},quantile="0.5"') == (10 if without == 2 else None)
    assert made_without["nv_inference_exec_count"] == 3


def test_what_the_cache_answered_is_of_no_gpu(tmp_path: Path) -> None:
    made = spread(
        tmp_path, Spreading("cuda:0"), text="response_cache { enable: true }", cache_config="local,size=10000"
    )
    counts = made.model("spread").statistics
    counts.executed([0], 3, ran(0))
    counts.missed(lookup_ns=5_000, insertion_ns=4_000)
    for _ in range(2):
        counts.hit(lookup_ns=7_000, queue_ns=1_000)
    found = of(render(made, uuid=UUIDS.__getitem__).decode(), "spread")
    assert made.lifecycle.stop(LIMIT_S)
    for family, value in OF_RUNS.items():
        assert found[f'{family}gpu_uuid="GPU-a",'] == value
    assert [found[family] for family in OF_RUNS] == [2, 0, 0, 2 * 8 + 4, 2 * 1, 0, 0, 0]
    assert [found[f"nv_cache_num_{what}_per_model"] for what in ("hits", "misses")] == [2, 1]


def test_a_series_of_the_rest_never_becomes_less(tmp_path: Path) -> None:
    made = spread(tmp_path, Spreading("cuda:0", "cpu"))
    counts = made.model("spread").statistics
    seen = []
    for gpu, ns in ((NO_GPU, 1_900), (0, 900), (0, 100)):  # a whole us of the whole, and then one of the GPU
        counts.executed([0], 1, Execution(0, ns, 0, 0, ns, gpu=gpu))
        seen.append(of(render(made, uuid=UUIDS.__getitem__).decode(), "spread"))
    assert made.lifecycle.stop(LIMIT_S)
    assert [one["nv_inference_compute_infer_duration_us"] for one in seen] == [1, 1, 1]
    assert [one['nv_inference_compute_infer_duration_usgpu_uuid="GPU-a",'] for one in seen] == [0, 0, 1]


def test_without_metrics_of_gpus_no_series_bears_their_label(tmp_path: Path) -> None:
    made = spread(tmp_path, Spreading("cuda:0"), allow_gpu_metrics=False)
    made.model("spread").statistics.executed([0], 3, ran(0))
    text = render(made, uuid=UUIDS.__getitem__).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert "gpu_uuid" not in text
    assert of(text, "spread")["nv_inference_count"] == 3


def configured(root: Path, name: str, text: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.txt").write_text("scale 1")
    (root / name / "config.pbtxt").write_text(f'backend: "fake" default_model_filename: "model.txt" {text}')


def test_a_models_tags_are_labels_and_its_buckets_its_own(tmp_path: Path) -> None:
    options = "histogram_options { buckets: [ 8, 0.5 ] }"
    configured(
        tmp_path,
        "tagged",
        'metric_tags { key: "team" value: "north" } model_metrics { metric_control { metric_identifier '
        f'{{ family: "nv_inference_first_response_histogram_ms" }} {options} }} }}',
    )
    made = engine(tmp_path, metrics_config=("histogram_latencies=true",))
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert 'nv_inference_count{_team="north",model="tagged",version="1"} 0\n' in text
    bounds = re.findall(
        r'first_response_histogram_ms_bucket\{_team="north",model="tagged",version="1",le="(.*)"\}', text
    )
    assert bounds == ["0.5", "8", "+Inf"]


BOARD = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text())
ASKED = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
# What there is only once, and by which names it is told.
OF_PROCESS = set(re.findall(r"^# TYPE (\S+)", ProcessMetrics(True, 0).render(), re.MULTILINE))
OF_JOBS = {family.name for family in job_metrics.FAMILIES} | {job_metrics.ATTEMPTS, job_metrics.UP}
OF_GPUS = {gauge.name for gauge in (*gpu_metrics.GAUGES, gpu_metrics.ENERGY)}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
    known = {f"{family.name}{suffix}" for family in FAMILIES for suffix in suffixes.get(family.type, ("",))}
    cache = {f"nv_cache_{name}" for name, *_ in CACHE_GAUGES}
    elsewhere = OF_JOBS | OF_GPUS
    asked = {name for text in ASKED for name in re.findall(r"(?:nv|penstock|process)_\w+", text)}
    assert asked <= known | OF_PROCESS | cache | elsewhere


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(ASKED)
    # Each of these is shown as a histogram of ours, which says more.
    instead = re.compile(
        r"nv_inference_(request|queue|compute_\w+)_duration_us|nv_.*_summary_\w+|nv_inference_first_\w+"
    )
    missing = [family.name for family in FAMILIES if family.name not in shown and not instead.fullmatch(family.name)]
    assert missing == []
    assert {name for name in OF_PROCESS | OF_JOBS | OF_GPUS if name not in shown} == set()


def test_the_dashboard_adds_up_what_ran_on_several_gpus() -> None:
    of_runs = [text for text in ASKED if any(family in text for family in OF_RUNS)]
    assert len(of_runs) >= 4
    for text in of_runs:
        assert re.fullmatch(r"sum by \(model(, gpu_uuid)?\) \(rate\(\w+\{.*\}\[1m\]\)\)", text)


def test_a_cache_is_shown_though_it_is_empty(tmp_path: Path) -> None:
    settings = Settings(model_repository=(str(tmp_path),), device="cpu", cache_config="local,size=1000")
    text = render(Engine(settings, FakeRuntime().find)).decode()
    assert "\nnv_cache_util 0.0\n" in text
    assert "\nnv_cache_num_entries 0\n" in text


def test_the_cache_is_told_as_a_whole_and_for_each_model_that_uses_it(tmp_path: Path) -> None:
    configured(tmp_path, "kept", "response_cache { enable: true }")
    configured(tmp_path, "plain", "")
    options = ("summary_latencies=true", "summary_quantiles=0.5:0.05")
    size = 2 * (ENTRY_BYTES + 4)
    settings = Settings(
        model_repository=(str(tmp_path),), device="cpu", cache_config=f"local,size={size}", metrics_config=options
    )
    made = Engine(settings, FakeRuntime().find)
    made.lifecycle.start()
    for value in (1, 2, 3, 3):
        made.submit(made.model("kept"), request(value), answers := Answers())
        answers.one()
    counts, kept = made.model("kept").statistics, made.lifecycle.cache
    assert kept is not None
    counts.cache_hit.ns, kept.counts.lookup.ns, kept.counts.insertion.ns = 7_999, 8_999, 9_999
    assert counts.summaries is not None
    counts.summaries.cache_hit = Recent()
    counts.summaries.cache_hit.add(6_999, time.monotonic_ns())
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    told = dict(re.findall(r"^nv_cache_(\w+) (\S+)$", text, re.MULTILINE))
    assert told == {
        "util": "1.0", "num_entries": "2", "num_hits": "1", "num_misses": "3", "num_lookups": "4",
        "num_evictions": "1", "lookup_duration": "8", "insertion_duration": "9",
    }  # fmt: skip
    per_model = dict(re.findall(r'^nv_cache_(\w+_per_model)\{model="kept",version="1"\} (\d+)$', text, re.MULTILINE))
    assert (per_model["num_hits_per_model"], per_model["num_misses_per_model"]) == ("1", "3")
    assert (per_model["hit_duration_per_model"], int(per_model["miss_duration_per_model"]) > 0) == ("7", True)
    assert re.findall(r'^nv_cache_\w+\{model="plain"', text, re.MULTILINE) == []
    counted = dict(re.findall(r'^(nv_\w+_summary_\w+_count)\{model="kept",version="1"\} (\d+)$', text, re.MULTILINE))
    # Triton shows no request summary of a model that uses the cache.
    assert "nv_inference_request_summary_us_count" not in counted
    assert (counted["nv_inference_queue_summary_us_count"], counted["nv_cache_hit_summary_per_model_count"]) == (
        "4",
        "1",
    )
    assert 'nv_cache_hit_summary_per_model{model="kept",version="1",quantile="0.5"} 6\n' in text
    assert 'nv_inference_request_summary_us{model="plain",version="1",quantile="0.5"} NaN\n' in text


def test_labels_are_escaped(tmp_path: Path) -> None:
    made = engine(tmp_path, 'a"b\\c\nd')
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert r'nv_inference_count{model="a\"b\\c\nd",version="1"} 0' in text


def test_a_model_that_batches_shows_why_its_batches_left(tmp_path: Path) -> None:
    directory = tmp_path / "batched"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.txt").write_text("scale 1")
    (directory / "config.pbtxt").write_text(
        'backend: "fake" default_model_filename: "model.txt" max_batch_size: 4 dynamic_batching { }'
    )
    made = engine(tmp_path)
    sent = request(1)
    sent.inputs["X"].array = sent.inputs["X"].array.reshape(1, 1)
    made.submit(made.model("batched"), sent, answers := Answers())
    answers.one()
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert re.findall(
        r'^penstock_batches_total\{model="batched",reason="(.*)",version="1"\} (.*)$', text, re.MULTILINE
    ) == [(reason, str(int(reason == "idle"))) for reason in DEPARTURES]


def test_a_stateful_model_shows_how_many_sequences_live_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "stateful"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.txt").write_text("scale 1")
    (directory / "config.pbtxt").write_text(
        'backend: "fake" default_model_filename: "model.txt" max_batch_size: 4 sequence_batching { }'
    )
    made = engine(tmp_path)
    for flow in (1, 2):
        sent = request(1)
        sent.inputs["X"].array = sent.inputs["X"].array.reshape(1, 1)
        sent.sequence = Sequence(flow, start=True)
        made.submit(made.model("stateful"), sent, answers := Answers())
        answers.one()
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert 'penstock_live_sequences{model="stateful",version="1"} 2\n' in text
    assert 'penstock_batches_total{model="stateful",reason="idle",version="1"} 2\n' in text


def test_buckets_are_cumulative_and_in_seconds(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    times = Execution(0, 3_000_000, 11_995_000_000, started_ns=2_000_000, ended_ns=12_000_000_000)
    made.model("a").statistics.executed([1_000_000, 2_000_000], 3, times)
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    found = re.findall(r'^penstock_queue_seconds_bucket\{model="a",version="1",le="(.*)"\} (.*)$', text, re.MULTILINE)
    assert found[:5] == [("0.0001", "1"), ("0.00025", "1"), ("0.0005", "1"), ("0.001", "2"), ("0.0025", "2")]
    assert found[-1] == ("+Inf", "2")
    assert 'penstock_queue_seconds_sum{model="a",version="1"} 0.001\n' in text
    assert 'penstock_queue_seconds_count{model="a",version="1"} 2\n' in text
    assert 'penstock_request_seconds_bucket{model="a",version="1",le="10"} 0\n' in text
    assert 'penstock_batch_rows_bucket{model="a",version="1",le="4"} 1\n' in text
