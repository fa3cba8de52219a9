"""Configurations are read, completed, checked and compiled as the protocol says."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.model_config import (
    FIELDS,
    BatchPolicy,
    Control,
    InstanceGroup,
    Padding,
    QueuePolicy,
    RateLimit,
    Resource,
    SequencePolicy,
    State,
    Support,
    TensorSpec,
    batch_policy,
    controls,
    identify,
    instance_groups,
    markdown,
    normalise,
    read,
    read_json,
    read_text,
    refuse_unsupported,
    sequence_policy,
    sequence_tensors,
    signature,
    states,
    to_json,
    validate,
)
from penstock.tensor import DATATYPES

SIMPLE = """
    name: "simple" platform: "onnxruntime_onnx" version_policy { latest { num_versions: 1 } } max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_INT32 dims: 16 } input { name: "INPUT1" data_type: TYPE_INT32 dims: 16 }
    output { name: "OUTPUT0" data_type: TYPE_INT32 dims: 16 } output { name: "OUTPUT1" data_type: TYPE_INT32 dims: 16 }
    instance_group { name: "simple" count: 2 kind: KIND_CPU } default_model_filename: "model.onnx"
    optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } } backend: "onnxruntime"
"""
# As a running Triton answers for it.
SIMPLE_JSON = (
    b'{"name":"simple","platform":"onnxruntime_onnx","backend":"onnxruntime","runtime":"","version_policy":{"latest":'
    b'{"num_versions":1}},"max_batch_size":8,"input":[{"name":"INPUT0","data_type":"TYPE_INT32","format":"FORMAT_NONE",'
    b'"dims":[16],"is_shape_tensor":false,"allow_ragged_batch":false,"optional":false,"is_non_linear_format_io":false},'
    b'{"name":"INPUT1","data_type":"TYPE_INT32","format":"FORMAT_NONE","dims":[16],"is_shape_tensor":false,'
    b'"allow_ragged_batch":false,"optional":false,"is_non_linear_format_io":false}],"output":[{"name":"OUTPUT0",'
    b'"data_type":"TYPE_INT32","dims":[16],"label_filename":"","is_shape_tensor":false,"is_non_linear_format_io":false}'
    b',{"name":"OUTPUT1","data_type":"TYPE_INT32","dims":[16],"label_filename":"","is_shape_tensor":false,'
    b'"is_non_linear_format_io":false}],"batch_input":[],"batch_output":[],"optimization":{"priority":'
    b'"PRIORITY_DEFAULT","input_pinned_memory":{"enable":true},"output_pinned_memory":{"enable":true},'
    b'"gather_kernel_buffer_threshold":0,"eager_batching":false},"instance_group":[{"name":"simple","kind":"KIND_CPU",'
    b'"count":2,"gpus":[],"secondary_devices":[],"profile":[],"passive":false,"host_policy":""}],'
    b'"default_model_filename":"model.onnx","cc_model_filenames":{},"metric_tags":{},"parameters":{},"model_warmup":[]}'
)


def parsed(text: str) -> pb.ModelConfig:
    return read_text(text, "config.pbtxt")


# --- reading


TWO_INPUTS = pb.ModelConfig(input=[pb.ModelInput(name="x", dims=[3, -1]), pb.ModelInput(name="y")])
TWO_PARAMETERS = pb.ModelConfig(
    parameters={"k": pb.ModelParameter(string_value="v"), "l": pb.ModelParameter(string_value="w")}
)


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("max_batch_size: 4 # rows\n# a comment", pb.ModelConfig(max_batch_size=4)),
        ("max_batch_size: 4;", pb.ModelConfig(max_batch_size=4)),
        ("input [ { name: 'x' dims: [ 3, -1 ] }, { name: 'y' } ]", TWO_INPUTS),
        ("input { name: 'x', dims: 3, dims: -1 } input: { name: 'y' }", TWO_INPUTS),
        ("name: \"long\" ' name'", pb.ModelConfig(name="long name")),
        ("input { data_type: TYPE_FP32 }", pb.ModelConfig(input=[pb.ModelInput(data_type=pb.TYPE_FP32)])),
        (
            "parameters { key: 'k' value: { string_value: 'v' } } parameters { key: 'l' value { string_value: 'w' } }",
            TWO_PARAMETERS,
        ),
        (
            "parameters [ { key: 'k' value: { string_value: 'v' } }, { key: 'l' value: { string_value: 'w' } } ]",
            TWO_PARAMETERS,
        ),
        ("dynamic_batching { }", pb.ModelConfig(dynamic_batching=pb.ModelDynamicBatching())),
    ],
)
def test_every_feature_of_the_text_format_is_read(text: str, config: pb.ModelConfig) -> None:
    assert parsed(text) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch: 1", r"line 1, column 1: .*no field named \"max_batch\""),
        ("\n  max_batch_size: x", r"line 2, column 19: .*x"),
        ("input { dims: 1", r"line 1, column \d+: .*"),
        ("input { data_type: TYPE_FP33 }", r"line 1, column 20: .*TYPE_FP33"),
    ],
)
def test_a_mistake_in_the_text_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ServingError, match=rf"^failed to read text proto from config.pbtxt: {message}") as caught:
        parsed(text)
    assert caught.value.kind is Kind.INVALID


def test_a_file_is_read_by_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 2")
    (tmp_path / "config.json").write_text('{"max_batch_size": 2}')
    assert read(tmp_path / "config.pbtxt") == read(tmp_path / "config.json") == pb.ModelConfig(max_batch_size=2)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.pbtxt").write_bytes(b"name: '\xe9'")
    for name in ("latin.pbtxt", "absent.pbtxt"):
        with pytest.raises(ServingError, match=rf"^failed to read text proto from {tmp_path / name}: ") as caught:
            read(tmp_path / name)
        assert caught.value.kind is Kind.INVALID


@pytest.mark.parametrize(
    "text",
    [
        '{"max_batch_size": 4, "instance_group": [{"kind": "KIND_CPU"}], '
        '"version_policy": {"specific": {"versions": [3]}}}',
        '{"maxBatchSize": 4.0, "instanceGroup": [{"kind": "kind_cpu"}], '
        '"versionPolicy": {"specific": {"versions": ["3"]}}}',
        '{"max_batch_size": "4", "instance_group": [{"kind": 2}], "versionPolicy": {"specific": {"versions": [3.0]}}}',
    ],
)
def test_json_may_be_written_in_several_ways(text: str) -> None:
    expected = pb.ModelConfig(max_batch_size=4, instance_group=[pb.ModelInstanceGroup(kind="KIND_CPU")])
    expected.version_policy.specific.versions.append(3)
    assert read_json(text, "request") == read_json(text.encode(), "request") == expected


def test_only_enums_of_json_are_read_in_any_case() -> None:
    text = """{
        "input": [{"name": "x", "data_type": "type_fp32"}],
        "model_warmup": [{"inputs": {"x": {"dataType": "type_bool"}}}]
    }"""
    config = read_json(text, "request")
    assert config.input[0] == pb.ModelInput(name="x", data_type=pb.TYPE_FP32)
    assert config.model_warmup[0].inputs["x"].data_type == pb.TYPE_BOOL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "name": }', "line 2, column 10: Expecting value"),
        ("[]", "expected an object, got list"),
        ('{"input": [{"nam": "x"}]}', '.*no field named "nam" at "ModelConfig.input[0]"'),
        ('{"max_batch_size": 1.5}', ".*max_batch_size.*1.5"),
        ('{"max_batch_size": true}', ".*max_batch_size.*"),
        ('{"max_batch_size": 3000000000}', ".*max_batch_size.*"),
        ('{"input": [{"data_type": "TYPE_FP33"}]}', ".*TYPE_FP33.*"),
        ('{"name": "a", "name": "b"}', "field 'name' is given more than once"),
        ("[" * 100_000, ".*recursion.*"),
    ],
)
def test_a_mistake_in_json_is_named(text: str, message: str) -> None:
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ServingError, match=f"^failed to read JSON configuration from request: {pattern}") as caught:
        read_json(text, "request")
    assert caught.value.kind is Kind.INVALID
    assert "\n" not in caught.value.message


# --- writing


def test_the_json_form_is_triton_s_to_the_byte() -> None:
    assert orjson.dumps(to_json(parsed(SIMPLE))) == SIMPLE_JSON


def test_the_json_form_reads_back_as_the_same_configuration() -> None:
    config = parsed(SIMPLE)
    config.parameters["k"].string_value = "v"
    config.metric_tags["b"] = "2"
    config.dynamic_batching.priority_queue_policy[10].max_queue_size = 2**32 - 1
    config.dynamic_batching.priority_queue_policy[9].default_timeout_microseconds = 2**63
    config.model_warmup.add().inputs["x"].zero_data = False
    form = to_json(config)
    assert list(form["dynamic_batching"]["priority_queue_policy"]) == ["9", "10"]
    assert form["dynamic_batching"]["priority_queue_policy"]["9"]["default_timeout_microseconds"] == 2**63
    assert form["model_warmup"][0]["inputs"]["x"] == {"data_type": "TYPE_INVALID", "dims": [], "zero_data": False}
    assert read_json(json.dumps(form), "form") == config


def test_numbers_of_the_json_form_are_the_shortest_that_say_the_value() -> None:
    config = parsed("sequence_batching { control_input { control { fp32_false_true: [0.1, 3, inf, -inf, nan] } } }")
    config.model_metrics.metric_control.add().histogram_options.buckets.extend([0.1, math.inf])
    form = to_json(config)
    control = form["sequence_batching"]["control_input"][0]["control"][0]
    assert control["fp32_false_true"] == [0.1, 3.0, "Infinity", "-Infinity", "NaN"]
    assert form["model_metrics"]["metric_control"][0]["histogram_options"] == {"buckets": [0.1, "Infinity"]}


def test_an_enum_number_without_a_name_stays_a_number() -> None:
    assert to_json(parsed("input { data_type: 99 }"))["input"][0]["data_type"] == 99


# --- completing


@pytest.mark.parametrize(
    ("text", "files", "expected"),
    [
        ("", ["model.onnx"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('platform: "onnxruntime_onnx"', [], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('default_model_filename: "model.onnx"', [], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        (
            'backend: "onnxruntime" default_model_filename: "m.onnx"',
            ["m.onnx"],
            ("onnxruntime", "onnxruntime_onnx", "m.onnx"),
        ),
        ("", ["handler.py"], ("handler", "handler", "handler.py")),
        ("", ["rp_handler.py", "model.bin"], ("handler", "handler", "rp_handler.py")),
        ("", ["rp_handler.py", "handler.py"], ("handler", "handler", "handler.py")),
        ('backend: "handler"', ["rp_handler.py"], ("handler", "handler", "rp_handler.py")),
        ('backend: "handler"', ["src"], ("handler", "handler", "handler.py")),
        ('backend: "handler" default_model_filename: "src/main.py"', [], ("handler", "handler", "src/main.py")),
        ('default_model_filename: "rp_handler.py"', ["handler.py"], ("handler", "handler", "rp_handler.py")),
        ("", ["model.onnx", "handler.py"], ("onnxruntime", "onnxruntime_onnx", "model.onnx")),
        ('backend: "custom"', ["model.onnx"], ("custom", "", "")),
        ('platform: "ensemble"', [], ("", "ensemble", "")),
        ('platform: "other"', ["model.onnx"], ("", "other", "")),
        ('default_model_filename: "net.onnx"', [], ("onnxruntime", "onnxruntime_onnx", "net.onnx")),
    ],
)
def test_the_backend_is_found_from_what_there_is(text: str, files: list[str], expected: tuple[str, str, str]) -> None:
    config = identify(parsed(text), "m", files)
    assert (config.backend, config.platform, config.default_model_filename) == expected
    assert config.name == "m"


def test_a_model_of_no_known_backend_is_refused() -> None:
    with pytest.raises(ServingError) as caught:
        identify(pb.ModelConfig(), "m", ["model.bin"])
    assert caught.value.message == (
        "Invalid model name: Could not determine backend for model 'm' with no backend in model configuration. "
        "Expected model name of the form 'model.<backend_name>'."
    )


def test_a_name_other_than_the_directory_s_is_refused() -> None:
    with pytest.raises(ServingError) as caught:
        identify(parsed('name: "a"'), "b", ["model.onnx"])
    assert caught.value.message == ("unexpected directory name 'b' for model 'a', directory name must equal model name")


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("", [], "version_policy { latest { num_versions: 1 } }"),
        ("version_policy { all {} }", [], "version_policy { all {} }"),
        ("max_batch_size: 4 dynamic_batching {}", [], "dynamic_batching { preferred_batch_size: 4 }"),
        ("dynamic_batching {}", [], "dynamic_batching { }"),
        (
            "max_batch_size: 4 dynamic_batching { preferred_batch_size: 2 }",
            [],
            "dynamic_batching { preferred_batch_size: 2 }",
        ),
        (
            "max_batch_size: 4 sequence_batching { oldest {} }",
            [],
            "sequence_batching { max_sequence_idle_microseconds: 1000000 oldest { preferred_batch_size: 4 } }",
        ),
        (
            "sequence_batching { max_sequence_idle_microseconds: 5 }",
            [],
            "sequence_batching { max_sequence_idle_microseconds: 5 }",
        ),
        (
            "optimization { input_pinned_memory { enable: false } }",
            [],
            "optimization { input_pinned_memory { } output_pinned_memory { enable: true } }",
        ),
        ("", [], 'instance_group { name: "m" kind: KIND_CPU count: 1 }'),
        ('backend: "onnxruntime"', [], 'instance_group { name: "m" kind: KIND_CPU count: 2 }'),
        ('backend: "onnxruntime"', [0, 1], 'instance_group { name: "m" kind: KIND_GPU count: 1 gpus: [0, 1] }'),
        (
            'instance_group [ { }, { name: "x" }, { kind: KIND_MODEL }, { kind: KIND_CPU count: 3 } ]',
            [0],
            'instance_group [ { name: "m_0" kind: KIND_GPU count: 1 gpus: 0 }, '
            '{ name: "x" kind: KIND_GPU count: 1 gpus: 0 }, { name: "m_2" kind: KIND_MODEL count: 1 }, '
            '{ name: "m_3" kind: KIND_CPU count: 3 } ]',
        ),
        (
            "instance_group { gpus: [1, 2] }",
            [0, 1],
            'instance_group { name: "m_0" kind: KIND_CPU count: 1 gpus: [1, 2] }',
        ),
    ],
)
def test_defaults_are_written_out(text: str, gpus: list[int], expected: str) -> None:
    config = pb.ModelConfig(name="m")
    config.MergeFrom(parsed(text))
    before = config.SerializeToString(deterministic=True)
    completed, wanted = normalise(config, gpus), parsed(expected)
    for field, value in wanted.ListFields():
        got = getattr(completed, field.name)
        assert list(got) == list(value) if field.is_repeated else got == value
    assert config.SerializeToString(deterministic=True) == before
    assert normalise(completed, gpus) == completed


def test_an_ensemble_gets_neither_instances_nor_memory() -> None:
    completed = normalise(parsed('name: "m" platform: "ensemble"'), gpus=[0])
    assert completed == parsed('name: "m" platform: "ensemble" version_policy { latest { num_versions: 1 } }')


# --- checking

TENSORS = 'name: "m" backend: "b" input { %s }'
BATCHED = 'name: "m" backend: "b" max_batch_size: 4 %s'
NAMED = 'name: "m" backend: "b" %s'
CONTROLS = NAMED % "sequence_batching { control_input [ %s ] }"
START = 'name: "s" control { kind: CONTROL_SEQUENCE_START %s }'
STATE = NAMED % 'sequence_batching { state { input_name: "s" data_type: TYPE_FP32 dims: [2, -1] %s } }'
ENSEMBLE = 'name: "m" platform: "ensemble" %s'
EITHER = "'int32_false_true', 'fp32_false_true'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model configuration must specify 'name'"),
        ('name: "m" platform: "p"', "unexpected platform type 'p' for m"),
        (
            'name: "m" platform: "onnxruntime_onnx" backend: "python"',
            "unexpected 'platform' and 'backend' pair, got:onnxruntime_onnx, python",
        ),
        (
            'name: "m" platform: "p" backend: "onnxruntime"',
            "unexpected 'platform' and 'backend' pair, got:p, onnxruntime",
        ),
        (ENSEMBLE % 'backend: "python"', "unexpected 'platform' and 'backend' pair, got:ensemble, python"),
        (NAMED % "max_batch_size: -1", "'max_batch_size' must be non-negative value for m"),
        (TENSORS % "", "model input must specify 'name' for m"),
        (NAMED % "output { }", "model output must specify 'name' for m"),
        (TENSORS % 'name: "x"', "model input 'x' must specify 'data_type' for m"),
        (TENSORS % 'name: "x" data_type: 99', "model input 'x' must specify 'data_type' for m"),
        (TENSORS % 'name: "x" data_type: TYPE_FP32', "model input 'x' must specify 'dims' for m"),
        (NAMED % 'output { name: "y" data_type: TYPE_FP32 }', "model output 'y' must specify 'dims' for m"),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: -2',
            "model input 'x' dimension must be integer >= 1, or -1 to indicate a variable-size dimension for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 1 } input { name: "x"',
            "model input 'x' is specified more than once for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 1 format: FORMAT_NCHW',
            "model input 'x' has a 'format', which needs 3 dims, but has 1 for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 1 optional: true allow_ragged_batch: true',
            "model input 'x' can not be both 'optional' and 'allow_ragged_batch' for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 1 reshape { shape: 0 }',
            "model input 'x' reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension "
            "for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 4 reshape { shape: [2, 3] }',
            "model input 'x' has different size for dims and reshape for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: [4, -1] reshape { shape: 4 }',
            "model input 'x' has different size for dims and reshape for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: [2, 4, -1, 6] reshape { shape: [8, -1, 5] }',
            "model input 'x' has different size for dims and reshape for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: [-1, -1] reshape { shape: -1 }',
            "model input 'x' has different number of variable-size dimensions for dims and reshape for m",
        ),
        (
            TENSORS % 'name: "x" data_type: TYPE_FP32 dims: 1 reshape { }',
            "model input 'x' cannot have empty reshape for non-batching model as scalar tensors are not supported "
            "for m",
        ),
        (
            BATCHED % 'input { name: "x" data_type: TYPE_FP32 dims: 2 reshape { } }',
            "model input 'x' has different size for dims and reshape for m",
        ),
        (
            BATCHED % "dynamic_batching { preferred_batch_size: 0 }",
            "dynamic batching preferred size must be positive for m",
        ),
        (
            BATCHED % 'parameters { key: "split_oversized" value { string_value: "maybe" } }',
            "parameter 'split_oversized' expects true or false, got 'maybe' for m",
        ),
        (
            BATCHED % "dynamic_batching { preferred_batch_size: [4, 5] }",
            "dynamic batching preferred size must be <= max batch size for m",
        ),
        (
            NAMED % "dynamic_batching { priority_levels: 2 }",
            "default priority level must be in range [1, 2] for m",
        ),
        (
            NAMED % "dynamic_batching { priority_levels: 2 default_priority_level: 3 }",
            "default priority level must be in range [1, 2] for m",
        ),
        (
            NAMED % "dynamic_batching { priority_levels: 18446744073709551615 default_priority_level: 1 }",
            "priority levels must be <= 1000, got 18446744073709551615 for m",
        ),
        (
            NAMED % "dynamic_batching { priority_levels: 2 default_priority_level: 1 "
            "priority_queue_policy { key: 3 value {} } }",
            "priority queue policy must have priority level in range [1, 2] for m",
        ),
        (
            NAMED % "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            "Only one priority level is allowed when 'preserve_ordering' is true for m",
        ),
        (
            NAMED % "dynamic_batching { preserve_ordering: true default_queue_policy "
            "{ timeout_action: DELAY default_timeout_microseconds: 1 } }",
            "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
        ),
        (
            NAMED % "dynamic_batching { preserve_ordering: true priority_queue_policy { key: 1 value "
            "{ timeout_action: DELAY default_timeout_microseconds: 1 } } }",
            "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
        ),
        (
            NAMED % "model_metrics { metric_control { } }",
            "metric control must specify 'metric_identifier'",
        ),
        (
            NAMED % "model_metrics { metric_control { metric_identifier { } } }",
            "metric identifier must specify non-empty 'family'",
        ),
        (
            NAMED % 'model_metrics { metric_control { metric_identifier { family: "f" } } }',
            "metric control must specify 'histogram_options'",
        ),
        (
            NAMED % 'model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { } } }',
            "histogram options must specify non-empty 'buckets'",
        ),
        (
            NAMED % "response_cache { enable: true } sequence_batching { }",
            "Response Cache does not currently support model m with sequence batching scheduler. "
            "Please disable the response cache.",
        ),
        (
            NAMED % "response_cache { enable: true } model_transaction_policy { decoupled: true }",
            "Response Cache does not currently support model m with 'decoupled' transaction policy. "
            "Please disable the response cache.",
        ),
        (
            NAMED % "sequence_batching { direct { minimum_slot_utilization: 1.5 } }",
            "sequence batching minimum slot utilization must be in range (0.0, 1.0] for m",
        ),
        (
            BATCHED % "sequence_batching { oldest { preferred_batch_size: -1 } }",
            "sequence batching preferred batch size must be positive for m",
        ),
        (
            BATCHED % "sequence_batching { oldest { preferred_batch_size: 5 } }",
            "sequence batching preferred batch size must be <= max batch size for m",
        ),
        (CONTROLS % "{ }", "sequence batching control tensor must have a name for m"),
        (
            CONTROLS % '{ name: "t" }, { name: "t" }',
            "sequence batching control tensor 't' is specified for multiple control kinds for m",
        ),
        (
            CONTROLS % f"{{ {START % 'bool_false_true: [false, true]'} control {{ }} }}",
            "sequence batching specifies multiple CONTROL_SEQUENCE_START tensors for m",
        ),
        (
            CONTROLS % f"{{ {START % 'bool_false_true: [false, true]'} control {{ kind: CONTROL_SEQUENCE_END "
            "int32_false_true: [0, 1] } }",
            "sequence batching control tensor 's' is specified for multiple control kinds for m",
        ),
        (
            CONTROLS % f"{{ {START % ''} }}",
            f"sequence batching must specify either {EITHER} or 'bool_false_true' for CONTROL_SEQUENCE_START for m",
        ),
        (
            CONTROLS % f"{{ {START % 'int32_false_true: [0, 1] fp32_false_true: [0, 1]'} }}",
            f"sequence batching specifies more than one from {EITHER} and 'bool_false_true' "
            "for CONTROL_SEQUENCE_START for m",
        ),
        (
            CONTROLS % f"{{ {START % 'fp32_false_true: [0, 1, 2]'} }}",
            "sequence batching control 'fp32_false_true' must have exactly 2 entries for CONTROL_SEQUENCE_START for m",
        ),
        (
            CONTROLS % '{ name: "c" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } }',
            "unexpected data type for control CONTROL_SEQUENCE_CORRID for m. Allowed data types are TYPE_UINT64, "
            "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING",
        ),
        (
            CONTROLS % '{ name: "c" control { kind: CONTROL_SEQUENCE_CORRID bool_false_true: true } }',
            f"sequence batching must not specify {EITHER} or 'bool_false_true' for CONTROL_SEQUENCE_CORRID for m",
        ),
        (
            NAMED % 'sequence_batching { state { input_name: "s" } }',
            "sequence batching state 's' must specify 'data_type'",
        ),
        (
            STATE % "initial_state { } initial_state { }",
            "initial_state field for state input 's' must contain exactly one or zero element. Found '2' elements.",
        ),
        (
            STATE % "initial_state { }",
            "The data type used for 'initial_state' field of state 's' does not match the state data type.",
        ),
        (
            STATE % "initial_state { data_type: TYPE_FP32 }",
            "Field 'name' must be set when using initial_state for state input 's'.",
        ),
        (
            STATE % 'initial_state { data_type: TYPE_FP32 name: "i" dims: 2 }',
            "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input 's'. "
            "1 != 2",
        ),
        (
            STATE % 'initial_state { data_type: TYPE_FP32 name: "i" dims: [2, -1] }',
            "'initial_state' field for state input name 's' contains variable dimensions.",
        ),
        (
            STATE % 'initial_state { data_type: TYPE_FP32 name: "i" dims: [3, 1] }',
            "'initial_state' dim for input name 's' doesn't match 'state' dim description. 3 != 2",
        ),
        (
            STATE % 'initial_state { data_type: TYPE_FP32 name: "i" dims: [2, 1] }',
            "initial_state setting expects state's' to have state_data set",
        ),
        (
            NAMED % "ensemble_scheduling { }",
            "ensemble scheduling cannot be set for model 'm' whose platform is not ensemble",
        ),
        (ENSEMBLE % "", "ensemble scheduling must be set for ensemble m whose platform is ensemble"),
        (
            ENSEMBLE % "ensemble_scheduling { } instance_group { }",
            "instance group should not be specified for ensemble 'm'",
        ),
        (
            ENSEMBLE % "ensemble_scheduling { } optimization { }",
            "optimization should not be specified for ensemble 'm'",
        ),
        (
            ENSEMBLE % "ensemble_scheduling { } model_warmup { }",
            "model_warmup can not be specified for ensemble 'm'",
        ),
        (ENSEMBLE % "ensemble_scheduling { }", "must specify 'step' for ensemble 'm'"),
        (ENSEMBLE % "ensemble_scheduling { step { } }", "must specify 'model_name' in step 0 of ensemble 'm'"),
        (
            NAMED % "instance_group { kind: 7 }",
            "instance group  of model m has unknown kind 7",
        ),
        (
            NAMED % 'instance_group { name: "g" kind: KIND_GPU }',
            "instance group g of model m has kind KIND_GPU but no GPUs are available",
        ),
        (
            NAMED % 'instance_group { name: "g" kind: KIND_CPU gpus: 0 }',
            "instance group g of model m has kind KIND_CPU but specifies one or more GPUs",
        ),
    ],
)
def test_a_mistake_is_refused_with_triton_s_text(text: str, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        validate(parsed(text))
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> pb.ModelEnsembling.Step:
    return pb.ModelEnsembling.Step(model_name=model, input_map=inputs, output_map=outputs)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([step("a", {}, {})], "must specify 'input_map' in step 0 of ensemble 'm'"),
        ([step("a", {"i": "X"}, {})], "must specify 'output_map' in step 0 of ensemble 'm'"),
        (
            [step("a", {"i": "X"}, {"o": "Y"}), step("b", {"i": "X"}, {"o": "Y"})],
            "ensemble tensor 'Y' can appear in an output map only once for ensemble 'm' step 1",
        ),
        ([step("a", {"i": "T"}, {"o": "Y"})], "ensemble input 'X' for ensemble m' is not used"),
        ([step("a", {"i": "X"}, {"o": "T"})], "ensemble output 'Y' for ensemble m' is not used"),
        (
            [step("a", {"i": "X", "j": "T"}, {"o": "Y"})],
            "output 'Y' for ensemble 'm' is not written, because nothing provides 'T' to the steps that need it",
        ),
        (
            [step("a", {"i": "X", "j": "U"}, {"o": "T"}), step("b", {"i": "T"}, {"o": "U", "p": "Y"})],
            "output 'Y' for ensemble 'm' is not written, because nothing provides 'T', 'U' to the steps that need it",
        ),
        (
            [step("a", {"i": "X"}, {"o": "Y"}), step("b", {"i": "T"}, {"o": "U"})],
            "step of model 'b' in ensemble 'm' never runs, because nothing provides 'T' to the steps that need it",
        ),
        ([step("a", {"i": "X"}, {"o": "Y", "p": "T"})], "ensemble tensor 'T' is unused in ensemble 'm'"),
        ([step("b", {"i": "T"}, {"o": "Y"}), step("a", {"i": "X"}, {"o": "T"})], None),
    ],
)
def test_an_ensemble_must_be_a_graph_without_loose_ends(
    steps: list[pb.ModelEnsembling.Step], message: str | None
) -> None:
    config = parsed('name: "m" platform: "ensemble" input { name: "X" data_type: TYPE_FP32 dims: 1 }')
    config.output.add(name="Y", data_type=pb.TYPE_FP32, dims=[1])
    config.ensemble_scheduling.step.extend(steps)
    if message is None:
        validate(config, complete=True)
        return
    with pytest.raises(ServingError, match=f"^{re.escape(message)}$"):
        validate(config)


@pytest.mark.parametrize(
    "text",
    [
        SIMPLE,
        NAMED % 'platform: "anything"',
        TENSORS % 'name: "x" data_type: TYPE_FP32 dims: [0, -1, 3]',
        TENSORS % 'name: "x" data_type: TYPE_FP32 dims: [2, 4, -1, 6] reshape { shape: [8, -1, 1, 6] }',
        BATCHED % 'input { name: "x" data_type: TYPE_FP32 dims: 1 reshape { } }',
        BATCHED % "dynamic_batching { preferred_batch_size: [1, 4] }",
        CONTROLS % f"{{ {START % 'int32_false_true: [0, 1]'} }}",
        STATE % 'initial_state { data_type: TYPE_FP32 name: "i" dims: [2, 1] zero_data: true }',
        NAMED % "instance_group { kind: KIND_AUTO gpus: 7 }",
    ],
)
def test_a_configuration_without_mistakes_passes(text: str) -> None:
    validate(parsed(text))


def test_a_complete_configuration_may_have_scalars_and_must_have_instances() -> None:
    config = parsed(NAMED % 'input { name: "x" data_type: TYPE_FP32 }')
    with pytest.raises(ServingError, match=r"^model input 'x' must specify 'dims' for m$"):
        validate(config)
    with pytest.raises(ServingError, match=r"^must specify one or more 'instance group's for m$"):
        validate(config, complete=True)
    validate(normalise(config), complete=True)


def test_instances_on_gpus_need_the_gpus_they_name() -> None:
    config = parsed(NAMED % 'instance_group { name: "g" kind: KIND_GPU gpus: [1, 3] }')
    validate(config, gpus=[0, 1, 3], complete=True)
    with pytest.raises(ServingError) as caught:
        validate(config, gpus=[0, 1])
    assert caught.value.message == (
        "instance group g of model m specifies invalid or unsupported gpu id 3. GPUs with at least the minimum "
        "required CUDA compute compatibility of 6.0 are: 0, 1"
    )
    del config.instance_group[0].gpus[:]
    with pytest.raises(ServingError, match=r"^instance group g of model m has kind KIND_GPU but specifies no GPUs$"):
        validate(config, gpus=[0], complete=True)


# --- support


def fields(message: Descriptor, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        yield prefix + field.name, field
        if field.message_type and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            if value.message_type:
                yield from fields(value.message_type, f"{prefix}{field.name}.")
        elif field.message_type:
            yield from fields(field.message_type, f"{prefix}{field.name}.")


ALL_FIELDS: dict[str, FieldDescriptor] = dict(fields(pb.POOL.FindMessageTypeByName("inference.ModelConfig")))


def test_every_field_has_a_row_or_stands_below_one_that_is_not_done() -> None:
    def is_covered(path: str) -> bool:
        above = [path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1)]
        rows = [FIELDS[row] for row in above if row in FIELDS]
        return path in FIELDS or any(row.support is not Support.DONE and not row.only_slower for row in rows)

    def is_leaf(path: str) -> bool:
        return not any(other.startswith(f"{path}.") for other in ALL_FIELDS)

    assert [path for path in ALL_FIELDS if is_leaf(path) and not is_covered(path)] == []
    assert len(ALL_FIELDS) > 150
    assert [
        path for path, row in FIELDS.items() if row.support is Support.DONE and path in ALL_FIELDS and not is_leaf(path)
    ] == []


def test_every_row_is_a_field_and_says_what_its_reader_needs() -> None:
    assert {path.split("[")[0] for path in FIELDS} <= ALL_FIELDS.keys()
    assert [path for path, row in FIELDS.items() if row.support is Support.REFUSED and not row.note] == []
    assert [path for path, row in FIELDS.items() if row.only_slower and not row.note] == []


# One text for every row that is not done, which must be refused because of it.
REFUSED = {
    "runtime": 'runtime: "x.so"',
    "input.is_shape_tensor": "input { is_shape_tensor: true }",
    "input.is_non_linear_format_io": "input { is_non_linear_format_io: true }",
    "output.is_shape_tensor": "output { is_shape_tensor: true }",
    "output.is_non_linear_format_io": "output { is_non_linear_format_io: true }",
    "optimization.priority": "optimization { priority: PRIORITY_MAX }",
    "optimization.cuda.graphs": "optimization { cuda { graphs: true } }",
    "optimization.cuda.busy_wait_events": "optimization { cuda { busy_wait_events: true } }",
    "optimization.cuda.graph_spec": "optimization { cuda { graph_spec { batch_size: 1 } } }",
    "optimization.cuda.output_copy_stream": "optimization { cuda { output_copy_stream: true } }",
    "optimization.gather_kernel_buffer_threshold": "optimization { gather_kernel_buffer_threshold: 1 }",
    "sequence_batching.iterative_sequence": "sequence_batching { iterative_sequence: true }",
    "ensemble_scheduling.step.model_namespace": 'ensemble_scheduling { step { model_namespace: "n" } }',
    "instance_group.secondary_devices": "instance_group { secondary_devices { } }",
    "instance_group.profile": 'instance_group { profile: "0" }',
    "instance_group.host_policy": 'instance_group { host_policy: "p" }',
    "cc_model_filenames": 'cc_model_filenames { key: "8.6" value: "m" }',
    "model_operations": 'model_operations { op_library_filename: "x.so" }',
    "model_repository_agents": 'model_repository_agents { agents { name: "checksum" } }',
}
SLOWER = {
    "optimization.eager_batching": "optimization { eager_batching: true }",
    "sequence_batching.state.use_same_buffer_for_input_output": "sequence_batching { state "
    "{ use_same_buffer_for_input_output: true } }",
    "sequence_batching.state.use_growable_memory": "sequence_batching { state { use_growable_memory: true } }",
}


def test_the_cases_below_are_all_rows_that_are_not_done() -> None:
    not_done = {path: row for path, row in FIELDS.items() if row.support is not Support.DONE}
    assert REFUSED.keys() | SLOWER.keys() == not_done.keys()
    assert SLOWER.keys() == {path for path, row in not_done.items() if row.only_slower}


@pytest.mark.parametrize("path", REFUSED)
def test_a_field_that_is_not_honoured_is_refused_by_name(path: str) -> None:
    row = FIELDS[path]
    yet = " yet" if row.support is Support.PLANNED else ""
    note = f": {row.note}" if row.note else ""
    with pytest.raises(ServingError) as caught:
        refuse_unsupported(parsed(f'name: "m" {REFUSED[path]}'))
    assert caught.value.kind is Kind.UNSUPPORTED
    assert caught.value.message == f"model 'm': config field '{path}' is not supported{yet}{note}"


@pytest.mark.parametrize("path", SLOWER)
def test_a_field_that_changes_speed_only_gives_a_warning(path: str) -> None:
    warnings = refuse_unsupported(parsed(f'name: "m" {SLOWER[path]}'))
    assert warnings == [f"model 'm': config field '{path}' has no effect yet: {FIELDS[path].note}"]


def test_what_only_some_backends_can_do_is_refused_for_the_others() -> None:
    text = 'name: "m" backend: "%s" model_transaction_policy { decoupled: true }'
    assert refuse_unsupported(parsed(text % "handler")) == []
    with pytest.raises(ServingError, match=r"field 'model_transaction_policy\.decoupled' is not supported: .* once$"):
        refuse_unsupported(parsed(text % "onnxruntime"))
    ragged = 'name: "m" backend: "%s" input { allow_ragged_batch: true } batch_input { data_type: TYPE_INT32 }'
    assert refuse_unsupported(parsed(ragged % "onnxruntime")) == []
    with pytest.raises(ServingError, match=r"'input\.allow_ragged_batch' .*; config field 'batch_input\.data_type' is"):
        refuse_unsupported(parsed(ragged % "handler"))


def test_all_refusals_come_at_once_and_each_field_once() -> None:
    with pytest.raises(ServingError) as caught:
        refuse_unsupported(
            parsed(
                'name: "m" cc_model_filenames { key: "a" value: "" } cc_model_filenames { key: "b" value: "" } '
                'runtime: "x"'
            )
        )
    assert caught.value.message == (
        "model 'm': config field 'runtime' is not supported: names a shared library of Triton; a runtime is found by "
        "`backend`; config field 'cc_model_filenames' is not supported yet"
    )


@pytest.mark.parametrize(
    "text",
    [
        SIMPLE,
        "input { optional: false allow_ragged_batch: false is_shape_tensor: false }",
        "response_cache { enable: false } model_transaction_policy { decoupled: false } model_metrics { }",
        "optimization { cuda { graphs: false } priority: PRIORITY_DEFAULT eager_batching: false }",
        "instance_group { passive: false rate_limiter { } host_policy: '' }",
        "model_operations { } model_repository_agents { }",
        'parameters { key: "split_oversized" value { string_value: "1" } }',
        "dynamic_batching { priority_levels: 2 priority_queue_policy { key: 1 value { max_queue_size: 1 } } }",
        'parameters { key: "anything" value { string_value: "1" } }',
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' "
        "parameters { key: 'precision_mode' value: 'FP16' } } } graph { level: -1 } }",
        "version_policy { all { } }",
        'metric_tags { key: "k" value: "v" }',
        'model_metrics { metric_control { metric_identifier { family: "f" } histogram_options { buckets: 1 } } }',
    ],
)
def test_fields_at_their_default_or_done_are_accepted(text: str) -> None:
    assert refuse_unsupported(parsed(text)) == []


def test_the_documentation_has_one_row_per_field() -> None:
    lines = markdown().splitlines()
    assert lines[:2] == ["| Field | Support | Note |", "|---|---|---|"]
    assert "| `name` | done | equal to the directory's name, or left out |" in lines
    assert "| `cc_model_filenames` | planned |  |" in lines
    assert len(lines) == len(FIELDS) + 2
    assert all(line.count("|") == 4 for line in lines)


# --- records


def test_the_signature_has_the_shapes_of_the_metadata() -> None:
    config = parsed(SIMPLE)
    config.input[1].data_type, config.input[1].optional = pb.TYPE_STRING, True
    compiled = signature(config, labels={"OUTPUT1": ("cat", "dog")})
    assert (compiled.model, compiled.max_batch_size, compiled.row_limit) == ("simple", 8, 8)
    assert compiled.inputs == {
        "INPUT0": TensorSpec("INPUT0", DATATYPES["INT32"], (16,), (-1, 16)),
        "INPUT1": TensorSpec("INPUT1", DATATYPES["BYTES"], (16,), (-1, 16), optional=True),
    }
    assert compiled.required == {"INPUT0"}
    assert compiled.outputs["OUTPUT0"].labels == ()
    assert compiled.outputs["OUTPUT1"] == TensorSpec("OUTPUT1", DATATYPES["INT32"], (16,), (-1, 16), ("cat", "dog"))


def test_without_batching_the_shape_is_the_dims() -> None:
    compiled = signature(
        parsed(
            'name: "m" input { name: "x" data_type: TYPE_BF16 dims: [-1, 3] } output { name: "y" data_type: TYPE_FP64 }'
        )
    )
    assert compiled.inputs["x"].shape == compiled.inputs["x"].dims == (-1, 3)
    assert compiled.outputs["y"].shape == ()
    assert (compiled.outputs["y"].datatype.name, compiled.max_batch_size) == ("FP64", 0)


@pytest.mark.parametrize("name", DATATYPES)
def test_every_datatype_has_its_number_in_a_configuration(name: str) -> None:
    text = f'name: "m" input {{ name: "x" data_type: {DATATYPES[name].config_name} dims: 1 }}'
    assert signature(parsed(text)).inputs["x"].datatype is DATATYPES[name]


def test_instance_groups_are_plain_records() -> None:
    assert instance_groups(
        normalise(parsed('name: "m" instance_group [ { count: 3 }, { kind: KIND_CPU } ]'), [0, 1])
    ) == (
        InstanceGroup("m_0", "KIND_GPU", 3, (0, 1)),
        InstanceGroup("m_1", "KIND_CPU", 1, ()),
    )
    limited = """
        name: "m" instance_group {
          name: "g" kind: KIND_CPU count: 1 passive: true
          rate_limiter { priority: 2 resources { name: "R" count: 4 } resources { name: "S" count: 1 global: true } }
        }
    """
    assert instance_groups(parsed(limited)) == (
        InstanceGroup("g", "KIND_CPU", 1, (), True, RateLimit((Resource("R", 4), Resource("S", 1, True)), 2)),
    )


def test_a_batch_policy_knows_ragged_and_padded_inputs() -> None:
    policy = batch_policy(
        parsed(
            """
            name: "m" backend: "onnxruntime" max_batch_size: 8 dynamic_batching { }
            input { name: "ragged" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
            input { name: "padded" data_type: TYPE_INT64 dims: [ 2, -1 ] }
            parameters { key: "pad.padded.axis" value { string_value: "2" } }
            """
        )
    )
    assert policy is not None
    assert (policy.varying, policy.ragged) == (("ragged", "padded"), ("ragged",))
    assert policy.paddings == (Padding("padded", 2, np.int64(0)),)


def test_without_dynamic_batching_there_is_no_batch_policy() -> None:
    assert batch_policy(parsed(SIMPLE)) is None
    assert batch_policy(parsed("max_batch_size: 8 sequence_batching { }")) is None


RAGGED = """
name: "m" backend: "onnxruntime" max_batch_size: 4 instance_group { count: 1 kind: KIND_CPU }
input { name: "x" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }
input { name: "z" data_type: TYPE_FP32 dims: -1 optional: true }
output { name: "y" data_type: TYPE_FP32 dims: -1 }
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_input { kind: 9 }", "unknown batch input kind '9'"),
        ("batch_input { }", "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 0"),
        (
            'batch_input { kind: BATCH_ITEM_SHAPE source_input: ["x", "x"] }',
            "batch input kind 'BATCH_ITEM_SHAPE' expects 1 source input, got 2",
        ),
        (
            'batch_input { source_input: "x" data_type: TYPE_INT64 }',
            "batch input data type must be TYPE_INT32 or TYPE_FP32",
        ),
        ('batch_input { source_input: "w" data_type: TYPE_INT32 }', "unknown source input name 'w'"),
        (
            'batch_input { source_input: "z" data_type: TYPE_INT32 }',
            "batch input kind 'BATCH_ELEMENT_COUNT' needs 'z', which is optional",
        ),
        (
            'batch_input { source_input: "x" data_type: TYPE_INT32 target_name: ["c", "c"] }',
            "target input name 'c' can only be specified once",
        ),
        ("batch_output { kind: 9 }", "unknown batch output kind '9'"),
        ("batch_output { }", "batch output kind 'BATCH_SCATTER_WITH_INPUT_SHAPE' expects 1 source input, got 0"),
        ('batch_output { source_input: "w" }', "unknown source input name 'w'"),
        ('batch_output { source_input: "x" target_name: "w" }', "unknown target output name 'w'"),
        (
            'batch_output { source_input: "x" target_name: ["y", "y"] }',
            "target output name 'y' can only be specified once",
        ),
    ],
)
def test_what_is_computed_from_a_batch_is_checked_once_the_inputs_are_known(text: str, message: str) -> None:
    config = parsed(RAGGED + text)
    validate(config)
    with pytest.raises(ServingError) as caught:
        validate(config, complete=True)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_a_batch_policy_has_nanoseconds_and_a_queue_policy_for_each_level() -> None:
    config = parsed(
        """
        name: "m" max_batch_size: 8
        input { name: "fixed" data_type: TYPE_FP32 dims: 3 }
        input { name: "open" data_type: TYPE_FP32 dims: [ 2, -1 ] }
        input { name: "spare" data_type: TYPE_FP32 dims: 3 optional: true }
        dynamic_batching {
          preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 preserve_ordering: true
          priority_levels: 3 default_priority_level: 2
          default_queue_policy { max_queue_size: 9 }
          priority_queue_policy {
            key: 3
            value { timeout_action: DELAY default_timeout_microseconds: 5 allow_timeout_override: true }
          }
        }
        """
    )
    assert batch_policy(config) == BatchPolicy(
        max_rows=8,
        preferred_rows=(4, 8),
        delay_ns=100_000,
        preserve_ordering=True,
        levels=(
            QueuePolicy(max_size=9),
            QueuePolicy(max_size=9),
            QueuePolicy(timeout_ns=5000, delays=True, may_shorten=True),
        ),
        default_level=1,
        varying=("open", "spare"),
    )


