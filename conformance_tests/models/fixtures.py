"""Models that only tests need, made on the spot: one per datatype and rank, slow ones, failing ones, broken ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from .arithmetic import multiple
from .batches import make_shared_fixtures
from .ensembles import make_broken_ensembles, make_ensembles
from .graphs import OPSET, Directory, Files, Shape, graph, node, tensor
from .sequences import make_sequence_fixtures
from .slow import SQUARE, step

# The protocol's name of each datatype, in lower case, and the ONNX element type behind it.
ELEMENT_TYPES = {
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "fp16": TensorProto.FLOAT16,
    "fp32": TensorProto.FLOAT,
    "fp64": TensorProto.DOUBLE,
    "bytes": TensorProto.STRING,
    "bf16": TensorProto.BFLOAT16,
}
MATRIX = ("rows", "columns")  # two free axes, neither of them named as a batch
NOT_ONNX = b"This file is called model.onnx and is none.\n"


def make_fixtures(directory: Path) -> None:
    """Write the models that load beside the sample models. Files already there with the same bytes are left untouched.

    - identity_<datatype>: INPUT0 → OUTPUT0 [rows,columns], for each of ELEMENT_TYPES
    - identity_scalar_fp32 [], identity_1d_int64 [length], identity_rank4_fp32: the same in other ranks
    - fixed_shape: FP32 identity of exactly [2,3]
    - batched_identity_fp32 [batch,4]: no configuration; the axis's name tells that it can be batched
    - two_inputs_mixed: FP32 INPUT0 and BYTES INPUT1, each copied to its own output
    - optional_input: OUTPUT0 = INPUT0 + BIAS, FP32; BIAS [1] may be left out and is 10 then
    - string_classes: FP32 INPUT0 [rows,2] → OUTPUT0, a sequence of maps from "no" and "yes" to the row's numbers
    - slow_matmul: FP32 identity that takes some 10 ms on one core
    - slow_loop: the same, and takes the longer the larger STEPS is, an INT64 [1]: about a millisecond each
    - failing: FP32 OUTPUT0 = (10, 20, 30, 40)[INPUT0]; an index outside -4..3 fails while it runs
    - slow_rows: FP32 identity [batch,columns] that takes about a millisecond for each unit of the largest number in it,
      on one instance; batched as BATCHING says under the names there
    - those of `batches`
    - cached: FP32 OUTPUT0 = INPUT0 and OUTPUT1 = -INPUT0 [rows,columns], with the response cache
    - warmed: `failing`, warmed up with zeros, random numbers of no rows, and a file of indices that are valid
    - halves: INPUT0 FP16 and INPUT1 BF16 [rows,columns]; OUTPUT0 is INPUT0 as BF16, OUTPUT1 is INPUT1 as FP16
    - quantised_qdq: FP32 [rows,4] to [rows,2] through a product of INT8 weights and numbers rounded to quarters
    - quantised_qlinear: the same product in whole numbers, UINT8 to UINT8
    - stream_count: a handler that is a generator: 0, 1, ... below `count`, then a failure where `fail` says so
    - latest_version: y = version · x, FP32 [length], in versions 2, 9 and 10 and no configuration: 10 serves.
      Its directories 03 and notes are no versions
    - latest_two: the same in versions 1, 2 and 3, the highest two served
    - specific_versions: likewise, of which 1, 3 and 4 are asked for
    - ensemble_...: as `make_ensembles` says
    - sequence_…: see `sequences`
    """
    for name, element_type in ELEMENT_TYPES.items():
        _identity(f"identity_{name}", element_type, MATRIX).write(directory)
    _identity("identity_scalar_fp32", TensorProto.FLOAT, ()).write(directory)
    _identity("identity_1d_int64", TensorProto.INT64, ("length",)).write(directory)
    _identity("identity_rank4_fp32", TensorProto.FLOAT, ("images", "channels", "height", "width")).write(directory)
    _identity("fixed_shape", TensorProto.FLOAT, (2, 3)).write(directory)
    _identity("batched_identity_fp32", TensorProto.FLOAT, ("batch", 4)).write(directory)
    for model in (_two_inputs_mixed(), _string_classes(), _slow_matmul(), _slow_loop(), _failing(), _halves()):
        Directory(model.graph.name, {"1/model.onnx": model}).write(directory)
    for model in (_quantised_qdq(), _quantised_qlinear()):
        Directory(model.graph.name, {"1/model.onnx": model}).write(directory)
    _optional_input().write(directory)
    _cached().write(directory)
    _warmed("warmed", [0, 3, -4]).write(directory)
    make_batching_fixtures(directory, *BATCHING)
    Directory("stream_count", {"handler.py": STREAM_COUNT}).write(directory)
    make_shared_fixtures(directory)
    make_sequence_fixtures(directory)
    _multiples("latest_version", (2, 9, 10), {f"{no}/model.onnx": NOT_ONNX for no in ("03", "notes")}).write(directory)
    for name, policy in {
        "latest_two": "latest { num_versions: 2 }",
        "specific_versions": "specific { versions: [ 1, 3, 4 ] }",
    }.items():
        config = f"version_policy {{ {policy} }}\n"
        _multiples(name, (1, 2, 3), {"config.pbtxt": config}).write(directory)
    make_ensembles(directory)


def make_batching_fixtures(directory: Path, *names: str) -> None:
    """Write slow_rows under some of its names in BATCHING."""
    for name in names:
        config = SLOW_ROWS_CONFIG.format(batching=BATCHING[name])
        Directory(name, {"1/model.onnx": _slow_rows(), "config.pbtxt": config}).write(directory)


def make_broken_fixtures(directory: Path) -> None:
    """Write models none of which loads: for a repository of their own.

    - broken, empty: model.onnx is text, or has no bytes
    - half_broken: version 1 is sound, version 2 is text, and all versions are asked for
    - no_version, no_model: a configuration and no version directory; a version directory without model.onnx
    - bad_config: config.pbtxt is cut off in the middle of a message
    - wrong_name, wrong_datatype, wrong_dims, wrong_output: the configuration contradicts directory or file
    - wrong_batching: max_batch_size 8 where the file says [2,3]
    - missing_labels: label_filename names a file that is not there
    - warmup_fails, warmup_short: as `warmed`, with an index that is out of range; with a file that is too short
    - unsupported_datatype: OUTPUT0 is FP8, for which the protocol has no name
    - sequence_output: OUTPUT0 is a sequence of tensors
    - ensemble_...: as `make_broken_ensembles` says
    """
    matrix = _identity_graph(TensorProto.FLOAT, MATRIX)
    repository: dict[str, Files] = {
        "broken": {"1/model.onnx": NOT_ONNX},
        "empty": {"1/model.onnx": b""},
        "half_broken": {
            "1/model.onnx": matrix,
            "2/model.onnx": NOT_ONNX,
            "config.pbtxt": "version_policy { all { } }\n",
        },
        "no_version": {"config.pbtxt": 'platform: "onnxruntime_onnx"\n'},
        "no_model": {"1/notes.txt": "The model is not here.\n"},
        "bad_config": {"1/model.onnx": matrix, "config.pbtxt": "version_policy { latest {"},
        "wrong_name": {"1/model.onnx": matrix, "config.pbtxt": 'name: "another"\n'},
        "wrong_datatype": {"1/model.onnx": matrix, "config.pbtxt": _identity_config(datatype="TYPE_INT32")},
        "wrong_dims": {"1/model.onnx": matrix, "config.pbtxt": _identity_config(dims="-1, -1, -1")},
        "wrong_output": {"1/model.onnx": matrix, "config.pbtxt": _identity_config(output="OUTPUT9")},
        "wrong_batching": {
            "1/model.onnx": _identity_graph(TensorProto.FLOAT, (2, 3)),
            "config.pbtxt": "max_batch_size: 8\n",
        },
        "missing_labels": {
            "1/model.onnx": matrix,
            "config.pbtxt": _identity_config(labels='label_filename: "nowhere.txt"'),
        },
        "unsupported_datatype": {"1/model.onnx": _fp8_output()},
        "sequence_output": {"1/model.onnx": _sequence_output()},
    }
    _warmed("warmup_fails", [0, 9, 0]).write(directory)
    _warmed("warmup_short", [0]).write(directory)
    make_broken_ensembles(directory)
    for name, files in repository.items():
        Directory(name, files).write(directory)


def _identity_graph(element_type: int, shape: Shape) -> ModelProto:
    return graph(
        "identity",
        [node("Identity", "INPUT0", "OUTPUT0")],
        [tensor("INPUT0", element_type, shape)],
        [tensor("OUTPUT0", element_type, shape)],
    )


def _identity(name: str, element_type: int, shape: Shape) -> Directory:
    return Directory(name, {"1/model.onnx": _identity_graph(element_type, shape)})


def _two_inputs_mixed() -> ModelProto:
    return graph(
        "two_inputs_mixed",
        [node("Identity", "INPUT0", "OUTPUT0"), node("Identity", "INPUT1", "OUTPUT1")],
        [tensor("INPUT0", TensorProto.FLOAT, ("numbers",)), tensor("INPUT1", TensorProto.STRING, ("texts",))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("numbers",)), tensor("OUTPUT1", TensorProto.STRING, ("texts",))],
    )


OPTIONAL_INPUT_CONFIG = """\
input [
  { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "BIAS" data_type: TYPE_FP32 dims: [ 1 ] optional: true }
]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""


