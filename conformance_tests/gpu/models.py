"""The networks that are measured on a GPU: of shapes that people run, with random weights, as nobody reads answers.

- conv: ResNet-50's shape, FP16. X [batch,3,224,224] to Y [batch,1000]
- transformer: MiniLM-L6's shape, FP16 inside. IDS and MASK INT64 [batch,128] to Y FP32 [batch,384], the words' mean
- small: FP32 X [batch,16] to Y [batch,16], through one hidden layer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from conformance_tests.models.graphs import Directory, graph, node, tensor

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is: as in the world, or so small that a CPU is done at once."""

    image: int = 224
    width: int = 64  # channels of the first convolution
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000
    words: int = 128  # of a sequence
    hidden: int = 384
    heads: int = 12
    layers: int = 6
    vocabulary: int = 30522
    most_rows: int = 64  # of a batch


TINY = Sizes(16, 4, (1, 1), 10, 8, 16, 2, 1, 50, 8)


@dataclass
class Parts:
    """Nodes and weights of a network while it is built; names are made up as they come."""

    dtype: type[np.floating[Any]]
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(20261121))

    def add(self, operator: str, inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(operator, inputs, name, **attributes))
        return name

    def weight(self, *shape: int, spread: float) -> str:
        return self.constant(self.random.standard_normal(shape) * spread, self.dtype)

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(value, dtype or self.dtype)
        return name

    def convolve(self, given: str, channels: tuple[int, int], kernel: int, stride: int = 1) -> str:
        """With a bias, in which a batch normalisation would have been folded."""
        weight = self.weight(channels[1], channels[0], kernel, kernel, spread=(2 / (channels[0] * kernel**2)) ** 0.5)
        bias = self.weight(channels[1], spread=0.01)
        edge = kernel // 2
        return self.add(
            "Conv", f"{given} {weight} {bias}", kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[edge] * 4
        )

    def linear(self, given: str, size: tuple[int, int]) -> str:
        product = self.add("MatMul", f"{given} {self.weight(*size, spread=size[0] ** -0.5)}")
        return self.add("Add", f"{product} {self.weight(size[1], spread=0.01)}")


