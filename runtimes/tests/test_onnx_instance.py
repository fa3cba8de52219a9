import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from penstock import model_config, pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.runtime import PLENTY, Cancelled, ModelFiles, Placement
from penstock.tensor import BY_DTYPE, DATATYPES, FP32, Array, Tensor, objects
from penstock_runtimes.onnx import OnnxRuntime
from penstock_runtimes.onnx.instance import OnnxInstance
from penstock_runtimes.onnx.signature import OnnxSignature, OnnxTensor

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "model_repository"
BF16 = np.dtype(ml_dtypes.bfloat16)

Axes = Sequence[int | str]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the conformance tests, made by a process that can import them."""
    directory = tmp_path_factory.mktemp("fixtures")
    code = "import sys, pathlib; from conformance_tests.models.fixtures import make_fixtures as make"
    subprocess.run(
        [sys.executable, "-c", f"{code}; make(pathlib.Path(sys.argv[1]))", str(directory)], cwd=ROOT, check=True
    )
    return directory


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a bare model of copies: each (ONNX element type, shape of X<n>, shape of its copy Y<n>)."""

    def write(*copies: tuple[int, Axes, Axes], operator: str = "Identity") -> Path:
        made = helper.make_graph(
            [helper.make_node(operator, [f"X{number}"], [f"Y{number}"]) for number in range(len(copies))],
            "copies",
            [
                helper.make_tensor_value_info(f"X{number}", kind, shape)
                for number, (kind, shape, _) in enumerate(copies)
            ],
            [
                helper.make_tensor_value_info(f"Y{number}", kind, shape)
                for number, (kind, _, shape) in enumerate(copies)
            ],
        )
        path = tmp_path / "m.onnx"
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    return write


def load(path: Path, text: str = "") -> OnnxInstance:
    """An instance of a bare model file, or of version 1 in a model's directory with its config.pbtxt."""
    if path.is_dir():
        files = ModelFiles(path.name, 1, path, path / "1")
        if (path / "config.pbtxt").exists():
            text += (path / "config.pbtxt").read_text()
    else:
        files = ModelFiles("m", 1, path.parent, path)
    config = pb.ModelConfig()
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    config = model_config.identify(config, files.model, ["model.onnx"])
    runtime, place = OnnxRuntime({}), Placement("cpu")
    config = model_config.normalise(runtime.complete(files, config, place))
    model_config.validate(config, complete=True)
    instance = runtime.open(files, config, place, None)
    assert isinstance(instance, OnnxInstance)
    return instance


def request(inputs: dict[str, Array], outputs: Sequence[str] = (), id: str = "") -> InferRequest:
    tensors = {name: Tensor(name, BY_DTYPE[array.dtype], array) for name, array in inputs.items()}
    first = next(iter(inputs.values()))
    rows = first.shape[0] if first.ndim else 1
    return InferRequest("m", "", id, tensors, {name: RequestedOutput(name) for name in outputs}, rows=rows)


def arrays(answer: InferResponse | ServingError) -> dict[str, Array]:
    if isinstance(answer, ServingError):
        raise answer
    for tensor in answer.outputs:
        assert tensor.array.dtype == tensor.datatype.dtype
    return {tensor.name: tensor.array for tensor in answer.outputs}


def run(instance: OnnxInstance, **inputs: Array) -> dict[str, Array]:
    [answer] = instance.execute([request(inputs)])
    return arrays(answer)


def refusal(instance: OnnxInstance, **inputs: Array) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        run(instance, **inputs)
    return caught.value.kind, caught.value.message


def texts(*elements: str) -> Array:
    return objects([element.encode() for element in elements], (len(elements),))


# -- datatypes


VALUES: dict[str, Any] = {
    "bool": np.array([[True, False, True]]),
    "fp16": np.array([[-65504, 6e-8, np.inf]], np.float16),
    "fp32": np.array([[-3.4e38, 1e-45, np.nan]], np.float32),
    "fp64": np.array([[-1.7e308, 5e-324, np.nan]]),
    "bf16": np.array([[-3.0e38, 1e-40, np.nan]], BF16),
    "bytes": objects([b"a\0b", "zw\u00f6lf \U0001f6b0".encode(), b""], (1, 3)),
} | {row.name.lower(): np.array([[row.low, 1, row.high]], row.dtype) for row in DATATYPES.values() if row.is_integer}


