"""Inference, whichever way it is carried."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, Output, Refusal, Value, infer, refusal, simple
from conformance_tests.clause_table import clause
from conformance_tests.server import Target
from conformance_tests.tensors import same, texts

needs = pytest.mark.needs


def floats(*shape: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Numbers that differ in every place."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape) + np.float32(0.5)


@clause("infer.all_outputs", "infer.model_version")
@needs("simple")
def test_without_outputs_all_come_back(carrier: Carrier) -> None:
    reply = infer(carrier, simple())
    assert (reply.model, reply.version) == ("simple", "1")
    assert [output.datatype for output in reply.outputs] == ["INT32", "INT32"]
    assert reply["OUTPUT0"].tolist() == [list(range(1, 17))]
    assert reply["OUTPUT1"].tolist() == [list(range(-1, 15))]


@clause("infer.requested_outputs")
@needs("simple")
def test_only_the_outputs_asked_for_come_back(carrier: Carrier) -> None:
    reply = infer(carrier, simple(outputs=[Output("OUTPUT1")]))
    assert [output.name for output in reply.outputs] == ["OUTPUT1"]
    assert reply["OUTPUT1"].tolist() == [list(range(-1, 15))]


@clause("infer.output_order")
@needs("simple")
def test_outputs_come_in_the_order_asked_for(carrier: Carrier) -> None:
    reply = infer(carrier, simple(outputs=[Output("OUTPUT1"), Output("OUTPUT0")]))
    assert [output.name for output in reply.outputs] == ["OUTPUT1", "OUTPUT0"]
    assert reply["OUTPUT0"].tolist() == [list(range(1, 17))]


@clause("infer.output_order")
@needs("sentiment")
def test_outputs_not_asked_for_by_name_come_in_the_files_order(carrier: Carrier) -> None:
    reply = infer(carrier, Call("sentiment", [Input("text", "BYTES", texts(["fine"], (1, 1)))]))
    assert [output.name for output in reply.outputs] == ["label", "probabilities"]


@clause("infer.id")
@needs("simple")
@pytest.mark.parametrize("call_id", ["w1", 'Größe "1"\\ \n', "x" * 5000])
def test_the_id_comes_back(carrier: Carrier, call_id: str) -> None:
    assert infer(carrier, simple(call_id)).id == call_id


@clause("infer.no_id")
@needs("simple")
def test_no_id_is_made_up(carrier: Carrier) -> None:
    assert infer(carrier, simple()).id == ""


@clause("infer.version")
@needs("times_version")
@pytest.mark.parametrize("version", ["1", "2"])
def test_the_version_asked_for_runs(carrier: Carrier, version: str) -> None:
    x = floats(3)
    reply = infer(carrier, Call("times_version", [Input("x", "FP32", x)], version=version))
    assert reply.version == version
    assert reply["y"].tolist() == (int(version) * x).tolist()


@clause("infer.latest_version")
@pytest.mark.parametrize(("model", "latest"), [("times_version", 2), ("latest_version", 10)])
def test_without_a_version_the_greatest_number_runs(carrier: Carrier, target: Target, model: str, latest: int) -> None:
    target.require(model)
    x = floats(3)
    reply = infer(carrier, Call(model, [Input("x", "FP32", x)]))
    assert reply.version == str(latest)
    assert reply["y"].tolist() == (latest * x).tolist()


@clause("lifecycle.version_policy")
@needs("specific_versions")
def test_a_version_outside_the_policy_is_not_found(carrier: Carrier) -> None:
    call = Call("specific_versions", [Input("x", "FP32", floats(3))], version="2")
    text = "Request for unknown model: 'specific_versions' version 2 is not found"
    assert refusal(carrier, call) == Refusal("NOT_FOUND", text)


@clause("infer.batch")
@needs("simple")
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_go_in_and_rows_come_out(carrier: Carrier, rows: int) -> None:
    reply = infer(carrier, simple(rows=rows))
    assert reply["OUTPUT0"].tolist() == (np.arange(rows * 16).reshape(rows, 16) + 1).tolist()


@clause("infer.bare_model")
@needs("matmul")
def test_a_model_without_configuration_takes_the_files_shapes(carrier: Carrier) -> None:
    a, b = floats(2, 3), floats(3, 5)
    reply = infer(carrier, Call("matmul", [Input("a", "FP32", a), Input("b", "FP32", b)]))
    assert same("FP32", reply["product"], a @ b)


@clause("infer.two_datatypes")
@needs("two_inputs_mixed")
def test_inputs_of_different_datatypes_go_together(carrier: Carrier) -> None:
    numbers, words = floats(3), texts(["", "zwölf", "a,b"])
    call = Call("two_inputs_mixed", [Input("INPUT1", "BYTES", words), Input("INPUT0", "FP32", numbers)])
    reply = infer(carrier, call)
    assert same("FP32", reply["OUTPUT0"], numbers)
    assert same("BYTES", reply["OUTPUT1"], words)


@clause("infer.parameters")
@needs("simple")
def test_parameters_of_every_type_are_accepted(carrier: Carrier) -> None:
    parameters: dict[str, Value] = {"flag": True, "count": -7, "share": 0.25, "name": "ü"}
    reply = infer(carrier, Call("simple", simple().inputs, parameters=parameters))
    assert reply["OUTPUT0"].tolist() == [list(range(1, 17))]


@clause("infer.scheduling_parameters")
@needs("simple")
def test_a_priority_and_a_timeout_of_0_change_nothing(carrier: Carrier) -> None:
    reply = infer(carrier, Call("simple", simple().inputs, parameters={"priority": 0, "timeout": 0}))
    assert reply["OUTPUT0"].tolist() == [list(range(1, 17))]


@clause("infer.optional_input")
@needs("optional_input")
@pytest.mark.parametrize(("bias", "added"), [(None, 10), (2.5, 2.5)])
def test_an_optional_input_may_be_left_out(carrier: Carrier, bias: float | None, added: float) -> None:
    x = floats(3)
    given = [] if bias is None else [Input("BIAS", "FP32", np.array([bias], np.float32))]
    reply = infer(carrier, Call("optional_input", [Input("INPUT0", "FP32", x), *given]))
    assert reply["OUTPUT0"].tolist() == (x + np.float32(added)).tolist()


@clause("infer.empty")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@needs("identity_fp32")
def test_an_empty_tensor_comes_back_empty(carrier: Carrier, shape: tuple[int, int]) -> None:
    reply = infer(carrier, Call("identity_fp32", [Input("INPUT0", "FP32", floats(*shape))]))
    assert reply["OUTPUT0"].shape == shape


@clause("infer.empty")
@needs("matmul")
def test_an_empty_inner_axis_gives_zeros(carrier: Carrier) -> None:
    inputs = [Input("a", "FP32", floats(2, 0)), Input("b", "FP32", floats(0, 3))]
    assert infer(carrier, Call("matmul", inputs))["product"].tolist() == [[0, 0, 0], [0, 0, 0]]


@clause("infer.empty")
@needs("digits")
def test_a_batch_of_no_rows_comes_back_as_none(carrier: Carrier) -> None:
    reply = infer(carrier, Call("digits", [Input("image", "FP32", floats(0, 1, 8, 8))]))
    assert reply["probabilities"].shape == (0, 10)


@clause("infer.scalar")
@needs("identity_scalar_fp32")
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scalar_may_have_rank_0_or_1(carrier: Carrier, shape: tuple[int, ...]) -> None:
    number = np.full(shape, 2.5, np.float32)
    reply = infer(carrier, Call("identity_scalar_fp32", [Input("INPUT0", "FP32", number)]))
    assert reply["OUTPUT0"].ravel().tolist() == [2.5]


@clause("infer.rank_four")
@needs("identity_rank4_fp32")
def test_four_axes_keep_their_order(carrier: Carrier) -> None:
    x = floats(2, 3, 4, 5)
    assert same("FP32", infer(carrier, Call("identity_rank4_fp32", [Input("INPUT0", "FP32", x)]))["OUTPUT0"], x)


@clause("infer.rank_four")
@needs("identity_rank4_fp32")
def test_a_transposed_view_is_sent_in_its_own_order(carrier: Carrier) -> None:
    x = floats(2, 3, 4, 5).transpose(3, 1, 0, 2)
    assert same("FP32", infer(carrier, Call("identity_rank4_fp32", [Input("INPUT0", "FP32", x)]))["OUTPUT0"], x)


@clause("infer.zipmap")
@needs("string_classes")
def test_maps_come_back_as_numbers(carrier: Carrier) -> None:
    rows = floats(3, 2)
    reply = infer(carrier, Call("string_classes", [Input("INPUT0", "FP32", rows)]))
    assert same("FP32", reply["OUTPUT0"], rows)


@clause("infer.zipmap")
@needs("iris")
def test_a_scikit_learn_pipeline_serves_as_exported(carrier: Carrier) -> None:
    flowers = np.array([[5.1, 3.5, 1.4, 0.2], [6.0, 2.7, 5.1, 1.6], [6.9, 3.1, 5.4, 2.1]], np.float32)
    reply = infer(carrier, Call("iris", [Input("measurements", "FP32", flowers)]))
    probabilities = reply["output_probability"]
    assert probabilities.shape == (3, 3)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert reply["output_label"].tolist() == probabilities.argmax(axis=1, keepdims=True).tolist()
    assert reply["output_label"].tolist()[0] == [0]


@clause("infer.sentiment")
@needs("sentiment")
def test_words_become_numbers(carrier: Carrier) -> None:
    remarks = texts(["A wonderful place, I love it.", "Terrible service, a waste of money."], (2, 1))
    reply = infer(carrier, Call("sentiment", [Input("text", "BYTES", remarks)]))
    assert reply["label"].tolist() == [[1], [0]]
    assert reply["probabilities"].shape == (2, 2)


@clause("infer.sentiment")
@needs("simple_string")
def test_numbers_written_as_text_are_added(carrier: Carrier) -> None:
    left, right = texts([str(i) for i in range(16)], (1, 16)), texts(["1"] * 16, (1, 16))
    reply = infer(carrier, Call("simple_string", [Input("INPUT0", "BYTES", left), Input("INPUT1", "BYTES", right)]))
    assert reply["OUTPUT0"].tolist() == [[str(i + 1).encode() for i in range(16)]]


@clause("infer.concurrent")
@needs("digits", "simple")
def test_each_of_many_at_once_gets_its_own_answer(carrier: Carrier) -> None:
    """Rows of different requests that share an execution must part again."""

    def one(i: int) -> bool:
        rows = 1 + i % 3
        left, right = np.full((rows, 16), i, np.int32), np.full((rows, 16), 2 * i, np.int32)
        call = Call("simple", [Input("INPUT0", "INT32", left), Input("INPUT1", "INT32", right)], id=str(i))
        reply = infer(carrier, call)
        assert reply.id == str(i)
        return same("INT32", reply["OUTPUT0"], left + right) and same("INT32", reply["OUTPUT1"], left - right)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(64)))


@clause("infer.split_oversized")
@needs("batched_identity_fp32")
@pytest.mark.parametrize("rows", [65, 200])
def test_more_rows_than_a_completed_batch_are_split_and_joined(carrier: Carrier, rows: int) -> None:
    x = floats(rows, 4)
    assert same("FP32", infer(carrier, Call("batched_identity_fp32", [Input("INPUT0", "FP32", x)]))["OUTPUT0"], x)


@clause("infer.runtime_error")
@needs("failing")
def test_values_that_a_model_cannot_take_are_refused_and_it_serves_on(carrier: Carrier) -> None:
    def call(index: int) -> Call:
        return Call("failing", [Input("INPUT0", "INT64", np.array([index], np.int64))])

    refused = refusal(carrier, call(9))
    assert refused.status == "INVALID_ARGUMENT"
    assert refused.text.startswith("onnx runtime error 2: ")
    assert "Traceback" not in refused.text
    assert infer(carrier, call(2))["OUTPUT0"].tolist() == [30]
