"""`digits`: a convolutional network, trained here in NumPy, that reads handwritten digits.

Images inside this module are [n,height,width,channels]: a convolution is then one matrix product over the rows
of `_patches`. The ONNX graph is [N,channels,height,width], as ONNX wants it.
"""

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto

from . import digits_data
from .digits_data import Images, Labels
from .graphs import Directory, graph, node, tensor

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

EPOCHS = 80
BATCH = 64
STEP = 2e-3  # Adam's, falling to zero along a cosine
FULL_INK = 16.0
CHANNELS = (16, 32)

CONFIG = """\
name: "digits"
platform: "onnxruntime_onnx"
max_batch_size: 64
input [ { name: "image" data_type: TYPE_FP32 dims: [ 1, 8, 8 ] } ]
output [ { name: "probabilities" data_type: TYPE_FP32 dims: [ 10 ] label_filename: "labels.txt" } ]
dynamic_batching { }
"""
LABELS = "zero\none\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n"


def digits() -> Directory:
    """FP32 image [N,1,8,8], ink 0 to 16 → FP32 probabilities [N,10]. Trains; some 10 s on one core."""
    model = _exported(train(*digits_data.training()))
    return Directory("digits", {"1/model.onnx": model, "config.pbtxt": CONFIG, "labels.txt": LABELS})


def train(images: Images, labels: Labels) -> Weights:
    """Minimise cross entropy with Adam over images moved by up to one pixel, so that position teaches nothing."""
    random = np.random.RandomState(0)
    weights = _initial(random)
    mean = {name: np.zeros_like(weight) for name, weight in weights.items()}
    variance = {name: np.zeros_like(weight) for name, weight in weights.items()}
    scaled = images.transpose(0, 2, 3, 1) / np.float32(FULL_INK)
    total = EPOCHS * (len(images) // BATCH)
    for step in range(total):
        if step % (len(images) // BATCH) == 0:
            order = random.permutation(len(images))
        chosen, order = order[:BATCH], order[BATCH:]
        rate = STEP * (1 + np.cos(np.pi * step / total)) / 2
        for name, slope in _gradients(weights, _moved(scaled[chosen], random), labels[chosen]).items():
            mean[name] += 0.1 * (slope - mean[name])
            variance[name] += 0.001 * (slope**2 - variance[name])
            unbiased = np.sqrt(variance[name] / (1 - 0.999 ** (step + 1))) + 1e-8
            weights[name] -= (rate * mean[name] / (1 - 0.9 ** (step + 1)) / unbiased).astype(np.float32)
    return weights


def _initial(random: np.random.RandomState) -> Weights:
    """Kernels as [9·in,out] matrices in the order of `_patches`, scaled for ReLU (He), and zero offsets."""
    few, many = CHANNELS

    def normal(inputs: int, outputs: int) -> Array:
        return random.normal(0, np.sqrt(2 / inputs), (inputs, outputs)).astype(np.float32)

    return {
        "kernel1": normal(9, few),
        "offset1": np.zeros(few, np.float32),
        "kernel2": normal(few * 9, many),
        "offset2": np.zeros(many, np.float32),
        "dense": normal(many * 16, 10),
        "offset3": np.zeros(10, np.float32),
    }


def _moved(images: Array, random: np.random.RandomState) -> Array:
    """Each image moved by -1, 0 or 1 pixel in both directions, on empty paper."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = random.randint(0, 3, (len(images), 2))
    return np.stack([page[y : y + 8, x : x + 8] for page, (y, x) in zip(padded, places, strict=True)])


def _gradients(weights: Weights, images: Array, labels: Labels) -> Weights:
    """Slopes of the mean cross entropy over `images` [n,8,8,1], by name of the weight."""
    n, (few, many) = len(images), CHANNELS
    patches1 = _patches(images)
    hidden1 = np.maximum(patches1 @ weights["kernel1"] + weights["offset1"], 0).reshape(n, 8, 8, few)
    patches2 = _patches(hidden1)
    hidden2 = np.maximum(patches2 @ weights["kernel2"] + weights["offset2"], 0).reshape(n, 4, 2, 4, 2, many)
    pooled = hidden2.max(axis=(2, 4), keepdims=True)
    flat = pooled.reshape(n, -1)
    scores = flat @ weights["dense"] + weights["offset3"]

    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = raised / raised.sum(axis=1, keepdims=True)
    error[np.arange(n), labels] -= 1
    error /= n
    to_pooled = (error @ weights["dense"].T).reshape(pooled.shape)
    to_hidden2 = (to_pooled * (hidden2 == pooled) * (hidden2 > 0)).reshape(-1, many)
    # The slope with respect to a convolution's input is a convolution with the kernel turned by half a circle.
    turned = weights["kernel2"].reshape(few, 3, 3, many)[:, ::-1, ::-1].transpose(3, 1, 2, 0).reshape(-1, few)
    to_hidden1 = (_patches(to_hidden2.reshape(n, 8, 8, many)) @ turned) * (hidden1.reshape(-1, few) > 0)
    return {
        "kernel1": patches1.T @ to_hidden1,
        "offset1": to_hidden1.sum(axis=0),
        "kernel2": patches2.T @ to_hidden2,
        "offset2": to_hidden2.sum(axis=0),
        "dense": flat.T @ error,
        "offset3": error.sum(axis=0),
    }


def _patches(images: Array) -> Array:
    """[n,8,8,c] → [n·64,c·9]: the 3x3 surroundings of every pixel, zero beyond the edge."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).reshape(-1, images.shape[3] * 9)


def _exported(weights: Weights) -> ModelProto:
    few, many = CHANNELS
    return graph(
        "digits",
        [
            node("Div", "image full_ink", "scaled"),
            node("Conv", "scaled kernel1 offset1", "sum1", pads=[1, 1, 1, 1]),
            node("Relu", "sum1", "hidden1"),
            node("Conv", "hidden1 kernel2 offset2", "sum2", pads=[1, 1, 1, 1]),
            node("Relu", "sum2", "hidden2"),
            node("MaxPool", "hidden2", "pooled", kernel_shape=[2, 2], strides=[2, 2]),
            node("Flatten", "pooled", "flat"),
            node("Gemm", "flat dense offset3", "scores"),
            node("Softmax", "scores", "probabilities", axis=1),
        ],
        [tensor("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [tensor("probabilities", TensorProto.FLOAT, ["N", 10])],
        {
            **weights,
            "full_ink": np.float32(FULL_INK),
            "kernel1": weights["kernel1"].T.reshape(few, 1, 3, 3),
            "kernel2": weights["kernel2"].T.reshape(many, few, 3, 3),
            "dense": weights["dense"].reshape(4, 4, many, 10).transpose(2, 0, 1, 3).reshape(-1, 10),
        },
    )
