"""Sample models that compute in plain sight: sums, differences, multiples, a matrix product, a sum that grows."""

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from .graphs import Directory, Shape, graph, node, tensor

SIMPLE_CONFIG = """\
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  {{ name: "INPUT0" data_type: {datatype} dims: [ 16 ] }},
  {{ name: "INPUT1" data_type: {datatype} dims: [ 16 ] }}
]
output [
  {{ name: "OUTPUT0" data_type: {datatype} dims: [ 16 ] }},
  {{ name: "OUTPUT1" data_type: {datatype} dims: [ 16 ] }}
]
"""


def simple() -> Directory:
    """INT32 INPUT0, INPUT1 [N,16] → OUTPUT0 their sum, OUTPUT1 their difference: what Triton's examples call."""
    model = graph(
        "simple",
        [node("Add", "INPUT0 INPUT1", "OUTPUT0"), node("Sub", "INPUT0 INPUT1", "OUTPUT1")],
        _rows_of_16(TensorProto.INT32, "INPUT0", "INPUT1"),
        _rows_of_16(TensorProto.INT32, "OUTPUT0", "OUTPUT1"),
    )
    config = SIMPLE_CONFIG.format(name="simple", datatype="TYPE_INT32")
    return Directory("simple", {"1/model.onnx": model, "config.pbtxt": config})


def simple_string() -> Directory:
    """As `simple`, with decimal integers written as text on both sides."""
    model = graph(
        "simple_string",
        [
            node("Cast", "INPUT0", "left", to=TensorProto.INT32),
            node("Cast", "INPUT1", "right", to=TensorProto.INT32),
            node("Add", "left right", "sum"),
            node("Sub", "left right", "difference"),
            node("Cast", "sum", "OUTPUT0", to=TensorProto.STRING),
            node("Cast", "difference", "OUTPUT1", to=TensorProto.STRING),
        ],
        _rows_of_16(TensorProto.STRING, "INPUT0", "INPUT1"),
        _rows_of_16(TensorProto.STRING, "OUTPUT0", "OUTPUT1"),
    )
    config = SIMPLE_CONFIG.format(name="simple_string", datatype="TYPE_STRING")
    return Directory("simple_string", {"1/model.onnx": model, "config.pbtxt": config})


def times_version() -> Directory:
    """FP32 x [length] → y = version · x, in versions 1 and 2, both of them served."""
    return Directory(
        "times_version",
        {
            "1/model.onnx": multiple(1),
            "2/model.onnx": multiple(2),
            "config.pbtxt": 'name: "times_version"\nversion_policy { all { } }\n',
        },
    )


def multiple(factor: int) -> ModelProto:
    """FP32 x [length] → y = factor · x."""
    return graph(
        "multiple",
        [node("Mul", "x factor", "y")],
        [tensor("x", TensorProto.FLOAT, ["length"])],
        [tensor("y", TensorProto.FLOAT, ["length"])],
        {"factor": np.float32(factor)},
    )


def matmul() -> Directory:
    """FP32 a [rows,inner] times b [inner,columns] → product [rows,columns]; every axis is free, no batching."""
    model = graph(
        "matmul",
        [node("MatMul", "a b", "product")],
        [tensor("a", TensorProto.FLOAT, ["rows", "inner"]), tensor("b", TensorProto.FLOAT, ["inner", "columns"])],
        [tensor("product", TensorProto.FLOAT, ["rows", "columns"])],
    )
    return Directory("matmul", {"1/model.onnx": model})


RUNNING_SUM_CONFIG = """\
name: "running_sum"
max_batch_size: 16
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  state { input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: [ 1 ] }
}
"""


def running_sum() -> Directory:
    """FP32 x [N,1] → sum [N,1] of all x of the sequence so far, carried by the server from `after` to `before`."""
    row: Shape = ("N", 1)
    model = graph(
        "running_sum",
        [node("Add", "before x", "after"), node("Identity", "after", "sum")],
        [tensor("x", TensorProto.FLOAT, row), tensor("before", TensorProto.FLOAT, row)],
        [tensor("sum", TensorProto.FLOAT, row), tensor("after", TensorProto.FLOAT, row)],
    )
    return Directory("running_sum", {"1/model.onnx": model, "config.pbtxt": RUNNING_SUM_CONFIG})


def _rows_of_16(element_type: int, *names: str) -> list[ValueInfoProto]:
    return [tensor(name, element_type, ["N", 16]) for name in names]