def test_a_model_without_a_batch_axis_has_batches_of_one() -> None:
    assert batch_policy(parsed("dynamic_batching { }")) == BatchPolicy(max_rows=1)


def test_without_sequence_batching_there_is_no_sequence_policy() -> None:
    assert sequence_policy(parsed(SIMPLE)) is None
    assert sequence_policy(parsed("max_batch_size: 8 dynamic_batching { }")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SequencePolicy("m", slots=1, max_rows=1, direct=True, idle_ns=10**9)),
        ("max_batch_size: 8", SequencePolicy("m", slots=8, max_rows=8, direct=True, idle_ns=10**9)),
        (
            "max_batch_size: 8 sequence_batching { max_sequence_idle_microseconds: 5 "
            "direct { max_queue_delay_microseconds: 7 minimum_slot_utilization: 0.5 } }",
            SequencePolicy("m", 8, 8, True, 5000, delay_ns=7000, utilization=0.5),
        ),
        (
            "max_batch_size: 8 sequence_batching { oldest { } }",
            SequencePolicy("m", 8, 8, False, 10**9, preferred_rows=(8,)),
        ),
        (
            "max_batch_size: 8 sequence_batching { oldest { max_candidate_sequences: 20 preferred_batch_size: 4 "
            "max_queue_delay_microseconds: 7 preserve_ordering: true } }",
            SequencePolicy("m", 20, 8, False, 10**9, 7000, preferred_rows=(4,), preserve_ordering=True),
        ),
        (
            'input { name: "x" data_type: TYPE_FP32 dims: -1 } input { name: "z" data_type: TYPE_FP32 dims: 1 } '
            'sequence_batching { control_input { name: "c" control { kind: CONTROL_SEQUENCE_CORRID '
            "data_type: TYPE_STRING } } }",
            SequencePolicy(
                "m", 1, 1, True, 10**9, varying=("x",), correlation=Control("c", "CORRID", DATATYPES["BYTES"])
            ),
        ),
    ],
)
def test_a_sequence_policy_has_nanoseconds_slots_and_the_input_of_the_id(text: str, expected: SequencePolicy) -> None:
    config = parsed(f'name: "m" backend: "b" {text}')
    config.sequence_batching.SetInParent()
    assert sequence_policy(normalise(config)) == expected


