"""ONNX graphs in a few words, and model directories in the Triton layout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, ValueInfoProto, checker, helper, numpy_helper

# What ONNX Runtime 1.12 already loads; newer operators would shut out older runtimes for nothing.
OPSET = 17
IR_VERSION = 8

Shape = Sequence[int | str]
Files = Mapping[str, ModelProto | bytes | str]  # by path below the model's directory


def graph(
    name: str,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, npt.NDArray[Any] | np.generic] | None = None,
    opsets: Mapping[str, int] | None = None,
    ir_version: int = IR_VERSION,
) -> ModelProto:
    """A checked model. `constants` become initializers; `opsets` (domain → version) default to OPSET alone.

    Raises onnx.checker.ValidationError or onnx.shape_inference.InferenceError if the graph is no valid one.
    """
    model = helper.make_model(
        helper.make_graph(
            nodes,
            name,
            inputs,
            outputs,
            [numpy_helper.from_array(np.asarray(value), key) for key, value in (constants or {}).items()],
        ),
        producer_name="penstock",
        ir_version=ir_version,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in (opsets or {"": OPSET}).items()],
    )
    checker.check_model(model, full_check=True)
    return model


def tensor(name: str, element_type: int, shape: Shape) -> ValueInfoProto:
    """A graph input or output; a str in `shape` is a symbolic axis, `element_type` a TensorProto number."""
    return helper.make_tensor_value_info(name, element_type, shape)


def node(operator: str, inputs: str, outputs: str, domain: str = "", **attributes: Any) -> NodeProto:
    """One operator; names of its inputs and outputs are separated by blanks."""
    return helper.make_node(operator, inputs.split(), outputs.split(), domain=domain, **attributes)


@dataclass(frozen=True, slots=True)
class Directory:
    """One model of a repository: configuration, labels and version directories."""

    name: str
    files: Files

    def write(self, repository: Path) -> None:
        """Write `repository`/name. A file that already holds the same bytes keeps its modification time."""
        (repository / self.name).mkdir(parents=True, exist_ok=True)
        for path, content in self.files.items():
            target = repository / self.name / path
            data = content if isinstance(content, bytes) else _serialised(content)
            if not target.is_file() or target.read_bytes() != data:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)


def _serialised(content: ModelProto | str) -> bytes:
    return content.encode() if isinstance(content, str) else bytes(content.SerializeToString(deterministic=True))