def conv(sizes: Sizes) -> ModelProto:
    """Convolutions in bottleneck blocks, each added to what went in."""
    parts = Parts(np.float16)
    width = sizes.width
    given = parts.add("Relu", parts.convolve("X", (3, width), 7, 2))
    given = parts.add("MaxPool", given, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = width
    for stage, blocks in enumerate(sizes.blocks):
        inner, outer = width << stage, 4 * (width << stage)
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            inside = parts.add("Relu", parts.convolve(given, (channels, inner), 1))
            inside = parts.add("Relu", parts.convolve(inside, (inner, inner), 3, stride))
            # The sum over so many blocks stays within what FP16 holds, as a batch normalisation would see to.
            inside = parts.add("Mul", f"{parts.convolve(inside, (inner, outer), 1)} {parts.constant(0.2)}")
            given = parts.convolve(given, (channels, outer), 1, stride) if not block else given
            given = parts.add("Relu", parts.add("Add", f"{inside} {given}"))
            channels = outer
    pooled = parts.add("Flatten", parts.add("GlobalAveragePool", given))
    parts.nodes.append(node("Identity", parts.linear(pooled, (channels, sizes.classes)), "Y"))
    return graph(
        "conv",
        parts.nodes,
        [tensor("X", TensorProto.FLOAT16, ("batch", 3, sizes.image, sizes.image))],
        [tensor("Y", TensorProto.FLOAT16, ("batch", sizes.classes))],
        parts.weights,
    )


def transformer(sizes: Sizes) -> ModelProto:
    """Words are looked up, looked at by one another in layers, and averaged."""
    parts = Parts(np.float16)
    hidden, heads, words = sizes.hidden, sizes.heads, sizes.words
    split = parts.constant([0, words, heads, hidden // heads], np.int64)
    merge = parts.constant([0, words, hidden], np.int64)
    word = parts.add("Gather", f"{parts.weight(sizes.vocabulary, hidden, spread=1)} IDS")
    given = _normalised(parts, parts.add("Add", f"{word} {parts.weight(words, hidden, spread=1)}"), hidden)
    mask = parts.add("Cast", "MASK", to=TensorProto.FLOAT16)
    absent = parts.add("Mul", f"{parts.add('Sub', f'{parts.constant(1)} {mask}')} {parts.constant(-10000)}")
    hide = parts.add("Unsqueeze", f"{absent} {parts.constant([1, 2], np.int64)}")
    for _ in range(sizes.layers):
        query, key, value = (
            parts.add("Transpose", parts.add("Reshape", f"{parts.linear(given, (hidden, hidden))} {split}"), perm=order)
            for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        likeness = parts.add(
            "Mul", f"{parts.add('MatMul', f'{query} {key}')} {parts.constant((hidden / heads) ** -0.5)}"
        )
        share = parts.add("Softmax", parts.add("Add", f"{likeness} {hide}"), axis=-1)
        seen = parts.add("Transpose", parts.add("MatMul", f"{share} {value}"), perm=[0, 2, 1, 3])
        attended = parts.linear(parts.add("Reshape", f"{seen} {merge}"), (hidden, hidden))
        given = _normalised(parts, parts.add("Add", f"{given} {attended}"), hidden)
        inside = _gelu(parts, parts.linear(given, (hidden, 4 * hidden)))
        given = _normalised(parts, parts.add("Add", f"{given} {parts.linear(inside, (4 * hidden, hidden))}"), hidden)
    mean = parts.add("ReduceMean", given, axes=[1], keepdims=0)
    parts.nodes.append(node("Cast", mean, "Y", to=TensorProto.FLOAT))
    return graph(
        "transformer",
        parts.nodes,
        [tensor(name, TensorProto.INT64, ("batch", words)) for name in ("IDS", "MASK")],
        [tensor("Y", TensorProto.FLOAT, ("batch", hidden))],
        parts.weights,
    )


def _normalised(parts: Parts, given: str, hidden: int) -> str:
    scale, shift = parts.constant(np.ones(hidden)), parts.constant(np.zeros(hidden))
    return parts.add("LayerNormalization", f"{given} {scale} {shift}", axis=-1, epsilon=1e-5)


def _gelu(parts: Parts, given: str) -> str:
    error = parts.add("Erf", parts.add("Mul", f"{given} {parts.constant(0.5**0.5)}"))
    above = parts.add("Add", f"{error} {parts.constant(1)}")
    return parts.add("Mul", f"{parts.add('Mul', f'{given} {above}')} {parts.constant(0.5)}")


def small(_sizes: Sizes) -> ModelProto:
    parts = Parts(np.float32)
    inside = parts.add("Relu", parts.linear("X", (16, 64)))
    parts.nodes.append(node("Identity", parts.linear(inside, (64, 16)), "Y"))
    return graph(
        "small",
        parts.nodes,
        [tensor("X", TensorProto.FLOAT, ("batch", 16))],
        [tensor("Y", TensorProto.FLOAT, ("batch", 16))],
        parts.weights,
    )


NETWORKS = {"conv": conv, "transformer": transformer, "small": small}
# With a search for each batch size, a convolution's first run of that size takes seconds.
HEURISTIC = {"cudnn_conv_algo_search": "1"}


def write(directory: Path, sizes: Sizes) -> None:
    """A repository of all networks, some of them in several configurations."""
    made = {name: network(sizes) for name, network in NETWORKS.items()}
    most = sizes.most_rows
    variants: Sequence[tuple[str, str, int, int, Mapping[str, str]]] = (
        # name, network, instances, rows of a batch, parameters
        ("conv", "conv", 2, most, HEURISTIC),
        ("conv_one", "conv", 1, most, HEURISTIC),
        ("conv_numpy", "conv", 2, most, {**HEURISTIC, "io_binding": "0"}),
        ("transformer", "transformer", 2, most, {}),
        ("transformer_one", "transformer", 1, most, {}),
        ("transformer_numpy", "transformer", 2, most, {"io_binding": "0"}),
        ("transformer_alone", "transformer", 1, 1, {}),
        ("transformer_graph", "transformer", 1, 1, {"cuda_graph": "1", "cuda_graph_batch_sizes": "1"}),
        ("small", "small", 1, most, {}),
        ("small_exact", "small", 1, most, {"use_tf32": "0"}),
        ("small_numpy", "small", 1, most, {"io_binding": "0"}),
        ("small_graph", "small", 1, most, {"cuda_graph": "1", "cuda_graph_batch_sizes": f"1,{most}"}),
    )
    for name, network, instances, rows, parameters in variants:
        text = [f"max_batch_size: {rows}", f"instance_group {{ count: {instances} }}"]
        if rows > 1:
            text.append("dynamic_batching { }")
        for key, value in parameters.items():
            text.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
        config = "\n".join(text) + "\n"
        Directory(name, {"1/model.onnx": made[network], "config.pbtxt": config}).write(directory)


def inputs(network: str, sizes: Sizes, rows: int) -> dict[str, Array]:
    """So many rows of plausible numbers."""
    random = np.random.default_rng(rows)
    if network == "conv":
        return {"X": random.standard_normal((rows, 3, sizes.image, sizes.image)).astype(np.float16)}
    if network == "transformer":
        mask = np.ones((rows, sizes.words), np.int64)
        mask[:, sizes.words * 3 // 4 :] = 0
        return {"IDS": random.integers(0, sizes.vocabulary, mask.shape), "MASK": mask}
    return {"X": random.standard_normal((rows, 16)).astype(np.float32)}
