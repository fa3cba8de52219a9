"""Models whose requests share a batch in ways that rows alone do not tell: ragged, padded, optional, reshaped."""

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto

from .graphs import Directory, graph, node, tensor

# A request waits for a second row; then both leave at once.
PAIRED = "max_batch_size: 4 dynamic_batching {{ preferred_batch_size: 2 max_queue_delay_microseconds: {delay_us} }}\n"
DELAY_US = 1_500_000
CONFIGS = {
    "ragged_sums": """\
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]
output [
  { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] reshape { } }
]
batch_input [ {
  kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "BOUNDS" data_type: TYPE_INT32 source_input: "INPUT0"
} ]
batch_output [ { target_name: "OUTPUT0" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "INPUT0" } ]
""",
    "padded_rows": """\
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "MASK" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] }, { name: "SUM" data_type: TYPE_FP32 dims: [ 1 ] } ]
parameters { key: "pad.INPUT0.axis" value { string_value: "1" } }
parameters { key: "pad.INPUT0.value" value { string_value: "-1" } }
parameters { key: "pad.MASK.axis" value { string_value: "1" } }
""",
    "optional_rows": """\
input [
  { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2 ] },
  { name: "BIAS" data_type: TYPE_FP32 dims: [ 2 ] optional: true }
]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2 ] } ]
""",
    "reshaped_rows": """\
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2, -1 ] reshape { shape: [ 2, 1, -1 ] } } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 2, -1 ] reshape { shape: [ 1, 2, -1 ] } } ]
""",
    "picking_rows": """\
input [ { name: "INPUT0" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
""",
    "hurried_rows": """\
input [ { name: "INPUT0" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] } ]
""",
}


def make_shared_fixtures(directory: Path) -> None:
    """Write models that wait DELAY_US for a second row.

    - ragged_sums: OUTPUT0 = 2 · INPUT0, FP32 of any length, and SUM [1] of INPUT0; ragged
    - padded_rows: the same, where MASK is 1; padded with -1 and 0
    - optional_rows: OUTPUT0 = INPUT0 + BIAS, FP32 [2]; BIAS may be left out and is (10, 20) then
    - reshaped_rows: FP32 [2,length], which the model sees as [2,1,length] and gives as [1,2,length]
    - picking_rows: FP32 OUTPUT0 = (10, 20, 30, 40)[INPUT0] for INT64 [length]; other indices than -4..3 fail
    - hurried_rows: the same, waiting ten times as long, and requests may shorten their time in the queue
    """
    models = (_ragged(), _padded(), _optional(), _reshaped(), _picking("picking_rows"), _picking("hurried_rows"))
    for model in models:
        name = model.graph.name
        batching = PAIRED.format(delay_us=DELAY_US)
        if name == "hurried_rows":
            policy = "default_queue_policy { default_timeout_microseconds: 60000000 allow_timeout_override: true }"
            batching = PAIRED.format(delay_us=10 * DELAY_US).replace(" }\n", f" {policy} }}\n")
        Directory(name, {"1/model.onnx": model, "config.pbtxt": batching + CONFIGS[name]}).write(directory)


def _ragged() -> ModelProto:
    """The sum up to each bound, less that up to the bound before it."""
    return graph(
        "ragged_sums",
        [
            node("Add", "INPUT0 INPUT0", "OUTPUT0"),
            node("CumSum", "INPUT0 axis", "sums"),
            node("Concat", "nothing sums", "from_nothing", axis=0),
            node("Gather", "from_nothing BOUNDS", "picked"),
            node("Slice", "picked first last", "before"),
            node("Slice", "picked second end", "after"),
            node("Sub", "after before", "SUM"),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, ("all",)), tensor("BOUNDS", TensorProto.INT32, ("bounds",))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("all",)), tensor("SUM", TensorProto.FLOAT, ("requests",))],
        {
            "axis": np.int64(0),
            "nothing": np.zeros(1, np.float32),
            **{name: np.array([at]) for name, at in {"first": 0, "second": 1, "last": -1, "end": 2**63 - 1}.items()},
        },
    )


def _padded() -> ModelProto:
    rows = ("batch", "length")
    return graph(
        "padded_rows",
        [
            node("Add", "INPUT0 INPUT0", "OUTPUT0"),
            node("Mul", "INPUT0 MASK", "kept"),
            node("ReduceSum", "kept axis", "SUM", keepdims=1),
        ],
        [tensor("INPUT0", TensorProto.FLOAT, rows), tensor("MASK", TensorProto.FLOAT, rows)],
        [tensor("OUTPUT0", TensorProto.FLOAT, rows), tensor("SUM", TensorProto.FLOAT, ("batch", 1))],
        {"axis": np.array([1])},
    )


def _optional() -> ModelProto:
    rows = ("batch", 2)
    return graph(
        "optional_rows",
        [node("Add", "INPUT0 BIAS", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.FLOAT, rows), tensor("BIAS", TensorProto.FLOAT, rows)],
        [tensor("OUTPUT0", TensorProto.FLOAT, rows)],
        {"BIAS": np.array([[10, 20]], np.float32)},
    )


def _reshaped() -> ModelProto:
    return graph(
        "reshaped_rows",
        [node("Transpose", "INPUT0", "OUTPUT0", perm=[0, 2, 1, 3])],
        [tensor("INPUT0", TensorProto.FLOAT, ("batch", 2, 1, "length"))],
        [tensor("OUTPUT0", TensorProto.FLOAT, ("batch", 1, 2, "length"))],
    )


def _picking(name: str) -> ModelProto:
    rows = ("batch", "length")
    return graph(
        name,
        [node("Gather", "table INPUT0", "OUTPUT0")],
        [tensor("INPUT0", TensorProto.INT64, rows)],
        [tensor("OUTPUT0", TensorProto.FLOAT, rows)],
        {"table": np.array([10, 20, 30, 40], np.float32)},
    )
