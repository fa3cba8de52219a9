"""A step of a loop that takes time, for models that take as much as a request says."""

from onnx import GraphProto, TensorProto, helper

from .graphs import node, tensor

SQUARE = (256, 256)


def step() -> GraphProto:
    """The body of a loop: a product of matrices twice, about a millisecond."""
    return helper.make_graph(
        [
            node("Identity", "go_on", "still"),
            node("MatMul", "power power", "half"),
            node("MatMul", "half half", "next_power"),
        ],
        "step",
        [
            tensor("step", TensorProto.INT64, ()),
            tensor("go_on", TensorProto.BOOL, ()),
            tensor("power", TensorProto.FLOAT, SQUARE),
        ],
        [tensor("still", TensorProto.BOOL, ()), tensor("next_power", TensorProto.FLOAT, SQUARE)],
    )