@pytest.mark.parametrize("name", [name.lower() for name in DATATYPES])
def test_every_datatype_goes_in_and_comes_out_to_the_bit(fixtures: Path, name: str) -> None:
    given = VALUES[name]
    instance = load(fixtures / f"identity_{name}")
    got = run(instance, INPUT0=given)["OUTPUT0"]
    assert (got.dtype, got.shape) == (given.dtype, given.shape)
    assert got.tolist() == given.tolist() if name == "bytes" else got.tobytes() == given.tobytes()
    for shape in ((0, 3), (2, 0), (0, 0)):
        got = run(instance, INPUT0=np.zeros(shape, given.dtype))["OUTPUT0"]
        assert (got.dtype, got.shape) == (given.dtype, shape)


@pytest.mark.parametrize("name", ["fp32", "bf16", "bool"])
def test_inputs_are_read_wherever_they_lie(fixtures: Path, name: str) -> None:
    instance = load(fixtures / f"identity_{name}")
    every = np.repeat(VALUES[name], 4, axis=0)
    body = b"\1" + every.tobytes()
    unaligned = np.frombuffer(body, every.dtype, every.size, 1).reshape(every.shape)
    for given in (unaligned, every[::2], every.T, every[:, ::-1]):
        got = run(instance, INPUT0=given)["OUTPUT0"]
        assert got.shape == given.shape
        assert got.tobytes() == given.tobytes()


def test_bfloat16_goes_beside_other_datatypes(write: Write) -> None:
    kinds = (TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.BOOL)
    shapes: list[list[str]] = [["a"], ["b"], [], ["c"]]
    instance = load(write(*((kind, shape, shape) for kind, shape in zip(kinds, shapes, strict=True))))
    x = np.array([0.1], np.float32)
    got = run(instance, X0=np.array([1.5, -2], BF16), X1=x, X2=np.array(7, BF16), X3=np.array([True]))
    assert {name: array.tolist() for name, array in got.items()} == {
        "Y0": [1.5, -2],
        "Y1": x.tolist(),
        "Y2": 7,
        "Y3": [True],
    }


def test_a_run_with_bfloat16_ends_too_once_nobody_wants_it(write: Write) -> None:
    instance, unwanted = load(write((TensorProto.BFLOAT16, ["a"], ["a"]))), Cancelled()
    unwanted.set(ServingError(Kind.CANCELLED, "gone"))
    with pytest.raises(ServingError, match="terminate"):
        instance.execute([request({"X0": np.array([1.5], BF16)})], unwanted)


def test_bfloat16_goes_in_beside_strings_but_cannot_come_out(write: Write) -> None:
    path = write((TensorProto.BFLOAT16, ["a"], ["a"]), (TensorProto.STRING, ["b"], ["b"]))
    inputs = (
        """input { name: "X0" data_type: TYPE_BF16 dims: -1 } input { name: "X1" data_type: TYPE_STRING dims: -1 }"""
    )
    instance = load(path, inputs + 'output { name: "Y1" data_type: TYPE_STRING dims: -1 }')
    assert run(instance, X0=np.array([1], BF16), X1=texts("\u00fc"))["Y1"].tolist() == ["\u00fc".encode()]
    with pytest.raises(ServingError) as caught:
        load(path)
    assert (caught.value.kind, caught.value.message) == (
        Kind.UNSUPPORTED,
        "model 'm' takes BYTES and gives BF16, which ONNX Runtime's Python interface cannot do in one run",
    )


@pytest.mark.parametrize("elements", [[b"\xff"], [b"fine", b"fine", b"\xe4", b"\xff"]])
def test_an_element_that_is_not_utf8_is_named_by_its_index(fixtures: Path, elements: list[bytes]) -> None:
    kind, message = refusal(load(fixtures / "identity_bytes"), INPUT0=objects(elements, (1, len(elements))))
    bad = 0 if len(elements) == 1 else 2
    assert kind is Kind.INVALID
    assert message.startswith(
        f"input 'INPUT0' for model 'identity_bytes': element {bad} is not UTF-8, as strings of ONNX are: "
    )


