from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.tensor import BY_ONNX_NAME, BYTES, FP32, FP64, Array
from penstock_runtimes.onnx import signature
from penstock_runtimes.onnx.signature import OnnxSignature, OnnxTensor

IRIS = Path(__file__).parents[2] / "model_repository" / "iris" / "1" / "model.onnx"
FLOAT = "tensor(float)"
MAPS = "seq(map(string,tensor(float)))"

Shapes = dict[str, Sequence[int | str]]


@dataclass
class Node:
    """What ONNX Runtime tells of an input or output."""

    name: str
    shape: Sequence[int | str | None]
    type: str = FLOAT


@dataclass
class Session:
    """What `read` asks of an InferenceSession."""

    inputs: list[Node]
    outputs: list[Node]
    answer: Any
    fed: dict[str, Array] = field(default_factory=dict)

    def get_inputs(self) -> list[Node]:
        return self.inputs

    def get_outputs(self) -> list[Node]:
        return self.outputs

    def get_overridable_initializers(self) -> list[Node]:
        return []

    def run(self, names: list[str], feed: dict[str, Array]) -> list[Any]:
        self.fed = feed
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


def tensors(shapes: Shapes, onnx_type: str = FLOAT) -> dict[str, OnnxTensor]:
    return {name: signature.tensor(Node(name, shape, onnx_type)) for name, shape in shapes.items()}


def of(inputs: Shapes, outputs: Shapes, overridable: Shapes | None = None) -> OnnxSignature:
    return OnnxSignature(tensors(inputs), tensors(outputs), tensors(overridable or {}))


def configuration(text: str) -> pb.ModelConfig:
    config = pb.ModelConfig()
    text_format.Parse('name: "m" ' + text, config, descriptor_pool=pb.POOL)
    return config


def both(inputs: str, outputs: str, rest: str = "") -> pb.ModelConfig:
    """X and Y, FP32, with what stands in their configurations."""
    return configuration(
        f'input {{ name: "X" data_type: TYPE_FP32 {inputs} }} output {{ name: "Y" data_type: TYPE_FP32 {outputs} }} '
        + rest
    )


def refusal(config: pb.ModelConfig, found: OnnxSignature) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        signature.check(config, found)
    return caught.value.kind, caught.value.message


# -- reading


@pytest.mark.parametrize(
    ("shape", "axes", "read"),
    [
        (["N", 3], ("N", 3), (-1, 3)),
        ([None, 3], ("", 3), (-1, 3)),
        ([-1, 0], ("-1", 0), (-1, 0)),
        ([], (), ()),
    ],
)
def test_an_axis_that_is_not_fixed_is_open(
    shape: list[int | str | None], axes: tuple[int | str, ...], read: tuple[int, ...]
) -> None:
    found = signature.tensor(Node("X", shape))
    assert (found.axes, found.shape) == (axes, read)


@pytest.mark.parametrize("onnx_type", sorted(BY_ONNX_NAME))
def test_every_type_of_the_protocol_is_known_by_its_onnx_name(onnx_type: str) -> None:
    assert signature.tensor(Node("X", [], onnx_type)).datatype is BY_ONNX_NAME[onnx_type]


def test_a_sequence_of_maps_is_a_tensor_with_its_labels_as_columns() -> None:
    session = onnxruntime.InferenceSession(IRIS, providers=["CPUExecutionProvider"])
    found = signature.read(session, "iris")
    output = found.outputs["output_probability"]
    assert (output.datatype, output.maps, output.axes, output.keys) == (FP32, True, ("", 3), (0, 1, 2))
    assert found.labels == {"output_probability": ("0", "1", "2")}
    assert list(found.inputs) == ["measurements"]
    assert list(found.outputs) == ["output_label", "output_probability"]


