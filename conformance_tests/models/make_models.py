"""Makes the sample repository anew: `python -m conformance_tests.models.make_models [directory]`.

Training repeats in accuracy, not in bits: the order of sums depends on the machine's BLAS.
"""

import sys
from pathlib import Path

import onnxruntime
from onnx import ModelProto

from . import digits_data
from .arithmetic import matmul, running_sum, simple, simple_string, times_version
from .digits import digits
from .graphs import Directory
from .iris import iris
from .sentiment import sentiment

SAMPLES = Path(__file__).parents[2] / "model_repository"


def main() -> None:
    repository = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLES
    network = digits()
    flowers, flowers_accuracy = iris()
    remarks, remarks_accuracy = sentiment()
    sums = (simple(), simple_string(), times_version(), matmul(), running_sum())
    for directory in (network, flowers, remarks, *sums):
        directory.write(repository)
    print(f"digits     {_digits_accuracy(network):7.2%} of the held-out images")
    print(f"iris       {flowers_accuracy:7.2%} of the held-out flowers")
    print(f"sentiment  {remarks_accuracy:7.2%} of the held-out sentences")


def _digits_accuracy(network: Directory) -> float:
    """Measured on the exported graph, so that it covers the export as well."""
    model = network.files["1/model.onnx"]
    assert isinstance(model, ModelProto)
    images, labels = digits_data.held_out()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(None, {"image": images})
    return float((probabilities.argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main()
