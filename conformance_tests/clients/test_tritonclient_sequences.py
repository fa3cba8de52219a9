"""Sequences as tritonclient's own examples send them: sums that grow, two of them interleaved, call by call."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
from tritonclient.utils import InferenceServerException

from conformance_tests.clause_table import clause
from conformance_tests.server import Target

# They ship no types.
http_api: Any = tritonclient.http
grpc_api: Any = tritonclient.grpc
grpc_aio: Any = tritonclient.grpc.aio

VALUES = [11, 7, 5, 3, 2, 0, 1]
SUMS = list(itertools.accumulate(VALUES))
IDS = itertools.count(time.time_ns() % 2**40 * 1000)  # that no sequence has

models = pytest.mark.parametrize("model", ["sequence_sum", "sequence_sum_oldest"])
texts = pytest.mark.parametrize("text", [False, True], ids=["number", "text"])
needs = pytest.mark.needs("sequence_sum", "sequence_sum_oldest")


@pytest.fixture
def grpc_address(target: Target) -> str:
    if not target.grpc:
        pytest.skip("no --grpc was given")
    return target.grpc


@pytest.fixture
def http(target: Target) -> Iterator[Any]:
    with http_api.InferenceServerClient(target.http.removeprefix("http://")) as client:
        yield client


@pytest.fixture
def grpc(grpc_address: str) -> Iterator[Any]:
    with grpc_api.InferenceServerClient(grpc_address) as client:
        yield client


def inputs(api: Any, value: int) -> list[Any]:
    entry = api.InferInput("INPUT", [1, 1], "INT32")
    entry.set_data_from_numpy(np.array([[value]], np.int32))
    return [entry]


def fresh(text: bool) -> int | str:
    return f"flow-{next(IDS)}" if text else next(IDS)


def place(id: int | str, position: int) -> dict[str, object]:
    return {"sequence_id": id, "sequence_start": position == 0, "sequence_end": position == len(VALUES) - 1}


def interleaved(client: Any, api: Any, model: str, text: bool) -> tuple[list[int], list[int]]:
    """The sums that two sequences see, one of the values and one of their negatives, in turns."""
    up, down = fresh(text), fresh(text)
    sums: tuple[list[int], list[int]] = ([], [])
    for position, value in enumerate(VALUES):
        for id, number, seen in ((up, value, sums[0]), (down, -value, sums[1])):
            answer = client.infer(model, inputs(api, number), **place(id, position))
            seen.append(int(answer.as_numpy("OUTPUT").item()))
    return sums


@models
@texts
@needs
@clause("sequence.clients")
def test_two_sequences_over_http(http: Any, model: str, text: bool) -> None:
    assert interleaved(http, http_api, model, text) == (SUMS, [-total for total in SUMS])


@models
@texts
@needs
@clause("sequence.clients")
def test_two_sequences_over_grpc(grpc: Any, model: str, text: bool) -> None:
    assert interleaved(grpc, grpc_api, model, text) == (SUMS, [-total for total in SUMS])


@models
@needs
@clause("sequence.clients")
def test_two_sequences_at_a_time_over_the_asynchronous_client(grpc_address: str, model: str) -> None:
    async def follow(client: Any, sign: int) -> list[int]:
        id, seen = fresh(False), []
        for position, value in enumerate(VALUES):
            answer = await client.infer(model, inputs(grpc_aio, sign * value), **place(id, position))
            seen.append(int(answer.as_numpy("OUTPUT").item()))
        return seen

    async def session() -> tuple[list[int], list[int]]:
        async with grpc_aio.InferenceServerClient(grpc_address) as client:
            up, down = await asyncio.gather(follow(client, 1), follow(client, -1))
            return up, down

    assert asyncio.run(session()) == (SUMS, [-total for total in SUMS])


@needs
@clause("sequence.clients")
def test_a_sequence_without_a_start_is_an_exception_with_its_reason(http: Any, grpc: Any) -> None:
    for client, api in ((http, http_api), (grpc, grpc_api)):
        with pytest.raises(InferenceServerException, match="must specify the START flag on the first request"):
            client.infer("sequence_sum", inputs(api, 1), sequence_id=next(IDS))