# -- shapes


def test_a_scalar_is_a_scalar_where_nobody_says_otherwise(fixtures: Path) -> None:
    got = run(load(fixtures / "identity_scalar_fp32"), INPUT0=np.array(2.5, np.float32))["OUTPUT0"]
    assert (got.shape, got.tolist()) == ((), 2.5)


def test_a_scalar_that_is_configured_as_one_element_is_that_both_ways(fixtures: Path) -> None:
    text = """
        input { name: "INPUT0" data_type: TYPE_FP32 dims: 1 }
        output { name: "OUTPUT0" data_type: TYPE_FP32 dims: 1 }"""
    got = run(load(fixtures / "identity_scalar_fp32", text), INPUT0=np.array([2.5], np.float32))["OUTPUT0"]
    assert got.tolist() == [2.5]


@pytest.mark.parametrize(
    ("dims", "model_dims", "batch", "given"),
    [
        ([6], [2, 3], 0, (6,)),
        ([1, 6], [6], 0, (1, 6)),
        ([6], [3, 2], 8, (4, 6)),
        ([1], [], 8, (4, 1)),
        ([-1, 6, -1], [-1, 2, 3, -1], 0, (5, 6, 7)),
        ([4, -1, -1, 2], [2, 2, -1, -1, 2, 1], 8, (3, 4, 5, 7, 2)),
        ([-1, -1], [1, -1, -1], 8, (2, 0, 3)),
    ],
)
def test_a_reshape_is_done_on_the_way_in_and_undone_on_the_way_out(
    write: Write, dims: list[int], model_dims: list[int], batch: int, given: tuple[int, ...]
) -> None:
    leading: list[int | str] = ["N"] if batch else []
    axes = [*leading, *(f"d{position}" if dim < 0 else dim for position, dim in enumerate(model_dims))]
    path = write((TensorProto.INT32, axes, axes))
    shapes = f"dims: {dims} reshape {{ shape: {model_dims} }}"
    text = (
        f'max_batch_size: {batch} input {{ name: "X0" data_type: TYPE_INT32 {shapes} }} '
        f'output {{ name: "Y0" data_type: TYPE_INT32 {shapes} }}'
    )
    x = np.arange(np.prod(given), dtype=np.int32).reshape(given)
    np.testing.assert_array_equal(run(load(path, text), X0=x)["Y0"], x, strict=True)


def test_the_model_sees_the_reshape_and_the_client_the_dims(write: Write) -> None:
    """Transpose turns the axes round, so that the shape it was given shows in the order of the elements."""
    path = write((TensorProto.INT32, ["N", 2, 3], [3, 2, "N"]), operator="Transpose")
    text = """
        input { name: "X0" data_type: TYPE_INT32 dims: [-1, 6] reshape { shape: [-1, 2, 3] } }
        output { name: "Y0" data_type: TYPE_INT32 dims: [6, -1] reshape { shape: [3, 2, -1] } }"""
    got = run(load(path, text), X0=np.arange(6, dtype=np.int32)[None])["Y0"]
    assert got.tolist() == [[0], [3], [1], [4], [2], [5]]


def test_a_completed_batch_of_scalars_is_one_column(write: Write) -> None:
    instance = load(write((TensorProto.FLOAT, ["N"], ["N"])))
    got = run(instance, X0=np.array([[1], [2], [3]], np.float32))["Y0"]
    assert got.tolist() == [[1], [2], [3]]


def test_an_optional_input_may_be_left_out(fixtures: Path) -> None:
    instance = load(fixtures / "optional_input")
    x = np.array([1, 2], np.float32)
    assert run(instance, INPUT0=x)["OUTPUT0"].tolist() == [11, 12]
    assert run(instance, INPUT0=x, BIAS=np.array([0.5], np.float32))["OUTPUT0"].tolist() == [1.5, 2.5]


# -- sequences of maps


