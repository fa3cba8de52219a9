"""ModelStreamInfer through a real client, on either transport on a free loopback port."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from penstock import pb
from penstock.engine import STREAM_WINDOW, Engine
from penstock.errors import Kind, ServingError
from penstock.grpc_api import streaming
from penstock.grpc_api.calls import STOPPING, Call, Door
from penstock.grpc_api.methods import SERVICE
from penstock.messages import InferRequest, InferResponse
from penstock.model import Model
from penstock.runtime import PLENTY, Cancelled, Credit, Reply
from penstock.settings import Settings
from penstock.tensor import DATATYPES, Tensor

from .test_grpc_methods import (
    LIMIT_S,
    Doubler,
    Failing,
    Gated,
    Long,
    Serve,
    Served,
    Shelf,
    model,
    request,
    run,
    same,
    serve,
    until,
)

__all__ = ["serve"]  # the fixture

PATH = f"/{SERVICE}/ModelStreamInfer"
INT32 = DATATYPES["INT32"]
Open = Any  # a call of grpc.aio, which ships no types for what both ends of a stream are
Answer = tuple[str, str, list[int], bool | None]  # id, error, Y, whether it is the last; None where that is not said


class Counting(Doubler):
    """Answers A = [n] with 0 ... n-1, and ends with an answer that has no outputs. It waits for room after each."""

    streams = True

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.full = threading.Event()  # there was no room
        self.cancelled = threading.Event()

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        threading.Thread(target=self._count, args=[request, reply, cancelled]).start()

    def _count(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        credit: Credit = PLENTY
        for number in range(int(request.inputs["A"].array[0])):
            if credit.left <= 0:
                self.full.set()
            credit.wait()
            if cancelled:
                self.cancelled.set()
                reply(ServingError(Kind.CANCELLED, "the client is gone"))
                return
            outputs = [Tensor("Y", INT32, np.array([number], np.int32))]
            self.sent += 1
            credit = reply(InferResponse(request.model, "1", request.id, outputs), final=False)
        reply(InferResponse(request.model, "1", request.id, []))


class Scripted(Doubler):
    """Answers each request with the results of a list, the last of which ends it."""

    streams = True

    def __init__(self, *results: InferResponse | ServingError) -> None:
        super().__init__()
        self.results = results

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        for left, result in enumerate(self.results, 1 - len(self.results)):
            reply(result, final=left == 0)


def opened(served: Served, **options: Any) -> Open:
    return served.channel.stream_stream(PATH, same, same)(**options)


async def say(call: Open, *messages: pb.ModelInferRequest) -> None:
    for message in messages:
        await call.write(message.SerializeToString())


async def hear(call: Open, number: int) -> list[Answer]:
    return [shown(await call.read()) for _ in range(number)]


async def rest(call: Open) -> list[Answer]:
    """What still comes, once the client has said its last; the call must end well."""
    await call.done_writing()
    answers = [shown(body) for body in await bodies_of(call)]
    assert await call.code() is grpc.StatusCode.OK
    return answers


async def bodies_of(call: Open) -> list[bytes]:
    """Of all that still comes."""
    bodies = []
    while (body := await call.read()) is not grpc.aio.EOF:
        bodies.append(body)
    return bodies


def shown(body: bytes | list[bytes]) -> Answer:
    body = body if isinstance(body, bytes) else b"".join(body)
    message = pb.ModelStreamInferResponse.FromString(body)
    answer = message.infer_response
    flag = (
        answer.parameters["triton_final_response"].bool_param if "triton_final_response" in answer.parameters else None
    )
    values = np.frombuffer(answer.raw_output_contents[0], np.int32).tolist() if answer.raw_output_contents else []
    return answer.id, message.error_message, values, flag


def asking(name: str, *values: int, id: str, empty_final: bool = False) -> pb.ModelInferRequest:
    message = request(name, *values, id=id)
    if empty_final:
        message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def test_answers_come_in_the_order_of_requests_to_many_models(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        async with serve(model("slow", gated), model("fast", Doubler())) as served:
            call = opened(served)
            await say(call, request("slow", 1, id="a"), request("fast", 2, id="b"), request("fast", 3, 4, id="c"))
            await asyncio.to_thread(gated.entered.acquire)
            gated.gate.set()
            assert await rest(call) == [("a", "", [2], True), ("b", "", [4], True), ("c", "", [6, 8], True)]

    run(test)


def test_an_answer_comes_while_the_stream_stays_open(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            call = opened(served)
            for number in range(3):
                await say(call, request("m", number, id=str(number)))
                assert await hear(call, 1) == [(str(number), "", [2 * number], True)]
            assert await rest(call) == []

    run(test)


def test_what_is_refused_is_an_answer_with_the_id_alone_in_its_turn(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("m", Doubler())) as served:
            call = opened(served)
            wrong = request("m", 1, id="b")
            wrong.inputs[0].datatype = "FP32"
            await say(call, request("m", 1, id="a"), wrong, request("nope", id="c"), request("m", 2, id="d"))
            await call.write(b"\x0a\x7f")
            first, second, third, fourth, fifth = await rest(call)
            assert (first, fourth) == (("a", "", [2], True), ("d", "", [4], True))
            text = "[request id: b] inference input 'A' data-type is 'FP32', but model 'm' expects 'INT32'"
            assert second == ("b", text, [], None)
            assert third == ("c", "Request for unknown model: 'nope' is not found", [], None)
            assert (fifth[0], fifth[1][:28], fifth[3]) == ("", "malformed request message: E"[:28], None)

    run(test)


@pytest.mark.parametrize("known", [False, True])
def test_a_request_that_fails_does_not_end_the_stream(serve: Serve, known: bool) -> None:
    async def test() -> None:
        failing = model("bad", Failing(ServingError(Kind.INTERNAL, "no luck")))
        async with serve(failing, model("m", Doubler())) as served:
            call = opened(served)
            if known:  # by its bytes
                await say(call, request("bad", 1, id="0"))
                await hear(call, 1)
            await say(call, request("bad", 1, id="a"), request("m", 1, id="b"))
            await call.done_writing()
            message = pb.ModelStreamInferResponse.FromString(await call.read())
            assert message.error_message == "no luck"
            answer = message.infer_response
            assert (answer.id, answer.model_name, answer.model_version) == ("a", "bad", "")
            assert answer.parameters["triton_final_response"].bool_param
            assert await rest(call) == [("b", "", [2], True)]

    run(test)


@pytest.mark.parametrize("decoupled", [False, True])
def test_what_is_refused_when_it_is_queued_bears_its_id_alone_even_where_errors_are_strict(
    serve: Serve, decoupled: bool
) -> None:
    async def test() -> None:
        closing = model("m", Counting() if decoupled else Doubler(), decoupled)
        closing.drain(0)
        async with serve(closing) as served:
            call = opened(served, metadata=(("triton_grpc_error", "true"),))
            await say(call, request("m", 1, id="a"))
            text = (
                "[request id: a] Server is stopping, scheduler for model has stopped accepting new inference requests"
            )
            assert await rest(call) == [("a", text, [], None)]

    run(test)


def test_where_errors_are_strict_one_of_execution_ends_the_stream(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        held = model("slow", gated)
        failing = model("bad", Failing(ServingError(Kind.NOT_FOUND, "no luck")))
        async with serve(failing, held) as served:
            call = opened(served, metadata=(("triton_grpc_error", "true"),))
            await say(call, request("nope", 1, id="a"))
            assert await hear(call, 1) == [("a", "Request for unknown model: 'nope' is not found", [], None)]
            await say(call, request("bad", 1, id="b"), request("slow", 1, id="c"), request("slow", 1, id="d"))
            with pytest.raises(grpc.aio.AioRpcError):
                await hear(call, 1)
            assert (await call.code(), await call.details()) == (grpc.StatusCode.NOT_FOUND, "no luck")
            await until(lambda: held.waiting == 0)
            gated.gate.set()
        assert len(gated.seen) <= 1

    run(test)


def test_a_decoupled_model_answers_many_times_and_is_not_held_back(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        async with serve(model("slow", gated), model("count", Counting(), decoupled=True)) as served:
            call = opened(served)
            await say(call, request("slow", 1, id="a"), asking("count", 3, id="b"))
            assert await hear(call, 3) == [("b", "", [number], False) for number in range(3)]
            gated.gate.set()
            assert await rest(call) == [("a", "", [2], True)]

    run(test)


def test_the_end_of_a_decoupled_request_is_told_where_that_is_asked_for(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("count", Counting(), decoupled=True)) as served:
            call = opened(served)
            await say(call, asking("count", 1, id="a", empty_final=True), asking("count", 0, id="b", empty_final=True))
            await call.done_writing()
            answers = [pb.ModelStreamInferResponse.FromString(body) for body in await bodies_of(call)]
            last = [answer.infer_response for answer in answers if not answer.infer_response.outputs]
            assert sorted((one.id, one.model_name, one.model_version) for one in last) == [
                ("a", "count", ""),
                ("b", "count", ""),
            ]
            assert all(one.parameters["triton_final_response"].bool_param for one in last)
            assert len(answers) == 3

    run(test)


def test_an_error_of_a_decoupled_model_is_the_last_answer_or_is_not(serve: Serve) -> None:
    async def test() -> None:
        outputs = [Tensor("Y", INT32, np.array([7], np.int32))]
        script = Scripted(
            ServingError(Kind.INTERNAL, "one of them"),
            InferResponse("m", "1", "a", outputs),
            ServingError(Kind.INTERNAL, "all over"),
        )
        async with serve(model("m", script, decoupled=True)) as served:
            call = opened(served)
            await say(call, request("m", 1, id="a"))
            assert await rest(call) == [
                ("a", "one of them", [], False),
                ("a", "", [7], False),
                ("a", "all over", [], True),
            ]

    run(test)


def test_an_answer_over_the_limit_fails_alone(serve: Serve) -> None:
    async def test() -> None:
        async with serve(model("long", Long()), model("m", Doubler()), grpc_max_message_size=2000) as served:
            call = opened(served)
            await say(call, request("long", 1, id="a"), request("m", 1, id="b"))
            first, second = await rest(call)
            assert first[1].endswith("which exceeds gRPC's byte size limit 2000.")
            assert second == ("b", "", [2], True)

    run(test)


def test_a_client_that_leaves_ends_what_is_queued_and_what_runs(serve: Serve) -> None:
    async def test() -> None:
        gated, counting = Gated(), Counting()
        held = model("slow", gated)
        async with serve(held, model("count", counting, decoupled=True)) as served:
            call = opened(served)
            await say(call, *(request("slow", 1) for _ in range(4)), request("count", 2**31 - 1))
            await asyncio.to_thread(gated.entered.acquire)
            await until(lambda: held.waiting == 3 and counting.sent > 0)
            call.cancel()
            await until(lambda: held.waiting == 0)
            assert await asyncio.to_thread(counting.cancelled.wait, LIMIT_S)
            gated.gate.set()
        assert len(gated.seen) == 1
        assert held.statistics.failures["CANCELED"] == 3

    run(test)


def test_a_deadline_ends_the_stream_and_drops_what_waits(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        held = model("slow", gated)
        async with serve(held) as served:
            call = opened(served, timeout=0.2)
            await say(call, request("slow", 1), request("slow", 2))
            await asyncio.to_thread(gated.entered.acquire)
            with pytest.raises(grpc.aio.AioRpcError):
                await hear(call, 1)
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: held.waiting == 0)
            gated.gate.set()
        assert len(gated.seen) == 1

    run(test)


def test_a_server_that_stops_answers_what_it_has_accepted_and_ends_the_stream(serve: Serve) -> None:
    async def test() -> None:
        gated = Gated()
        async with serve(model("m", gated)) as served:
            call, idle = opened(served), opened(served)
            await say(call, request("m", 1, id="a"))
            await say(idle, request("nope", 1, id="b"))
            await hear(idle, 1)
            await asyncio.to_thread(gated.entered.acquire)
            served.door.stopping.set()
            for one in (idle, call):
                with pytest.raises(grpc.aio.AioRpcError):
                    await hear(one, 2)
                assert (await one.code(), await one.details()) == (grpc.StatusCode.UNAVAILABLE, STOPPING)
                gated.gate.set()
            assert len(gated.seen) == 1

    run(test)


def test_a_decoupled_model_waits_for_a_client_that_does_not_read() -> None:
    async def test() -> None:
        counting = Counting()

        async def bodies() -> AsyncIterator[bytes]:
            yield request("count", 200).SerializeToString()

        async with talking(model("count", counting, decoupled=True), bodies) as answers:
            seen = [shown(await anext(answers))]
            await until(lambda: counting.sent == STREAM_WINDOW + 1)
            assert await asyncio.to_thread(counting.full.wait, LIMIT_S)
            seen += [shown(answer) async for answer in answers]
        assert seen == [("", "", [number], False) for number in range(200)]

    run(test)


@pytest.mark.parametrize(
    ("body_bytes", "most"),
    [(0, streaming.MOST_REQUESTS), (1 << 20, streaming.MOST_BYTES >> 20)],
    ids=["many requests", "many bytes"],
)
def test_no_more_is_read_than_there_is_room_for(body_bytes: int, most: int) -> None:
    async def test() -> None:
        gated = Gated()
        held = model("m", gated)
        message = request("m", *[0] * (body_bytes // 4)).SerializeToString()
        taken = 0

        async def bodies() -> AsyncIterator[bytes]:
            nonlocal taken
            while taken < 2 * most:
                taken += 1
                yield message

        async with talking(held, bodies) as answers:
            first = asyncio.ensure_future(anext(answers))
            await asyncio.to_thread(gated.entered.acquire)
            assert taken == most
            gated.gate.set()
            assert shown(await first)[1:] == ("", [0] * (body_bytes // 4), True)
            assert len([answer async for answer in answers]) == 2 * most - 1

    run(test)


def test_answers_larger_than_their_requests_count_as_what_they_are() -> None:
    async def test() -> None:
        megabytes = 8

        class Large(Gated):
            def answer(self, request: InferRequest) -> InferResponse:
                outputs = [Tensor("Y", INT32, np.zeros(megabytes << 18, np.int32))]
                return InferResponse(request.model, "1", request.id, outputs)

        large = Large()
        taken = 0

        async def bodies() -> AsyncIterator[bytes]:
            nonlocal taken
            while taken < 40:
                taken += 1
                yield request("m", 1).SerializeToString()
                await answered.wait()

        large.gate.set()
        answered = asyncio.Event()
        held = model("m", large)
        async with talking(held, bodies) as answers:
            await anext(answers)
            answered.set()
            await anext(answers)
            await until(lambda: held.running + held.waiting == 0)
            assert 1 < taken <= 2 + (streaming.MOST_BYTES >> 20) // megabytes
            assert len([answer async for answer in answers]) == 38

    run(test)


@asynccontextmanager
async def talking(
    served: Model, bodies: Callable[[], AsyncIterator[bytes]]
) -> AsyncIterator[AsyncGenerator[Any, None]]:
    """The row itself, without a transport that holds messages of its own."""
    engine = Engine(Settings())
    engine.lifecycle = Shelf(engine.settings, [served])
    answers = streaming.stream_infer(Door(engine), bodies(), Call(()))
    try:
        yield answers
    finally:
        await answers.aclose()
        served.close()
