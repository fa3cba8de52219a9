"""Streams of inference: many requests and their answers over one call, by tritonclient and by the bare stub."""

import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc

from conformance_tests.carriers import Call, Carrier, Input, Refusal
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import LIMIT_S, GrpcClient, details, pb, status
from conformance_tests.server import Target
from conformance_tests.tensors import pack

needs = pytest.mark.needs
triton: Any = tritonclient.grpc  # ships no types


class Stream:
    """A stream of tritonclient's, whose answers are results or errors."""

    def __init__(self, address: str, **options: Any) -> None:
        self.client = triton.InferenceServerClient(address)
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: self._answers.put((result, error)), **options)

    def ask(self, model: str, array: "np.ndarray[Any, Any]", id: str, name: str = "INPUT0", **options: Any) -> None:
        texts = array.dtype.kind == "O"
        tensor = triton.InferInput(name, list(array.shape), "BYTES" if texts else triton_datatype(array))
        tensor.set_data_from_numpy(array)
        self.client.async_stream_infer(model, [tensor], request_id=id, **options)

    def count(self, id: str, count: int, *, fail: bool = False, **options: Any) -> None:
        """0 ... count-1 of the model that answers so."""
        given = json.dumps({"count": count, "fail": fail}).encode()
        self.ask("stream_count", np.array([given], np.object_), id, name="input", **options)

    def next(self) -> Any:
        """The next answer. Raises InferenceServerException where it is an error."""
        result, error = self._answers.get(timeout=LIMIT_S)
        if error is not None:
            raise error
        return result

    def failure(self) -> Any:
        with pytest.raises(tritonclient.utils.InferenceServerException) as caught:
            self.next()
        return caught.value

    def end(self) -> None:
        """Say the last, wait for the end, and check that nothing came that nobody has asked for."""
        self.client.stop_stream()
        assert self._answers.empty()

    def close(self) -> None:
        self.client.close()


def triton_datatype(array: "np.ndarray[Any, Any]") -> str:
    return {"float32": "FP32", "int64": "INT64"}[array.dtype.name]


