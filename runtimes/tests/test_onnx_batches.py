"""Requests that run together get what each would get alone; a run that nobody waits for any more ends."""

import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from penstock import pb
from penstock.batching import DEPARTURES, Batcher
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import batch_policy
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled
from penstock.tensor import FP32, Tensor
from penstock_runtimes.onnx.instance import OnnxInstance

from .test_onnx_instance import load, request

GONE = ServingError(Kind.CANCELLED, "gone")

# Operators that give the same bits however many rows there are, from [rows,3] to [rows,3]; each takes X, or X and Z.
OPERATORS: dict[str, int] = {"Add": 2, "Mul": 2, "Sub": 2, "Relu": 1, "Neg": 1, "Abs": 1, "Floor": 1, "Max": 2}


def chain(path: Path, operators: list[str], axes: list[str | int | None], *, optional: bool = False) -> Path:
    """A model that applies the operators one after the other: V0 = X, V<n> = operator(V<n-1>[, Z]), of which Y is the
    last. W are the sums of the rows of X Z. X and Z have the `axes`; an `optional` Z is 0.5 where it is not given."""
    nodes = [
        helper.make_node(name, [f"V{number}", "Z"][: OPERATORS[name]], [f"V{number + 1}"])
        for number, name in enumerate(operators)
    ]
    rows = len(axes) > 1
    outputs = [("Y", axes)] + ([("W", ["batch", 1])] if rows else [])
    constants = [numpy_helper.from_array(np.array([1], np.int64), "axis")]
    if optional:
        constants.append(numpy_helper.from_array(np.full((1, 3), 0.5, np.float32), "Z"))
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["X"], ["V0"]),
            *nodes,
            helper.make_node("Identity", [f"V{len(operators)}"], ["Y"]),
            helper.make_node("Mul", ["V0", "Z"], ["kept"]),
            *([helper.make_node("ReduceSum", ["kept", "axis"], ["W"], keepdims=1)] if rows else []),
        ],
        "chain",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("X", "Z")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / "m.onnx")
    return path / "m.onnx"


def sent(inputs: dict[str, NDArray[np.float32]], outputs: list[str]) -> Pending:
    return Pending(request(inputs, outputs), lambda result, final=True, partial=False: PLENTY, Cancelled(), 0, 0)


def share_batches(instance: OnnxInstance, text: str, waiting: list[Pending]) -> int:
    """Run the requests in the batches that a batcher of this configuration makes of them, and each of them alone, and
    compare the answers to the bit. Gives the number of batches."""
    config = pb.ModelConfig(backend="onnxruntime")
    text_format.Merge(text, config, descriptor_pool=pb.POOL)
    policy = batch_policy(config)
    assert policy is not None
    batcher = Batcher(policy, dict.fromkeys(DEPARTURES, 0))
    for pending in waiting:
        batcher.add(pending, now_ns=0)
    batches, together = 0, list[InferResponse | ServingError]()
    while batch := batcher.take(now_ns=0):
        together += instance.execute([pending.request for pending in batch])
        batches += 1
    assert len(together) == len(waiting)
    for pending, answer in zip(waiting, together, strict=True):
        [alone] = instance.execute([pending.request])
        assert isinstance(answer, InferResponse)
        assert isinstance(alone, InferResponse)
        assert [output.name for output in answer.outputs] == [output.name for output in alone.outputs]
        for batched, single in zip(answer.outputs, alone.outputs, strict=True):
            assert batched.array.shape == single.array.shape
            assert batched.array.tobytes() == single.array.tobytes()
    return batches


MODELS = st.lists(st.sampled_from([*OPERATORS]), min_size=1, max_size=4)
ASKED = st.sampled_from([[], ["Y"], ["W", "Y"]])
random_models = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BATCHED = "max_batch_size: 8 dynamic_batching { preferred_batch_size: 8 }"
XZ = "".join(f'input {{ name: "{name}" data_type: TYPE_FP32 dims: %s }}' for name in "XZ")
YW = """output { name: "Y" data_type: TYPE_FP32 dims: %s } output { name: "W" data_type: TYPE_FP32 dims: 1 }"""


@random_models
@given(operators=MODELS, mix=st.lists(st.tuples(st.integers(0, 5), ASKED), min_size=1, max_size=8), seed=st.integers(0))
def test_batched_equals_unbatched_bit_for_bit(
    tmp_path: Path, operators: list[str], mix: list[tuple[int, list[str]]], seed: int
) -> None:
    text = BATCHED + XZ % (3, 3) + YW % 3
    instance = load(chain(tmp_path, operators, ["batch", 3]), text)
    random = np.random.default_rng(seed)
    waiting = [
        sent({name: random.normal(size=(rows, 3)).astype(np.float32) for name in ("X", "Z")}, outputs)
        for rows, outputs in mix
    ]
    share_batches(instance, text, waiting)


@random_models
@given(
    operators=MODELS,
    mix=st.lists(st.tuples(st.integers(1, 5), st.booleans(), ASKED), min_size=1, max_size=8),
    seed=st.integers(0),
)
def test_with_and_without_an_optional_input_batched_equals_unbatched(
    tmp_path: Path, operators: list[str], mix: list[tuple[int, bool, list[str]]], seed: int
) -> None:
    text = BATCHED + (XZ % (3, 3)).replace("3 }", "3 optional: true }").replace("3 optional: true }", "3 }", 1) + YW % 3
    instance = load(chain(tmp_path, operators, ["batch", 3], optional=True), text)
    random = np.random.default_rng(seed)
    waiting = [
        sent({name: random.normal(size=(rows, 3)).astype(np.float32) for name in ("X", "Z")[: 1 + has_both]}, outputs)
        for rows, has_both, outputs in mix
    ]
    share_batches(instance, text, waiting)