def test_maps_with_numbers_as_labels_become_columns() -> None:
    flowers = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32)
    got = run(load(SAMPLES / "iris"), measurements=flowers)
    assert got["output_label"].tolist() == [[0], [2]]
    assert got["output_probability"].shape == (2, 3)
    np.testing.assert_allclose(got["output_probability"].sum(axis=1), 1, rtol=1e-6)
    assert got["output_probability"].argmax(axis=1).tolist() == [0, 2]


def test_maps_with_strings_as_labels_become_columns_and_no_rows_stay_no_rows(fixtures: Path) -> None:
    instance = load(fixtures / "string_classes")
    assert run(instance, INPUT0=np.array([[1, 2], [3, 4]], np.float32))["OUTPUT0"].tolist() == [[1, 2], [3, 4]]
    assert run(instance, INPUT0=np.zeros((0, 2), np.float32))["OUTPUT0"].shape == (0, 2)


class Maps:
    """Stands for a session whose one output is a sequence of maps, which it is given to answer."""

    def __init__(self, *answers: list[dict[str, float]]) -> None:
        self.answers = list(answers)

    def run(self, names: list[str], feed: dict[str, Array], options: Any) -> list[Any]:
        return [self.answers.pop(0)]


def maps_instance(session: Maps, keys: tuple[str, ...]) -> OnnxInstance:
    given = OnnxTensor("X", FP32, FP32.onnx, ("N",))
    maps = OnnxTensor("Y", FP32, "seq(map(string,tensor(float)))", ("", len(keys) or ""), maps=True, keys=keys)
    config = pb.ModelConfig(name="m")
    config.input.add(name="X", data_type="TYPE_FP32", dims=[-1])
    config.output.add(name="Y", data_type="TYPE_FP32", dims=[-1, -1])
    return OnnxInstance(session, "cpu", config, OnnxSignature({"X": given}, {"Y": maps}))


def test_labels_that_were_not_known_are_those_of_the_first_row() -> None:
    instance = maps_instance(Maps([], [{"b": 1, "a": 2}], [{"a": 3, "b": 4}]), keys=())
    x = np.zeros(1, np.float32)
    assert run(instance, X=x)["Y"].shape == (0, 0)
    assert run(instance, X=x)["Y"].tolist() == [[1, 2]]
    assert run(instance, X=x)["Y"].tolist() == [[4, 3]]


@pytest.mark.parametrize("row", [{"a": 1.0}, {"a": 1.0, "c": 2.0}, {"a": 1.0, "b": 2.0, "c": 3.0}])
def test_a_row_with_other_labels_is_an_error_and_not_a_wrong_column(row: dict[str, float]) -> None:
    instance = maps_instance(Maps([{"a": 1, "b": 2}, row]), keys=("a", "b"))
    assert refusal(instance, X=np.zeros(2, np.float32)) == (
        Kind.INTERNAL,
        f"output 'Y' of model 'm': row 1 has the labels {list(row)}, expected ['a', 'b']",
    )


# -- batches


def pair(*rows: int, outputs: Sequence[str] = (), id: str = "") -> InferRequest:
    """A request to `simple`: one row of 16 for each number."""
    left = np.repeat(np.array(rows, np.int32)[:, None], 16, axis=1)
    return request({"INPUT0": left, "INPUT1": np.full_like(left, 1)}, outputs, id)


def test_a_batch_gives_each_request_what_it_gets_alone() -> None:
    instance = load(SAMPLES / "simple")
    batch = [pair(5, id="a"), pair(6, 7, 8, id="b"), pair(9, id="c")]
    answers = instance.execute(batch)
    for asked, answer in zip(batch, answers, strict=True):
        assert isinstance(answer, InferResponse)
        assert (answer.model, answer.id) == ("m", asked.id)
        [alone] = instance.execute([asked])
        got, expected = arrays(answer), arrays(alone)
        assert list(got) == ["OUTPUT0", "OUTPUT1"]
        for name in got:
            np.testing.assert_array_equal(got[name], expected[name], strict=True)
    assert arrays(answers[1])["OUTPUT0"][:, 0].tolist() == [7, 8, 9]