def test_controls_and_states_are_plain_records() -> None:
    config = parsed(
        """
        name: "m"
        sequence_batching {
          control_input { name: "a" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 3, 4 ] } }
          control_input { name: "b" control { kind: CONTROL_SEQUENCE_END fp32_false_true: [ 0.5, 2 ] } }
          control_input { name: "c" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [ true, false ] } }
          control_input { name: "d" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT32 } }
          state { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: [ 2, -1 ] }
          state {
            input_name: "j" output_name: "p" data_type: TYPE_STRING dims: [ -1 ]
            initial_state { name: "first" data_type: TYPE_STRING dims: [ 3 ] data_file: "words" }
          }
        }
        """
    )
    assert controls(config) == (
        Control("a", "START", DATATYPES["INT32"], 3, 4),
        Control("b", "END", DATATYPES["FP32"], 0.5, 2),
        Control("c", "READY", DATATYPES["BOOL"], True, False),
        Control("d", "CORRID", DATATYPES["UINT32"]),
    )
    assert states(config) == (
        State("i", "o", DATATYPES["FP32"], (2, 1)),
        State("j", "p", DATATYPES["BYTES"], (3,), "words"),
    )
    assert sequence_tensors(config) == {"a", "b", "c", "d", "i", "o", "j", "p"}