def _optional_input() -> Directory:
    """An initializer that is an input as well is ONNX's form of a default."""
    model = graph(
        "optional_input",
        [node("Add", "INPUT0 BIAS", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.FLOAT, ("length",)), tensor("BIAS", TensorProto.FLOAT, (1,))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("length",))],
        {"BIAS": np.array([10], np.float32)},
    )
    return Directory("optional_input", {"1/model.onnx": model, "config.pbtxt": OPTIONAL_INPUT_CONFIG})


def _string_classes() -> ModelProto:
    classes = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, ()))
    return graph(
        "string_classes",
        [node("ZipMap", "INPUT0", "OUTPUT0", domain="ai.onnx.ml", classlabels_strings=["no", "yes"])],
        [tensor("INPUT0", TensorProto.FLOAT, ("rows", 2))],
        [helper.make_value_info("OUTPUT0", helper.make_sequence_type_proto(classes))],
        opsets={"": OPSET, "ai.onnx.ml": 3},
    )


def _slow_matmul() -> ModelProto:
    """Adds 0 to INPUT0, found the long way: powers of a 512x512 matrix of zeros, 2^27 multiplications each.

    The zeros are the input's size times 0, which no optimiser knows before the input is there.
    """
    powers = [node("MatMul", f"power{i} power{i}", f"power{i + 1}") for i in range(4)]
    return graph(
        "slow_matmul",
        [
            node("Size", "INPUT0", "size"),
            node("Cast", "size", "number", to=TensorProto.FLOAT),
            node("Mul", "number zero", "nothing"),
            node("Expand", "nothing side", "power0"),
            *powers,
            node("ReduceMax", f"power{len(powers)}", "late_zero", keepdims=0),
            node("Add", "INPUT0 late_zero", "OUTPUT0"),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, MATRIX)],
        [tensor("OUTPUT0", TensorProto.FLOAT, MATRIX)],
        {"zero": np.float32(0), "side": np.array([512, 512], np.int64)},
    )


