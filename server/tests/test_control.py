"""Control methods answer in the protocol's JSON shape, and the table names each of them once."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import penstock
import pytest
from penstock import pb
from penstock.auth import Category
from penstock.control import EXTENSIONS, METHODS, Fields, Method
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.settings import Settings
from penstock.statistics import Execution

from .fakes import LIMIT_S, Answers, FakeRuntime, request

ROWS = {method.rpc: method for method in METHODS}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Serves m in versions 1 and 2, and n whose version failed."""
    for name, text in (("m/1", "scale 1"), ("m/2", "scale 2"), ("n/1", "broken")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.onnx").write_text(text)
    (tmp_path / "m" / "config.pbtxt").write_text("version_policy { all { } } max_batch_size: 4")
    made = Engine(
        Settings(model_repository=(str(tmp_path),), device="cpu", strict_readiness=False, id="host-1"),
        FakeRuntime().find,
    )
    made.lifecycle.start()
    yield made
    assert made.lifecycle.stop(LIMIT_S)


def call(engine: Engine, rpc: str, **fields: str) -> Any:
    return ROWS[rpc].call(engine, fields)


def refused(engine: Engine, rpc: str, **fields: str) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        call(engine, rpc, **fields)
    return caught.value.kind, caught.value.message


def test_every_method_is_one_of_the_protocol_and_no_path_is_named_twice() -> None:
    service = pb.POOL.FindServiceByName("inference.GRPCInferenceService")
    assert set(ROWS) <= set(service.methods_by_name)
    assert len(ROWS) == len(METHODS)
    paths = [path for method in METHODS for path in method.http]
    assert len(set(paths)) == len(paths)


def test_methods_are_in_tritons_categories_and_only_the_servers_own_health_needs_no_key() -> None:
    assert {rpc: method.category for rpc, method in ROWS.items()}.items() >= {
        "ServerLive": Category.HEALTH,
        "ServerReady": Category.HEALTH,
        "ModelReady": Category.HEALTH,
        "ServerMetadata": Category.METADATA,
        "ModelMetadata": Category.METADATA,
        "ModelConfig": Category.MODEL_CONFIG,
        "ModelStatistics": Category.STATISTICS,
    }.items()
    assert {rpc for rpc, method in ROWS.items() if method.keyless} == {"ServerLive", "ServerReady"}


@pytest.mark.parametrize("method", METHODS, ids=list(ROWS))
def test_paths_use_only_fields_that_requests_have(method: Method) -> None:
    for _, path in method.http:
        assert set(re.findall(r"{(\w+)}", path)) <= {"name", "version"}


def test_a_server_that_serves_is_live_and_ready(engine: Engine) -> None:
    assert (call(engine, "ServerLive"), call(engine, "ServerReady")) == ({"live": True}, {"ready": True})


def test_health_over_http_is_a_status() -> None:
    starting = Engine(Settings(), FakeRuntime().find)
    for rpc, key in (("ServerLive", "live"), ("ServerReady", "ready")):
        shape = ROWS[rpc].http_shape
        assert shape is not None
        assert shape(call(starting, rpc)) == (400, {key: False})
        assert shape({key: True}) == (200, {key: True})


@pytest.mark.parametrize("version", ["", "1", "2"])
def test_a_model_that_serves_is_ready(engine: Engine, version: str) -> None:
    assert call(engine, "ModelReady", name="m", version=version) == {"name": "m", "ready": True}


def test_a_model_that_does_not_serve_says_why(engine: Engine) -> None:
    subject = "Request for unknown model: "
    assert refused(engine, "ModelReady", name="x") == (Kind.NOT_FOUND, f"{subject}'x' is not found")
    assert refused(engine, "ModelReady", name="m", version="9") == (
        Kind.NOT_FOUND,
        f"{subject}'m' version 9 is not found",
    )
    assert refused(engine, "ModelReady", name="n", version="1") == (
        Kind.UNAVAILABLE,
        f"{subject}'n' version 1 is not at ready state",
    )


def test_the_server_names_itself_and_what_it_can_do(engine: Engine) -> None:
    assert call(engine, "ServerMetadata") == {
        "name": "host-1",
        "version": penstock.__version__,
        "extensions": list(EXTENSIONS),
    }


def test_extensions_are_the_protocols_in_its_order() -> None:
    known = (
        "classification", "sequence", "model_repository", "model_repository(unload_dependents)", "schedule_policy",
        "model_configuration", "system_shared_memory", "cuda_shared_memory", "binary_tensor_data", "parameters",
        "statistics", "trace", "logging",
    )  # fmt: skip
    assert [name for name in known if name in EXTENSIONS] == list(EXTENSIONS)


@pytest.mark.parametrize(("version", "versions"), [("", ["1", "2"]), ("1", ["1"])])
def test_metadata_shows_the_tensors_with_the_batch_axis(engine: Engine, version: str, versions: list[str]) -> None:
    assert call(engine, "ModelMetadata", name="m", version=version) == {
        "name": "m",
        "versions": versions,
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, -1]}],
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [-1, -1]}],
        "parameters": {"device": "cpu"},
    }


