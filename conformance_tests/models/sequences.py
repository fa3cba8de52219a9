"""Stateful models: sums that grow from request to request, and what a model is told of its sequences."""

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto

from .graphs import Directory, Files, graph, node, tensor
from .slow import SQUARE, step

ROW = ("batch", 1)

# Configurations of a sum, by the name of the model that has each. Every one of them has one instance.
SUMS = {
    "sequence_sum": "max_batch_size: 4 sequence_batching { direct { } %s }",
    "sequence_sum_oldest": "max_batch_size: 4 sequence_batching { oldest { max_candidate_sequences: 6 } %s }",
    "sequence_sum_one_slot": "max_batch_size: 1 sequence_batching { %s }",
    "sequence_sum_brief": "max_batch_size: 1 sequence_batching { max_sequence_idle_microseconds: 300000 %s }",
    "sequence_sum_from_100": "max_batch_size: 4 sequence_batching { %s }",
}
IDLE = "max_sequence_idle_microseconds: 60000000"
STATE = 'state { input_name: "SUM" output_name: "NEXT_SUM" data_type: TYPE_INT32 dims: [ 1 ] %s }'
FROM_FILE = 'initial_state { name: "hundred" data_type: TYPE_INT32 dims: [ 1 ] data_file: "hundred" }'
ONE_INSTANCE = "\ninstance_group { count: 1 kind: KIND_CPU }\n"
SLOW_CONFIG = (
    """\
max_batch_size: 4
input [ { name: "INPUT" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "OUTPUT" data_type: TYPE_FP32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 4 }
  state { input_name: "SUM" output_name: "NEXT_SUM" data_type: TYPE_FP32 dims: [ 1 ] }
}
"""
    + ONE_INSTANCE
)
# What controls look like: the element type and values of flags, the element type of ids, and the rest.
CONTROLS = {
    "sequence_controls_int32": ("INT32", "int32_false_true: [ 0, 1 ]", "INT64", "max_batch_size: 4", "direct { }"),
    "sequence_controls_fp32": ("FLOAT", "fp32_false_true: [ -0.5, 2 ]", "INT32", "max_batch_size: 4", "direct { }"),
    "sequence_controls_bool": ("BOOL", "bool_false_true: [ false, true ]", "STRING", "max_batch_size: 4", "oldest { }"),
    "sequence_controls_uint64": ("BOOL", "bool_false_true: [ true, false ]", "UINT64", "max_batch_size: 4", ""),
    "sequence_controls_alone": ("INT32", "int32_false_true: [ 7, 8 ]", "UINT32", "max_batch_size: 0", ""),
}  # fmt: skip


def make_sequence_fixtures(directory: Path) -> None:
    """Write the stateful models. All keep a sequence for a minute of idleness, but `sequence_sum_brief`.

    - sequence_sum: OUTPUT = the sum of all INPUTs of the sequence so far, INT32 [1]; direct, four slots
    - sequence_sum_oldest: the same, batched by the oldest; six slots
    - sequence_sum_one_slot, sequence_sum_brief: the same with one slot, the second for 0.3 s of idleness
    - sequence_sum_from_100: the sum begins at 100, and the state NEXT_SUM is an output too
    - sequence_slow: FP32 sum that takes about a millisecond for each unit of the largest INPUT; oldest, four slots
    - sequence_controls_int32, _fp32, _bool, _uint64, _alone: what the model is told comes back as STARTED, ENDED, BEING
      and ID; ROW and ROWS are where the request stood in its batch, and how large that was (not of _alone, which has no
      batch axis). The ids are INT64, INT32, text, UINT64 and UINT32; the flags' values differ
    """
    for name, config in SUMS.items():
        idle = "" if "idle" in config else IDLE
        initial = FROM_FILE if name == "sequence_sum_from_100" else ""
        outputs = ("OUTPUT", "NEXT_SUM") if initial else ()  # else completed, without the state
        shown = "".join(f'output {{ name: "{output}" data_type: TYPE_INT32 dims: [ 1 ] }}\n' for output in outputs)
        files: Files = {
            "1/model.onnx": _sum(),
            "config.pbtxt": config % f"{idle} {STATE % initial}" + ONE_INSTANCE + shown,
            **({"initial_state/hundred": np.array([100], np.int32).tobytes()} if initial else {}),
        }
        Directory(name, files).write(directory)
    Directory("sequence_slow", {"1/model.onnx": _slow_sum(), "config.pbtxt": SLOW_CONFIG}).write(directory)
    for name, (flag, values, id_type, size, strategy) in CONTROLS.items():
        kinds = [("START", values), ("END", values), ("READY", values), ("CORRID", f"data_type: TYPE_{id_type}")]
        controls = "\n".join(
            f'control_input {{ name: "{kind}" control {{ kind: CONTROL_SEQUENCE_{kind} {rest} }} }}'
            for kind, rest in kinds
        )
        config = f"{size}\nsequence_batching {{ {IDLE} {strategy}\n{controls} }}{ONE_INSTANCE}"
        model = _told(TensorProto.DataType.Value(flag), TensorProto.DataType.Value(id_type), "0" not in size)
        Directory(name, {"1/model.onnx": model, "config.pbtxt": config}).write(directory)


