"""Ragged, padded and optional inputs: what the model is fed for a batch, and how its outputs become the requests'."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import helper, parser
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.runtime import Pads
from penstock.statistics import Padded
from penstock.tensor import BYTES, FP32, Array
from penstock_runtimes.onnx import assembly
from penstock_runtimes.onnx.instance import INDIVISIBLE_RUNS, OnnxInstance
from penstock_runtimes.onnx.signature import OnnxSignature, OnnxTensor

from .test_onnx_instance import arrays, load, request


def fp32(*shape: int) -> Array:
    return np.arange(1, 1 + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def write(path: Path, graph: str, optional: Sequence[str] = ()) -> Path:
    """A bare model of a graph in ONNX's own text form. `optional` initialisers, of rows of 3, are inputs as well."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> m {graph}')
    for name in optional:
        model.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]))
    onnx.save(model, path / "m.onnx")
    return path / "m.onnx"


def answers(instance: OnnxInstance, *requests: InferRequest) -> list[dict[str, list[Any]]]:
    return [{name: array.tolist() for name, array in arrays(answer).items()} for answer in instance.execute(requests)]


def alone(instance: OnnxInstance, *requests: InferRequest) -> list[dict[str, list[Any]]]:
    return [answer for request in requests for answer in answers(instance, request)]


# -- ragged inputs, and what is computed from them


def fed(kind: str, *shapes: tuple[int, ...], datatype: str = "TYPE_INT32", batched: bool = True) -> Array:
    """The input C that is computed from a batch of ragged inputs X with these shapes."""
    config = pb.ModelConfig()
    text = f"""
    max_batch_size: {8 if batched else 0}
    input {{ name: "X" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true }}
    batch_input {{ kind: {kind} target_name: "C" data_type: {datatype} source_input: "X" }}
    """
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    made = assembly.of(config, OnnxSignature({}, {}))
    assert made is not None
    feed = made.gather([request({"X": np.full(shape, number, np.float32)}) for number, shape in enumerate(shapes)])
    assert feed["X"].tolist() == [number for number, shape in enumerate(shapes) for _ in range(np.prod(shape))]
    return feed["C"]


# Two rows of [3,1] and one of [2,2].
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BATCH_ELEMENT_COUNT", [6, 4]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT", [6, 10]),
        ("BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO", [0, 6, 10]),
        ("BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", [0, 0, 0, 0, 0, 0]),
        ("BATCH_ITEM_SHAPE", [[3, 1], [3, 1], [2, 2]]),
        ("BATCH_ITEM_SHAPE_FLATTEN", [3, 1, 3, 1, 2, 2]),
    ],
)
def test_an_input_is_computed_from_what_the_batch_is_made_of(kind: str, expected: list[Any]) -> None:
    assert fed(kind, (2, 3, 1), (1, 2, 2)).tolist() == expected
    of_floats = fed(kind, (2, 3, 1), (1, 2, 2), datatype="TYPE_FP32")
    assert (of_floats.dtype, of_floats.tolist()) == (FP32.dtype, expected)


def test_without_a_batch_axis_all_axes_are_of_the_item() -> None:
    assert fed("BATCH_ITEM_SHAPE", (2, 3), batched=False).tolist() == [[2, 3]]
    assert fed("BATCH_ELEMENT_COUNT", (2, 3), batched=False).dtype == np.int32


SUMS = """\
(float[all] X, int32[bounds] B) => (float[all] Y, float[requests] S) {
  Y = Add(X, X)
  axis = Constant<value_int: int = 0>()
  sums = CumSum(X, axis)
  zero = Constant<value_floats: floats = [0]>()
  from_zero = Concat<axis = 0>(zero, sums)
  picked = Gather(from_zero, B)
  first = Constant<value_ints: ints = [0]>()
  second = Constant<value_ints: ints = [1]>()
  last = Constant<value_ints: ints = [-1]>()
  end = Constant<value_ints: ints = [9223372036854775807]>()
  before = Slice(picked, first, last)
  after = Slice(picked, second, end)
  S = Sub(after, before)
}"""
SUMS_CONFIG = """
max_batch_size: 8
input { name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
output [ { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] },
         { name: "S" data_type: TYPE_FP32 dims: [ 1 ] reshape { } } ]
batch_input {
  kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "B" data_type: TYPE_INT32 source_input: "X"
}
batch_output { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" }
"""


