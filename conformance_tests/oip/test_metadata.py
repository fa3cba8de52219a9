"""What server and models say about themselves."""

from typing import Any

import pytest

from conformance_tests.carriers import Refusal
from conformance_tests.clause_table import clause
from conformance_tests.doors import Door, GrpcDoor, HttpDoor, known
from conformance_tests.grpc_wire import GrpcClient
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.server import Target
from conformance_tests.tensors import DATATYPES

needs = pytest.mark.needs
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


def io(name: str, datatype: str, *shape: int) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


@clause("metadata.server")
def test_the_server_tells_name_version_and_extensions(door: Door) -> None:
    document = door.server()
    assert {"name", "version", "extensions"} <= {*document}
    assert document["name"]
    assert document["version"]
    assert all(isinstance(extension, str) for extension in document["extensions"])


@clause("metadata.extensions")
def test_extensions_are_known_ones_in_order(door: Door) -> None:
    extensions = door.server()["extensions"]
    assert extensions == [name for name in EXTENSIONS if name in extensions]
    assert {"classification", "model_configuration", "binary_tensor_data", "parameters"} <= {*extensions}


@clause("metadata.trailing_slash")
def test_server_metadata_may_end_in_a_slash(http: HttpClient) -> None:
    assert http.get("/v2/").json() == http.get("/v2").json()


@clause("metadata.model")
@needs("simple")
def test_a_model_tells_its_name_versions_and_platform(door: Door) -> None:
    document = known(door.metadata("simple"))
    assert (document["name"], document["versions"]) == ("simple", ["1"])
    assert document["platform"]


@clause("metadata.platform")
@needs("simple")
def test_the_platform_is_tritons_name_for_it(door: Door) -> None:
    assert known(door.metadata("simple"))["platform"] == "onnxruntime_onnx"


@clause("metadata.batch_axis")
@needs("simple")
def test_a_batching_model_shows_its_batch_axis(door: Door) -> None:
    document = known(door.metadata("simple"))
    assert document["inputs"] == [io("INPUT0", "INT32", -1, 16), io("INPUT1", "INT32", -1, 16)]
    assert document["outputs"] == [io("OUTPUT0", "INT32", -1, 16), io("OUTPUT1", "INT32", -1, 16)]


@clause("metadata.layout")
def test_server_metadata_are_compact_json_in_the_protocols_order(http: HttpClient) -> None:
    answer = http.get("/v2")
    assert [*answer.json()] == ["name", "version", "extensions"]
    assert answer.body == encode(answer.json())


@clause("metadata.layout")
@needs("simple")
def test_metadata_is_compact_json_in_the_protocols_order(http: HttpClient) -> None:
    assert http.get("/v2/models/simple").body.startswith(
        b'{"name":"simple","versions":["1"],"platform":"onnxruntime_onnx",'
        b'"inputs":[{"name":"INPUT0","datatype":"INT32","shape":[-1,16]},'
        b'{"name":"INPUT1","datatype":"INT32","shape":[-1,16]}],'
        b'"outputs":[{"name":"OUTPUT0","datatype":"INT32","shape":[-1,16]},'
        b'{"name":"OUTPUT1","datatype":"INT32","shape":[-1,16]}]'
    )


@clause("metadata.device")
@needs("simple")
def test_metadata_names_the_device_that_runs_the_model(http: HttpClient) -> None:
    assert http.get("/v2/models/simple").json()["parameters"]["device"].partition(":")[0] in ("cpu", "cuda")


@clause("metadata.model", "metadata.free_axes")
@pytest.mark.parametrize(
    ("model", "inputs", "outputs"),
    [
        (
            "matmul",
            [io("a", "FP32", -1, -1), io("b", "FP32", -1, -1)],
            [io("product", "FP32", -1, -1)],
        ),
        ("digits", [io("image", "FP32", -1, 1, 8, 8)], [io("probabilities", "FP32", -1, 10)]),
        (
            "sentiment",
            [io("text", "BYTES", -1, 1)],
            [io("label", "INT64", -1, 1), io("probabilities", "FP32", -1, 2)],
        ),
        ("fixed_shape", [io("INPUT0", "FP32", 2, 3)], [io("OUTPUT0", "FP32", 2, 3)]),
        (
            "two_inputs_mixed",
            [io("INPUT0", "FP32", -1), io("INPUT1", "BYTES", -1)],
            [io("OUTPUT0", "FP32", -1), io("OUTPUT1", "BYTES", -1)],
        ),
        ("optional_input", [io("INPUT0", "FP32", -1), io("BIAS", "FP32", 1)], [io("OUTPUT0", "FP32", -1)]),
        ("batched_identity_fp32", [io("INPUT0", "FP32", -1, 4)], [io("OUTPUT0", "FP32", -1, 4)]),
    ],
)
def test_a_model_shows_names_datatypes_and_shapes(
    door: Door, target: Target, model: str, inputs: object, outputs: object
) -> None:
    target.require(model)
    document = known(door.metadata(model))
    assert (document["inputs"], document["outputs"]) == (inputs, outputs)