def test_the_configuration_is_the_completed_one_in_both_shapes(engine: Engine) -> None:
    config = call(engine, "ModelConfig", name="m")
    http, grpc = ROWS["ModelConfig"].http_shape, ROWS["ModelConfig"].grpc_shape
    assert http is not None
    assert grpc is not None
    status, shown = http(config)
    assert (status, shown["name"], shown["max_batch_size"], shown["backend"]) == (200, "m", 4, "onnxruntime")
    assert [entry["name"] for entry in shown["input"]] == ["X"]
    assert grpc(config).config.name == "m"


def names(answer: Fields) -> list[tuple[str, str]]:
    return [(entry["name"], entry["version"]) for entry in answer["model_stats"]]


def test_statistics_are_of_all_of_one_model_or_of_one_version(engine: Engine) -> None:
    assert names(call(engine, "ModelStatistics")) == [("m", "1"), ("m", "2")]
    assert names(call(engine, "ModelStatistics", name="m")) == [("m", "1"), ("m", "2")]
    assert names(call(engine, "ModelStatistics", name="m", version="2")) == [("m", "2")]
    assert names(call(engine, "ModelStatistics", name="m", version="02")) == [("m", "2")]


def test_statistics_of_what_does_not_serve_are_refused(engine: Engine) -> None:
    for name in ("x", "n"):
        assert refused(engine, "ModelStatistics", name=name) == (
            Kind.INVALID,
            f"requested model '{name}' is not available",
        )
    assert refused(engine, "ModelStatistics", name="m", version="3") == (
        Kind.INVALID,
        "requested model version is not available for model 'm'",
    )
    assert refused(engine, "ModelStatistics", name="m", version="x")[0] is Kind.INVALID


def test_statistics_show_what_was_counted(engine: Engine) -> None:
    for rows in (1, 1, 2):
        sent = request(1)
        sent.rows = rows
        engine.submit(engine.model("m", "1"), sent, answers := Answers())
        answers.one()
    [entry] = call(engine, "ModelStatistics", name="m", version="1")["model_stats"]
    assert list(entry) == [
        "name", "version", "last_inference", "inference_count", "execution_count", "inference_stats",
        "response_stats", "batch_stats", "memory_usage",
    ]  # fmt: skip
    assert (entry["inference_count"], entry["execution_count"]) == (4, 3)
    assert list(entry["inference_stats"]) == [
        "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
    ]  # fmt: skip
    assert entry["inference_stats"]["success"]["count"] == 3
    assert entry["inference_stats"]["fail"] == {"count": 0, "ns": 0}
    assert [(batch["batch_size"], batch["compute_infer"]["count"]) for batch in entry["batch_stats"]] == [
        (1, 2),
        (2, 1),
    ]


def test_every_duration_is_shown_under_its_name(engine: Engine) -> None:
    counts = engine.model("m", "1").statistics
    counts.executed([900], 3, Execution(10, 100, 40, 1000, 1150))
    counts.executed([900], 2, Execution(10, 100, 40, 1000, 1150))
    counts.failed("OTHER", 7)
    counts.hit(lookup_ns=3, queue_ns=2)
    counts.responded(1, 8, "fail", 108)
    counts.responded(0, 9, "success", 109)
    [entry] = call(engine, "ModelStatistics", name="m", version="1")["model_stats"]
    shown = {name: (duration["count"], duration["ns"]) for name, duration in entry["inference_stats"].items()}
    shown.pop("cache_miss")
    assert shown == {
        "success": (3, 505), "fail": (1, 7), "queue": (3, 202), "compute_input": (2, 20), "compute_infer": (2, 200),
        "compute_output": (2, 80), "cache_hit": (1, 3),
    }  # fmt: skip
    phases = {
        "compute_input": {"count": 1, "ns": 10},
        "compute_infer": {"count": 1, "ns": 100},
        "compute_output": {"count": 1, "ns": 40},
    }
    assert entry["batch_stats"] == [{"batch_size": 2} | phases, {"batch_size": 3} | phases]
    assert list(entry["response_stats"]) == ["0", "1"]
    names = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")
    assert [list(entry["response_stats"][place]) for place in "01"] == [list(names)] * 2
    of = {place: [entry["response_stats"][place][name]["count"] for name in names] for place in "01"}
    assert of == {"0": [1, 1, 1, 0, 0, 0], "1": [1, 0, 0, 1, 0, 0]}


def test_a_server_on_its_way_out_tells_nothing_of_its_models(engine: Engine) -> None:
    assert engine.lifecycle.stop(LIMIT_S)
    for rpc in ("ModelReady", "ModelMetadata", "ModelConfig"):
        assert refused(engine, rpc, name="m") == (Kind.UNAVAILABLE, "Server not ready")
    assert refused(engine, "ModelStatistics") == (Kind.UNAVAILABLE, "Server not ready")
    for rpc in ("ServerLive", "ServerReady"):
        assert refused(engine, rpc) == (Kind.UNAVAILABLE, "Server exiting")