def test_labels_are_learnt_from_one_row_of_zeros() -> None:
    inputs = [Node("X", ["N", 2]), Node("S", ["N", 1], "tensor(string)"), Node("K", [], "tensor(int64)")]
    session = Session(inputs, [Node("Y", [], MAPS)], [{"no": 0.0, "yes": 1.0}])
    assert signature.read(session, "m").labels == {"Y": ("no", "yes")}
    assert {name: (array.dtype.char, array.tolist()) for name, array in session.fed.items()} == {
        "X": ("f", [[0, 0]]),
        "S": ("O", [[""]]),
        "K": (np.dtype(np.int64).char, 0),
    }


@pytest.mark.parametrize("answer", [RuntimeError("zeros will not do"), []])
def test_labels_that_zeros_do_not_show_stay_open(answer: Any) -> None:
    found = signature.read(Session([Node("X", ["N", 2])], [Node("Y", [], MAPS)], answer), "m")
    assert found.labels == {}
    assert found.outputs["Y"].shape == (-1, -1)


def test_maps_to_doubles_are_fp64_and_maps_to_strings_are_no_tensor() -> None:
    assert signature.tensor(Node("Y", [], "seq(map(int64,tensor(double)))")).datatype is FP64
    assert signature.tensor(Node("Y", [], "seq(map(int64,tensor(string)))")).datatype is None


# -- completion


@pytest.mark.parametrize(
    ("found", "stated", "completed"),
    [
        (
            of({"X": ["N", 3], "A": ["N"]}, {"Y": ["N", 3], "B": ["N"]}),
            "",
            """max_batch_size: 4 dynamic_batching {}
            input { name: "X" data_type: TYPE_FP32 dims: 3 }
            input { name: "A" data_type: TYPE_FP32 dims: 1 reshape {} }
            output { name: "Y" data_type: TYPE_FP32 dims: 3 }
            output { name: "B" data_type: TYPE_FP32 dims: 1 reshape {} }""",
        ),
        (
            of({"X": [2, "K"]}, {"Y": [2, "K"]}),
            "",
            """input { name: "X" data_type: TYPE_FP32 dims: [2, -1] }
            output { name: "Y" data_type: TYPE_FP32 dims: [2, -1] }""",
        ),
        (
            of({"X": ["N", "M"]}, {"Y": ["N", "M"]}),
            "max_batch_size: 1",
            """max_batch_size: 1
            input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }""",
        ),
        (
            of({"X": ["N", "M"]}, {"Y": ["N", "M"]}),
            'max_batch_size: 16 input { name: "X" data_type: TYPE_FP32 dims: 5 }',
            """max_batch_size: 16 dynamic_batching {}
            input { name: "X" data_type: TYPE_FP32 dims: 5 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }""",
        ),
        (
            of({"X": ["N", "M"]}, {"Y": ["N", "M"]}),
            'output { name: "Y" data_type: TYPE_FP32 dims: -1 }',
            """max_batch_size: 4 dynamic_batching {}
            input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }""",
        ),
        (
            of({"X": ["N", "M"]}, {"Y": ["N", "M"]}),
            "sequence_batching {}",
            """max_batch_size: 4 sequence_batching {}
            input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }""",
        ),
        (
            of({"X": ["N", 3]}, {"Y": ["N", 3]}, {"BIAS": [1]}),
            "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 5 }",
            """max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 5 }
            input { name: "X" data_type: TYPE_FP32 dims: 3 } output { name: "Y" data_type: TYPE_FP32 dims: 3 }""",
        ),
    ],
    ids=["batched", "fixed", "one", "input kept", "output kept", "sequences", "initialiser"],
)
def test_completion_by_tritons_rule(found: OnnxSignature, stated: str, completed: str) -> None:
    assert signature.complete(configuration(stated), found, default_batch_size=4) == configuration(completed)


