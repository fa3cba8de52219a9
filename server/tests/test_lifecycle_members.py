"""Models that call others: they load after those, follow their changes, and what they accepted finishes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from penstock.engine import Engine
from penstock.errors import Kind, ServingError
from penstock.lifecycle import State
from penstock.settings import Settings

from .fakes import LIMIT_S, Answers, GatedInstance, calling, pending, request
from .test_lifecycle import Server, refused


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "models", model_control_mode="explicit")
    made.root.mkdir()
    yield made
    for instance in made.runtime.instances:
        if isinstance(instance, GatedInstance):
            instance.gate.set()
    made.runtime.loads.set()
    assert made.lifecycle.stop(LIMIT_S)


def ready(server: Server) -> list[str]:
    return [name for name, _, state, _ in server.states() if state is State.READY]


def reason(server: Server, name: str) -> str:
    [found] = [(state, reason) for known, _, state, reason in server.states() if known == name]
    assert found[0] is State.UNAVAILABLE, found
    return found[1]


def until_unavailable(server: Server, name: str) -> str:
    server.wait(lambda: server.lifecycle.states(name) == [State.UNAVAILABLE])
    return reason(server, name)


def failed(name: str, why: str) -> str:
    return f"load failed for model '{name}': version 1 is at UNAVAILABLE state: Invalid argument: {why};\n"


def test_everything_starts_whatever_calls_what(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("a", config=calling("b", "z"))
    made.put("b", config=calling("y", "z"))
    made.put("y", "scale 2")
    made.put("z", "scale 5")
    made.lifecycle.start()
    assert (made.lifecycle.failures(), ready(made)) == ({}, ["a", "b", "y", "z"])
    assert (made.ask("a"), made.ask("b")) == ([50], [10])
    assert made.lifecycle.stop(LIMIT_S)


def test_a_load_brings_the_members_along(server: Server) -> None:
    server.put("a", config=calling("b", "c"))
    server.put("b", config=calling("c", "c"))
    server.put("c", "scale 3")
    server.put("other")
    server.lifecycle.load("a")
    assert (ready(server), server.ask("a")) == (["a", "b", "c"], [27])


def test_a_member_in_no_repository_is_named(server: Server) -> None:
    server.put("a", config=calling("b", "c", "d"))
    server.put("c")
    missing = "ensemble a contains models that are not available or ambiguous: b, d"
    assert refused(lambda: server.lifecycle.load("a")) == (
        Kind.INVALID, f"failed to load 'a', failed to poll from model repository: {missing}",
    )  # fmt: skip
    assert server.lifecycle.failures() == {"a": missing}
    assert not server.lifecycle.knows("b")


def test_a_member_in_two_repositories_is_named(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    made = Server(one, model_repository=(str(one), str(two)))
    made.put("a", config=calling("b"))
    made.put("b")
    (two / "b" / "1").mkdir(parents=True)
    made.lifecycle.start()
    assert made.lifecycle.failures()["a"] == "ensemble a contains models that are not available or ambiguous: b"
    assert made.lifecycle.stop(LIMIT_S)


def test_it_serves_once_a_missing_member_does(server: Server) -> None:
    server.put("a", config=calling("b"))
    refused(lambda: server.lifecycle.load("a"))
    server.put("b", "scale 4")
    server.lifecycle.load("b")
    assert (ready(server), server.ask("a"), server.lifecycle.failures()) == (["a", "b"], [4], {})


def test_a_member_that_fails_is_told_with_its_reason(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b", "broken")
    why = (
        "ensemble 'a' depends on 'b' which has no loaded version. "
        "Model 'b' loading failed with error: Internal: no model in model.onnx"
    )
    assert refused(lambda: server.lifecycle.load("a")) == (Kind.INVALID, failed("a", why))
    assert reason(server, "a") == f"Invalid argument: {why}"
    server.put("b", "scale 4")
    server.lifecycle.load("b")
    assert server.ask("a") == [4]


def test_a_member_whose_configuration_is_wrong_is_told(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b", config="nonsense")
    kind, message = refused(lambda: server.lifecycle.load("a"))
    assert kind is Kind.INVALID
    assert "ensemble 'a' depends on 'b' which is not valid. Model 'b' failed with error: failed to read text" in message


def test_a_version_that_is_not_served_is_told(server: Server) -> None:
    server.put("a", config=calling("b", version=7))
    server.put("b", version=2)
    why = "ensemble 'a' depends on 'b' whose required version 7 is not loaded."
    assert refused(lambda: server.lifecycle.load("a")) == (Kind.INVALID, failed("a", why))


def test_a_stated_version_is_called(server: Server) -> None:
    server.put("a", config=calling("b", version=1))
    server.put("b", "scale 10", version=1, config="version_policy { all { } }")
    server.put("b", "scale 20", version=2)
    server.lifecycle.load("a")
    assert server.ask("a") == [10]


def test_a_circle_is_refused(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("a", config=calling("b"))
    made.put("b", config=calling("c"))
    made.put("c", config=calling("a"))
    made.put("d", config=calling("a"))
    made.put("good")
    made.lifecycle.start()
    assert ready(made) == ["good"]
    failures = made.lifecycle.failures()
    assert failures["a"] == "circular dependency between ensembles: a -> b -> c -> a"
    assert failures["b"] == "circular dependency between ensembles: b -> c -> a -> b"
    assert failures["d"] == (
        "version 1: Invalid argument: ensemble 'd' depends on 'a' which is not valid. Model 'a' failed with error: "
        "circular dependency between ensembles: a -> b -> c -> a"
    )
    assert made.lifecycle.stop(LIMIT_S)


# -- while it serves


def test_a_member_that_is_replaced_is_called_from_then_on(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("outer", config=calling("a", "a"))
    server.put("b", "scale 2")
    server.lifecycle.load("outer")
    assert (server.ask("a"), server.ask("outer")) == ([2], [4])
    server.put("b", "scale 3")
    server.lifecycle.load("b")
    assert (server.ask("a"), server.ask("outer")) == ([3], [9])
    server.wait(lambda: server.runtime.instances[0].closed == 1)  # of the version that was replaced


def test_a_member_that_has_not_changed_leaves_its_callers_alone(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b")
    server.lifecycle.load("a")
    before = server.lifecycle.get("a")
    server.lifecycle.load("b")
    server.lifecycle.load("a")
    assert server.lifecycle.get("a") is before


def test_a_member_whose_reload_fails_goes_on_with_its_callers(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b", "scale 2")
    server.lifecycle.load("a")
    server.put("b", "broken")
    refused(lambda: server.lifecycle.load("b"))
    assert server.ask("a") == [2]


def test_an_unloaded_member_takes_its_callers_along_and_brings_them_back(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("outer", config=calling("a"))
    server.put("b", "scale 2")
    server.lifecycle.load("outer")
    server.lifecycle.unload("b")
    assert (
        until_unavailable(server, "a") == "Invalid argument: ensemble 'a' depends on 'b' which has no loaded version."
    )
    assert until_unavailable(server, "outer") == (
        "Invalid argument: ensemble 'outer' depends on 'a' which has no loaded version."
    )
    assert until_unavailable(server, "b") == "unloaded"
    server.lifecycle.load("b")
    assert (server.ask("a"), server.ask("outer")) == ([2], [2])


def test_a_member_on_a_lost_gpu_takes_its_callers_along(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b", "fragile 2")
    server.lifecycle.load("a")
    assert server.ask("a") == [2]
    answers = Answers()
    server.lifecycle.get("b").submit(pending(request(-1), answers))
    assert answers.error().message == "cuda:0 is lost"
    assert until_unavailable(server, "a") == (
        "Invalid argument: ensemble 'a' depends on 'b' which has no loaded version. "
        "Model 'b' loading failed with error: cuda:0 is lost"
    )


def test_an_unloaded_caller_does_not_come_back_with_its_member(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b", "scale 2")
    server.lifecycle.load("a")
    server.lifecycle.unload("a")
    assert until_unavailable(server, "a") == "unloaded"
    server.put("b", "scale 3")
    server.lifecycle.load("b")
    assert (ready(server), reason(server, "a")) == (["b"], "unloaded")


def test_a_member_that_no_longer_fits_takes_its_callers_out_of_service(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b")
    server.lifecycle.load("a")
    server.put("b", config='output { name: "Z" data_type: TYPE_FP32 dims: -1 }')
    server.lifecycle.load("b")
    assert until_unavailable(server, "a") == "Invalid argument: b gives no Y"
    assert ready(server) == ["b"]


@pytest.mark.parametrize("what", ["unload a", "unload b", "unload c", "replace c", "stop"])
def test_what_was_accepted_goes_through_all_its_steps(server: Server, what: str) -> None:
    server.put("a", config=calling("b", "c"))
    server.put("b", "gated 2", config="instance_group { count: 1 kind: KIND_CPU }")
    server.put("c", "scale 5")
    server.lifecycle.load("a")
    [instance] = [instance for instance in server.runtime.instances if isinstance(instance, GatedInstance)]
    member = server.lifecycle.get("c")
    answers = Answers()
    server.lifecycle.get("a").submit(pending(request(1), answers))
    instance.wait_begun()
    match what.split():
        case ["unload", name]:
            server.lifecycle.unload(name)
            server.wait(lambda: server.lifecycle.states(name) == [State.UNLOADING])
        case ["replace", name]:
            server.put(name, "scale 7")
            server.lifecycle.load(name)
            assert not member.draining  # its caller is not done
        case _:
            stopping = threading.Thread(target=server.lifecycle.stop, args=[LIMIT_S])
            stopping.start()
    assert answers.given == []
    instance.gate.set()
    assert answers.values() == [10]
    if what == "stop":
        stopping.join(LIMIT_S)
        assert not stopping.is_alive()
    elif what.startswith("unload"):
        assert until_unavailable(server, what.split()[1]) == "unloaded"


def test_no_request_fails_while_members_are_replaced(tmp_path: Path) -> None:
    files = Server(tmp_path)
    engine = Engine(Settings(model_repository=(str(tmp_path),), device="cpu"), files.runtime.find)
    files.put("outer", config=calling("a", "b"))
    files.put("a", config=calling("b"))
    files.put("b", "scale 2")
    engine.lifecycle.start()
    enough = threading.Event()
    answers: list[Answers] = []

    def ask() -> None:
        while not enough.is_set():
            answers.append(sent := Answers())
            engine.submit(engine.model("outer"), request(1), sent)
            sent.one()

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for scale in range(3, 13):
            files.put("b", f"scale {scale}")
            engine.lifecycle.load("b")
        enough.set()
        for asked in asking:
            asked.result(LIMIT_S)
    assert engine.lifecycle.stop(LIMIT_S)
    # Never one version of b in one step and another in the next.
    assert {value for sent in answers for value in sent.values()} <= {float(scale**2) for scale in range(2, 13)}


def test_a_caller_that_is_gone_refuses_and_says_so(server: Server) -> None:
    server.put("a", config=calling("b"))
    server.put("b")
    server.lifecycle.load("a")
    model = server.lifecycle.get("a")
    server.lifecycle.unload("b")
    until_unavailable(server, "a")
    with pytest.raises(ServingError, match="has stopped accepting"):
        model.submit(pending(request(1)))
    assert refused(lambda: server.lifecycle.get("a"))[0] is Kind.NOT_FOUND
    assert refused(lambda: server.lifecycle.get("a", "1"))[0] is Kind.UNAVAILABLE