def _slow_loop() -> ModelProto:
    """The same idea in a loop, so that each request chooses how long it takes: a 256x256 product twice per step."""
    return graph(
        "slow_loop",
        [
            node("Size", "INPUT0", "size"),
            node("Cast", "size", "number", to=TensorProto.FLOAT),
            node("Mul", "number zero", "nothing"),
            node("Expand", "nothing side", "start"),
            node("Squeeze", "STEPS", "steps"),
            node("Loop", "steps true start", "end", body=step()),
            node("ReduceMax", "end", "late_zero", keepdims=0),
            node("Add", "INPUT0 late_zero", "OUTPUT0"),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, MATRIX), tensor("STEPS", TensorProto.INT64, (1,))],
        [tensor("OUTPUT0", TensorProto.FLOAT, MATRIX)],
        {"zero": np.float32(0), "side": np.array(SQUARE, np.int64), "true": np.bool_(True)},
    )


def _cached() -> Directory:
    model = graph(
        "cached",
        [node("Identity", "INPUT0", "OUTPUT0"), node("Neg", "INPUT0", "OUTPUT1")],
        [tensor("INPUT0", TensorProto.FLOAT, MATRIX)],
        [tensor(name, TensorProto.FLOAT, MATRIX) for name in ("OUTPUT0", "OUTPUT1")],
    )
    return Directory("cached", {"1/model.onnx": model, "config.pbtxt": "response_cache { enable: true }\n"})