def _sum() -> ModelProto:
    return graph(
        "sequence_sum",
        [node("Add", "SUM INPUT", "NEXT_SUM"), node("Identity", "NEXT_SUM", "OUTPUT")],
        [tensor("INPUT", TensorProto.INT32, ROW), tensor("SUM", TensorProto.INT32, ROW)],
        [tensor("OUTPUT", TensorProto.INT32, ROW), tensor("NEXT_SUM", TensorProto.INT32, ROW)],
    )


def _slow_sum() -> ModelProto:
    return graph(
        "sequence_slow",
        [
            node("ReduceMax", "INPUT", "largest", keepdims=0),
            node("Add", "largest one", "number"),  # at least one step, so that it never runs inline
            node("Cast", "number", "steps", to=TensorProto.INT64),
            node("Mul", "largest zero", "nothing"),
            node("Expand", "nothing side", "start"),
            node("Loop", "steps true start", "end", body=step()),
            node("ReduceMax", "end", "late_zero", keepdims=0),
            node("Add", "INPUT late_zero", "late"),
            node("Add", "SUM late", "NEXT_SUM"),
            node("Identity", "NEXT_SUM", "OUTPUT"),
        ],
        [tensor("INPUT", TensorProto.FLOAT, ROW), tensor("SUM", TensorProto.FLOAT, ROW)],
        [tensor("OUTPUT", TensorProto.FLOAT, ROW), tensor("NEXT_SUM", TensorProto.FLOAT, ROW)],
        {"zero": np.float32(0), "one": np.float32(1), "side": np.array(SQUARE, np.int64), "true": np.bool_(True)},
    )


def _told(flag: int, id_type: int, batched: bool) -> ModelProto:
    shape = ROW if batched else (1,)
    nodes = [
        node("Identity", "INPUT", "OUTPUT"),
        node("Identity", "START", "STARTED"),
        node("Identity", "END", "ENDED"),
        node("Identity", "READY", "BEING"),
        node("Identity", "CORRID", "ID"),
    ]
    outputs = [
        tensor("OUTPUT", TensorProto.FLOAT, shape),
        *(tensor(name, flag, shape) for name in ("STARTED", "ENDED", "BEING")),
        tensor("ID", id_type, shape),
    ]
    if batched:
        nodes += [
            node("Shape", "INPUT", "shape"),
            node("Gather", "shape zero", "rows"),
            node("Range", "zero rows one", "range"),
            node("Unsqueeze", "range axis", "ROW"),
            node("Expand", "rows shape", "ROWS"),
        ]
        outputs += [tensor(name, TensorProto.INT64, ROW) for name in ("ROW", "ROWS")]
    return graph(
        "sequence_controls",
        nodes,
        [
            tensor("INPUT", TensorProto.FLOAT, shape),
            *(tensor(name, flag, shape) for name in ("START", "END", "READY")),
            tensor("CORRID", id_type, shape),
        ],
        outputs,
        {"zero": np.int64(0), "one": np.int64(1), "axis": np.array([1], np.int64)} if batched else {},
    )
