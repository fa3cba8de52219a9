"""A GPU is lost to the process: what ran on it is served no more, the rest goes on, and a supervisor may be told."""

import pickle
from pathlib import Path

import pytest
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.lifecycle import State

from .fakes import LIMIT_S, Answers, pending, request
from .test_lifecycle import Server

ON_CPU = 'backend: "other"'


@pytest.fixture
def server(tmp_path: Path) -> Server:
    made = Server(tmp_path, exit_on_error=False)
    made.put("fragile", "fragile 2")
    made.put("neighbour", "fragile 3")
    made.put("safe", "scale 4")
    made.lifecycle.start()
    return made


def lose(server: Server) -> ServingError:
    """Ask the model what its GPU does not survive; the answer."""
    answers = Answers()
    server.lifecycle.get("fragile").submit(pending(request(-1), answers))
    return answers.error()


def test_the_request_that_lost_the_gpu_is_told_so(server: Server) -> None:
    error = lose(server)
    assert (error.kind, error.message) == (Kind.INTERNAL, "cuda:0 is lost")
    assert server.lifecycle.stop(LIMIT_S)


def test_every_version_on_a_gpu_is_unavailable_by_the_time_the_answer_is_there_and_the_cpu_goes_on(
    server: Server,
) -> None:
    assert server.ask("neighbour") == [3]
    lose(server)
    assert server.lifecycle.device_lost == "cuda:0 is lost"
    assert server.states() == [
        ("fragile", 1, State.UNAVAILABLE, "cuda:0 is lost"),
        ("neighbour", 1, State.UNAVAILABLE, "cuda:0 is lost"),
        ("safe", 1, State.READY, ""),
    ]
    with pytest.raises(ServingError, match="is not at ready state") as caught:
        server.lifecycle.get("neighbour", "1")
    assert caught.value.kind is Kind.UNAVAILABLE
    assert server.ask("safe") == [4]
    assert not server.lifecycle.is_ready()
    assert server.lifecycle.is_live()
    assert server.lifecycle.failures() == {
        "fragile": "version 1: cuda:0 is lost",
        "neighbour": "version 1: cuda:0 is lost",
    }
    assert server.lifecycle.stop(LIMIT_S)


def test_the_reason_stays_once_the_versions_are_released(server: Server) -> None:
    lose(server)
    instances = [instance for instance in server.runtime.instances if instance.device == "cuda:0"]
    server.wait(lambda: all(instance.closed for instance in instances))
    server.wait(lambda: not server.lifecycle._retiring)
    assert [row[3] for row in server.states()] == ["cuda:0 is lost", "cuda:0 is lost", ""]
    assert server.lifecycle.stop(LIMIT_S)


def test_requests_that_waited_are_answered(server: Server) -> None:
    model = server.lifecycle.get("fragile")
    waiting = [Answers() for _ in range(20)]
    for number, answers in enumerate(waiting):
        model.submit(pending(request(-1 if number == 0 else 1), answers))
    assert {len(answers.given) and answers.ended for answers in waiting if answers.one()} == {1}
    assert server.lifecycle.stop(LIMIT_S)


def test_an_error_of_one_request_alone_ends_nothing(server: Server) -> None:
    server.put("broken", "broken")
    with pytest.raises(ServingError):
        server.lifecycle.load("broken")
    assert server.lifecycle.device_lost == ""
    assert server.ask("fragile") == [2]
    assert server.lifecycle.stop(LIMIT_S)


def test_the_error_keeps_its_kind_across_processes() -> None:
    error = pickle.loads(pickle.dumps(DeviceLostError("gone")))
    assert (type(error), error.kind, error.message) == (DeviceLostError, Kind.INTERNAL, "gone")
