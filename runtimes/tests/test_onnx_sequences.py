"""What a stateful model is told, what it is given back, and which rows it computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from penstock import messages, model_config, pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.runtime import Cancelled, ModelFiles, Placement
from penstock.tensor import BY_DTYPE, Array, Tensor, objects
from penstock_runtimes.onnx import OnnxRuntime, sequences
from penstock_runtimes.onnx.sequences import SequenceInstance
from penstock_runtimes.onnx.signature import OnnxSignature

GONE = ServingError(Kind.CANCELLED, "gone")
Axes = list[str | int | None]
Ports = dict[str, tuple[int, Axes]]
ROW: Axes = ["batch", 1]


def save(path: Path, nodes: Sequence[Any], inputs: Ports, outputs: Ports, constants: dict[str, Array]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = helper.make_graph(
        nodes,
        "m",
        [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def load(directory: Path, text: str) -> SequenceInstance:
    """An instance of version 1 in `directory`, with this configuration."""
    files = ModelFiles("m", 1, directory, directory / "1")
    config = pb.ModelConfig()
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    config = model_config.identify(config, "m", ["model.onnx"])
    runtime, place = OnnxRuntime({}), Placement("cpu")
    model_config.validate(config)
    config = model_config.normalise(runtime.complete(files, config, place))
    model_config.validate(config, complete=True)
    instance = runtime.open(files, config, place, None)
    assert isinstance(instance, SequenceInstance)
    return instance


def sent(
    x: Array | list[list[float]],
    flow: int | str | None = None,
    flags: str = "",
    slot: int = 0,
    outputs: Sequence[str] = (),
) -> InferRequest:
    array = np.array(x, np.float32) if isinstance(x, list) else x
    place = None if flow is None else messages.Sequence(flow, "S" in flags, "E" in flags, slot)
    wanted = {name: RequestedOutput(name) for name in outputs}
    rows = array.shape[0] if array.ndim > 1 else 1
    inputs = {"X": Tensor("X", BY_DTYPE[array.dtype], array)}
    return InferRequest("m", "", "", inputs, wanted, sequence=place, rows=rows)


def run(instance: SequenceInstance, *batch: InferRequest) -> list[dict[str, Any]]:
    """The outputs of each request as lists, by name."""
    answers = instance.execute(batch)
    assert len(answers) == len(batch)
    found = []
    for answer in answers:
        assert isinstance(answer, InferResponse), answer
        found.append({tensor.name: tensor.array.tolist() for tensor in answer.outputs})
    return found


# -- controls

FLAGS = {
    "int32_false_true: [ 0, 1 ]": (TensorProto.INT32, 0, 1),
    "int32_false_true: [ 5, -5 ]": (TensorProto.INT32, 5, -5),
    "fp32_false_true: [ 0.25, 3 ]": (TensorProto.FLOAT, 0.25, 3.0),
    "bool_false_true: [ false, true ]": (TensorProto.BOOL, False, True),
    "bool_false_true: [ true, false ]": (TensorProto.BOOL, True, False),
}
IDS: dict[str, tuple[int, list[int | str]]] = {
    "UINT64": (TensorProto.UINT64, [2**64 - 1, 1]),
    "INT64": (TensorProto.INT64, [2**64 - 1, 1]),
    "UINT32": (TensorProto.UINT32, [2**32 - 1, 1]),
    "INT32": (TensorProto.INT32, [2**31 - 1, 1]),
    "STRING": (TensorProto.STRING, ["ü", "1"]),
}
CONTROL = 'control_input {{ name: "{0}" control {{ kind: CONTROL_SEQUENCE_{0} {1} }} }}'


def echo(
    directory: Path, flag: str, id_type: str, strategy: str = "direct { }", batched: bool = True
) -> SequenceInstance:
    """Y = X; S, E, R and I are what it is told; ALL has what the rows of the whole batch are told to be: READY."""
    kind = FLAGS[flag][0]
    axes: Axes = ROW if batched else [1]
    id_kind = IDS[id_type][0]
    copies = {"Y": "X", "S": "START", "E": "END", "R": "READY", "I": "CORRID"}
    nodes = [helper.make_node("Identity", [source], [name]) for name, source in copies.items()]
    inputs: Ports = {"X": (TensorProto.FLOAT, axes), "CORRID": (id_kind, axes)}
    outputs: Ports = {"Y": (TensorProto.FLOAT, axes), "I": (id_kind, axes)}
    for told, seen in (("START", "S"), ("END", "E"), ("READY", "R")):
        inputs[told], outputs[seen] = (kind, axes), (kind, axes)
    if batched:
        nodes += [
            helper.make_node("Cast", ["READY"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["numbers"], ["line"], perm=[1, 0]),
            helper.make_node("Shape", ["X"], ["shape"]),
            helper.make_node("Expand", ["line", "shape"], ["ALL"]),
        ]
        outputs["ALL"] = (TensorProto.FLOAT, ["batch", "rows"])
    save(directory / "1" / "model.onnx", nodes, inputs, outputs, {})
    controls = [CONTROL.format(told, flag) for told in ("START", "END", "READY")]
    controls.append(CONTROL.format("CORRID", f"data_type: TYPE_{id_type}"))
    return load(directory, f"max_batch_size: {4 * batched} sequence_batching {{ {strategy} {' '.join(controls)} }}")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("id_type", IDS)
def test_flags_and_ids_come_as_the_configuration_says(tmp_path: Path, flag: str, id_type: str) -> None:
    _, no, yes = FLAGS[flag]
    first, second = IDS[id_type][1]
    instance = echo(tmp_path, flag, id_type)
    found = run(instance, sent([[1]], first, "S", 0), sent([[2]], second, "E", 1), sent([[3]], second, "", 2))
    assert [answer["Y"] for answer in found] == [[[1]], [[2]], [[3]]]
    assert [answer["S"] for answer in found] == [[[yes]], [[no]], [[no]]]
    assert [answer["E"] for answer in found] == [[[no]], [[yes]], [[no]]]
    assert [answer["R"] for answer in found] == [[[yes]]] * 3
    shown = {"ü": "ü".encode(), "1": b"1"} | ({2**64 - 1: -1} if id_type == "INT64" else {})
    assert [answer["I"] for answer in found] == [[[shown.get(id, id)]] for id in (first, second, second)]


def test_direct_has_a_row_for_every_slot_and_empty_ones_are_not_ready(tmp_path: Path) -> None:
    instance = echo(tmp_path, "int32_false_true: [ 0, 1 ]", "UINT64")
    found = run(instance, sent([[4]], 9, "S", 3), sent([[1]], 8, "", 1))
    assert [(answer["Y"], answer["I"], answer["ALL"]) for answer in found] == [
        ([[4]], [[9]], [[0, 1, 0, 1]]),
        ([[1]], [[8]], [[0, 1, 0, 1]]),
    ]
    assert run(instance, sent([[5]], 9, "", 0))[0]["ALL"] == [[1]]


def test_by_the_oldest_a_batch_has_no_empty_rows(tmp_path: Path) -> None:
    instance = echo(tmp_path, "int32_false_true: [ 0, 1 ]", "STRING", "oldest { }")
    found = run(instance, sent([[4]], "d", "S", 3), sent([[1]], "b", "", 1))
    assert [(answer["Y"], answer["I"], answer["ALL"]) for answer in found] == [
        ([[4]], [[b"d"]], [[1, 1]]),
        ([[1]], [[b"b"]], [[1, 1]]),
    ]


def test_a_model_without_a_batch_axis_is_told_as_well(tmp_path: Path) -> None:
    instance = echo(tmp_path, "int32_false_true: [ 0, 1 ]", "STRING", batched=False)
    found = run(instance, sent(np.array([4], np.float32), "d", "E", 0))
    assert found == [{"Y": [4], "S": [0], "E": [1], "R": [1], "I": [b"d"]}]


def test_empty_rows_of_a_text_input_are_empty_text(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["X"], ["Y"])]
    text: Ports = {"X": (TensorProto.STRING, ROW)}
    save(tmp_path / "1" / "model.onnx", nodes, text, {"Y": (TensorProto.STRING, ROW)}, {})
    instance = load(tmp_path, "max_batch_size: 4 sequence_batching { }")
    assert run(instance, sent(objects([b"x"], (1, 1)), 1, "S", 2)) == [{"Y": [[b"x"]]}]


def test_a_request_outside_any_sequence_is_one_of_its_own(tmp_path: Path) -> None:
    instance = echo(tmp_path, "bool_false_true: [ false, true ]", "UINT32")
    [answer] = run(instance, sent([[1], [2], [3]]))
    assert (answer["Y"], answer["I"]) == ([[1], [2], [3]], [[0]] * 3)
    assert answer["S"] == answer["E"] == answer["R"] == [[True]] * 3


# -- state

STATE = 'state {{ input_name: "SUM" output_name: "NEXT" data_type: TYPE_FP32 dims: [ 1 ] {} }}'


def sums(
    directory: Path, strategy: str = "direct { }", initial: str = "", batched: bool = True, rest: str = ""
) -> SequenceInstance:
    """Y = the sum of all X so far; a number below 0 has no logarithm here: an index that is out of range."""
    axes: Axes = ROW if batched else [1]
    nodes = [
        helper.make_node("Add", ["SUM", "X"], ["NEXT"]),
        helper.make_node("Cast", ["X"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["zero"]),
        helper.make_node("Add", ["NEXT", "zero"], ["Y"]),
    ]
    inputs: Ports = {"X": (TensorProto.FLOAT, axes), "SUM": (TensorProto.FLOAT, axes)}
    outputs: Ports = {"Y": (TensorProto.FLOAT, axes), "NEXT": (TensorProto.FLOAT, axes)}
    save(directory / "1" / "model.onnx", nodes, inputs, outputs, {"table": np.zeros(100, np.float32)})
    size = 4 if batched else 0
    return load(directory, f"max_batch_size: {size} sequence_batching {{ {strategy} {STATE.format(initial)} }} {rest}")


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { }"])
def test_the_state_is_carried_by_slot_and_begins_anew_with_each_start(tmp_path: Path, strategy: str) -> None:
    instance = sums(tmp_path, strategy)
    assert run(instance, sent([[1]], 1, "S", 0), sent([[10]], 2, "S", 2)) == [{"Y": [[1]]}, {"Y": [[10]]}]
    assert run(instance, sent([[5]], 2, "", 2)) == [{"Y": [[15]]}]
    assert run(instance, sent([[2]], 1, "E", 0), sent([[5]], 2, "", 2)) == [{"Y": [[3]]}, {"Y": [[20]]}]
    assert run(instance, sent([[7]], 3, "S", 0), sent([[1]], 2, "S", 2)) == [{"Y": [[7]]}, {"Y": [[1]]}]


def test_a_model_without_a_batch_axis_has_its_state_too(tmp_path: Path) -> None:
    instance = sums(tmp_path, batched=False)
    one = np.array([1], np.float32)
    assert run(instance, sent(one, 1, "S")) == [{"Y": [1]}]
    assert run(instance, sent(one, 1)) == [{"Y": [2]}]
    oldest = sums(tmp_path, "oldest { max_candidate_sequences: 2 }", batched=False)
    assert run(oldest, sent(one, 1, "S", 0), sent(one, 2, "S", 1)) == [{"Y": [1]}, {"Y": [1]}]
    assert run(oldest, sent(one, 2, "", 1)) == [{"Y": [2]}]


def test_the_state_is_an_output_where_the_configuration_lists_it(tmp_path: Path) -> None:
    listed = " ".join(f'output {{ name: "{name}" data_type: TYPE_FP32 dims: [ 1 ] }}' for name in ("Y", "NEXT"))
    instance = sums(tmp_path, rest=listed)
    assert run(instance, sent([[1]], 1, "S", 1)) == [{"Y": [[1]], "NEXT": [[1]]}]
    assert run(instance, sent([[1]], 1, "", 1, ["NEXT"])) == [{"NEXT": [[2]]}]
    assert run(instance, sent([[1]], 1, "", 1, ["Y"])) == [{"Y": [[3]]}]


INITIAL = 'initial_state {{ name: "i" data_type: TYPE_FP32 dims: [ 1 ] {} }}'


def test_the_first_state_comes_from_a_file_or_is_zero(tmp_path: Path) -> None:
    (tmp_path / "initial_state").mkdir()
    (tmp_path / "initial_state" / "hundred").write_bytes(np.array([100], "<f4").tobytes())
    instance = sums(tmp_path, initial=INITIAL.format('data_file: "hundred"'))
    assert run(instance, sent([[1]], 1, "S", 1)) == [{"Y": [[101]]}]
    assert run(instance, sent([[1]], 1, "", 1)) == [{"Y": [[102]]}]
    assert run(instance, sent([[1]], 1, "S", 1)) == [{"Y": [[101]]}]
    zero = sums(tmp_path, initial=INITIAL.format("zero_data: true"))
    assert run(zero, sent([[1]], 1, "S", 1)) == [{"Y": [[1]]}]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing", None, "model 'm': initial state of 'SUM': failed to read its file: "),
        ("../1/model.onnx", None, "model 'm': initial state of 'SUM': file path '../1/model.onnx' is outside "),
        ("short", b"123", "model 'm': initial state of 'SUM': expected 4 bytes in short, got 3"),
    ],
)
def test_a_first_state_that_cannot_be_had_fails_the_load(
    tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    (tmp_path / "initial_state").mkdir()
    if content is not None:
        (tmp_path / "initial_state" / file).write_bytes(content)
    with pytest.raises(ServingError) as caught:
        sums(tmp_path, initial=INITIAL.format(f'data_file: "{file}"'))
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { }"])
def test_a_request_that_fails_fails_alone_and_leaves_its_state(tmp_path: Path, strategy: str) -> None:
    instance = sums(tmp_path, strategy)
    run(instance, sent([[1]], 1, "S", 0), sent([[10]], 2, "S", 1))
    good, bad = instance.execute([sent([[2]], 1, "", 0), sent([[5000]], 2, "", 1)])
    assert isinstance(good, InferResponse)
    assert good.outputs[0].array.tolist() == [[3]]
    assert isinstance(bad, ServingError)
    assert bad.kind is Kind.INVALID
    assert run(instance, sent([[1]], 1, "", 0), sent([[1]], 2, "", 1)) == [{"Y": [[4]]}, {"Y": [[11]]}]


def test_a_start_that_fails_does_not_leave_the_state_of_the_sequence_before(tmp_path: Path) -> None:
    instance = sums(tmp_path)
    run(instance, sent([[50]], 1, "S", 0))
    [bad] = instance.execute([sent([[5000]], 2, "S", 0)])
    assert isinstance(bad, ServingError)
    assert run(instance, sent([[1]], 2, "", 0)) == [{"Y": [[1]]}]


def test_where_no_answer_can_be_made_of_a_run_its_states_are_not_kept(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["SUM", "X"], ["NEXT"]),
        helper.make_node("Compress", ["NEXT", "first"], ["Y"], axis=0),  # one row, whatever the file says
    ]
    inputs: Ports = {"X": (TensorProto.FLOAT, ROW), "SUM": (TensorProto.FLOAT, ROW)}
    outputs: Ports = {"Y": (TensorProto.FLOAT, ROW), "NEXT": (TensorProto.FLOAT, ROW)}
    save(tmp_path / "1" / "model.onnx", nodes, inputs, outputs, {"first": np.array([True])})
    instance = load(tmp_path, f"max_batch_size: 4 sequence_batching {{ oldest {{ }} {STATE.format('')} }}")
    for flow in (0, 1):
        run(instance, sent([[1]], flow, "S", flow))
    answers = instance.execute([sent([[5]], flow, "", flow) for flow in (0, 1)])
    assert [answer.kind for answer in answers if isinstance(answer, ServingError)] == [Kind.INTERNAL] * 2
    assert run(instance, sent([[1]], 0, "", 0)) == [{"Y": [[2]]}]


def test_a_run_that_nobody_wants_changes_no_state(tmp_path: Path) -> None:
    instance = sums(tmp_path)
    run(instance, sent([[1]], 1, "S", 0))
    unwanted = Cancelled()
    unwanted.set(GONE)
    with pytest.raises(ServingError):
        instance.execute([sent([[1]], 1, "", 0)], unwanted)
    assert run(instance, sent([[1]], 1, "", 0)) == [{"Y": [[2]]}]


def test_a_request_outside_any_sequence_touches_no_state(tmp_path: Path) -> None:
    instance = sums(tmp_path)
    run(instance, sent([[1]], 1, "S", 0))
    assert run(instance, sent([[5], [6]])) == [{"Y": [[5], [6]]}]
    assert run(instance, sent([[1]], 1, "", 0)) == [{"Y": [[2]]}]


def growing(directory: Path, kind: int, datatype: str, strategy: str) -> SequenceInstance:
    """Y = all X so far, one after the other: a state that is longer every time. It begins with one empty element."""
    axes: Axes = ["batch", "length"]
    nodes = [
        helper.make_node("Concat", ["ALL", "X"], ["NEXT"], axis=1),
        helper.make_node("Identity", ["NEXT"], ["Y"]),
    ]
    inputs: Ports = {"X": (kind, ROW), "ALL": (kind, axes)}
    outputs: Ports = {"Y": (kind, ["batch", "longer"]), "NEXT": (kind, ["batch", "longer"])}
    save(directory / "1" / "model.onnx", nodes, inputs, outputs, {})
    state = f'state {{ input_name: "ALL" output_name: "NEXT" data_type: {datatype} dims: [ -1 ] }}'
    return load(directory, f"max_batch_size: 4 sequence_batching {{ {strategy} {state} }}")


@pytest.mark.parametrize("strategy", ["direct { }", "oldest { }"])
def test_requests_whose_states_differ_in_shape_run_apart_with_the_same_answers(tmp_path: Path, strategy: str) -> None:
    instance = growing(tmp_path, TensorProto.FLOAT, "TYPE_FP32", strategy)
    assert run(instance, sent([[1]], 1, "S", 0)) == [{"Y": [[0, 1]]}]
    began_ns = instance.outputs_came_ns
    found = run(instance, sent([[2]], 1, "", 0), sent([[7]], 2, "S", 1), sent([[8]], 3, "S", 3))
    assert found == [{"Y": [[0, 1, 2]]}, {"Y": [[0, 7]]}, {"Y": [[0, 8]]}]
    # Two runs are one execution, from the first to the last.
    assert began_ns < instance.inputs_ready_ns < instance._model.inputs_ready_ns < instance.outputs_came_ns
    assert run(instance, sent([[9]], 3, "", 3), sent([[3]], 1, "", 0)) == [{"Y": [[0, 8, 9]]}, {"Y": [[0, 1, 2, 3]]}]


def test_a_state_may_be_text(tmp_path: Path) -> None:
    instance = growing(tmp_path, TensorProto.STRING, "TYPE_STRING", "direct { }")
    words = [objects([word], (1, 1)) for word in (b"one", b"two")]
    assert run(instance, sent(words[0], 1, "S", 1)) == [{"Y": [[b"", b"one"]]}]
    assert run(instance, sent(words[1], 1, "", 1)) == [{"Y": [[b"", b"one", b"two"]]}]


def test_a_state_may_be_bfloat16_though_no_output_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["X"], ["short"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["SUM"], ["long"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["long", "X"], ["Y"]),
        helper.make_node("Cast", ["Y"], ["NEXT"], to=TensorProto.BFLOAT16),
    ]
    inputs: Ports = {"X": (TensorProto.FLOAT, ROW), "SUM": (TensorProto.BFLOAT16, ROW)}
    outputs: Ports = {"Y": (TensorProto.FLOAT, ROW), "NEXT": (TensorProto.BFLOAT16, ROW)}
    save(tmp_path / "1" / "model.onnx", nodes, inputs, outputs, {})
    state = 'state { input_name: "SUM" output_name: "NEXT" data_type: TYPE_BF16 dims: [ 1 ] }'
    instance = load(tmp_path, f"max_batch_size: 4 sequence_batching {{ {state} }}")
    assert run(instance, sent([[1.5]], 1, "S", 1)) == [{"Y": [[1.5]]}]
    assert run(instance, sent([[2]], 1, "", 1)) == [{"Y": [[3.5]]}]


def test_the_state_of_one_sequence_does_not_hold_the_memory_of_a_batch(tmp_path: Path) -> None:
    instance = sums(tmp_path, "oldest { }")
    run(instance, *(sent([[1]], flow, "S", flow) for flow in range(1, 4)))
    assert all(array.base is None for kept in instance._kept.values() for array in kept.values())
    run(instance, *(sent([[1]], flow, "E", flow) for flow in range(1, 4)))
    assert instance._kept == {}


# -- file and configuration

FLAG = 'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }'
TWO: Axes = ["batch", 2]


@pytest.mark.parametrize(
    ("told", "text", "kind", "message"),
    [
        (
            {},
            FLAG,
            Kind.INTERNAL,
            "configuration specified sequence control 'START', but model does not provide that input",
        ),
        (
            {"START": (TensorProto.INT32, TWO)},
            FLAG,
            Kind.INVALID,
            "unable to load model 'm', sequence control 'START' in model has dims [2] but dims [1] is expected",
        ),
        (
            {"START": (TensorProto.FLOAT, ROW)},
            FLAG,
            Kind.INVALID,
            "unable to load model 'm', sequence control 'START', the model expects data-type FLOAT but the model "
            "configuration specifies data-type TYPE_INT32",
        ),
        (
            {"START": (TensorProto.INT32, ROW), "MORE": (TensorProto.FLOAT, ROW)},
            FLAG + ' state { input_name: "SUM" output_name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }',
            Kind.INVALID,
            "unexpected inference input 'SUM', allowed inputs are: MORE, START, X",
        ),
        (
            {"SUM": (TensorProto.FLOAT, TWO)},
            'state { input_name: "SUM" output_name: "NEXT" data_type: TYPE_FP32 dims: [ 2 ] }',
            Kind.INVALID,
            "unexpected inference output 'NEXT', allowed outputs are: Y",
        ),
        (
            {"SUM": (TensorProto.FLOAT, TWO)},
            'state { input_name: "SUM" output_name: "Y" data_type: TYPE_FP64 dims: [ 2 ] }',
            Kind.INVALID,
            "unable to load model 'm', configuration expects datatype TYPE_FP64 for input 'SUM', "
            "model provides TYPE_FP32",
        ),
        (
            {"MORE": (TensorProto.FLOAT, ROW), "START": (TensorProto.INT32, ROW)},
            FLAG,
            Kind.INVALID,
            "unable to load model 'm', configuration expects 2 inputs, model provides 3",
        ),
    ],
)
def test_a_control_or_state_that_the_file_does_not_have_fails_the_load(
    tmp_path: Path, told: Ports, text: str, kind: Kind, message: str
) -> None:
    nodes = [helper.make_node("Identity", ["X"], ["Y"])]
    save(
        tmp_path / "1" / "model.onnx",
        nodes,
        {"X": (TensorProto.FLOAT, ROW), **told},
        {"Y": (TensorProto.FLOAT, ROW)},
        {},
    )
    listed = (
        'input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }'
    )
    with pytest.raises(ServingError) as caught:
        load(tmp_path, f"max_batch_size: 4 {listed} sequence_batching {{ {text} }}")
    assert (caught.value.kind, caught.value.message) == (kind, message)


@pytest.mark.parametrize(
    ("stated", "rest", "message"),
    [
        ("allow_ragged_batch: true", "", "model 'm': ragged input 'X' with sequence_batching"),
        ("", 'batch_input { target_name: "N" }', "model 'm': batch_input with sequence_batching"),
        ("", 'batch_output { target_name: "Y" }', "model 'm': batch_output with sequence_batching"),
        (
            "data_type: TYPE_FP32 dims: -1",
            'backend: "onnxruntime" parameters { key: "pad.X.axis" value { string_value: "1" } }',
            "model 'm': padded input 'X' with sequence_batching",
        ),
    ],
)
def test_a_batch_of_anything_but_rows_is_refused(stated: str, rest: str, message: str) -> None:
    config = pb.ModelConfig()
    text = f'name: "m" input {{ name: "X" {stated} }} sequence_batching {{ }} {rest}'
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    with pytest.raises(ServingError) as caught:
        sequences.check(config, OnnxSignature({}, {}))
    assert (caught.value.kind, caught.value.message) == (Kind.UNSUPPORTED, message)


def test_no_client_sees_controls_or_state(tmp_path: Path) -> None:
    echo(tmp_path, "int32_false_true: [ 0, 1 ]", "UINT64")
    files = ModelFiles("m", 1, tmp_path, tmp_path / "1")
    config = pb.ModelConfig()
    controls = " ".join(CONTROL.format(told, "int32_false_true: [ 0, 1 ]") for told in ("START", "END", "READY"))
    state = 'state { input_name: "CORRID" output_name: "I" data_type: TYPE_UINT64 dims: [ 1 ] }'
    text_format.Parse(f"sequence_batching {{ {controls} {state} }}", config, descriptor_pool=pb.POOL)
    config = model_config.identify(config, "m", ["model.onnx"])
    done = OnnxRuntime({}).complete(files, config, Placement("cpu"))
    assert [entry.name for entry in done.input] == ["X"]
    assert [entry.name for entry in done.output] == ["Y", "S", "E", "R", "ALL"]
