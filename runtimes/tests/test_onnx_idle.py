"""An instance that idles gives its memory back, once, by a run that it was asked for before."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from penstock.errors import Kind, ServingError
from penstock_runtimes.onnx import idle
from penstock_runtimes.onnx.idle import Rest, Shrinker
from penstock_runtimes.onnx.parameters import Parameters

from .test_onnx_instance import SAMPLES, load, run

LIMIT_S = 10.0
MS = 1_000_000
IDLE = 'parameters { key: "arena_shrink_idle_ms" value { string_value: "100" } }'


class Spy:
    """Stands before a session and keeps the arenas that each run shrinks."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.arenas: list[str] = []
        self.changed = threading.Condition()

    def run(self, names: Any, feed: Any, options: Any) -> Any:
        try:
            arenas = options.get_run_config_entry(idle.SHRINKAGE) if options else ""
        except RuntimeError:
            arenas = ""
        with self.changed:
            self.arenas.append(arenas)
            self.changed.notify_all()
        return self._session.run(names, feed, options)


def ask(instance: Any, rows: int) -> None:
    numbers = np.ones((rows, 16), np.int32)
    assert run(instance, INPUT0=numbers, INPUT1=numbers)["OUTPUT0"].tolist() == (numbers * 2).tolist()


@pytest.mark.parametrize(("value", "ns"), [({}, 0), ({"arena_shrink_idle_ms": "250"}, 250 * MS)])
def test_the_time_is_a_parameter(value: dict[str, str], ns: int) -> None:
    assert idle.after_ns(Parameters("model 'm'", value)) == ns


def test_a_time_that_would_keep_the_instance_busy_is_refused() -> None:
    with pytest.raises(ServingError) as caught:
        idle.after_ns(Parameters("model 'm'", {"arena_shrink_idle_ms": "99"}))
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        "model 'm': parameter 'arena_shrink_idle_ms' expects milliseconds from 100 up, got '99'",
    )


@pytest.mark.parametrize(("device", "arena"), [("cpu", "cpu:0"), ("cuda:0", "gpu:0"), ("cuda:3", "gpu:3")])
def test_the_arena_is_that_of_the_device(device: str, arena: str) -> None:
    assert Rest(100 * MS, device).arena == arena


def test_it_is_due_after_its_time_and_not_again_before_another_run() -> None:
    rest = Rest(100 * MS, "cpu")
    assert not rest.is_due(ended_ns=1, now_ns=500 * MS)  # nothing has run that could run again
    rest.saw(["Y"], {"X": np.zeros(3)})
    assert not rest.is_due(ended_ns=50 * MS, now_ns=149 * MS)
    assert rest.is_due(ended_ns=50 * MS, now_ns=150 * MS)
    rest.shrunk_ns = 151 * MS
    assert not rest.is_due(ended_ns=50 * MS, now_ns=900 * MS)
    assert rest.is_due(ended_ns=160 * MS, now_ns=900 * MS)


def test_the_smallest_run_is_kept_as_a_copy() -> None:
    rest = Rest(100 * MS, "cpu")
    small = np.ones(2)
    for sent in (np.ones(5), small, np.ones(3)):
        rest.saw(["Y"], {"X": sent})
    small[:] = 7
    assert rest.feed["X"].tolist() == [1, 1]


def test_an_instance_gives_its_memory_back_by_its_smallest_run() -> None:
    instance = load(SAMPLES / "simple", IDLE)
    instance._session = spy = Spy(instance._session)
    ask(instance, 8)
    ask(instance, 1)
    for wait_ms, arenas in ((99, ["", ""]), (101, ["", "", "cpu:0"]), (500, ["", "", "cpu:0"])):
        instance.shrink(instance.outputs_came_ns + wait_ms * MS)
        assert spy.arenas == arenas
    ask(instance, 1)
    instance.close()
    instance.shrink(instance.outputs_came_ns + 500 * MS)
    assert spy.arenas == ["", "", "cpu:0", ""]


def test_a_thread_asks_idle_instances_and_ends_with_the_last(tmp_path: Path) -> None:
    instance = load(SAMPLES / "simple", IDLE)
    instance._session = spy = Spy(instance._session)
    ask(instance, 1)
    with spy.changed:
        assert spy.changed.wait_for(lambda: spy.arenas == ["", "cpu:0"], LIMIT_S), spy.arenas
    instance.close()
    [thread] = [one for one in threading.enumerate() if one.name == "shrink-arenas"]
    del instance
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_a_thread_comes_again_with_a_later_instance() -> None:
    class Instance:
        rest_ns = MS

        def __init__(self) -> None:
            self.asked = threading.Event()

        def shrink(self, now_ns: int) -> None:
            self.asked.set()

    shrinker = Shrinker()
    for _ in range(2):
        instance = Instance()
        shrinker.add(instance)
        assert instance.asked.wait(LIMIT_S)
        thread = shrinker._thread
        assert thread is not None
        del instance
        thread.join(LIMIT_S)
        assert not thread.is_alive()