@pytest.mark.parametrize("axis", ["N", "batch", "batch_size", "Batch", "unk__batch"])
def test_a_shared_first_axis_that_is_named_as_a_batch_is_one(axis: str) -> None:
    found = of({"X": [axis, 3], "A": [axis]}, {"Y": [axis, "M"]})
    assert signature.complete(configuration(""), found, 0) == configuration(
        """max_batch_size: 64 dynamic_batching {}
        input { name: "X" data_type: TYPE_FP32 dims: 3 }
        input { name: "A" data_type: TYPE_FP32 dims: 1 reshape {} }
        output { name: "Y" data_type: TYPE_FP32 dims: -1 }"""
    )


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ({"X": ["rows", 3]}, {"Y": ["rows", 3]}),
        ({"X": ["n", 3]}, {"Y": ["n", 3]}),
        ({"X": ["N", 3]}, {"Y": ["batch", 3]}),
        ({"X": ["N", 3]}, {"Y": ["", 3]}),
        ({"X": ["", 3]}, {"Y": ["", 3]}),
        ({"X": [3, "N"]}, {"Y": [3, "N"]}),
        ({"X": ["N", 3]}, {"Y": []}),
        ({"X": []}, {"Y": []}),
    ],
)
def test_any_other_model_keeps_the_shapes_of_its_file(inputs: Shapes, outputs: Shapes) -> None:
    found = of(inputs, outputs)
    done = signature.complete(configuration(""), found, 0)
    assert (done.max_batch_size, done.WhichOneof("scheduling_choice")) == (0, None)
    assert [tuple(entry.dims) for entry in done.input] == [given.shape for given in found.inputs.values()]
    assert [tuple(entry.dims) for entry in done.output] == [given.shape for given in found.outputs.values()]


def test_a_sequence_of_maps_does_not_hide_the_batch_axis() -> None:
    found = OnnxSignature(tensors({"X": ["N", 4]}), tensors({"P": []}, MAPS) | tensors({"L": ["N"]}))
    assert signature.complete(configuration(""), found, 0) == configuration(
        """max_batch_size: 64 dynamic_batching {}
        input { name: "X" data_type: TYPE_FP32 dims: 4 }
        output { name: "P" data_type: TYPE_FP32 dims: -1 }
        output { name: "L" data_type: TYPE_FP32 dims: 1 reshape {} }"""
    )


def test_dims_that_were_stated_without_a_batch_size_keep_their_meaning() -> None:
    config = configuration('input { name: "X" data_type: TYPE_FP32 dims: [-1, 3] }')
    done = signature.complete(config, of({"X": ["N", 3]}, {"Y": ["N", 3]}), 0)
    assert done.max_batch_size == 0
    assert list(done.output[0].dims) == [-1, 3]


def test_a_stated_batch_size_is_kept_whatever_the_axes_are_called() -> None:
    done = signature.complete(configuration("max_batch_size: 8"), of({"X": ["a", 3]}, {"Y": ["b", 3]}), 0)
    assert (done.max_batch_size, list(done.input[0].dims)) == (8, [3])
    assert done.HasField("dynamic_batching")


@pytest.mark.parametrize("default_batch_size", [0, 4])
def test_where_both_lists_stand_nothing_is_completed(default_batch_size: int) -> None:
    config = both("dims: [-1, 3]", "dims: [-1, 3]")
    done = signature.complete(config, of({"X": ["N", 3]}, {"Y": ["N", 3]}), default_batch_size)
    assert done == config
    assert done is not config


def test_completion_leaves_its_argument_as_it_is() -> None:
    config = configuration("")
    signature.complete(config, of({"X": ["N", 3]}, {"Y": ["N", 3]}), 4)
    assert config == configuration("")


@pytest.mark.parametrize("shape", [[2, 3], []])
def test_a_batch_size_for_a_model_that_cannot_batch_is_refused(shape: list[int | str]) -> None:
    with pytest.raises(ServingError) as caught:
        signature.complete(configuration("max_batch_size: 8"), of({"X": shape}, {"Y": shape}), 4)
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        "autofill failed for model 'm': model does not support batching while non-zero max_batch_size is specified",
    )