@random_models
@given(
    operators=MODELS,
    mix=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=8),
    seed=st.integers(0),
)
def test_ragged_batched_equals_unbatched(
    tmp_path: Path, operators: list[str], mix: list[tuple[int, int]], seed: int
) -> None:
    ragged = (XZ % (-1, -1)).replace("dims: -1", "dims: -1 allow_ragged_batch: true")
    scattered = """
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
    batch_output { target_name: "Y" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "X" }
    """
    instance = load(chain(tmp_path, operators, ["all"]), BATCHED + ragged + scattered)
    random = np.random.default_rng(seed)
    waiting = [sent({name: random.normal(size=shape).astype(np.float32) for name in ("X", "Z")}, []) for shape in mix]
    batches = share_batches(instance, BATCHED + ragged, waiting)
    if all(length for _, length in mix):  # whatever the lengths are: rows alone fill a batch
        assert batches == 1 or sum(rows for rows, _ in mix) > 8


@random_models
@given(
    operators=MODELS,
    mix=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=8),
    buckets=st.sampled_from(["", "4,8"]),
    asked=ASKED,
    seed=st.integers(0),
)
def test_padded_equals_unpadded_where_the_model_masks(
    tmp_path: Path, operators: list[str], mix: list[tuple[int, int]], buckets: str, asked: list[str], seed: int
) -> None:
    """Z is the mask: padded with 0. Whole numbers above 0 have sums that are exact whatever is added up first, and that
    no padding changes: -0 with a 0 beside it is 0."""
    values = {"X.axis": "1", "X.value": "7", "Z.axis": "1"} | ({f"{name}.buckets": buckets for name in "XZ" if buckets})
    stated = "".join(
        f'parameters {{ key: "pad.{key}" value {{ string_value: "{value}" }} }}' for key, value in values.items()
    )
    text = BATCHED + XZ % (-1, -1) + YW % -1 + stated
    instance = load(chain(tmp_path, operators, ["batch", "length"]), text)
    random = np.random.default_rng(seed)
    waiting = [
        sent({name: random.integers(1, 9, shape).astype(np.float32) for name in ("X", "Z")}, asked) for shape in mix
    ]
    batches = share_batches(instance, text, waiting)
    if not buckets and all(length for _, length in mix):
        assert batches == 1 or sum(rows for rows, _ in mix) > 8


# -- ending a run


@pytest.fixture
def slow(tmp_path: Path) -> OnnxInstance:
    """Y = X after as many steps of about a millisecond as X says; no batch axis."""
    square = [256, 256]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("MatMul", ["power", "power"], ["next"])],
        "step",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("power", TensorProto.FLOAT, square),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, square),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Squeeze", ["X"], ["number"]),
            helper.make_node("Cast", ["number"], ["steps"], to=TensorProto.INT64),
            helper.make_node("Mul", ["X", "zero"], ["nothing"]),
            helper.make_node("Expand", ["nothing", "side"], ["start"]),
            helper.make_node("Loop", ["steps", "true", "start"], ["end"], body=body),
            helper.make_node("ReduceMax", ["end"], ["late"], keepdims=0),
            helper.make_node("Add", ["X", "late"], ["Y"]),
        ],
        "slow",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1])],
        [
            numpy_helper.from_array(np.array(0, np.float32), "zero"),
            numpy_helper.from_array(np.array(square, np.int64), "side"),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    return load(tmp_path / "m.onnx")


def steps(number: float) -> InferRequest:
    return InferRequest("m", "", "", {"X": Tensor("X", FP32, np.array([number], np.float32))}, {})


def test_a_run_ends_once_it_is_unwanted_and_the_next_is_not_touched(slow: OnnxInstance) -> None:
    unwanted = Cancelled()
    timer = threading.Timer(0.05, unwanted.set, [GONE])
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(ServingError, match="terminate"):
        slow.execute([steps(1e6)], unwanted)  # a quarter of an hour, if nobody ended it
    assert time.monotonic() - began_s < 30
    timer.join()
    slow.execute([steps(0)], Cancelled())
    with pytest.raises(ServingError, match="terminate"):
        slow.execute([steps(1e6)], unwanted)  # also after a short run
    [answer] = slow.execute([steps(2)], Cancelled())
    assert isinstance(answer, InferResponse)
    assert answer.outputs[0].array.tolist() == [2]


def test_a_run_that_was_unwanted_before_it_began_ends_at_once(slow: OnnxInstance) -> None:
    unwanted = Cancelled()
    unwanted.set(GONE)
    with pytest.raises(ServingError, match="terminate"):
        slow.execute([steps(1e6)], unwanted)


def test_an_ended_batch_is_not_run_one_by_one(tmp_path: Path) -> None:
    instance = load(chain(tmp_path, ["Add"], ["batch", 3]), BATCHED + XZ % (3, 3) + YW % 3)
    ones = np.ones((1, 3), np.float32)
    batch = [request({"X": ones, "Z": ones}) for _ in range(2)]
    unwanted = Cancelled()
    assert len(instance.execute(batch, unwanted)) == 2
    unwanted.set(GONE)
    with pytest.raises(ServingError, match="terminate"):
        instance.execute(batch, unwanted)


def test_without_a_batch_axis_every_run_of_an_ended_batch_ends(slow: OnnxInstance) -> None:
    unwanted = Cancelled()
    unwanted.set(GONE)
    answers = slow.execute([steps(1e6), steps(1e6)], unwanted)
    assert all(isinstance(answer, ServingError) and "terminate" in answer.message for answer in answers)