def test_requests_of_different_lengths_run_as_one_and_get_what_is_theirs(tmp_path: Path) -> None:
    instance = load(write(tmp_path, SUMS), SUMS_CONFIG)
    requests = [request({"X": fp32(1, length)}) for length in (3, 1, 2)]
    expected = [
        {"Y": [[2, 4, 6]], "S": [[6]]},
        {"Y": [[2]], "S": [[1]]},
        {"Y": [[2, 4]], "S": [[3]]},
    ]
    assert answers(instance, *requests) == expected == alone(instance, *requests)


def test_an_output_that_does_not_divide_by_the_shapes_is_an_error_that_names_both(tmp_path: Path) -> None:
    path = write(tmp_path, "(float[all] X) => (float[twice] Y) { Y = Concat<axis = 0>(X, X) }")
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
    output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] }
    batch_output { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" }
    """
    failures = load(path, config).execute([request({"X": fp32(1, 2)}), request({"X": fp32(1, 3)})])
    message = "output 'Y' of model 'm' has {} elements, but the shapes of its requests, {}, have {}"
    assert [(error.kind, error.message) for error in failures if isinstance(error, ServingError)] == [
        (Kind.INTERNAL, message.format(4, "[1,2]", 2)),
        (Kind.INTERNAL, message.format(6, "[1,3]", 3)),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('target_name: "B"', "", "unable to load model 'm', configuration expects 1 inputs, model provides 2"),
        ('target_name: "B"', 'target_name: "A"', "unexpected inference input 'A', allowed inputs are: B, X"),
        (
            '"B" data_type: TYPE_INT32',
            '"B" data_type: TYPE_FP32',
            "unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'B', "
            "model provides TYPE_INT32",
        ),
        (
            "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
            "BATCH_ITEM_SHAPE",
            "unable to load model 'm', batch input 'B' of kind BATCH_ITEM_SHAPE has the shape [-1,-1], "
            "model provides [-1]",
        ),
        (
            '"Y" data_type: TYPE_FP32 dims: [ -1 ]',
            '"Y" data_type: TYPE_FP32 dims: [ -1, -1 ]',
            "unable to load model 'm', output 'Y' with dims [-1,-1] is to be divided by input 'X' with dims [-1], "
            "which has no such axis",
        ),
    ],
)
def test_a_ragged_model_that_contradicts_its_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUMS_CONFIG
    with pytest.raises(ServingError) as caught:
        load(write(tmp_path, SUMS), SUMS_CONFIG.replace(old, new))
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_a_ragged_input_is_flat_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "(float[rows,all] X) => (float[rows,all] Y) { Y = Add(X, X) }")
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
    output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] }
    """
    with pytest.raises(ServingError) as caught:
        load(path, config)
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        "unable to load model 'm', configuration expects model provides input with shape [-1]  for ragged input 'X', "
        "model provides [-1,-1]",
    )


# -- optional inputs


OPTIONAL = "(float[batch,3] X) => (float[batch,3] Y) <float[1,3] Z = {10,20,30}> { Y = Add(X, Z) }"
OPTIONAL_CONFIG = """
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: 3 }, { name: "Z" data_type: TYPE_FP32 dims: 3 optional: true } ]
output { name: "Y" data_type: TYPE_FP32 dims: 3 }
"""


def test_an_optional_input_is_the_files_own_where_no_request_of_a_batch_has_it(tmp_path: Path) -> None:
    instance = load(write(tmp_path, OPTIONAL, ["Z"]), OPTIONAL_CONFIG)
    without = [request({"X": fp32(rows, 3)}) for rows in (2, 1)]
    having = [request({"X": fp32(rows, 3), "Z": fp32(rows, 3)}) for rows in (2, 1)]
    assert answers(instance, *without) == [{"Y": [[11, 22, 33], [14, 25, 36]]}, {"Y": [[11, 22, 33]]}]
    assert answers(instance, *having) == [{"Y": [[2, 4, 6], [8, 10, 12]]}, {"Y": [[2, 4, 6]]}]


def test_an_optional_input_that_is_reshaped_may_be_left_out_too(tmp_path: Path) -> None:
    reshaped = OPTIONAL_CONFIG.replace("dims: 3 optional: true", "dims: [ 1, 3 ] reshape { shape: 3 } optional: true")
    instance = load(write(tmp_path, OPTIONAL, ["Z"]), reshaped)
    assert answers(instance, request({"X": fp32(1, 3)})) == [{"Y": [[11, 22, 33]]}]
    assert answers(instance, request({"X": fp32(1, 3), "Z": fp32(1, 1, 3)})) == [{"Y": [[2, 4, 6]]}]


# -- padded inputs


