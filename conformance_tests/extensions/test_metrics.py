"""Counts as Prometheus text, on a port of their own."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conformance_tests.carriers import Call, HttpBinary, Input, infer, refusal, simple
from conformance_tests.clause_table import clause
from conformance_tests.doors import HttpDoor, known
from conformance_tests.grpc_wire import GrpcClient, pb
from conformance_tests.http_wire import HttpClient
from conformance_tests.models.ensembles import Step, ensemble
from conformance_tests.server import HANDLERS, SAMPLES, StartServer
from conformance_tests.tensors import pack

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
ON_GPU = re.compile(r'gpu_uuid="[^"]*",model=')
SERIES = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*",?)*)\})? (\S+)')


def scrape(http: HttpClient) -> dict[str, float]:
    """Every series by its name and labels as printed; every line must be one, or a comment.

    Of a model on GPUs, those of each of them together, without that label.
    """
    found = {}
    for line in http.get("/metrics").body.decode().splitlines():
        if not line.startswith("#"):
            match = SERIES.fullmatch(line)
            assert match, line
            assert line.rpartition(" ")[0] not in found, f"twice: {line}"
            found[line.rpartition(" ")[0]] = float(match[3])
    whole: dict[str, float] = {}
    for name, value in found.items():
        name = ON_GPU.sub("model=", name)
        whole[name] = whole.get(name, 0) + value
    return whole


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


QUANTILES = ("0.5", "0.9", "0.95", "0.99", "0.999")


@clause("metrics.summaries", "ensemble.compute")
@pytest.mark.over("http")
def test_summaries_are_of_the_same_durations_as_the_statistics(process: StartServer, tmp_path: Path) -> None:
    once = Step("simple", {"INPUT0": "INPUT0", "INPUT1": "INPUT1"}, {"OUTPUT0": "INNER0", "OUTPUT1": "INNER1"})
    again = Step("simple", {"INPUT0": "INNER0", "INPUT1": "INNER1"}, {"OUTPUT0": "OUTPUT0", "OUTPUT1": "OUTPUT1"})
    given, made = (dict.fromkeys(names, "TYPE_INT32 16") for names in (("INPUT0", "INPUT1"), ("OUTPUT0", "OUTPUT1")))
    kept = "max_batch_size: 8 response_cache { enable: true }"
    ensemble("twice", given, made, [once, again], kept).write(tmp_path / "models")
    options = ("--metrics-config", "summary_latencies=true", "--cache-config", "local,size=1000000")
    server = process([SAMPLES, tmp_path / "models"], *options)
    http = HttpClient(server.http)
    for _ in range(2):  # a miss, and a hit
        infer(HttpBinary(http), replace(simple(rows=2), model="twice"))
    found = scrape(HttpClient(server.metrics))
    told = known(HttpDoor(http).statistics("twice"))["model_stats"][0]["inference_stats"]
    labels = 'model="twice",version="1"'
    assert f"nv_inference_request_summary_us_count{{{labels}}}" not in found  # of a model that caches, as Triton
    for family, name, count in (
        ("nv_inference_queue_summary_us", "queue", 2),
        ("nv_inference_compute_input_summary_us", "compute_input", 1),
        ("nv_inference_compute_infer_summary_us", "compute_infer", 1),
        ("nv_inference_compute_output_summary_us", "compute_output", 1),
        ("nv_cache_hit_summary_per_model", "cache_hit", 1),
        ("nv_cache_miss_summary_per_model", "cache_miss", 1),
    ):
        assert found[f"{family}_count{{{labels}}}"] == told[name]["count"] == count, family
        assert found[f"{family}_sum{{{labels}}}"] == told[name]["ns"] // 1000, family
        quantiles = [found[f'{family}{{{labels},quantile="{quantile}"}}'] for quantile in QUANTILES]
        if count == 1:  # all quantiles of a single value are that
            assert quantiles == [told[name]["ns"] // 1000] * len(QUANTILES), family


@clause("metrics.first_response")
@pytest.mark.over("http")
def test_the_first_response_of_many_is_the_one_that_counts(process: StartServer) -> None:
    server = process([HANDLERS], "--metrics-config", "histogram_latencies=true")
    given = np.array([b'{"count": 4, "seconds": 0.2}'], np.object_)
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="BYTES", shape=[1])
    asked = pb.ModelInferRequest(model_name="job_stream", inputs=[tensor], raw_input_contents=[pack("BYTES", given)])
    assert len(list(GrpcClient(server.grpc).stub.ModelStreamInfer(iter([asked])))) >= 4
    found = scrape(HttpClient(server.metrics))
    labels = 'model="job_stream",version="1"'
    assert found[f"nv_inference_first_response_histogram_ms_count{{{labels}}}"] == 1
    assert 200 <= found[f"nv_inference_first_response_histogram_ms_sum{{{labels}}}"] < 800  # when the last one came
    assert found[f'nv_inference_first_response_histogram_ms_bucket{{{labels},le="+Inf"}}'] == 1


@clause("metrics.machine", "metrics.process")
def test_the_machine_and_the_process_are_told(http_metrics: HttpClient) -> None:
    found = scrape(http_metrics)
    assert 0 <= found["nv_cpu_utilization"] <= 1
    assert 0 < found["nv_cpu_memory_used_bytes"] < found["nv_cpu_memory_total_bytes"]
    assert found["process_resident_memory_bytes"] > 0
    assert 0 < found["process_open_fds"] <= found["process_max_fds"]
    assert found["process_cpu_seconds_total"] <= scrape(http_metrics)["process_cpu_seconds_total"]
