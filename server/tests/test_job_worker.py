"""Claiming, running and recording: slots, limits of time, lost workers, and an orderly stop."""

import asyncio
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.job_api.store import Job, Request, State, open_store
from penstock.job_api.worker import Recorder
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import Cancelled, Reply
from penstock.tensor import FP32, Tensor

from .fakes import LIMIT_S, EchoInstance, GatedInstance, ScriptedInstance, StreamingInstance
from .fakes_job_door import Handler, House, Say, Says, X, echo, eventually, final, handler, house, never, run, settled
from .fakes_jobs import MemoryJobStore


class Counting(MemoryJobStore):
    """Counts the calls that write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def add(self, *arguments: Any, **named: Any) -> Job | None:
        self.calls.append("add")
        return await super().add(*arguments, **named)

    async def claim(self, *arguments: Any) -> Sequence[Job]:
        claimed = await super().claim(*arguments)
        if claimed:
            self.calls.append("claim")
        return claimed

    async def finish(self, *arguments: Any) -> bool:
        self.calls.append("finish")
        return await super().finish(*arguments)


# -- slots


def test_a_runsync_with_a_free_slot_takes_two_commits(tmp_path: Path) -> None:
    store = Counting()

    async def test(made: House) -> None:
        await asyncio.gather(*(made.post("/v2/m/runsync", X) for _ in range(8)))
        assert sorted(store.calls) == ["add"] * 8 + ["finish"] * 8

    run(tmp_path, test, store=store)


@pytest.mark.parametrize("slots", [1, 3])
def test_no_more_jobs_run_than_a_model_takes(tmp_path: Path, slots: int) -> None:
    says = Says()

    async def test(made: House) -> None:
        for number in range(5):
            await made.post("/v2/h/run", {"input": number})
        await made.until("/v2/h/health", lambda health: health["jobs"]["inProgress"] == slots)
        await settled()
        assert (await made.get("/v2/h/health"))["jobs"]["inProgress"] == slots
        for number in range(5):
            (await says.number(number))(number)
        await made.until("/v2/h/health", lambda health: health["jobs"]["completed"] == 5)

    run(tmp_path, test, {"h": handler(says.take, slots)})


def test_one_endpoint_does_not_hold_up_another(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        blocked = [(await made.post("/v2/h/run", {"input": n}))["id"] for n in range(3)]
        assert (await made.post("/v2/m/runsync", X))["status"] == "COMPLETED"
        await final(made, "m", (await made.post("/v2/m/run", X))["id"])
        for id in blocked:
            await made.post(f"/v2/h/cancel/{id}")

    run(tmp_path, test, {"h": handler(never), "m": EchoInstance})


def test_jobs_of_low_priority_come_last(tmp_path: Path) -> None:
    order: list[Any] = []
    says = Says()

    def script(value: Any, say: Say) -> None:
        order.append(value)
        if value == "first":
            says.take(value, say)
        else:
            say(value)

    async def test(made: House) -> None:
        await made.post("/v2/h/run", {"input": "first"})
        say = await says.first()
        for value, low in (("low", True), ("a", False), ("b", False)):
            await made.post("/v2/h/run", {"input": value, "policy": {"lowPriority": low}})
        say("done")
        await made.until("/v2/h/health", lambda health: health["jobs"]["completed"] == 4)
        assert order == ["first", "a", "b", "low"]

    run(tmp_path, test, {"h": handler(script)})


def test_jobs_of_a_model_that_is_not_loaded_wait_for_it(tmp_path: Path) -> None:
    """It is known, so its jobs are accepted unseen; what is wrong with them is found when they run."""

    async def test(made: House) -> None:
        made.shelf.gate.clear()
        loading = asyncio.create_task(asyncio.to_thread(made.engine.lifecycle.start))
        await eventually(lambda: made.engine.lifecycle.states("m"))
        right = (await made.post("/v2/m/run", X))["id"]
        wrong = (await made.post("/v2/m/run", {"input": {"Z": 1}}))["id"]
        health = await made.get("/v2/m/health")
        assert (health["jobs"]["inQueue"], health["workers"]["initializing"], health["workers"]["ready"]) == (2, 1, 0)
        waiting = asyncio.create_task(made.call("POST", "/v2/endpoints/m/runsync", {"input": {"Z": 1}}))
        await settled()
        made.shelf.gate.set()
        await loading
        assert (await final(made, "m", right))["output"] == {"Y": [1.0, 2.0]}
        job = await final(made, "m", wrong)
        error = "INVALID_INPUT: input.Z: unknown input; model 'm' has X"
        assert (job["status"], job["error"]) == ("FAILED", error)
        told = await waiting
        assert (told.status, told.json["error"], told.json["details"]["field"]) == (400, "INVALID_INPUT", "input.Z")

    run(tmp_path, test, load=False)


def test_jobs_of_a_model_that_is_unloaded_wait_until_it_is_back(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        await asyncio.to_thread(made.engine.lifecycle.unload, "m")
        id = (await made.post("/v2/m/run", X))["id"]
        assert (await made.get("/v2/m/health"))["workers"]["ready"] == 0
        await asyncio.to_thread(made.engine.lifecycle.load, "m")
        assert (await final(made, "m", id))["status"] == "COMPLETED"

    run(tmp_path, test)


# -- time


def test_a_job_that_runs_too_long_is_stopped(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        first = (await made.post("/v2/h/run", {"input": 1}))["id"]
        say = await says.first()
        say("chunk", final=False)
        job = await final(made, "h", first)
        assert (job["status"], job["error"]) == ("TIMED_OUT", "execution exceeded 1000 ms")
        assert 1000 <= job["executionTime"] < 5000
        assert say.cancelled
        assert (await made.get(f"/v2/h/stream/{first}"))["stream"] == [{"output": "chunk"}]
        say("too late")
        assert await made.get(f"/v2/h/status/{first}") == job
        assert (await made.get("/v2/h/health"))["jobs"]["inProgress"] == 0
        assert (await made.post(f"/v2/h/retry/{first}"))["status"] == "IN_QUEUE"
        await made.post(f"/v2/h/cancel/{first}")

    run(tmp_path, test, {"h": handler(says.take)}, job_execution_timeout_secs=1)


def test_a_job_whose_time_to_live_is_over_is_stopped_and_forgotten(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        waiting = asyncio.create_task(made.post("/v2/h/runsync", {"input": 1}))
        say = await says.first()
        job = await waiting
        assert (job["status"], job["error"]) == ("TIMED_OUT", "ttl of 1000 ms expired")
        assert (await made.call("GET", f"/v2/h/status/{job['id']}")).status == 404
        await eventually(lambda: say.cancelled)

    run(tmp_path, test, {"h": handler(says.take)}, job_ttl_secs=1)


def test_an_expired_job_never_starts(tmp_path: Path) -> None:
    says = Says()

    async def test(made: House) -> None:
        first = (await made.post("/v2/h/run", {"input": 1, "policy": {"ttl": 60000}}))["id"]
        say = await says.first()
        second = (await made.post("/v2/h/run", {"input": 2}))["id"]
        await made.until("/v2/h/health", lambda health: health["jobs"]["inQueue"] == 0)
        assert (await made.call("GET", f"/v2/h/status/{second}")).status == 404
        say("done")
        await final(made, "h", first)
        await settled()
        assert len(says.says) == 1

    run(tmp_path, test, {"h": handler(says.take)}, job_ttl_secs=1)


def test_while_a_process_is_replaced_its_jobs_wait_and_their_time_does_not_run(tmp_path: Path) -> None:
    async def test(made: House) -> None:
        [instance] = made.shelf.opened
        assert isinstance(instance, Handler)
        instance.max_in_flight = 0
        job = await made.post("/v2/h/run", {"input": 7})
        sync = asyncio.create_task(made.post("/v2/h/runsync", {"input": 8}))
        await made.until("/v2/h/health", lambda health: health["jobs"]["inQueue"] == 2)
        workers = (await made.get("/v2/h/health"))["workers"]
        assert (workers["ready"], workers["idle"], workers["initializing"], workers["unhealthy"]) == (0, 0, 1, 0)
        assert (await made.get("/v2/endpoints/h/health"))["status"] == "unhealthy"
        assert instance.seen == []
        instance.max_in_flight = 1
        assert (await final(made, "h", job["id"]))["output"] == 7
        assert (await sync)["output"] == 8
        assert (await made.get("/v2/h/health"))["workers"]["ready"] == 1

    run(tmp_path, test, {"h": handler(echo)})


def test_jobs_whose_sequences_wait_for_a_slot_do_not_keep_that_from_ending_which_has_it(tmp_path: Path) -> None:
    def step(sequence: int, **controls: bool) -> Any:
        tensor = {"name": "X", "datatype": "FP32", "shape": [1, 1], "data": [sequence]}
        parameters = {"sequence_id": sequence} | {f"sequence_{name}": value for name, value in controls.items()}
        return {"input": {"parameters": parameters, "inputs": [tensor]}}

    async def test(made: House) -> None:
        await made.post("/v2/m/runsync", step(1, start=True))
        waiting = [await made.post("/v2/m/run", step(number, start=True, end=True)) for number in range(2, 12)]
        await made.until("/v2/m/health", lambda health: health["jobs"]["inProgress"] == len(waiting))
        assert (await made.post("/v2/m/runsync", step(1, end=True)))["status"] == "COMPLETED"
        for job in waiting:
            assert (await final(made, "m", job["id"]))["status"] == "COMPLETED"

    lasting = "max_batch_size: 1 sequence_batching { max_sequence_idle_microseconds: 3600000000 }"
    elsewhere = functools.partial(EchoInstance, device="cuda:0")  # where a model has no jobs at hand besides
    run(tmp_path, test, {"m": elsewhere}, configs={"m": lasting})


# -- failures


def test_a_job_whose_worker_is_lost_runs_once_more_and_then_fails(tmp_path: Path) -> None:
    runs: list[Any] = []

    def script(value: Any, say: Say) -> None:
        runs.append(value)
        say.fail(WorkerLostError("worker lost: signal SIGSEGV", blamed=True))

    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": 7})
        assert (job["status"], job["error"], job["retries"]) == ("FAILED", "worker lost: signal SIGSEGV", 1)
        assert runs == [7, 7]
        lines = (await made.get("/v2/endpoints/h/logs"))["logs"]
        assert [line.partition(" ERROR ")[2] for line in lines] == [f"{job['id']}: {job['error']}"] * 2

    run(tmp_path, test, {"h": handler(script)})


def test_a_job_that_lost_its_worker_for_another_counts_no_retry(tmp_path: Path) -> None:
    runs: list[Any] = []

    def script(value: Any, say: Say) -> None:
        runs.append(value)
        if len(runs) <= 3:
            say.fail(WorkerLostError("ended for another", blamed=False))
        else:
            say("done")

    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": 7})
        assert (job["status"], job["output"], len(runs)) == ("COMPLETED", "done", 4)
        assert "retries" not in job

    run(tmp_path, test, {"h": handler(script)})


def test_a_job_that_finds_its_model_busy_waits_and_runs_later(tmp_path: Path) -> None:
    runs: list[Any] = []

    def script(value: Any, say: Say) -> None:
        runs.append(value)
        if len(runs) == 1:
            say.fail(ServingError(Kind.UNAVAILABLE, "the queue is full"))
        else:
            say("done")

    async def test(made: House) -> None:
        job = await made.post("/v2/h/runsync", {"input": 7})
        assert (job["status"], len(runs)) == ("COMPLETED", 2)
        logs = (await made.get("/v2/endpoints/h/logs?level=warning"))["logs"]
        assert [line.partition(": ")[2] for line in logs] == ["put back: the queue is full"]

    run(tmp_path, test, {"h": handler(script)})


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (Kind.INVALID, "FAILED"),
        (Kind.INTERNAL, "FAILED"),
        (Kind.UNSUPPORTED, "FAILED"),
        (Kind.NOT_FOUND, "FAILED"),
        (Kind.TIMED_OUT, "TIMED_OUT"),
        (Kind.DEADLINE, "TIMED_OUT"),
        (Kind.CANCELLED, "CANCELLED"),
    ],
)
def test_what_a_failure_makes_of_a_job(tmp_path: Path, kind: Kind, state: str) -> None:
    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        assert job["status"] == state
        assert job.get("error") == (None if state == "CANCELLED" else "why")

    def fail(batch: Sequence[InferRequest]) -> list[InferResponse | ServingError]:
        return [ServingError(kind, "why")] * len(batch)

    run(tmp_path, test, {"m": lambda: ScriptedInstance(fail)})


def test_a_model_that_is_not_decoupled_by_handler_streams_its_answers(tmp_path: Path) -> None:
    def answers(sent: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        for value in (1, 2):
            outputs = [Tensor("Y", FP32, np.array([value], np.float32))]
            reply(InferResponse("m", "1", sent.id, outputs), final=False)
        reply(InferResponse("m", "1", sent.id, []))

    async def test(made: House) -> None:
        job = await made.post("/v2/m/runsync", X)
        assert job["output"] == [{"Y": [1.0]}, {"Y": [2.0]}]
        assert (await made.get(f"/v2/m/stream/{job['id']}"))["stream"] == [
            {"output": {"Y": [1.0]}},
            {"output": {"Y": [2.0]}},
        ]

    run(tmp_path, test, {"m": lambda: StreamingInstance(script=answers)})


# -- recording


def request(id: str) -> Request:
    return Request(id, "h", b"1", 1, 10**9, 10**9, 10**9)


def test_chunks_that_come_faster_than_they_are_written_are_written_together() -> None:
    class Slow(MemoryJobStore):
        def __init__(self) -> None:
            super().__init__()
            self.gate = asyncio.Event()
            self.writes: list[int] = []

        async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
            self.writes.append(len(values))
            await self.gate.wait()
            return await super().append(id, attempt, values)

    async def test() -> None:
        store = Slow()
        await store.add(request("j"))
        [job] = await store.claim({"h": 1}, "w", 2, 1000)
        recorder = Recorder(store, job, 100)
        await recorder.chunk(b"1")
        await settled()
        for number in range(2, 6):
            await recorder.chunk(b"%d" % number)
        recorder.progress(b'"half"')
        store.gate.set()
        await recorder.flush()
        assert store.writes == [1, 4]
        chunks = await store.chunks("j", 0)
        assert chunks is not None
        assert chunks.values == (b"1", b"2", b"3", b"4", b"5")
        stands = await store.get("j", "h", 3)
        assert stands is not None
        assert stands.progress == b'"half"'

    asyncio.run(test())


def test_a_producer_waits_while_too_many_chunks_are_unwritten() -> None:
    class Stuck(MemoryJobStore):
        async def append(self, id: str, attempt: int, values: Sequence[bytes]) -> bool:
            await asyncio.Event().wait()
            raise AssertionError

    async def test() -> None:
        store = Stuck()
        await store.add(request("j"))
        [job] = await store.claim({"h": 1}, "w", 2, 1000)
        recorder = Recorder(store, job, 100)
        written = 0

        async def produce() -> None:
            nonlocal written
            while True:
                await recorder.chunk(b"1")
                written += 1
                await asyncio.sleep(0)

        producing = asyncio.create_task(produce())
        for _ in range(500):
            await asyncio.sleep(0)
        producing.cancel()
        assert 30 < written < 40

    asyncio.run(test())


# -- stopping, and starting again


def test_a_running_job_may_end_within_the_grace_period(tmp_path: Path) -> None:
    gated = GatedInstance()

    async def test(made: House) -> None:
        waiting = asyncio.create_task(made.post("/v2/m/runsync", X))
        await asyncio.to_thread(gated.wait_begun)
        stopping = asyncio.create_task(made.service.stop(LIMIT_S))
        await settled()
        gated.gate.set()
        await stopping
        assert (await waiting)["output"] == {"Y": [1.0, 2.0]}

    run(tmp_path, test, {"m": lambda: gated})


def test_what_a_process_left_is_taken_up_by_the_next(tmp_path: Path) -> None:
    """The first stops in order while one job runs and another waits; both run after that, in their order."""
    url = f"sqlite:{tmp_path / 'jobs.db'}"
    order: list[Any] = []

    async def first() -> list[str]:
        says = Says()
        async with house(tmp_path / "models", {"h": handler(says.take)}, store=await open_store(url)) as made:
            ids = [(await made.post("/v2/h/run", {"input": n}))["id"] for n in range(3)]
            await says.first()
            return ids

    def script(value: Any, say: Say) -> None:
        order.append(value)
        say(value)

    async def second(ids: list[str]) -> None:
        async with house(tmp_path / "models", {"h": handler(script)}, store=await open_store(url)) as made:
            jobs = [await final(made, "h", id) for id in ids]
            assert [job["output"] for job in jobs] == [0, 1, 2]
            assert all("retries" not in job for job in jobs)
            assert order == [0, 1, 2]
            assert (await made.get("/v2/h/health"))["jobs"]["completed"] == 3

    ids = asyncio.run(first())
    asyncio.run(asyncio.wait_for(second(ids), LIMIT_S))


def test_a_job_that_was_cut_off_is_tried_once_more(tmp_path: Path) -> None:
    """As after `kill -9`: the store has a job that runs, and nobody who runs it."""
    url = f"sqlite:{tmp_path / 'jobs.db'}"

    async def killed() -> None:
        store = await open_store(url)
        await store.add(Request("j", "h", b"5", 1, 2**52, 10_000, 10_000))
        assert len(await store.claim({"h": 1}, "gone", 2, 1)) == 1
        await store.close()

    async def after() -> None:
        async with house(tmp_path / "models", {"h": handler(echo)}, store=await open_store(url)) as made:
            job = await final(made, "h", "j")
            assert (job["status"], job["output"], job["retries"]) == ("COMPLETED", 5, 1)

    asyncio.run(killed())
    asyncio.run(asyncio.wait_for(after(), LIMIT_S))


def test_a_late_result_of_a_job_that_was_cancelled_counts_for_nothing(tmp_path: Path) -> None:
    gated = GatedInstance()

    async def test(made: House) -> None:
        id = (await made.post("/v2/m/run", X))["id"]
        await asyncio.to_thread(gated.wait_begun)
        cancelled = await made.post(f"/v2/m/cancel/{id}")
        gated.gate.set()
        assert (await made.post("/v2/m/runsync", X))["status"] == "COMPLETED"
        assert await made.get(f"/v2/m/status/{id}") == cancelled
        stored = await made.store.get(id, "m", 0)
        assert stored is not None
        assert stored.state is State.CANCELLED

    run(tmp_path, test, {"m": lambda: gated})


def test_models_are_told_apart_by_their_instances(tmp_path: Path) -> None:
    """A handler's concurrency is its own; others take a batch each, and short ones are brought many."""

    async def test(made: House) -> None:
        engine = made.engine
        assert engine.model("h").concurrency == 3
        assert engine.model("h").streams
        assert engine.model("slow").concurrency == 1
        assert not engine.model("slow").streams
        assert engine.model("short").concurrency == 64
        assert engine.model("short").workers == 1

    models = {
        "h": functools.partial(Handler, echo, 3),
        "slow": lambda: EchoInstance(device="cuda:0"),
        "short": EchoInstance,
    }
    run(tmp_path, test, models)
