"""gRPC itself: contents, transport, health's neighbour reflection."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc as grpcio
import numpy as np
import pytest

from conformance_tests.carriers import Call, Input, Output, infer_message, read_outputs, simple
from conformance_tests.clause_table import clause
from conformance_tests.doors import GrpcDoor, known
from conformance_tests.grpc_wire import LIMIT_S, GrpcClient, fields, pb, status
from conformance_tests.tensors import pack

needs = pytest.mark.needs
SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"


def raw(call: Call) -> Any:
    message = infer_message(call)
    message.raw_input_contents.extend(pack(tensor.datatype, tensor.array) for tensor in call.inputs)
    return message


def typed(call: Call) -> Any:
    """A message of INT32 inputs."""
    message = infer_message(call)
    for entry, tensor in zip(message.inputs, call.inputs, strict=True):
        entry.contents.int_contents.extend(tensor.array.ravel().tolist())
    return message


def identity(array: "np.ndarray[Any, np.dtype[np.float32]]") -> Call:
    return Call("identity_fp32", [Input("INPUT0", "FP32", array)])


def numbers(answer: Any) -> dict[str, list[list[int]]]:
    return {output.name: output.array.tolist() for output in read_outputs(answer)}


@clause("grpc.raw")
@needs("simple")
def test_raw_entries_are_the_inputs_in_order(grpc: GrpcClient) -> None:
    answer = grpc.call("ModelInfer", raw(simple()))
    assert numbers(answer) == {"OUTPUT0": [[*range(1, 17)]], "OUTPUT1": [[*range(-1, 15)]]}


@clause("grpc.typed")
@needs("simple")
def test_typed_contents_are_the_inputs(grpc: GrpcClient) -> None:
    answer = grpc.call("ModelInfer", typed(simple()))
    assert numbers(answer) == {"OUTPUT0": [[*range(1, 17)]], "OUTPUT1": [[*range(-1, 15)]]}


@clause("grpc.answer_form")
@needs("simple")
@pytest.mark.parametrize("form", [raw, typed])
def test_an_answer_with_raw_contents_has_no_other(grpc: GrpcClient, form: Callable[[Call], Any]) -> None:
    answer = grpc.call("ModelInfer", form(simple()))
    typed_outputs = [output.HasField("contents") for output in answer.outputs]
    assert len(answer.raw_output_contents) == (0 if all(typed_outputs) else len(answer.outputs))
    assert len({*typed_outputs}) == 1


@clause("grpc.answers_raw")
@needs("simple")
def test_an_answer_is_what_the_protocol_shows(grpc: GrpcClient) -> None:
    answer = grpc.call("ModelInfer", raw(simple("g1")))
    expected = pb.ModelInferResponse(model_name="simple", model_version="1", id="g1")
    expected.outputs.add(name="OUTPUT0", datatype="INT32", shape=[1, 16])
    expected.outputs.add(name="OUTPUT1", datatype="INT32", shape=[1, 16])
    for first in (1, -1):
        expected.raw_output_contents.append(np.arange(first, first + 16, dtype=np.int32).tobytes())
    assert answer == expected


@clause("grpc.answers_raw")
@needs("simple")
def test_typed_contents_are_answered_raw(grpc: GrpcClient) -> None:
    answer = grpc.call("ModelInfer", typed(simple(outputs=[Output("OUTPUT1")])))
    assert [output.name for output in answer.outputs] == ["OUTPUT1"]
    assert [*answer.raw_output_contents] == [np.arange(-1, 15, dtype=np.int32).tobytes()]


@clause("grpc.surplus_raw")
@needs("simple")
def test_raw_entries_to_spare_are_ignored(grpc: GrpcClient) -> None:
    message = raw(simple())
    message.raw_input_contents.append(b"more")
    assert len(grpc.call("ModelInfer", message).outputs) == 2


@clause("grpc.narrow_typed")
@pytest.mark.parametrize(
    ("datatype", "field", "sent", "want"),
    [
        ("UINT8", "uint_contents", [300, 255], [44, 255]),
        ("UINT16", "uint_contents", [65537, 1], [1, 1]),
        ("INT8", "int_contents", [128, -129], [-128, 127]),
        ("INT16", "int_contents", [32768, -1], [-32768, -1]),
    ],
)
@needs("identity_uint8", "identity_uint16", "identity_int8", "identity_int16")
def test_low_bytes_are_taken(grpc: GrpcClient, datatype: str, field: str, sent: list[int], want: list[int]) -> None:
    dtype = np.dtype(datatype.lower())
    message = infer_message(Call(f"identity_{datatype.lower()}", [Input("INPUT0", datatype, np.zeros((1, 2), dtype))]))
    getattr(message.inputs[0].contents, field).extend(sent)
    (data,) = grpc.call("ModelInfer", message).raw_output_contents
    assert np.frombuffer(data, dtype).tolist() == want


@clause("grpc.answers_raw", "infer.empty")
@needs("identity_fp32")
def test_an_output_of_no_bytes_has_an_entry(grpc: GrpcClient) -> None:
    message = infer_message(identity(np.zeros((0, 3), np.float32)))
    message.raw_input_contents.append(b"")
    assert [*grpc.call("ModelInfer", message).raw_output_contents] == [b""]


@clause("infer.empty")
@needs("identity_fp32")
def test_empty_contents_are_contents(grpc: GrpcClient) -> None:
    message = infer_message(identity(np.zeros((0, 3), np.float32)))
    message.inputs[0].contents.SetInParent()
    assert [*grpc.call("ModelInfer", message).outputs[0].shape] == [0, 3]


@clause("grpc.unimplemented")
@pytest.mark.parametrize("path", [f"/{SERVICE}/Nope", "/nope.Service/Nope", f"/{SERVICE}/"])
def test_an_unknown_method_is_unimplemented(grpc: GrpcClient, path: str) -> None:
    ask: Any = grpc.channel.unary_unary(path)
    with pytest.raises(grpcio.RpcError) as caught:
        ask(b"", timeout=LIMIT_S)
    assert status(caught.value) == "UNIMPLEMENTED"


@clause("grpc.large_messages")
@needs("identity_fp32")
def test_a_message_of_64_mib_passes_both_ways(grpc: GrpcClient) -> None:
    array = np.arange(1 << 24, dtype=np.float32).reshape(1, -1)
    (data,) = grpc.call("ModelInfer", raw(identity(array))).raw_output_contents
    assert data == array.tobytes()


@clause("grpc.compression")
@needs("identity_fp32")
@pytest.mark.parametrize("algorithm", [grpcio.Compression.Gzip, grpcio.Compression.Deflate])
def test_a_compressed_message_is_read(grpc: GrpcClient, algorithm: grpcio.Compression) -> None:
    array = np.zeros((100, 100), np.float32)
    (data,) = grpc.call("ModelInfer", raw(identity(array)), compression=algorithm).raw_output_contents
    assert data == array.tobytes()


@clause("grpc.concurrency")
@needs("identity_fp32")
def test_many_calls_share_a_channel(grpc: GrpcClient) -> None:
    def one(i: int) -> bool:
        array = np.full((1 + i % 5, 7), i, np.float32)
        answer = grpc.call("ModelInfer", raw(identity(array)))
        return bool(answer.raw_output_contents[0] == array.tobytes())

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(one, range(200)))


def slow(steps: int) -> Any:
    """A message to slow_loop, a millisecond or so per step."""
    row, count = np.ones((1, 1), np.float32), np.array([steps], np.int64)
    return raw(Call("slow_loop", [Input("INPUT0", "FP32", row), Input("STEPS", "INT64", count)]))


def past_deadline(grpc: GrpcClient, message: Any) -> None:
    with pytest.raises(grpcio.RpcError) as caught:
        grpc.stub.ModelInfer(message, timeout=0.05)
    assert status(caught.value) == "DEADLINE_EXCEEDED"


def cancelled(grpc: GrpcClient, message: Any) -> None:
    call = grpc.stub.ModelInfer.future(message, timeout=LIMIT_S)
    # An answer to a later call has come: by then the server holds the earlier one.
    assert grpc.call("ModelReady", pb.ModelReadyRequest(name="slow_loop")).ready
    call.cancel()
    with pytest.raises(grpcio.FutureCancelledError):
        call.result(LIMIT_S)


@needs("slow_loop")
@pytest.mark.parametrize(
    "abandon",
    [
        pytest.param(past_deadline, marks=clause("grpc.deadline")),
        pytest.param(cancelled, marks=clause("grpc.cancel")),
    ],
)
def test_a_call_that_is_given_up_while_it_waits_never_runs(
    grpc: GrpcClient, abandon: Callable[[GrpcClient, Any], None]
) -> None:
    """Every instance is kept busy, so that the call can only wait; the statistics tell what became of it."""
    door = GrpcDoor(grpc)
    instances = sum(group["count"] for group in known(door.config("slow_loop"))["instance_group"])

    def run() -> int:
        (found,) = known(door.statistics("slow_loop"))["model_stats"]
        count: int = found["execution_count"]
        return count

    for _ in range(5):  # now the server has seen that the model is slow, and runs it on its instances only
        grpc.stub.ModelInfer(slow(5), timeout=LIMIT_S)
    before = run()
    busy = [grpc.stub.ModelInfer.future(slow(150), timeout=LIMIT_S) for _ in range(2 * instances)]
    abandon(grpc, slow(1))
    busy.append(grpc.stub.ModelInfer.future(slow(50), timeout=LIMIT_S))  # behind the one given up
    for call in busy:
        call.result(LIMIT_S)
    limit = time.monotonic() + LIMIT_S
    while (ran := run() - before) < len(busy):  # a server may count after it has answered
        assert time.monotonic() < limit, ran
    assert ran == len(busy)


@clause("grpc.malformed")
@needs("simple")
@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x7fsimple", b"\x0a\x02\xff\xfe", bytes(range(256))])
def test_bytes_that_are_no_message_fail_their_call_alone(grpc: GrpcClient, data: bytes) -> None:
    ask: Any = grpc.channel.unary_unary(INFER)
    with pytest.raises(grpcio.RpcError) as caught:
        ask(data, timeout=LIMIT_S)
    assert status(caught.value) != "OK"
    assert len(grpc.call("ModelInfer", raw(simple())).outputs) == 2


@clause("grpc.reflection")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services(grpc: GrpcClient, version: str) -> None:
    answer = dict(fields(grpc.reflect(version, 7, "*")))[6]
    assert isinstance(answer, bytes)
    services = {dict(fields(entry))[1] for _, entry in fields(answer) if isinstance(entry, bytes)}
    assert {SERVICE.encode(), b"grpc.health.v1.Health"} <= services


@clause("grpc.reflection")
@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize("symbol", [SERVICE, f"{SERVICE}.ModelInfer", "inference.ModelInferRequest"])
def test_reflection_gives_the_file_of_a_symbol(grpc: GrpcClient, version: str, symbol: str) -> None:
    files = dict(fields(grpc.reflect(version, 4, symbol)))[4]
    assert isinstance(files, bytes)
    assert b"GRPCInferenceService" in files
