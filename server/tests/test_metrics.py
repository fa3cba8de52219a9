"""Metrics are the statistics under Triton's names, in Prometheus' text format."""

import json
import re
from pathlib import Path

from penstock.batching import DEPARTURES
from penstock.engine import Engine
from penstock.metrics import FAMILIES, render
from penstock.settings import Settings
from penstock.statistics import Execution

from .fakes import LIMIT_S, Answers, FakeRuntime, request

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
    "penstock_batch_rows",
    "penstock_request_seconds",
    "penstock_queue_seconds",
    "penstock_compute_input_seconds",
    "penstock_compute_infer_seconds",
    "penstock_compute_output_seconds",
]


def engine(root: Path, *names: str, metrics_config: tuple[str, ...] = ()) -> Engine:
    for name in names:
        (root / f"{name}.onnx").write_text("scale 1")
    settings = Settings(model_repository=(str(root),), device="cpu", metrics_config=metrics_config)
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


def test_families_can_be_switched(tmp_path: Path) -> None:
    switched = ("counter_latencies=false", "histogram_latencies=true")
    made = engine(tmp_path, "a", metrics_config=switched)
    made.model("a").statistics.executed([0], 1, Execution(0, 0, 0, 600_900_000))
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert [name for name in names if name.endswith("_duration_us")] == []
    prefix = 'nv_inference_first_response_histogram_ms_%s{model="a",version="1"%s} %s\n'
    bounds = (("100", 0), ("500", 0), ("2000", 1), ("5000", 1), ("+Inf", 1))
    for le, number in bounds:
        assert prefix % ("bucket", f',le="{le}"', number) in text
    assert prefix % ("sum", "", "600.0") in text


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads((Path(__file__).parents[1] / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(asked) >= 10
    known = {family.name for family in FAMILIES} | {
        f"{family.name}{suffix}"
        for family in FAMILIES
        if family.type == "histogram"
        for suffix in ("_bucket", "_sum", "_count")
    }
    assert {name for text in asked for name in re.findall(r"(?:nv|penstock)_\w+", text)} <= known


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


def test_buckets_are_cumulative_and_in_seconds(tmp_path: Path) -> None:
    made = engine(tmp_path, "a")
    times = Execution(
        started_ns=2_000_000, inputs_ready_ns=2_000_000, outputs_came_ns=5_000_000, ended_ns=12_000_000_000
    )
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
