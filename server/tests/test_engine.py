"""The engine brings answers from any thread to the event loop, and takes back what nobody waits for any more."""

import asyncio
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from penstock.engine import STREAM_WINDOW, Engine, Mailbox, OnLoop, Window
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, Sequence
from penstock.model import Model
from penstock.runtime import Cancelled, Credit, Reply
from penstock.settings import Settings

from .fakes import (
    LIMIT_S,
    Answers,
    EchoInstance,
    FakeRuntime,
    GatedInstance,
    Result,
    StreamingInstance,
    model,
    request,
)

GONE = ServingError(Kind.CANCELLED, "gone")


@asynccontextmanager
async def engine() -> AsyncIterator[Engine]:
    """One without models of its own: requests name the model that they are for."""
    async with asyncio.timeout(LIMIT_S):
        yield Engine(Settings(), FakeRuntime().find)


@asynccontextmanager
async def serving(made: Model) -> AsyncIterator[Model]:
    yield made
    assert await asyncio.to_thread(made.drain, LIMIT_S)
    await asyncio.to_thread(made.close)


def values(response: InferResponse) -> list[float]:
    return [float(value) for value in response.outputs[0].array]


async def passes(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is true; the test's own time limit ends a wait for nothing."""
    while not condition():  # noqa: ASYNC110 - what is waited for is a number, not an event
        await asyncio.sleep(0)


# -- mailbox


def test_calls_from_its_own_thread_are_made_at_once() -> None:
    async def run() -> list[str]:
        made: list[str] = []
        Mailbox(asyncio.get_running_loop()).post(lambda: made.append("now"))
        return made

    assert asyncio.run(run()) == ["now"]


def test_calls_from_other_threads_are_made_on_the_loop_in_their_order() -> None:
    async def run() -> list[int]:
        box = Mailbox(asyncio.get_running_loop())
        made: list[int] = []
        threads: set[int] = set()

        def call(number: int) -> None:
            threads.add(threading.get_ident())
            made.append(number)

        def post() -> None:
            for number in range(100):
                box.post(functools.partial(call, number))

        await asyncio.to_thread(post)
        await passes(lambda: len(made) == 100)
        assert threads == {threading.get_ident()}
        return made

    assert asyncio.run(run()) == list(range(100))


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often other threads woke it."""

    def __init__(self) -> None:
        super().__init__()
        self.wakes = 0

    def call_soon_threadsafe(self, *args: object, **kwargs: object) -> asyncio.Handle:
        self.wakes += 1
        return super().call_soon_threadsafe(*args, **kwargs)  # type: ignore[arg-type]


def test_one_wake_up_brings_all_that_has_come() -> None:
    async def run(loop: CountingLoop) -> tuple[int, int]:
        box = Mailbox(loop)
        made: list[int] = []

        def post() -> None:
            for number in range(50):
                box.post(functools.partial(made.append, number))

        thread = threading.Thread(target=post)
        thread.start()
        thread.join(LIMIT_S)  # the loop does not run meanwhile
        await passes(lambda: len(made) == 50)
        return loop.wakes, len(made)

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        loop = cast(CountingLoop, runner.get_loop())
        assert runner.run(run(loop)) == (1, 50)


def test_no_call_is_lost_among_many_threads() -> None:
    async def run() -> int:
        box = Mailbox(asyncio.get_running_loop())
        made: list[int] = []
        together = threading.Barrier(4)

        def post() -> None:
            together.wait(LIMIT_S)
            for number in range(500):
                box.post(functools.partial(made.append, number))

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(LIMIT_S):
            await passes(lambda: len(made) == 2000)
        for thread in threads:
            thread.join(LIMIT_S)
        return len(made)

    assert asyncio.run(run()) == 2000


def test_a_call_that_fails_is_reported_and_holds_up_no_other() -> None:
    async def run() -> tuple[list[str], list[str]]:
        loop = asyncio.get_running_loop()
        reported: list[str] = []
        loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        box = Mailbox(loop)
        made: list[str] = []

        def fail() -> None:
            raise RuntimeError("broken door")

        def post() -> None:
            box.post(fail)
            box.post(lambda: made.append("next"))

        await asyncio.to_thread(post)
        await passes(lambda: bool(made))
        return made, reported

    assert asyncio.run(run()) == (["next"], ["broken door"])


def test_a_reply_after_the_loop_has_closed_is_dropped() -> None:
    async def run() -> Mailbox:
        return Mailbox(asyncio.get_running_loop())

    box = asyncio.run(run())
    made: list[int] = []
    thread = threading.Thread(target=lambda: box.post(lambda: made.append(1)))
    thread.start()
    thread.join(LIMIT_S)
    assert made == []


def test_a_loop_has_one_mailbox() -> None:
    async def run() -> None:
        async with engine() as made:
            assert made.mailbox() is made.mailbox()

    asyncio.run(run())


# -- infer


@pytest.mark.parametrize("device", ["cpu", "cuda:0"], ids=["inline", "worker"])
def test_a_request_is_answered_on_the_loop(device: str) -> None:
    async def run() -> list[float]:
        async with engine() as made, serving(model(EchoInstance(2, device))) as served:
            return values(await made.infer(served, request(4)))

    assert asyncio.run(run()) == [8]


def test_an_error_is_raised() -> None:
    async def run() -> None:
        async with engine() as made, serving(model(EchoInstance())) as served:
            sent = request()
            sent.deadline_ns = 1
            await made.infer(served, sent)

    with pytest.raises(ServingError) as caught:
        asyncio.run(run())
    assert caught.value.kind is Kind.DEADLINE


def test_cancelling_the_caller_cancels_the_request() -> None:
    async def run() -> list[list[str]]:
        instance = GatedInstance()
        async with engine() as made, serving(model(instance)) as served:
            running = asyncio.create_task(made.infer(served, request(id="runs")))
            await asyncio.to_thread(instance.wait_begun)
            waiting = asyncio.create_task(made.infer(served, request(id="waits")))
            await passes(lambda: served.waiting == 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert served.waiting == 0
            assert served.statistics.failures["CANCELED"] == 1
            instance.gate.set()
            await running
        return instance.batches

    assert asyncio.run(run()) == [["runs"]]


def test_an_answer_to_a_caller_that_has_gone_is_dropped() -> None:
    async def run() -> None:
        instance = GatedInstance()
        async with engine() as made, serving(model(instance)) as served:
            task = asyncio.create_task(made.infer(served, request()))
            await asyncio.to_thread(instance.wait_begun)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            instance.gate.set()

    asyncio.run(run())


def test_a_callback_gets_its_answer_within_submit_when_the_model_runs_inline() -> None:
    async def run() -> list[Result]:
        async with engine() as made, serving(model(EchoInstance(3))) as served:
            got: list[Result] = []
            made.submit(served, request(2), OnLoop(made.mailbox(), got.append))
            assert len(got) == 1
            return got

    [answer] = asyncio.run(run())
    assert isinstance(answer, InferResponse)
    assert values(answer) == [6]


# -- stream


def numbers(count: int, last: Result | None = None) -> Callable[[InferRequest, Reply, Cancelled], None]:
    """Replies 0, 1, ... on a thread of its own, waiting for room before each; the last is final, or `last` follows."""

    def produce(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        echo = EchoInstance()
        for number in range(count):
            if cancelled.reason is not None:
                reply(cancelled.reason)
                return
            final = number == count - 1 and last is None
            credit = reply(echo.answer(request(number, id=sent.id)), final=final)
            if not final and credit.left <= 0:
                credit.wait()
        if last is not None:
            reply(last)

    def script(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        threading.Thread(target=produce, args=(sent, reply, cancelled)).start()

    return script


def test_a_stream_brings_every_answer_in_order() -> None:
    async def run() -> list[float]:
        instance = StreamingInstance(script=numbers(3 * STREAM_WINDOW))
        async with engine() as made, serving(model(instance)) as served:
            return [values(answer.response)[0] async for answer in made.stream(served, request())]

    assert asyncio.run(run()) == list(range(3 * STREAM_WINDOW))


def test_a_stream_raises_the_error_that_ends_it() -> None:
    async def run(got: list[float]) -> None:
        instance = StreamingInstance(script=numbers(2, ServingError(Kind.INTERNAL, "no more")))
        async with engine() as made, serving(model(instance)) as served:
            async for answer in made.stream(served, request()):
                got += values(answer.response)

    got: list[float] = []
    with pytest.raises(ServingError, match="no more"):
        asyncio.run(run(got))
    assert got == [0, 1]


def test_leaving_a_stream_cancels_its_request_and_lets_the_producer_go() -> None:
    async def run() -> tuple[str, int]:
        instance = StreamingInstance(script=numbers(10**6))
        async with engine() as made, serving(model(instance)) as served:
            stream = made.stream(served, request())
            await anext(stream)
            await stream.aclose()
            [(_, _, cancelled)] = instance.started
            assert cancelled.reason is not None
            return cancelled.reason.message, served.waiting

    assert asyncio.run(run()) == ("the client went away", 0)


def test_a_stream_that_ended_is_not_cancelled() -> None:
    async def run() -> Cancelled:
        instance = StreamingInstance(script=numbers(1))
        async with engine() as made, serving(model(instance)) as served:
            assert len([answer async for answer in made.stream(served, request())]) == 1
        [(_, _, cancelled)] = instance.started
        return cancelled

    assert not asyncio.run(run())


def answer(number: int) -> InferResponse:
    return EchoInstance().answer(request(number))


def test_a_windows_credit_is_the_room_that_is_left() -> None:
    async def run() -> list[int]:
        window = Window(Mailbox(asyncio.get_running_loop()), 2)
        left = [window(answer(0), final=False).left, window(answer(1), final=False).left]
        await window.get()
        return [*left, window.left]

    assert asyncio.run(run()) == [1, 0, 1]


def test_a_producer_on_a_thread_waits_for_room() -> None:
    async def run() -> None:
        window = Window(Mailbox(asyncio.get_running_loop()), 1)
        window(answer(0), final=False)
        waited = asyncio.create_task(asyncio.to_thread(window.wait))
        done, _ = await asyncio.wait([waited], timeout=0.01)
        assert not done
        await window.get()
        async with asyncio.timeout(LIMIT_S):
            await waited

    asyncio.run(run())


def test_a_producer_in_a_coroutine_waits_for_room() -> None:
    async def run() -> None:
        window = Window(Mailbox(asyncio.get_running_loop()), 1)
        credit: Credit = window(answer(0), final=False)

        async def wait() -> None:
            await credit

        waited = asyncio.create_task(wait())
        done, _ = await asyncio.wait([waited], timeout=0.01)
        assert not done
        await window.get()
        async with asyncio.timeout(LIMIT_S):
            await waited
        await wait()  # there is room now

    asyncio.run(run())


def test_a_window_that_nobody_reads_any_more_has_room_for_all() -> None:
    async def run() -> None:
        window = Window(Mailbox(asyncio.get_running_loop()), 1)
        window(answer(0), final=False)
        window.open_wide()
        window.wait()
        window(answer(1), final=False).wait()

    asyncio.run(run())


# -- models that are replaced


class Repository:
    """One model file, an engine that serves it, and loads of its changes."""

    def __init__(self, root: Path) -> None:
        self._path = root / "m.onnx"
        self._clock_ns = 2**61
        self.write("scale 1")
        self.engine = Engine(Settings(model_repository=(str(root),), device="cpu"), FakeRuntime().find)
        self.engine.lifecycle.start()

    def write(self, text: str) -> None:
        """Each write is later than the one before, by the clock of the file system."""
        self._path.write_text(text)
        self._clock_ns += 10**9
        os.utime(self._path, ns=(self._clock_ns, self._clock_ns))

    def reload(self, text: str) -> None:
        self.write(text)
        self.engine.lifecycle.load("m")


@pytest.mark.parametrize("version", ["", "1"])
def test_a_request_for_a_model_that_was_replaced_goes_to_its_successor(tmp_path: Path, version: str) -> None:
    repository = Repository(tmp_path)
    old = repository.engine.model("m")
    repository.reload("scale 7")
    assert old.drain(LIMIT_S)
    sent = request(2)
    sent.version = version
    repository.engine.submit(old, sent, answers := Answers())
    assert answers.values() == [14]
    assert repository.engine.lifecycle.stop(LIMIT_S)


def test_a_sequence_ends_where_its_model_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "1").mkdir(parents=True)
    config = 'backend: "fake" default_model_filename: "model.txt" sequence_batching { }'

    def write(scale: int) -> None:
        (folder / "1" / "model.txt").write_text(f"scale {scale}")
        (folder / "config.pbtxt").write_text(f"{config} # {scale}")
        os.utime(folder / "config.pbtxt", ns=(2**61 + scale * 10**9,) * 2)

    def ask(flags: str) -> Answers:
        sent = request(2)
        sent.sequence = Sequence(7, "S" in flags, "E" in flags)
        engine.submit(old, sent, answers := Answers())
        return answers

    write(1)
    engine = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"), FakeRuntime().find)
    engine.lifecycle.start()
    old = engine.model("m")
    assert ask("S").values() == [2]
    write(5)
    engine.lifecycle.load("m")
    assert old.drain(LIMIT_S)  # though the sequence has had no end
    with pytest.raises(ServingError, match="inference request for sequence 7 to model 'm' must specify the START flag"):
        ask("")
    assert ask("SE").values() == [10]
    assert engine.lifecycle.stop(LIMIT_S)


def test_a_request_for_a_model_that_was_unloaded_is_told_so(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    old = repository.engine.model("m")
    repository.engine.lifecycle.unload("m")
    assert old.drain(LIMIT_S)
    with pytest.raises(ServingError, match="Request for unknown model: 'm' has no available versions"):
        repository.engine.submit(old, request(), Answers())
    assert repository.engine.lifecycle.stop(LIMIT_S)


def test_a_request_does_not_go_to_a_successor_with_another_signature(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_text("scale 1")
    engine = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"), FakeRuntime().find)
    engine.lifecycle.start()
    old = engine.model("m")
    (folder / "config.pbtxt").write_text('input { name: "X" data_type: TYPE_FP32 dims: 2 }')
    engine.lifecycle.load("m")
    assert old.drain(LIMIT_S)
    with pytest.raises(ServingError, match="stopped accepting") as caught:
        engine.submit(old, request(), Answers())
    assert caught.value.kind is Kind.UNAVAILABLE
    assert engine.lifecycle.stop(LIMIT_S)


def test_a_stopping_server_says_so(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    old = repository.engine.model("m")
    assert repository.engine.lifecycle.stop(LIMIT_S)
    with pytest.raises(ServingError, match="Server is stopping"):
        repository.engine.submit(old, request(), Answers())


def test_no_request_fails_while_a_model_is_reloaded(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    stop = threading.Event()
    failures: list[ServingError] = []
    answered: list[float] = []

    def ask() -> None:
        while not stop.is_set():
            try:
                served = repository.engine.model("m")
                repository.engine.submit(served, request(1), answers := Answers())
                answered.extend(answers.values())
            except ServingError as error:
                failures.append(error)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    for scale in range(2, 8):
        repository.reload(f"scale {scale}")
    stop.set()
    for client in clients:
        client.join(LIMIT_S)
    assert failures == []
    assert set(answered) <= set(range(1, 8))
    assert repository.engine.lifecycle.stop(LIMIT_S)
