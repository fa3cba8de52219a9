"""Counts as Prometheus text, on a port of their own."""

import re

import numpy as np
import pytest

from conformance_tests.carriers import Call, HttpBinary, Input, infer, refusal
from conformance_tests.clause_table import clause
from conformance_tests.doors import HttpDoor, known
from conformance_tests.http_wire import HttpClient

needs = pytest.mark.needs
# Of every model, and their types.
FAMILIES = {
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_inference_pending_request_count": "gauge",
    "nv_model_load_duration_secs": "gauge",
}
SERIES = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')


def scrape(http: HttpClient) -> dict[str, float]:
    """Every series by its name and labels as printed; every line must be one, or a comment."""
    found = {}
    for line in http.get("/metrics").body.decode().splitlines():
        if not line.startswith("#"):
            match = SERIES.fullmatch(line)
            assert match, line
            assert line.rpartition(" ")[0] not in found, f"twice: {line}"
            found[line.rpartition(" ")[0]] = float(match[3])
    return found


@clause("metrics.text")
def test_metrics_are_prometheus_text(http_metrics: HttpClient) -> None:
    answer = http_metrics.get("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert answer.body.endswith(b"\n")
    assert scrape(http_metrics)


@clause("metrics.paths")
def test_the_metrics_port_has_one_path(http_metrics: HttpClient) -> None:
    assert http_metrics.get("/metrics/").body.startswith(b"# HELP")
    nowhere = http_metrics.get("/nope")
    assert (nowhere.status, nowhere.json()) == (404, {"error": "Not Found"})
    assert http_metrics.post("/metrics").status == 405


@clause("metrics.names")
@needs("simple")
def test_families_have_their_names_and_types(http_metrics: HttpClient) -> None:
    text = http_metrics.get("/metrics").body.decode()
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)).items() >= FAMILIES.items()
    assert {*FAMILIES} <= {*re.findall(r"^# HELP (\S+) \S", text, re.MULTILINE)}


@clause("metrics.labels")
@needs("simple", "times_version")
def test_series_bear_model_and_version(http_metrics: HttpClient) -> None:
    found = scrape(http_metrics)
    for version in ("1", "2"):
        assert f'nv_inference_count{{model="times_version",version="{version}"}}' in found
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        assert f'nv_inference_request_failure{{model="simple",reason="{reason}",version="1"}}' in found


@clause("metrics.same_counts")
@needs("failing")
def test_metrics_and_statistics_agree(http: HttpClient, http_metrics: HttpClient) -> None:
    carrier = HttpBinary(http)
    for index in (0, 1, 9):
        call = Call("failing", [Input("INPUT0", "INT64", np.array([index], np.int64))])
        if index == 9:
            refusal(carrier, call)
        else:
            infer(carrier, call)
    (counted,) = known(HttpDoor(http).statistics("failing"))["model_stats"]
    found = scrape(http_metrics)
    labels = '{model="failing",version="1"}'
    assert found[f"nv_inference_request_success{labels}"] == counted["inference_stats"]["success"]["count"]
    assert found[f"nv_inference_count{labels}"] == counted["inference_count"]
    assert found[f"nv_inference_exec_count{labels}"] == counted["execution_count"]
    failures = [
        value for name, value in found.items() if name.startswith('nv_inference_request_failure{model="failing"')
    ]
    assert sum(failures) == counted["inference_stats"]["fail"]["count"]
    assert found['nv_inference_request_failure{model="failing",reason="BACKEND",version="1"}'] >= 1


@clause("metrics.machine", "metrics.process")
def test_the_machine_and_the_process_are_told(http_metrics: HttpClient) -> None:
    found = scrape(http_metrics)
    assert 0 <= found["nv_cpu_utilization"] <= 1
    assert 0 < found["nv_cpu_memory_used_bytes"] < found["nv_cpu_memory_total_bytes"]
    assert found["process_resident_memory_bytes"] > 0
    assert 0 < found["process_open_fds"] <= found["process_max_fds"]
    assert found["process_cpu_seconds_total"] <= scrape(http_metrics)["process_cpu_seconds_total"]
