"""Metrics are the statistics under Triton's names, in Prometheus' text format."""

import re
from pathlib import Path

from penstock.engine import Engine
from penstock.metrics import FAMILIES, render
from penstock.settings import Settings

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
]


def engine(root: Path, *names: str) -> Engine:
    for name in names:
        (root / f"{name}.onnx").write_text("scale 1")
    made = Engine(Settings(model_repository=(str(root),), device="cpu"), FakeRuntime().find)
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
        [family.name, family.type] for family in FAMILIES
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


def test_labels_are_escaped(tmp_path: Path) -> None:
    made = engine(tmp_path, 'a"b\\c\nd')
    text = render(made).decode()
    assert made.lifecycle.stop(LIMIT_S)
    assert r'nv_inference_count{model="a\"b\\c\nd",version="1"} 0' in text
