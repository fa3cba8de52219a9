"""Sequences over one gRPC stream: the requests of several, interleaved, as they come."""

import itertools
import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from conformance_tests.carriers import Call, Input, infer_message, read_outputs
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import LIMIT_S, GrpcClient
from conformance_tests.server import Target

api: Any = tritonclient.grpc

VALUES = [11, 7, 5, 3, 2, 0, 1]
SUMS = list(itertools.accumulate(VALUES))
IDS = itertools.count(time.time_ns() % 2**40 * 1000)  # that no sequence has

models = pytest.mark.parametrize("model", ["sequence_sum", "sequence_sum_oldest"])
needs = pytest.mark.needs("sequence_sum", "sequence_sum_oldest")


def flags(position: int) -> dict[str, bool]:
    return {"sequence_start": position == 0, "sequence_end": position == len(VALUES) - 1}


def messages(model: str, ids: tuple[int | str, int | str]) -> Iterator[Any]:
    """Both sequences in turns, the second of negatives; a request is named 0 or 1 after its sequence."""
    for position, value in enumerate(VALUES):
        for number, (id, sign) in enumerate(zip(ids, (1, -1), strict=True)):
            array = np.array([[sign * value]], np.int32)
            parameters = {"sequence_id": id, **flags(position)}
            sent = infer_message(Call(model, [Input("INPUT", "INT32", array)], (), "", f"{number}", parameters))
            sent.raw_input_contents.append(array.tobytes())
            yield sent


@models
@needs
@pytest.mark.parametrize("text", [False, True], ids=["number", "text"])
@clause("sequence.stream")
def test_two_sequences_sent_without_waiting_over_one_stream(grpc: GrpcClient, model: str, text: bool) -> None:
    ids = (f"flow-{next(IDS)}", f"flow-{next(IDS)}") if text else (next(IDS), next(IDS))
    seen: dict[str, list[int]] = {"0": [], "1": []}
    for answer in grpc.stub.ModelStreamInfer(messages(model, ids), timeout=LIMIT_S):
        assert answer.error_message == ""
        (output,) = read_outputs(answer.infer_response)
        seen[answer.infer_response.id].append(int(output.array.item()))
    assert seen == {"0": SUMS, "1": [-total for total in SUMS]}


@needs
@clause("sequence.stream")
def test_a_request_without_a_start_is_an_error_and_the_stream_goes_on(grpc: GrpcClient) -> None:
    first, second = next(IDS), next(IDS)
    sent = list(messages("sequence_sum", (first, second)))
    answers = list(grpc.stub.ModelStreamInfer(iter([sent[2], sent[0], sent[12]]), timeout=LIMIT_S))
    assert [answer.error_message for answer in answers] == [
        f"inference request for sequence {first} to model 'sequence_sum' must specify the START flag on the first "
        "request of the sequence",
        "",
        "",
    ]
    assert [int(read_outputs(answer.infer_response)[0].array.item()) for answer in answers[1:]] == [11, 12]


@models
@needs
@clause("sequence.stream")
def test_tritonclients_stream_of_two_sequences(target: Target, grpc: GrpcClient, model: str) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    up, down = next(IDS), next(IDS)
    with api.InferenceServerClient(target.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for position, value in enumerate(VALUES):
            for id, number in ((up, value), (down, -value)):
                entry = api.InferInput("INPUT", [1, 1], "INT32")
                entry.set_data_from_numpy(np.array([[number]], np.int32))
                client.async_stream_infer(model, [entry], request_id=str(id), sequence_id=id, **flags(position))
        found: dict[str, list[int]] = {str(up): [], str(down): []}
        for _ in range(2 * len(VALUES)):
            result, error = answers.get(timeout=LIMIT_S)
            assert error is None
            found[result.get_response().id].append(int(result.as_numpy("OUTPUT").item()))
        client.stop_stream()
    assert found == {str(up): SUMS, str(down): [-total for total in SUMS]}