@pytest.mark.parametrize(
    ("onnx_type", "kind", "message"),
    [
        (
            "tensor(float8e4m3fn)",
            Kind.INTERNAL,
            "unsupported datatype tensor(float8e4m3fn) for output 'Y' for model 'm'",
        ),
        (
            "seq(tensor(float))",
            Kind.UNSUPPORTED,
            "Unsupported ONNX Type 'ONNX_TYPE_SEQUENCE' for I/O 'Y', expected 'ONNX_TYPE_TENSOR'.",
        ),
        (
            "seq(map(int64,tensor(string)))",
            Kind.UNSUPPORTED,
            "Unsupported ONNX Type 'ONNX_TYPE_SEQUENCE' for I/O 'Y', expected 'ONNX_TYPE_TENSOR'.",
        ),
        (
            "map(int64,tensor(float))",
            Kind.UNSUPPORTED,
            "Unsupported ONNX Type 'ONNX_TYPE_MAP' for I/O 'Y', expected 'ONNX_TYPE_TENSOR'.",
        ),
        (
            "optional(tensor(float))",
            Kind.UNSUPPORTED,
            "Unsupported ONNX Type 'ONNX_TYPE_OPTIONAL' for I/O 'Y', expected 'ONNX_TYPE_TENSOR'.",
        ),
        (
            "sparse_tensor(float)",
            Kind.UNSUPPORTED,
            "Unsupported ONNX Type 'ONNX_TYPE_SPARSETENSOR' for I/O 'Y', expected 'ONNX_TYPE_TENSOR'.",
        ),
    ],
)
def test_a_type_that_the_protocol_does_not_have_is_refused_by_name(onnx_type: str, kind: Kind, message: str) -> None:
    found = OnnxSignature(tensors({"X": [2]}), tensors({"Y": [2]}, onnx_type))
    with pytest.raises(ServingError) as caught:
        signature.complete(configuration(""), found, 0)
    assert (caught.value.kind, caught.value.message) == (kind, message)
    assert refusal(both("dims: 2", "dims: 2"), found) == (kind, message)


# -- checks


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            configuration('output { name: "Y" data_type: TYPE_FP32 dims: [-1, 3] }'),
            "unable to load model 'm', configuration expects 0 inputs, model provides 1",
        ),
        (
            both("dims: [-1, 3] optional: true", "dims: [-1, 3]"),
            "unable to load model 'm', configuration expects 0 inputs, model provides 1",
        ),
        (
            both("dims: [-1, 3]", "dims: [-1, 3]", 'input { name: "Z" data_type: TYPE_FP32 dims: 1 optional: true }'),
            "unexpected inference input 'Z', allowed inputs are: A, X",
        ),
        (
            configuration('input { name: "Z" data_type: TYPE_FP32 dims: 1 }'),
            "unexpected inference input 'Z', allowed inputs are: X",
        ),
        (
            both("dims: [-1, 3]", "dims: [-1, 3]", 'output { name: "X" data_type: TYPE_FP32 dims: 1 }'),
            "unexpected inference output 'X', allowed outputs are: B, Y",
        ),
        (
            configuration('input { name: "X" data_type: TYPE_STRING dims: [-1, 3] }'),
            "unable to load model 'm', configuration expects datatype TYPE_STRING for input 'X', "
            "model provides TYPE_FP32",
        ),
        (
            both("dims: [-1, 3]", "dims: [-1, 3]", 'output { name: "B" data_type: TYPE_INT64 dims: -1 }'),
            "unable to load model 'm', configuration expects datatype TYPE_INT64 for output 'B', "
            "model provides TYPE_FP32",
        ),
        (
            both("dims: [-1, 3, 1]", "dims: [-1, 3]"),
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 3 dimensions (shape [-1,3,1])",
        ),
        (
            both("dims: [-1, 4]", "dims: [-1, 3]"),
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 2 dimensions (shape [-1,4])",
        ),
        (
            both("dims: [-1, -1]", "dims: [-1, 3]"),
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 2 dimensions (shape [-1,-1])",
        ),
        (
            both("dims: [-1, 3]", "dims: [7, 3]"),
            "model 'm', tensor 'Y': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 2 dimensions (shape [7,3])",
        ),
        (
            both("dims: [3, 1]", "dims: 3", "max_batch_size: 8"),
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,3,1])",
        ),
        (
            both("dims: 3 reshape { shape: [1, 3] }", "dims: 3", "max_batch_size: 8"),
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,3]) but the model configuration "
            "specifies 3 dimensions (an initial batch dimension because max_batch_size > 0 followed by the explicit "
            "tensor shape, making complete shape [-1,1,3])",
        ),
        (
            both(
                "dims: 3",
                "dims: 3",
                'max_batch_size: 8 input { name: "A" data_type: TYPE_FP32 dims: 1 optional: true }',
            ),
            "unable to load model 'm', optional input 'A' is not supported for models that support batching",
        ),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(config: pb.ModelConfig, message: str) -> None:
    found = of({"X": ["N", 3]}, {"Y": ["N", 3], "B": ["N"]}, {"A": [1]})
    assert refusal(config, found) == (Kind.INVALID, message)