def is_last(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


def number(result: Any) -> Any:
    """What an answer of stream_count holds."""
    return json.loads(result.as_numpy("output")[0])


def fp32(*values: float) -> "np.ndarray[Any, Any]":
    return np.array([values], np.float32)


@pytest.fixture
def open_stream(target: Target) -> Iterator[Callable[..., Stream]]:
    if not target.grpc:
        pytest.skip("no --grpc was given")
    opened: list[Stream] = []

    def start(**options: Any) -> Stream:
        opened.append(Stream(target.grpc, **options))
        return opened[-1]

    yield start
    for stream in opened:
        stream.close()


@pytest.fixture
def stream(open_stream: Callable[..., Stream], grpc: GrpcClient) -> Stream:
    return open_stream()


@clause("streaming.order", "streaming.many_models", "streaming.final_response", "streaming.half_close")
@needs("slow_rows", "identity_fp32")
def test_answers_come_in_the_order_of_requests_to_any_models(stream: Stream) -> None:
    asked = [("slow_rows", fp32(80)), ("identity_fp32", fp32(1, 2)), ("slow_rows", fp32(1)), ("identity_fp32", fp32(3))]
    for place, (model, array) in enumerate(asked):
        stream.ask(model, array, str(place))
    for place, (model, array) in enumerate(asked):
        result = stream.next()
        answer = result.get_response()
        assert (answer.id, answer.model_name, answer.model_version) == (str(place), model, "1")
        assert result.as_numpy("OUTPUT0").tolist() == array.tolist()
        assert is_last(result)
    stream.end()


@clause("streaming.order")
@needs("identity_fp32")
def test_a_thousand_requests_are_answered_on_one_stream(stream: Stream) -> None:
    for place in range(1000):
        stream.ask("identity_fp32", fp32(place), str(place))
    assert [stream.next().get_response().id for _ in range(1000)] == [str(place) for place in range(1000)]
    stream.end()


@clause("streaming.half_close")
@needs("slow_rows", "identity_fp32")
def test_what_was_asked_is_answered_after_the_client_has_said_its_last(grpc: GrpcClient) -> None:
    call = grpc.stub.ModelStreamInfer(iter([message("slow_rows", 50, "a"), message("identity_fp32", 1, "b")]))
    assert [answer.infer_response.id for answer in call] == ["a", "b"]
    assert call.code().name == "OK"


@clause("streaming.errors", "streaming.final_response")
@needs("failing", "identity_fp32")
def test_an_error_is_an_answer_and_the_stream_goes_on(grpc: GrpcClient) -> None:
    wrong = message("identity_fp32", 1, "wrong")
    wrong.inputs[0].datatype = "INT32"
    failing = message("failing", 1, "failing")
    failing.inputs[0].datatype = "INT64"
    failing.inputs[0].shape[:] = [1]
    failing.raw_input_contents[0] = pack("INT64", np.array([9], np.int64))
    asked = [message("nope", 1, "unknown"), wrong, failing, message("identity_fp32", 1, "right")]
    unknown, mistaken, failed, right = grpc.stub.ModelStreamInfer(iter(asked), timeout=LIMIT_S)
    for answer, id in ((unknown, "unknown"), (mistaken, "wrong")):
        assert answer.error_message
        assert answer.infer_response == pb.ModelInferResponse(id=id), "what no model saw has its id and nothing else"
    assert failed.error_message.startswith("onnx runtime error")
    assert (failed.infer_response.id, failed.infer_response.model_name) == ("failing", "failing")
    assert failed.infer_response.parameters["triton_final_response"].bool_param
    assert (right.error_message, right.infer_response.id) == ("", "right")


@clause("streaming.strict_errors")
@needs("stream_count", "slow_rows")
def test_where_asked_for_an_error_of_execution_ends_the_stream(grpc: GrpcClient) -> None:
    asked = [message("nope", 1, "a"), counting(1, fail=True), message("slow_rows", 3_600_000, "c")]
    call = grpc.stub.ModelStreamInfer(iter(asked), metadata=[("triton_grpc_error", "true")], timeout=LIMIT_S)
    assert next(call).error_message, "what no model has seen is an answer all the same"
    assert unpacked(next(call)) == 0
    with pytest.raises(grpc_error) as caught:
        next(call)
    assert status(caught.value) == "INTERNAL"
    assert "told to fail" in details(caught.value)


@clause("streaming.strict_errors")
@needs("failing")
def test_tritonclient_is_told_the_status(open_stream: Callable[..., Stream], grpc: GrpcClient) -> None:
    stream = open_stream(headers={"triton_grpc_error": "true"})
    stream.ask("failing", np.array([9], np.int64), "a")
    error = stream.failure()
    assert error.status().startswith("StatusCode.")
    assert error.message().startswith("onnx runtime error")


@clause("streaming.decoupled", "streaming.final_response")
@needs("stream_count", "identity_fp32")
def test_a_decoupled_model_answers_any_number_of_times(stream: Stream) -> None:
    stream.count("none", 0)
    stream.count("three", 3)
    seen = [stream.next() for _ in range(3)]
    assert [number(result) for result in seen] == [0, 1, 2]
    assert {result.get_response().id for result in seen} == {"three"}
    assert not any(is_last(result) for result in seen)
    stream.ask("identity_fp32", fp32(1), "after")
    assert stream.next().get_response().id == "after"
    stream.end()


@clause("streaming.empty_final_response")
@needs("stream_count")
def test_where_asked_for_the_end_is_told_by_an_empty_answer(stream: Stream) -> None:
    stream.count("a", 2, enable_empty_final_response=True)
    first, second, last = (stream.next() for _ in range(3))
    assert ([number(first), number(second)], is_last(first), is_last(second)) == ([0, 1], False, False)
    answer = last.get_response()
    assert (answer.id, answer.model_name, answer.model_version, len(answer.outputs)) == ("a", "stream_count", "", 0)
    assert is_last(last)
    stream.end()


@clause("streaming.decoupled", "streaming.errors")
@needs("stream_count")
def test_a_decoupled_model_may_fail_after_it_has_answered(stream: Stream) -> None:
    stream.count("a", 2, fail=True, enable_empty_final_response=True)
    assert [number(stream.next()) for _ in range(2)] == [0, 1]
    assert "told to fail" in stream.failure().message()
    stream.end()


@clause("streaming.decoupled")
@needs("stream_count")
def test_ten_thousand_answers_come_to_one_that_reads_slowly(grpc: GrpcClient) -> None:
    call = grpc.stub.ModelStreamInfer(iter([counting(10_000)]), timeout=LIMIT_S)
    answers = [unpacked(answer) for answer in call]
    assert answers == list(range(10_000))


@clause("streaming.decoupled_unary")
@needs("stream_count")
def test_a_decoupled_model_is_not_for_one_answer(carrier: Carrier) -> None:
    given = Input("input", "BYTES", np.array([b'{"count": 1}'], np.object_))
    refused = carrier.send(Call("stream_count", [given]))
    assert isinstance(refused, Refusal)
    assert refused.status == "UNIMPLEMENTED"
    assert refused.text in (
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
        "HTTP end point doesn't support models with decoupled transaction policy",
    )


@clause("streaming.cancel")
@needs("slow_rows")
def test_a_client_that_leaves_frees_the_model_over_grpc(grpc: GrpcClient, stream: Stream) -> None:
    call = grpc.stub.ModelStreamInfer(iter([message("slow_rows", 3_600_000, str(place)) for place in range(20)]))
    call.cancel()
    stream.ask("slow_rows", fp32(1), "after")
    assert stream.next().get_response().id == "after"


grpc_error: Any = grpc.RpcError


def message(model: str, value: float, id: str) -> Any:
    array = fp32(value)
    tensor = pb.ModelInferRequest.InferInputTensor(name="INPUT0", datatype="FP32", shape=array.shape)
    return pb.ModelInferRequest(model_name=model, id=id, inputs=[tensor], raw_input_contents=[pack("FP32", array)])


def counting(count: int, *, fail: bool = False) -> Any:
    given = np.array([json.dumps({"count": count, "fail": fail}).encode()], np.object_)
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="BYTES", shape=[1])
    raw = [pack("BYTES", given)]
    return pb.ModelInferRequest(model_name="stream_count", inputs=[tensor], raw_input_contents=raw)


def unpacked(answer: Any) -> Any:
    assert not answer.error_message
    return json.loads(answer.infer_response.raw_output_contents[0][4:])