def test_strings_reshapes_and_maps_are_taken_apart_again(write: Write) -> None:
    sentiment = load(SAMPLES / "sentiment")
    batch = [request({"text": texts(*each)[:, None]}) for each in (["lovely"], ["dirty", "SLOW and rude", "great"])]
    for asked, answer in zip(batch, sentiment.execute(batch), strict=True):
        alone = arrays(sentiment.execute([asked])[0])
        for name, got in arrays(answer).items():
            np.testing.assert_array_equal(got, alone[name], strict=True)
    copies = load(write((TensorProto.BFLOAT16, ["N", 2], ["N", 2]), (TensorProto.INT64, ["N"], ["N"])))
    rows = [([[1, 2]], [[1]]), ([[3, 4], [5, 6]], [[2], [3]])]
    batch = [request({"X0": np.array(numbers, BF16), "X1": np.array(column)}) for numbers, column in rows]
    answers = [arrays(answer) for answer in copies.execute(batch)]
    assert [(answer["Y0"].tolist(), answer["Y1"].tolist()) for answer in answers] == rows
    iris = load(SAMPLES / "iris")
    flowers = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3], [6, 3, 4, 1]], np.float32)
    parts = iris.execute([request({"measurements": flowers[:1]}), request({"measurements": flowers[1:]})])
    joined = np.concatenate([arrays(part)["output_probability"] for part in parts])
    np.testing.assert_array_equal(joined, run(iris, measurements=flowers)["output_probability"], strict=True)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ([["OUTPUT1"], ["OUTPUT0"]], [["OUTPUT1"], ["OUTPUT0"]]),
        ([["OUTPUT1"], ["OUTPUT1"]], [["OUTPUT1"], ["OUTPUT1"]]),
        ([["OUTPUT1"], []], [["OUTPUT1"], ["OUTPUT0", "OUTPUT1"]]),
        ([["OUTPUT1", "OUTPUT0"], ["OUTPUT0"]], [["OUTPUT1", "OUTPUT0"], ["OUTPUT0"]]),
        ([["OUTPUT1", "OUTPUT0"]], [["OUTPUT1", "OUTPUT0"]]),
        ([["OUTPUT1"]], [["OUTPUT1"]]),
    ],
)
def test_each_request_gets_the_outputs_that_it_names_in_its_order(asked: list[list[str]], got: list[list[str]]) -> None:
    batch = [pair(5 + number, outputs=outputs) for number, outputs in enumerate(asked)]
    answers = [arrays(answer) for answer in load(SAMPLES / "simple").execute(batch)]
    assert [list(answer) for answer in answers] == got
    for number, answer in enumerate(answers):
        for name, array in answer.items():
            assert array[0, 0] == 5 + number + (1 if name == "OUTPUT0" else -1)


def test_one_requests_mistake_is_not_the_others_in_its_batch() -> None:
    instance = load(SAMPLES / "simple_string")

    def numbers(text: str) -> InferRequest:
        return request({name: objects([text.encode()] * 16, (1, 16)) for name in ("INPUT0", "INPUT1")})

    not_text = request({name: objects([b"\xff"] * 16, (1, 16)) for name in ("INPUT0", "INPUT1")})
    first, second, third, fourth = instance.execute([numbers("2"), numbers("two"), not_text, numbers("4")])
    assert arrays(first)["OUTPUT0"][0, 0] == b"4"
    assert arrays(fourth)["OUTPUT0"][0, 0] == b"8"
    assert isinstance(second, ServingError)
    assert (second.kind, second.message.partition(" : ")[0][:22]) == (Kind.INVALID, "onnx runtime error 6: ")
    assert isinstance(third, ServingError)
    assert third.message.startswith("input 'INPUT0' for model 'simple_string': element 0 is not UTF-8")


def test_a_model_without_a_batch_axis_runs_one_request_after_the_other(fixtures: Path) -> None:
    instance = load(fixtures / "fixed_shape")
    ones = np.ones((2, 3), np.float32)
    answers = instance.execute([request({"INPUT0": ones}), request({"INPUT0": 2 * ones})])
    assert [arrays(answer)["OUTPUT0"].tolist() for answer in answers] == [ones.tolist(), (2 * ones).tolist()]


# -- failures, times, the end