def test_a_string_of_the_file_is_called_by_the_protocols_name() -> None:
    found = OnnxSignature(tensors({"X": [2]}, BYTES.onnx), tensors({"Y": [2]}))
    assert refusal(both("dims: 2", "dims: 2"), found) == (
        Kind.INVALID,
        "unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'X', model provides TYPE_BYTES",
    )


@pytest.mark.parametrize("shape", [[2, 3], []])
def test_a_model_whose_first_axis_is_not_open_cannot_batch(shape: list[int | str]) -> None:
    printed = str(shape).replace(" ", "")
    assert refusal(both("dims: 3", "dims: 3", "max_batch_size: 8"), of({"X": shape}, {"Y": shape})) == (
        Kind.INVALID,
        "model 'm', tensor 'X': for the model to support batching the shape should have at least 1 dimension and the "
        f"first dimension must be -1; but shape expected by the model is {printed}",
    )


def test_a_scalar_is_configured_as_one_element_or_without_dims() -> None:
    found = of({"X": []}, {"Y": []})
    for dims in ("", "dims: 1"):
        signature.check(both(dims, dims), found)
    assert refusal(both("dims: [1, 1]", ""), found) == (
        Kind.INVALID,
        "unable to load model 'm', scalar tensor 'X', should only provide 1 in the model configuration when the model "
        "doesn't support batching. Model configuration provided: [1,1].",
    )


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (both("dims: [5, 3]", "dims: [-1, 3]"), of({"X": ["N", "M"]}, {"Y": ["N", 3]})),
        (both("dims: 5", "dims: -1", "max_batch_size: 2"), of({"X": ["N", "M"]}, {"Y": ["N", "M"]})),
        (
            both("dims: 6 reshape { shape: [2, 3] }", "dims: 6 reshape { shape: [3, 2] }"),
            of({"X": [2, 3]}, {"Y": [3, 2]}),
        ),
        (
            both("dims: 1 reshape {}", "dims: 1 reshape {}", "max_batch_size: 2"),
            of({"X": ["N"]}, {"Y": ["N"]}),
        ),
        (
            both("dims: 2", "dims: 2", 'input { name: "A" data_type: TYPE_FP32 dims: 1 optional: true }'),
            of({"X": [2]}, {"Y": [2]}, {"A": [1]}),
        ),
        (both("dims: 2", "dims: 2"), of({"X": [2]}, {"Y": [2], "Z": [2]})),
    ],
    ids=["narrower input", "narrower rows", "reshape", "empty reshape", "optional", "output not listed"],
)
def test_a_configuration_that_agrees_with_the_file_passes(config: pb.ModelConfig, found: OnnxSignature) -> None:
    signature.check(config, found)


def test_columns_of_maps_are_held_against_the_labels_where_they_are_known() -> None:
    outputs = {"Y": OnnxTensor("Y", FP32, MAPS, ("", 2), maps=True, keys=("no", "yes"))}
    found = OnnxSignature(tensors({"X": ["N", 2]}), outputs)
    for dims in ("dims: [-1, 2]", "dims: [-1, -1]"):
        signature.check(both("dims: [-1, 2]", dims), found)
    assert refusal(both("dims: [-1, 2]", "dims: [-1, 3]"), found) == (
        Kind.INVALID,
        "model 'm', tensor 'Y': the model expects 2 dimensions (shape [-1,2]) but the model configuration specifies "
        "2 dimensions (shape [-1,3])",
    )