@pytest.mark.parametrize(
    "datatype",
    [
        pytest.param(name, marks=clause("datatypes.bf16" if name == "BF16" else "metadata.datatypes"))
        for name in DATATYPES
    ],
)
def test_each_datatype_goes_by_its_name(door: Door, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    document = known(door.metadata(model))
    assert document["inputs"] == [io("INPUT0", datatype, -1, -1)]
    assert document["outputs"] == [io("OUTPUT0", datatype, -1, -1)]


@clause("metadata.scalar")
@needs("identity_scalar_fp32")
def test_a_scalar_has_the_shape_that_the_file_gives_it(door: Door) -> None:
    document = known(door.metadata("identity_scalar_fp32"))
    assert document["inputs"] == [io("INPUT0", "FP32")]


@clause("metadata.zipmap")
@needs("string_classes")
def test_a_sequence_of_maps_is_shown_as_rows_of_labels(door: Door) -> None:
    document = known(door.metadata("string_classes"))
    assert document["outputs"] == [io("OUTPUT0", "FP32", -1, 2)]


@clause("metadata.versions", "lifecycle.version_policy")
@pytest.mark.parametrize(
    ("model", "versions"),
    [
        ("times_version", ["1", "2"]),
        ("latest_version", ["10"]),
        ("latest_two", ["2", "3"]),
        ("specific_versions", ["1", "3"]),
    ],
)
def test_ready_versions_are_listed_ascending(door: Door, target: Target, model: str, versions: list[str]) -> None:
    target.require(model)
    assert known(door.metadata(model))["versions"] == versions


@clause("metadata.versions")
@needs("times_version")
def test_a_version_asked_for_is_the_one_listed(door: Door) -> None:
    assert known(door.metadata("times_version", "1"))["versions"] == ["1"]


@clause("errors.unknown_model")
def test_an_unknown_model_has_no_metadata(door: Door) -> None:
    assert isinstance(door.metadata("nope"), Refusal)


@clause("errors.unknown_version")
@needs("simple")
def test_an_unknown_version_has_no_metadata(door: Door) -> None:
    assert isinstance(door.metadata("simple", "9"), Refusal)


@clause("error_texts.unknown_model")
def test_an_unknown_model_has_neither_metadata_nor_configuration(door: Door) -> None:
    refusal = Refusal("NOT_FOUND", "Request for unknown model: 'nope' is not found")
    assert door.metadata("nope") == refusal
    assert door.config("nope") == refusal


@clause("error_texts.unknown_version")
@needs("simple")
def test_an_unknown_version_has_neither_metadata_nor_configuration(door: Door) -> None:
    refusal = Refusal("NOT_FOUND", "Request for unknown model: 'simple' version 9 is not found")
    assert door.metadata("simple", "9") == refusal
    assert door.config("simple", "9") == refusal


SIMPLE_INPUT = {
    "data_type": "TYPE_INT32",
    "format": "FORMAT_NONE",
    "dims": [16],
    "is_shape_tensor": False,
    "allow_ragged_batch": False,
    "optional": False,
    "is_non_linear_format_io": False,
}
SIMPLE_OUTPUT = {
    "data_type": "TYPE_INT32",
    "dims": [16],
    "label_filename": "",
    "is_shape_tensor": False,
    "is_non_linear_format_io": False,
}
# Of the model `simple`; kind, count and GPUs of its instances are the machine's to decide.
SIMPLE_CONFIG = {
    "name": "simple",
    "platform": "onnxruntime_onnx",
    "backend": "onnxruntime",
    "runtime": "",
    "version_policy": {"latest": {"num_versions": 1}},
    "max_batch_size": 8,
    "input": [{"name": "INPUT0"} | SIMPLE_INPUT, {"name": "INPUT1"} | SIMPLE_INPUT],
    "output": [{"name": "OUTPUT0"} | SIMPLE_OUTPUT, {"name": "OUTPUT1"} | SIMPLE_OUTPUT],
    "batch_input": [],
    "batch_output": [],
    "optimization": {
        "priority": "PRIORITY_DEFAULT",
        "input_pinned_memory": {"enable": True},
        "output_pinned_memory": {"enable": True},
        "gather_kernel_buffer_threshold": 0,
        "eager_batching": False,
    },
    "instance_group": [],
    "default_model_filename": "model.onnx",
    "cc_model_filenames": {},
    "metric_tags": {},
    "parameters": {},
    "model_warmup": [],
}
INSTANCE_GROUP = ["name", "kind", "count", "gpus", "secondary_devices", "profile", "passive", "host_policy"]


def without_instances(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"instance_group": []}


@clause("config.shape")
@needs("simple")
def test_the_configuration_is_printed_whole(http: HttpClient) -> None:
    assert without_instances(known(HttpDoor(http).config("simple"))) == SIMPLE_CONFIG


@clause("config.key_order")
@needs("simple")
def test_keys_of_the_configuration_come_in_the_schemas_order(http: HttpClient) -> None:
    config = known(HttpDoor(http).config("simple"))
    assert [*config] == [*SIMPLE_CONFIG]
    assert [*config["input"][0]] == ["name", *SIMPLE_INPUT]
    assert [*config["output"][0]] == ["name", *SIMPLE_OUTPUT]
    assert [*config["instance_group"][0]] == INSTANCE_GROUP


@clause("config.same_over_grpc")
@pytest.mark.parametrize("model", ["simple", "digits", "sentiment", "times_version", "matmul", "iris"])
def test_both_protocols_tell_the_same_configuration(target: Target, grpc: GrpcClient, model: str) -> None:
    target.require(model)
    assert GrpcDoor(grpc).config(model) == HttpDoor(HttpClient(target.http)).config(model)


@clause("config.instance_group")
@needs("simple")
def test_instances_have_a_resolved_kind_and_a_count(door: Door) -> None:
    (group,) = known(door.config("simple"))["instance_group"]
    assert group["name"] == "simple"
    assert group["kind"] in ("KIND_CPU", "KIND_GPU")
    assert group["count"] >= 1
    assert bool(group["gpus"]) == (group["kind"] == "KIND_GPU")


@clause("config.completed", "config.version_policy")
@needs("matmul")
def test_a_configuration_is_completed_from_the_file(door: Door) -> None:
    config = known(door.config("matmul"))
    assert [(entry["name"], entry["data_type"], entry["dims"]) for entry in config["input"]] == [
        ("a", "TYPE_FP32", [-1, -1]),
        ("b", "TYPE_FP32", [-1, -1]),
    ]
    assert [(entry["name"], entry["dims"]) for entry in config["output"]] == [("product", [-1, -1])]
    assert (config["platform"], config["backend"]) == ("onnxruntime_onnx", "onnxruntime")
    assert config["default_model_filename"] == "model.onnx"
    assert config["version_policy"] == {"latest": {"num_versions": 1}}


@clause("config.version_policy")
@pytest.mark.parametrize(
    ("model", "policy"),
    [
        ("times_version", {"all": {}}),
        ("latest_two", {"latest": {"num_versions": 2}}),
        ("specific_versions", {"specific": {"versions": [1, 3, 4]}}),
    ],
)
def test_the_version_policy_is_shown(door: Door, target: Target, model: str, policy: dict[str, object]) -> None:
    target.require(model)
    assert known(door.config(model))["version_policy"] == policy


@clause("config.dynamic_batching")
@needs("digits")
def test_dynamic_batching_prefers_the_greatest_batch_where_nothing_is_said(door: Door) -> None:
    assert known(door.config("digits"))["dynamic_batching"]["preferred_batch_size"] == [64]


@clause("config.batch_axis_rule")
@needs("batched_identity_fp32")
def test_an_axis_named_as_a_batch_is_one(door: Door) -> None:
    config = known(door.config("batched_identity_fp32"))
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (64, [4])
    assert "dynamic_batching" in config


@clause("config.batch_axis_rule")
@pytest.mark.parametrize(
    "model", ["matmul", "identity_fp32", "fixed_shape", "identity_1d_int64", "identity_scalar_fp32"]
)
def test_an_axis_of_another_name_is_no_batch(door: Door, target: Target, model: str) -> None:
    target.require(model)
    config = known(door.config(model))
    assert config["max_batch_size"] == 0
    assert "dynamic_batching" not in config


@clause("config.version")
@needs("times_version")
def test_the_configuration_of_a_version_is_told(door: Door) -> None:
    assert known(door.config("times_version", "1"))["name"] == "times_version"