WARMUP_CONFIG = """\
model_warmup [
  { name: "zeros" batch_size: 1 inputs { key: "INPUT0" value { data_type: TYPE_INT64 dims: 2 zero_data: true } } },
  { name: "empty" batch_size: 1 inputs { key: "INPUT0" value { data_type: TYPE_INT64 dims: 0 random_data: true } } },
  { name: "file" batch_size: 1 count: 2
    inputs { key: "INPUT0" value { data_type: TYPE_INT64 dims: 3 input_data_file: "indices" } } }
]
"""


def _warmed(name: str, indices: Sequence[int]) -> Directory:
    data = np.array(indices, np.int64).tobytes()
    return Directory(name, {"1/model.onnx": _failing(), "config.pbtxt": WARMUP_CONFIG, "warmup/indices": data})


STREAM_COUNT = """\
import runpod


def handler(job):
    yield from range(job["input"]["count"])
    if job["input"].get("fail"):
        raise ValueError("told to fail")


runpod.serverless.start({"handler": handler})
"""

# Configurations of slow_rows, by the name of the model that has each.
BATCHING = {
    "slow_rows": "max_batch_size: 8 dynamic_batching { }",
    "slow_rows_delayed": "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 1500000 }",
    "slow_rows_limited": "max_batch_size: 1 dynamic_batching { default_queue_policy { max_queue_size: 2 } }",
    "slow_rows_hurried": "max_batch_size: 1 dynamic_batching { default_queue_policy "
    "{ default_timeout_microseconds: 150000 allow_timeout_override: true } }",
    "slow_rows_shortened": "max_batch_size: 1 dynamic_batching { default_queue_policy "
    "{ default_timeout_microseconds: 60000000 allow_timeout_override: true } }",
    "slow_rows_patient": "max_batch_size: 1 dynamic_batching { default_queue_policy "
    "{ timeout_action: DELAY default_timeout_microseconds: 60000000 allow_timeout_override: true } }",
    "slow_rows_by_priority": "max_batch_size: 1 dynamic_batching { priority_levels: 2 default_priority_level: 2 }",
    "slow_rows_in_order": "max_batch_size: 8 instance_group { count: 1 kind: KIND_CPU } "
    "dynamic_batching { preserve_ordering: true }",
    "slow_rows_sharing": "max_batch_size: 1",
    "slow_rows_sharing_too": "max_batch_size: 1 dynamic_batching { }",
    "slow_rows_split": "max_batch_size: 4 dynamic_batching { } "
    'parameters { key: "split_oversized" value { string_value: "true" } }',
}
SLOW_ROWS_CONFIG = """\
{batching}
input [ {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }} ]
output [ {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group {{ count: 1 kind: KIND_CPU rate_limiter {{ resources {{ name: "R" global: true count: 1 }} }} }}
"""