MASKED = """\
(float[batch,length] X, float[batch,length] M) => (float[batch,length] Y, float[batch,1] S) {
  Y = Add(X, X)
  kept = Mul(X, M)
  axis = Constant<value_ints: ints = [1]>()
  S = ReduceSum<keepdims = 1>(kept, axis)
}"""
MASKED_CONFIG = """
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: -1 }, { name: "M" data_type: TYPE_FP32 dims: -1 } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: -1 }, { name: "S" data_type: TYPE_FP32 dims: 1 } ]
"""


def parameters(**values: str) -> str:
    """By their names, with `__` for a dot."""
    return "".join(
        f'parameters {{ key: "{key.replace("__", ".")}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    )


PADDED = parameters(pad__X__axis="1", pad__X__value="9", pad__M__axis="1")


def masked(*lengths: int) -> list[InferRequest]:
    return [request({"X": fp32(1, length), "M": np.ones((1, length), np.float32)}) for length in lengths]


def padded(instance: OnnxInstance) -> Padded:
    assert isinstance(instance, Pads)
    assert instance.padded is not None
    return instance.padded


def test_padded_requests_get_outputs_of_their_own_length_and_the_padding_is_counted(tmp_path: Path) -> None:
    instance = load(write(tmp_path, MASKED), MASKED_CONFIG + PADDED)
    requests = masked(3, 1, 2)
    expected = [
        {"Y": [[2, 4, 6]], "S": [[6]]},
        {"Y": [[2]], "S": [[1]]},
        {"Y": [[2, 4]], "S": [[3]]},
    ]
    assert answers(instance, *requests) == expected
    assert padded(instance) == Padded(data=12, padding=6)
    assert alone(instance, *requests) == expected
    assert padded(instance) == Padded(data=24, padding=6)  # alone, nothing is filled up


def test_the_model_sees_the_value_of_each_input_up_to_the_longest_or_the_bucket(tmp_path: Path) -> None:
    graph = """(float[batch,length] X) => (float[batch,1] S) {
      axis = Constant<value_ints: ints = [1]>()
      S = ReduceSum<keepdims = 1>(X, axis)
    }"""
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "S" data_type: TYPE_FP32 dims: 1 }
    """
    path = write(tmp_path, graph)
    values = {"pad__X__axis": "1", "pad__X__value": "100"}
    requests = [request({"X": fp32(1, length)}) for length in (1, 3)]
    longest = load(path, config + parameters(**values))
    assert answers(longest, *requests) == [{"S": [[201]]}, {"S": [[6]]}]
    bucketed = load(path, config + parameters(**values, pad__X__buckets="2,4"))
    assert answers(bucketed, *requests) == [{"S": [[301]]}, {"S": [[106]]}]
    assert alone(bucketed, *requests) == [{"S": [[101]]}, {"S": [[106]]}]
    beyond = request({"X": fp32(1, 5)})
    assert answers(bucketed, beyond) == [{"S": [[15]]}]
    assert answers(bucketed, request({"X": fp32(1, 0)})) == [{"S": [[0]]}]


def test_a_request_whose_lengths_disagree_fails_as_it_does_alone_and_no_other_with_it(tmp_path: Path) -> None:
    instance = load(write(tmp_path, MASKED), MASKED_CONFIG + PADDED)
    wrong = request({"X": fp32(1, 3), "M": fp32(1, 2)})
    good, bad, also_good = instance.execute([*masked(2), wrong, *masked(3)])
    assert isinstance(bad, ServingError)
    assert bad.kind is Kind.INVALID
    assert "onnx runtime error" in bad.message
    assert [arrays(answer)["S"].tolist() for answer in (good, also_good)] == [[[3]], [[6]]]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("length", "calls both axes 'length'"), ("?", "has no names that tell their lengths apart")],
)
def test_inputs_of_one_length_have_the_same_buckets(tmp_path: Path, name: str, reason: str) -> None:
    head, arrow, rest = MASKED.partition("=>")
    graph = head.replace("length", name) + arrow + rest
    with pytest.raises(ServingError) as caught:
        load(write(tmp_path, graph), MASKED_CONFIG + PADDED + parameters(pad__M__buckets="4", cut__Y__axis="none"))
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        f"model 'm' pads inputs 'X' and 'M' to different buckets, but the model file {reason}",
    )


def test_an_output_is_cut_where_the_parameters_say_and_not_where_they_say_none(tmp_path: Path) -> None:
    graph = """(float[batch,length] X) => (float[batch,any] Y, float[batch,three,other] Z) {
      Y = Identity(X)
      axis = Constant<value_ints: ints = [1]>()
      one = Unsqueeze(X, axis)
      Z = Concat<axis = 1>(one, one, one)
    }"""
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: -1 }
    output [ { name: "Y" data_type: TYPE_FP32 dims: -1 }, { name: "Z" data_type: TYPE_FP32 dims: [ 3, -1 ] } ]
    """ + parameters(pad__X__axis="1")
    path = write(tmp_path, graph)
    with pytest.raises(ServingError) as caught:
        load(path, config)
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        "model 'm' pads its inputs, and nothing says which axis of output 'Y' is as long as a padded one: state the "
        "parameter 'cut.Y.axis', as one of 1 or none",
    )
    instance = load(path, config + parameters(cut__Y__axis="none", cut__Z__axis="2"))
    short, long = answers(instance, *[request({"X": fp32(1, length)}) for length in (1, 2)])
    assert short == {"Y": [[1, 0]], "Z": [[[1], [1], [1]]]}
    assert long == {"Y": [[1, 2]], "Z": [[[1, 2], [1, 2], [1, 2]]]}