def test_values_that_a_model_cannot_take_are_the_clients_mistake(
    fixtures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    instance = load(fixtures / "failing")
    assert refusal(instance, INPUT0=np.array([0, 9])) == (
        Kind.INVALID,
        "onnx runtime error 2: Non-zero status code returned while running Gather node. Name:'' Status Message: "
        "indices element out of data bounds, idx=9 must be within the inclusive range [-4,3]",
    )
    assert run(instance, INPUT0=np.array([0, -1]))["OUTPUT0"].tolist() == [10, 40]
    assert capfd.readouterr() == ("", "")


def test_what_a_failed_run_was_given_is_forgotten_without_a_collection(fixtures: Path) -> None:
    instance = load(fixtures / "failing")
    given = np.array([0, 9])
    known, batch = weakref.ref(given), [request({"INPUT0": given})]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ServingError) as caught:
            instance.execute(batch)
        caught.value.with_traceback(None)  # as the server does with it
        del given, batch, caught
        assert known() is None
    finally:
        gc.enable()


def test_sizes_that_do_not_multiply_are_the_clients_mistake() -> None:
    kind, message = refusal(load(SAMPLES / "matmul"), a=np.ones((2, 3), np.float32), b=np.ones((2, 3), np.float32))
    assert kind is Kind.INVALID
    assert message.startswith("onnx runtime error 1: Non-zero status code returned while running MatMul node.")


def test_shrinking_the_arena_changes_no_answer() -> None:
    shrink = 'key: "memory.enable_memory_arena_shrinkage" value { string_value: "cpu:0" }'
    answers = load(SAMPLES / "simple", f"parameters {{ {shrink} }} ").execute([pair(5)])
    assert arrays(answers[0])["OUTPUT0"][0, 0] == 6


def test_an_instance_notes_when_its_inputs_were_ready_and_its_outputs_came() -> None:
    instance = load(SAMPLES / "simple")
    assert (instance.inputs_ready_ns, instance.outputs_came_ns) == (0, 0)
    instance.execute([pair(5)])
    first = instance.outputs_came_ns
    assert 0 < instance.inputs_ready_ns < first
    instance.execute([pair(5), pair(6)])
    assert first < instance.inputs_ready_ns < instance.outputs_came_ns


class Clocked:
    """A session that gives back what it gets, and notes when each of its runs began and ended."""

    def __init__(self) -> None:
        self.began_ns: list[int] = []
        self.ended_ns: list[int] = []

    def run(self, names: list[str], feed: dict[str, Array], run_options: Any) -> list[Array]:
        self.began_ns.append(monotonic_ns())
        outputs = [feed["X"] for _ in names]
        self.ended_ns.append(monotonic_ns())
        return outputs


def test_runs_one_after_the_other_are_one_execution_from_the_first_to_the_last() -> None:
    x, y = (OnnxTensor(name, FP32, FP32.onnx, ("N",)) for name in "XY")
    config = pb.ModelConfig(name="m")
    config.input.add(name="X", data_type="TYPE_FP32", dims=[-1])
    config.output.add(name="Y", data_type="TYPE_FP32", dims=[-1])
    session = Clocked()
    instance = OnnxInstance(session, "cpu", config, OnnxSignature({"X": x}, {"Y": y}))
    instance.execute([request({"X": np.zeros(number, np.float32)}) for number in (1, 2, 3)])
    assert len(session.began_ns) == 3
    assert instance.inputs_ready_ns <= session.began_ns[0]
    assert instance.outputs_came_ns >= session.ended_ns[-1]


def test_a_closed_instance_lets_go_of_its_session() -> None:
    session = Maps()
    instance, alive = maps_instance(session, keys=()), weakref.ref(session)
    del session
    assert alive() is not None
    instance.close()
    assert alive() is None


def test_an_onnx_model_answers_once() -> None:
    instance = load(SAMPLES / "simple")
    assert (instance.streams, instance.max_in_flight, instance.device) == (False, 1, "cpu")
    with pytest.raises(ServingError) as caught:
        instance.start(pair(5), lambda result, final=True, partial=False: PLENTY, Cancelled())
    assert caught.value.kind is Kind.UNSUPPORTED