def _slow_rows() -> ModelProto:
    """As slow_loop, with a batch axis: as many steps as the largest number of all rows says."""
    rows = ("batch", "columns")
    return graph(
        "slow_rows",
        [
            node("ReduceMax", "INPUT0", "largest", keepdims=0),
            node("Add", "largest one", "number"),  # at least one step, so that it never runs inline
            node("Cast", "number", "steps", to=TensorProto.INT64),
            node("Mul", "largest zero", "nothing"),
            node("Expand", "nothing side", "start"),
            node("Loop", "steps true start", "end", body=step()),
            node("ReduceMax", "end", "late_zero", keepdims=0),
            node("Add", "INPUT0 late_zero", "OUTPUT0"),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, rows)],
        [tensor("OUTPUT0", TensorProto.FLOAT, rows)],
        {"zero": np.float32(0), "one": np.float32(1), "side": np.array(SQUARE, np.int64), "true": np.bool_(True)},
    )


def _halves() -> ModelProto:
    return graph(
        "halves",
        [
            node("Cast", "INPUT0", "OUTPUT0", to=TensorProto.BFLOAT16),
            node("Cast", "INPUT1", "OUTPUT1", to=TensorProto.FLOAT16),
        ],
        [tensor("INPUT0", TensorProto.FLOAT16, MATRIX), tensor("INPUT1", TensorProto.BFLOAT16, MATRIX)],
        [tensor("OUTPUT0", TensorProto.BFLOAT16, MATRIX), tensor("OUTPUT1", TensorProto.FLOAT16, MATRIX)],
    )


WEIGHTS = np.array([[1, -2], [3, 4], [-5, 6], [7, -8]], np.int8)
QUARTER: dict[str, np.generic] = {
    "scale": np.float32(0.25),
    "one": np.float32(1),
    "middle": np.uint8(128),
    "zero": np.int8(0),
}


def _quantised_qdq() -> ModelProto:
    """As tools for quantising write it: what a number was rounded to, as a floating-point number."""
    return graph(
        "quantised_qdq",
        [
            node("QuantizeLinear", "INPUT0 scale middle", "whole"),
            node("DequantizeLinear", "whole scale middle", "rounded"),
            node("DequantizeLinear", "weights one zero", "factors"),
            node("MatMul", "rounded factors", "OUTPUT0"),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, ("rows", 4))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("rows", 2))],
        {"weights": WEIGHTS, **QUARTER},
    )


def _quantised_qlinear() -> ModelProto:
    return graph(
        "quantised_qlinear",
        [node("QLinearMatMul", "INPUT0 scale middle weights one zero one middle", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.UINT8, ("rows", 4))],
        [tensor("OUTPUT0", TensorProto.UINT8, ("rows", 2))],
        {"weights": WEIGHTS, **QUARTER},
    )


def _failing() -> ModelProto:
    return graph(
        "failing",
        [node("Gather", "table INPUT0", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.INT64, ("length",))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("length",))],
        {"table": np.array([10, 20, 30, 40], np.float32)},
    )


def _multiples(name: str, versions: Sequence[int], extra: Files) -> Directory:
    return Directory(name, {**{f"{version}/model.onnx": multiple(version) for version in versions}, **extra})


IDENTITY_CONFIG = """\
input [ {{ name: "INPUT0" data_type: {datatype} dims: [ {dims} ] }} ]
output [ {{ name: "{output}" data_type: {datatype} dims: [ {dims} ] {labels} }} ]
"""


def _identity_config(
    datatype: str = "TYPE_FP32", dims: str = "-1, -1", output: str = "OUTPUT0", labels: str = ""
) -> str:
    return IDENTITY_CONFIG.format(datatype=datatype, dims=dims, output=output, labels=labels)


def _fp8_output() -> ModelProto:
    return graph(
        "unsupported_datatype",
        [node("Cast", "INPUT0", "OUTPUT0", to=TensorProto.FLOAT8E4M3FN)],
        [tensor("INPUT0", TensorProto.FLOAT, MATRIX)],
        [tensor("OUTPUT0", TensorProto.FLOAT8E4M3FN, MATRIX)],
        opsets={"": 19},  # the first with 8-bit floats
        ir_version=9,
    )


def _sequence_output() -> ModelProto:
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, MATRIX)
    return graph(
        "sequence_output",
        [node("SequenceConstruct", "INPUT0 INPUT0", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.FLOAT, MATRIX)],
        [helper.make_value_info("OUTPUT0", helper.make_sequence_type_proto(element))],
    )