def test_where_the_cut_axis_has_another_length_the_requests_run_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "(float[batch,length] X) => (float[batch,twice] Y) { Y = Concat<axis = 1>(X, X) }")
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }
    """ + parameters(pad__X__axis="1", cut__Y__axis="1")
    instance = load(path, config)
    with caplog.at_level(logging.WARNING):
        for _ in range(INDIVISIBLE_RUNS + 1):
            got = answers(instance, *[request({"X": fp32(1, length)}) for length in (1, 2)])
            assert got == [{"Y": [[1, 1]]}, {"Y": [[1, 2, 1, 2]]}]
    assert [record.getMessage() for record in caplog.records] == [
        "model m: output 'Y' of model 'm' has 4 elements along axis 1, and cannot be cut back like input 'X', which "
        "was padded to 2; its requests run one by one from now on"
    ]


def test_a_model_whose_output_has_no_batch_axis_answers_each_request_as_alone(tmp_path: Path) -> None:
    graph = "(float[batch,3] X) => (int64[found,2] Y) { at = NonZero(X) Y = Transpose<perm = [1, 0]>(at) }"
    path = write(tmp_path, graph)
    config = """
    max_batch_size: 8
    input { name: "X" data_type: TYPE_FP32 dims: 3 } output { name: "Y" data_type: TYPE_INT64 dims: 2 }
    """
    instance = load(path, config)
    requests = [request({"X": np.array([row], np.float32)}) for row in ([0, 1, 0], [1, 1, 1], [0, 0, 0])]
    assert answers(instance, *requests) == [{"Y": [[0, 1]]}, {"Y": [[0, 0], [0, 1], [0, 2]]}, {"Y": []}]


def test_a_batch_that_cannot_be_divided_does_not_end_batching(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instance = load(write(tmp_path, SUMS), SUMS_CONFIG)
    two_rows, one_row = request({"X": fp32(2, 1)}), request({"X": fp32(1, 2)})  # S has an element for each request
    for _ in range(INDIVISIBLE_RUNS):
        assert [got["Y"] for got in answers(instance, two_rows, one_row)] == [[[2], [4]], [[2, 4]]]
        assert [got["S"] for got in answers(instance, one_row, one_row)] == [[[3]], [[3]]]
    assert caplog.records == []


def test_plain_models_have_no_assembly_and_count_no_padding(tmp_path: Path) -> None:
    instance = load(write(tmp_path, OPTIONAL, ["Z"]), OPTIONAL_CONFIG)
    assert isinstance(instance, Pads)
    assert instance.padded is None


@pytest.mark.parametrize("value", ["[PAD]", ""])
def test_strings_are_padded_with_strings(value: str) -> None:
    config = pb.ModelConfig()
    text = 'max_batch_size: 8 backend: "onnxruntime" input { name: "X" data_type: TYPE_STRING dims: -1 }'
    text_format.Parse(text + parameters(pad__X__axis="1", pad__X__value=value), config, descriptor_pool=pb.POOL)
    made = assembly.of(config, OnnxSignature({"X": OnnxTensor("X", BYTES, BYTES.onnx, ("batch", "length"))}, {}))
    assert made is not None
    given = [np.array([[b"a", b"b"]], object), np.array([[b"c"]], object)]
    feed = made.gather([request({"X": array}) for array in given])
    assert feed["X"].tolist() == [[b"a", b"b"], [b"c", value.encode()]]
