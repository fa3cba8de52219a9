"""Versions load, serve, are replaced without a gap, and go; states, reasons and readiness say so at every moment."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from penstock import model_config, pb
from penstock.errors import Kind, ServingError
from penstock.lifecycle import Lifecycle, State, parse_version, place, show_devices, wanted_versions
from penstock.runtime import Placement
from penstock.settings import Settings

from .fakes import LIMIT_S, Answers, FakeRuntime, GatedInstance, calling, configuration, pending, request

Row = tuple[str, int | None, State | None, str]


class Server:
    """A lifecycle over a repository of text files, and the fake runtime that reads them."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.runtime = FakeRuntime()
        settings = Settings(**{"model_repository": (str(root),), "device": "cpu", **options})
        self.lifecycle = Lifecycle(settings, self.runtime.find)
        self._clock_ns = 2**61
        self.changed = threading.Condition()
        self.lifecycle.watch(self._notify)

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def put(self, name: str, text: str = "scale 1", version: int = 1, config: str | None = None) -> None:
        """Write a version of a model; each write is later than the one before, by the clock of the file system."""
        path = self.root / name / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self._touch(path)
        if config is not None:
            (self.root / name / "config.pbtxt").write_text(config)
            self._touch(self.root / name / "config.pbtxt")

    def _touch(self, path: Path) -> None:
        self._clock_ns += 10**9
        os.utime(path, ns=(self._clock_ns, self._clock_ns))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, LIMIT_S), self.lifecycle.index()

    def ask(self, name: str, version: str = "", value: float = 1) -> list[float]:
        answers = Answers()
        self.lifecycle.get(name, version).submit(pending(request(value), answers))
        return answers.values()

    def states(self) -> list[Row]:
        return self.lifecycle.index()


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


def refused(call: Callable[[], object]) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        call()
    return caught.value.kind, caught.value.message


# -- start


def test_everything_that_lies_there_loads_at_start(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("a", "scale 2")
    made.put("b", "scale 3")
    (tmp_path / "c.onnx").write_text("scale 4")
    assert not made.lifecycle.is_live()
    made.lifecycle.start()
    assert [made.ask(name) for name in "abc"] == [[2], [3], [4]]
    assert made.states() == [("a", 1, State.READY, ""), ("b", 1, State.READY, ""), ("c", 1, State.READY, "")]
    assert (made.lifecycle.is_live(), made.lifecycle.is_ready(), made.lifecycle.failures()) == (True, True, {})
    assert [(model.name, model.version) for model in made.lifecycle.models()] == [("a", "1"), ("b", "1"), ("c", "1")]
    assert made.lifecycle.stop(LIMIT_S)


@pytest.mark.parametrize(
    ("load_model", "ready"), [((), []), (("b",), ["b"]), (("a", "b", "a"), ["a", "b"]), (("*",), ["a", "b"])]
)
def test_explicit_mode_loads_what_is_named(tmp_path: Path, load_model: tuple[str, ...], ready: list[str]) -> None:
    made = Server(tmp_path, model_control_mode="explicit", load_model=load_model)
    made.put("a")
    made.put("b")
    made.lifecycle.start()
    assert [model.name for model in made.lifecycle.models()] == ready
    assert [row for row in made.states() if row[0] not in ready] == [
        (name, None, None, "") for name in "ab" if name not in ready
    ]
    assert made.lifecycle.is_ready()
    assert made.lifecycle.stop(LIMIT_S)


@pytest.mark.parametrize(("strict", "ready"), [(True, False), (False, True)])
def test_a_model_that_fails_is_told_and_the_others_serve(tmp_path: Path, strict: bool, ready: bool) -> None:
    made = Server(tmp_path, strict_readiness=strict)
    made.put("good")
    made.put("bad", "broken")
    made.lifecycle.start()
    assert made.ask("good") == [1]
    assert made.lifecycle.failures() == {"bad": "version 1: Internal: no model in model.onnx"}
    assert made.states() == [
        ("bad", 1, State.UNAVAILABLE, "Internal: no model in model.onnx"),
        ("good", 1, State.READY, ""),
    ]
    assert (made.lifecycle.is_live(), made.lifecycle.is_ready()) == (True, ready)
    assert made.lifecycle.stop(LIMIT_S)


def test_a_bug_of_a_runtime_is_a_failure_of_its_model(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("m", "crash")
    made.lifecycle.start()
    assert made.lifecycle.failures() == {"m": "version 1: Internal: RuntimeError: the runtime has a bug"}
    assert made.lifecycle.stop(LIMIT_S)


@pytest.mark.parametrize(
    ("config", "failure"),
    [
        ('name: "other"', "unexpected directory name 'm' for model 'other', directory name must equal model name"),
        ("version_policy { specific { versions: 9 } }",
         "at least one version must be available under the version policy of model 'm'"),
    ],
    ids=["another name", "no version"],
)  # fmt: skip
def test_what_fails_before_a_version_is_known_has_its_name_only(tmp_path: Path, config: str, failure: str) -> None:
    made = Server(tmp_path)
    made.put("m", config=config)
    made.lifecycle.start()
    assert made.lifecycle.failures() == {"m": failure}
    assert made.states() == [("m", None, None, "")]
    assert not made.lifecycle.is_ready()
    assert refused(lambda: made.lifecycle.get("m")) == (Kind.NOT_FOUND, "Request for unknown model: 'm' is not found")
    assert made.lifecycle.stop(LIMIT_S)


def test_a_configuration_that_cannot_be_read_fails_its_model_alone(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("m", config="name: ")
    made.put("good")
    made.lifecycle.start()
    assert list(made.lifecycle.failures()) == ["m"]
    assert made.ask("good") == [1]
    assert made.lifecycle.stop(LIMIT_S)


def test_a_named_model_that_does_not_exist_is_a_failure(tmp_path: Path) -> None:
    made = Server(tmp_path, model_control_mode="explicit", load_model=("nowhere",))
    made.lifecycle.start()
    assert made.lifecycle.failures() == {"nowhere": f"no model 'nowhere' in '{tmp_path}'"}
    assert not made.lifecycle.is_ready()
    made.put("nowhere")
    made.lifecycle.load("nowhere")
    assert (made.lifecycle.failures(), made.lifecycle.is_ready()) == ({}, True)
    assert made.lifecycle.stop(LIMIT_S)


def test_a_name_in_two_repositories_serves_neither(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    made = Server(one, model_repository=(str(one), str(two)))
    made.put("m")
    (two / "m" / "1").mkdir(parents=True)
    made.lifecycle.start()
    assert made.states() == [("m", None, State.UNAVAILABLE, "model appears in two or more repositories")]
    assert made.lifecycle.failures() == {"m": f"model appears in two or more repositories: {one / 'm'} and {two / 'm'}"}
    assert made.lifecycle.stop(LIMIT_S)


def test_a_repository_that_does_not_exist_stops_the_start(tmp_path: Path) -> None:
    made = Server(tmp_path / "nowhere")
    assert refused(made.lifecycle.start)[0] is Kind.NOT_FOUND
    assert made.lifecycle.stop(0)


def test_without_completion_a_configuration_is_required_and_is_not_completed(tmp_path: Path) -> None:
    made = Server(tmp_path, disable_auto_complete_config=True)
    made.put("bare")
    made.put("empty", config='backend: "onnxruntime"')
    made.put(
        "full",
        config='backend: "onnxruntime" input { name: "X" data_type: TYPE_FP32 dims: -1 } '
        'output { name: "Y" data_type: TYPE_FP32 dims: -1 }',
    )
    made.lifecycle.start()
    assert made.lifecycle.failures()["bare"] == "model 'bare' has no config.pbtxt, and auto-completion is switched off"
    assert list(made.lifecycle.get("full").signature.inputs) == ["X"]
    assert not made.lifecycle.get("empty").signature.inputs
    assert made.lifecycle.stop(LIMIT_S)


def test_a_runtime_gets_its_settings_and_is_made_once(tmp_path: Path) -> None:
    made = Server(tmp_path, backend_config=("onnxruntime,a=1", ",b=2", "c=3", "other,d=4"), default_max_batch_size=8)
    made.put("m")
    made.put("n")
    made.lifecycle.start()
    assert made.runtime.settings == {"onnxruntime": {"a": "1", "b": "2", "c": "3", "default-max-batch-size": "8"}}
    assert made.lifecycle.stop(LIMIT_S)


def test_one_odd_file_of_a_version_is_its_model(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("m", "scale 5")
    (tmp_path / "m/1/model.onnx").rename(tmp_path / "m/1/resnet.onnx")
    made.lifecycle.start()
    assert made.ask("m") == [5]
    assert made.lifecycle.stop(LIMIT_S)


def test_a_stated_batch_limit_limits_a_request_and_a_completed_one_does_not(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("stated", config="max_batch_size: 4")
    made.put("open")
    made.lifecycle.start()
    assert made.lifecycle.get("stated").signature.row_limit == 4
    assert made.lifecycle.get("open").signature.row_limit == 2**31
    assert made.lifecycle.stop(LIMIT_S)


def test_label_files_are_read(tmp_path: Path) -> None:
    made = Server(tmp_path)
    made.put("m", config='output { name: "Y" data_type: TYPE_FP32 dims: 2 label_filename: "labels.txt" }')
    (tmp_path / "m/labels.txt").write_text("cat\ndog\n")
    made.lifecycle.start()
    assert made.lifecycle.get("m").signature.outputs["Y"].labels == ("cat", "dog")
    assert made.lifecycle.stop(LIMIT_S)


# -- versions


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", [9]),
        ("latest { num_versions: 1 }", [9]),
        ("latest { num_versions: 2 }", [4, 9]),
        ("latest { num_versions: 7 }", [1, 4, 9]),
        ("latest { num_versions: 0 }", []),
        ("all { }", [1, 4, 9]),
        ("specific { versions: [ 4, 1 ] }", [1, 4]),
        ("specific { versions: [ 4, 5 ] }", [4]),
        ("specific { versions: 5 }", []),
    ],
)
def test_a_policy_chooses_versions(policy: str, versions: list[int]) -> None:
    config = configuration(f"version_policy {{ {policy} }}")
    assert wanted_versions([9, 1, 4], config.version_policy) == versions


def test_a_request_without_a_version_goes_to_the_highest(server: Server) -> None:
    for version in (1, 2, 10):
        server.put("m", f"scale {version}", version, config="version_policy { all { } }")
    server.lifecycle.load("m")
    assert [server.ask("m", version) for version in ("", "1", "2", "10")] == [[10], [1], [2], [10]]
    assert server.lifecycle.ready_versions("m") == ["1", "2", "10"]
    assert [model.version for model in server.lifecycle.models()] == ["1", "2", "10"]


def test_a_version_may_be_written_with_more_than_its_digits(server: Server) -> None:
    server.put("m", version=2)
    server.lifecycle.load("m")
    assert {server.lifecycle.get("m", text).version for text in ("2", "02", "+2", " 2", "2abc")} == {"2"}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("1", 1),
        ("007", 7),
        ("0", 0),
        ("-0", 0),
        ("+3", 3),
        ("  4", 4),
        ("5.9", 5),
        (str(2**63 - 1), 2**63 - 1),
        ("0" * 5000 + "8", 8),
    ],
)
def test_versions_are_read_as_leniently_as_tritons(text: str, number: int | None) -> None:
    assert parse_version(text) == number


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("abc", "failed to get model version from specified version string 'abc' (details: st"),
        ("+", "failed to get model version from specified version string '+' (details: st"),
        ("¹", "failed to get model version from specified version string '¹' (details: st"),
        (str(2**63), f"failed to get model version from specified version string '{2**63}' (details: st"),
        ("9" * 5000, "failed to get model version from specified version string '99"),
        ("-1", "invalid model version specified '-1' , version should be an integral value > 0"),
    ],
)
def test_what_is_no_version_is_refused(text: str, start: str) -> None:
    kind, message = refused(lambda: parse_version(text))
    assert kind is Kind.INVALID
    assert message.startswith(start)
    assert message.endswith("version should be an integral value > 0")


# -- look-ups


def test_each_failed_look_up_has_its_text(server: Server) -> None:
    get = server.lifecycle.get
    server.put("m", version=1)
    server.put("m", "broken", version=2, config="version_policy { all { } }")
    server.put("gone")
    with pytest.raises(ServingError):
        server.lifecycle.load("m")
    server.lifecycle.load("gone")
    server.lifecycle.unload("gone")
    server.wait(lambda: ("gone", 1, State.UNAVAILABLE, "unloaded") in server.states())
    subject = "Request for unknown model: "
    assert refused(lambda: get("x")) == (Kind.NOT_FOUND, f"{subject}'x' is not found")
    assert refused(lambda: get("x", "1")) == (Kind.NOT_FOUND, f"{subject}'x' is not found")
    assert refused(lambda: get("gone")) == (Kind.NOT_FOUND, f"{subject}'gone' has no available versions")
    assert refused(lambda: get("gone", "7")) == (Kind.NOT_FOUND, f"{subject}'gone' version 7 is not found")
    assert refused(lambda: get("gone", "1")) == (
        Kind.UNAVAILABLE,
        f"{subject}'gone' version 1 is not at ready state",
    )
    assert refused(lambda: get("m", "2")) == (Kind.UNAVAILABLE, f"{subject}'m' version 2 is not at ready state")
    assert refused(lambda: get("gone", "one"))[0] is Kind.INVALID
    assert (server.lifecycle.knows("gone"), server.lifecycle.knows("x")) == (True, False)


# -- loading


def test_loading_twice_is_nothing_unless_something_changed(server: Server) -> None:
    server.put("m", "scale 1")
    server.lifecycle.load("m")
    first = server.lifecycle.get("m")
    server.lifecycle.load("m")
    assert server.lifecycle.get("m") is first
    server.put("m", "scale 2")
    server.lifecycle.load("m")
    assert server.ask("m") == [2]


def test_a_model_that_is_in_no_repository_is_not_found(server: Server) -> None:
    server.lifecycle.start()
    assert refused(lambda: server.lifecycle.load("x")) == (
        Kind.NOT_FOUND,
        "failed to load 'x', failed to poll from model repository",
    )
    assert (server.lifecycle.is_ready(), server.lifecycle.failures(), server.lifecycle.knows("x")) == (True, {}, False)


def test_a_load_that_fails_says_why(server: Server) -> None:
    server.put("m", "broken")
    assert refused(lambda: server.lifecycle.load("m")) == (
        Kind.INVALID,
        "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: no model in model.onnx;\n",
    )


def test_a_load_without_a_version_says_so(server: Server) -> None:
    server.put("m", config="version_policy { specific { versions: 3 } }")
    assert refused(lambda: server.lifecycle.load("m")) == (
        Kind.INVALID,
        "load failed for model 'm': at least one version must be available under the version policy of model 'm'\n",
    )


def test_all_versions_load_or_none(server: Server) -> None:
    server.put("m", "scale 1", 1)
    server.put("m", "broken", 2)
    server.put("m", "broken", 3, config="version_policy { all { } }")
    kind, message = refused(lambda: server.lifecycle.load("m"))
    assert kind is Kind.INVALID
    assert message == (
        "load failed for model 'm': version 2 is at UNAVAILABLE state: Internal: no model in model.onnx;"
        "version 3 is at UNAVAILABLE state: Internal: no model in model.onnx;\n"
    )
    assert server.lifecycle.models() == []
    assert [(row[1], row[2]) for row in server.states()] == [(2, State.UNAVAILABLE), (3, State.UNAVAILABLE)]
    assert [instance.closed for instance in server.runtime.instances] == [1] * len(server.runtime.instances)


def test_an_instance_that_was_opened_is_closed_when_the_next_cannot_be(tmp_path: Path) -> None:
    class Second(FakeRuntime):
        def open(self, *args: Any, **kwargs: Any) -> Any:
            if self.instances:
                raise ServingError(Kind.INTERNAL, "no memory for a second one")
            return super().open(*args, **kwargs)

    runtime = Second()
    lifecycle = Lifecycle(Settings(model_repository=(str(tmp_path),), device="cpu"), runtime.find)
    (tmp_path / "m.onnx").write_text("scale 1")
    lifecycle.start()
    assert lifecycle.failures() == {"m": "version 1: Internal: no memory for a second one"}
    assert [instance.closed for instance in runtime.instances] == [1]
    assert lifecycle.stop(LIMIT_S)


def test_what_served_goes_on_serving_when_a_reload_fails(server: Server) -> None:
    server.put("m", "scale 1")
    server.lifecycle.load("m")
    server.lifecycle.start()
    server.put("m", "broken")
    refused(lambda: server.lifecycle.load("m"))
    assert server.ask("m") == [1]
    assert server.states() == [("m", 1, State.READY, "")]
    assert server.lifecycle.is_ready()
    server.put("m", config="name: ")
    refused(lambda: server.lifecycle.load("m"))
    assert (server.ask("m"), server.lifecycle.is_ready(), server.lifecycle.failures()) == ([1], True, {})


def test_a_failed_load_is_tried_again(server: Server) -> None:
    server.put("m", "broken")
    refused(lambda: server.lifecycle.load("m"))
    server.put("m", "scale 2")
    server.lifecycle.load("m")
    assert server.ask("m") == [2]


def test_a_model_is_loading_until_it_serves(server: Server) -> None:
    server.lifecycle.start()
    server.put("m", "waits 2")
    loading = threading.Thread(target=server.lifecycle.load, args=("m",))
    loading.start()
    assert server.runtime.loading.acquire(timeout=LIMIT_S)
    assert server.states() == [("m", 1, State.LOADING, "")]
    assert not server.lifecycle.is_ready()
    assert refused(lambda: server.lifecycle.get("m"))[0] is Kind.NOT_FOUND
    assert refused(lambda: server.lifecycle.get("m", "1"))[0] is Kind.UNAVAILABLE
    server.runtime.loads.set()
    loading.join(LIMIT_S)
    assert server.ask("m") == [2]
    assert server.lifecycle.is_ready()


def test_a_model_is_loading_until_every_instance_has_warmed_up(server: Server) -> None:
    server.lifecycle.start()
    sample = 'inputs { key: "X" value { data_type: TYPE_FP32 dims: 1 zero_data: true } }'
    warmup = f'model_warmup {{ name: "w" batch_size: 1 {sample} }}'
    server.put("m", "gated 2", config=f"{warmup} instance_group {{ count: 2 kind: KIND_CPU }}")
    loading = threading.Thread(target=server.lifecycle.load, args=("m",))
    loading.start()
    limit_s = time.monotonic() + LIMIT_S
    while len(server.runtime.instances) < 2:
        assert time.monotonic() < limit_s
    for instance in server.runtime.instances:
        assert isinstance(instance, GatedInstance)
        instance.wait_begun()
        assert server.states() == [("m", 1, State.LOADING, "")]
        instance.gate.set()
    loading.join(LIMIT_S)
    assert server.ask("m") == [2]
    assert server.lifecycle.get("m").statistics.execution_count == 1


def test_a_reload_serves_the_old_until_the_new_is_there(server: Server) -> None:
    server.put("m", "scale 1")
    server.lifecycle.load("m")
    server.lifecycle.start()
    server.put("m", "waits 2")
    loading = threading.Thread(target=server.lifecycle.load, args=("m",))
    loading.start()
    assert server.runtime.loading.acquire(timeout=LIMIT_S)
    assert server.ask("m") == [1]
    assert server.states() == [("m", 1, State.READY, "")]
    assert server.lifecycle.is_ready()
    server.runtime.loads.set()
    loading.join(LIMIT_S)
    assert server.ask("m") == [2]


def test_what_a_replaced_version_accepted_is_finished_by_it(server: Server) -> None:
    server.put("m", "gated 1")
    server.lifecycle.load("m")
    server.lifecycle.get("m").submit(pending(request(5), answers := Answers()))
    server.put("m", "scale 2")
    server.lifecycle.load("m")
    assert server.ask("m", value=5) == [10]
    assert answers.given == []
    old = server.runtime.instances[:2]
    for instance in old:
        assert isinstance(instance, GatedInstance)
        instance.gate.set()
    assert answers.values() == [5]
    server.wait(lambda: all(instance.closed for instance in old))


def test_a_new_version_takes_over_and_the_old_one_is_unloaded(server: Server) -> None:
    server.put("m", "scale 1", 1)
    server.lifecycle.load("m")
    server.put("m", "scale 2", 2)
    server.lifecycle.load("m")
    assert server.ask("m") == [2]
    server.wait(lambda: server.states()[0] == ("m", 1, State.UNAVAILABLE, "unloaded"))
    assert server.states()[1] == ("m", 2, State.READY, "")
    server.lifecycle.start()
    assert server.lifecycle.is_ready()


def test_loads_of_one_name_wait_for_each_other(server: Server) -> None:
    server.put("m", "waits 2")
    threads = [threading.Thread(target=server.lifecycle.load, args=("m",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert server.runtime.loading.acquire(timeout=LIMIT_S)
    server.runtime.loads.set()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(server.runtime.instances) == 2  # one load of two instances; the others found nothing to do
    assert server.ask("m") == [2]


def test_unknown_names_may_be_loaded_at_the_same_time(server: Server) -> None:
    server.lifecycle.start()
    kinds: list[Kind] = []
    threads = [
        threading.Thread(target=lambda: kinds.append(refused(lambda: server.lifecycle.load("x"))[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert kinds == [Kind.NOT_FOUND] * 4


# -- unloading


def test_unloading_returns_at_once_and_what_was_accepted_is_finished(server: Server) -> None:
    server.put("m", "gated 3")
    server.lifecycle.load("m")
    server.lifecycle.start()
    server.lifecycle.get("m").submit(pending(request(2), answers := Answers()))
    server.lifecycle.unload("m")
    assert server.states() == [("m", 1, State.UNLOADING, "")]
    assert not server.lifecycle.is_ready()
    assert refused(lambda: server.lifecycle.get("m"))[0] is Kind.NOT_FOUND
    assert server.lifecycle.models() == []
    for instance in server.runtime.instances:
        assert isinstance(instance, GatedInstance)
        instance.gate.set()
    assert answers.values() == [6]
    server.wait(lambda: server.states() == [("m", 1, State.UNAVAILABLE, "unloaded")])
    assert server.lifecycle.is_ready()
    assert [instance.closed for instance in server.runtime.instances] == [1, 1]


def test_unloading_what_is_not_loaded_is_nothing(server: Server) -> None:
    server.put("m")
    server.lifecycle.unload("m")
    server.lifecycle.unload("x")
    server.lifecycle.load("m")
    server.lifecycle.unload("m")
    server.lifecycle.unload("m")
    server.wait(lambda: server.states() == [("m", 1, State.UNAVAILABLE, "unloaded")])


def test_an_unloaded_model_can_be_loaded_again_unchanged(server: Server) -> None:
    server.put("m", "scale 2")
    server.lifecycle.load("m")
    server.lifecycle.unload("m")
    server.lifecycle.load("m")
    assert server.ask("m") == [2]
    assert server.states() == [("m", 1, State.READY, "")]


def test_a_model_that_is_gone_from_disk_is_gone_from_the_index_and_serves(server: Server) -> None:
    server.put("m", "scale 2")
    server.lifecycle.load("m")
    (server.root / "m").rename(server.root.parent / "away")
    assert server.states() == []
    assert server.ask("m") == [2]


# -- stopping


def test_stopping_finishes_what_was_accepted_also_by_models_that_unload(server: Server) -> None:
    server.put("m", "gated 2")
    server.put("n", "gated 3")
    answers = []
    for name in "mn":
        server.lifecycle.load(name)
        server.lifecycle.get(name).submit(pending(request(1), answer := Answers()))
        answers.append(answer)
    server.lifecycle.start()
    server.lifecycle.unload("m")
    assert not server.lifecycle.stop(0)
    assert (server.lifecycle.is_live(), server.lifecycle.is_ready(), server.lifecycle.exiting) == (False, False, True)
    for instance in server.runtime.instances:
        assert isinstance(instance, GatedInstance)
        instance.gate.set()
    assert server.lifecycle.stop(LIMIT_S)
    assert [answer.values() for answer in answers] == [[2], [3]]
    assert refused(lambda: server.ask("n"))[1].startswith("[request id: <id_unknown>] Server is stopping")


def test_nothing_can_be_loaded_once_the_server_stops(server: Server) -> None:
    server.put("m")
    assert server.lifecycle.stop(0)
    assert refused(lambda: server.lifecycle.load("m")) == (Kind.UNAVAILABLE, "Server not ready")


# -- watching


def test_a_watcher_hears_of_every_change_until_it_ends(server: Server) -> None:
    heard: list[list[Row]] = []
    end = server.lifecycle.watch(lambda: heard.append(server.states()))
    server.put("m")
    server.lifecycle.load("m")
    assert [[state for _, _, state, _ in rows] for rows in heard] == [[State.LOADING], [State.READY]]
    end()
    server.lifecycle.unload("m")
    server.wait(lambda: server.states() == [("m", 1, State.UNAVAILABLE, "unloaded")])
    assert len(heard) == 2


# -- devices

GPU, CPU = "KIND_GPU", "KIND_CPU"


def groups(*texts: str) -> pb.ModelConfig:
    return configuration(
        'name: "m" backend: "onnxruntime" ' + " ".join(f"instance_group {{ {text} }}" for text in texts)
    )


@pytest.mark.parametrize(
    ("config", "device", "gpus", "cores", "places"),
    [
        (groups(), "auto", [], 8, ["cpu 4", "cpu 4"]),
        (groups(), "cpu", [], 1, ["cpu 1", "cpu 1"]),
        (groups(), "auto", [], 64, ["cpu 16", "cpu 16"]),
        (groups(), "auto", [0], 8, ["cuda:0 8 or cpu"]),
        (groups(), "auto", [0, 1], 8, ["cuda:0 4 or cpu", "cuda:1 4 or cpu"]),
        (groups(), "cuda", [0], 8, ["cuda:0 8"]),
        (groups("kind: KIND_CPU count: 3"), "cuda", [0], 6, ["cpu 2"] * 3),
        (groups("kind: KIND_GPU count: 2 gpus: 1"), "auto", [0, 1], 8, ["cuda:1 4"] * 2),
        (groups("kind: KIND_GPU"), "auto", [0, 1], 8, ["cuda:0 4", "cuda:1 4"]),
        (groups("kind: KIND_AUTO count: 1 gpus: 0"), "auto", [0], 8, ["cuda:0 8 or cpu"]),
        (groups("kind: KIND_GPU count: 1", "kind: KIND_CPU count: 1"), "auto", [0], 8, ["cuda:0 4", "cpu 4"]),
    ],
)
def test_instances_go_where_the_configuration_and_the_server_say(
    config: pb.ModelConfig, device: str, gpus: list[int], cores: int, places: list[str]
) -> None:
    def text(where: Placement) -> str:
        return f"{where} {where.threads}" + (" or cpu" if where.may_fall_back else "")

    assert [text(where) for where in place(config, device, gpus, cores)] == places


def test_cuda_that_was_asked_for_and_is_not_there_is_refused() -> None:
    kind, message = refused(lambda: place(groups(), "cuda", [], 8))
    assert kind is Kind.UNAVAILABLE
    assert "model 'm' was to run on cuda, but the NVIDIA driver shows no GPU" in message


@pytest.mark.parametrize(
    ("config", "devices", "kinds"),
    [
        (groups("kind: KIND_CPU count: 2"), ["cpu", "cpu"], [(CPU, 2, [])]),
        (groups("kind: KIND_GPU count: 1 gpus: [ 0, 1 ]"), ["cuda:0", "cuda:1"], [(GPU, 1, [0, 1])]),
        (groups("kind: KIND_GPU count: 2 gpus: [ 0, 1 ]"), ["cpu"] * 4, [(CPU, 4, [])]),
        (
            groups("kind: KIND_GPU count: 1 gpus: 0", "kind: KIND_CPU count: 1"),
            ["cuda:0", "cpu"],
            [(GPU, 1, [0]), (CPU, 1, [])],
        ),
        (
            groups("kind: KIND_GPU count: 1 gpus: 0", "kind: KIND_GPU count: 1 gpus: 1"),
            ["cpu", "cuda:1"],
            [(CPU, 1, []), (GPU, 1, [1])],
        ),
    ],
)
def test_the_configuration_shows_the_devices_that_were_really_got(
    config: pb.ModelConfig, devices: list[str], kinds: list[tuple[str, int, list[int]]]
) -> None:
    before = config.SerializeToString()
    done = show_devices(config, devices)
    assert [
        (pb.ModelInstanceGroup.Kind.Name(group.kind), group.count, list(group.gpus)) for group in done.instance_group
    ] == kinds
    assert config.SerializeToString() == before


def test_a_model_shows_the_device_that_it_runs_on(server: Server) -> None:
    server.put("m")
    server.lifecycle.load("m")
    model = server.lifecycle.get("m")
    assert model.devices == ("cpu",)
    assert [pb.ModelInstanceGroup.Kind.Name(group.kind) for group in model.config.instance_group] == [CPU]
    assert {str(where) for where in server.runtime.places} == {"cpu"}


def test_passive_groups_have_no_instances(server: Server) -> None:
    text = 'name: "m" instance_group [ { count: 3 kind: KIND_CPU passive: true }, { count: 2 kind: KIND_CPU } ]'
    config = configuration(text)
    assert [str(where) for where in place(config, "cpu", [], 8)] == ["cpu", "cpu"]
    done = show_devices(model_config.normalise(config), ["cpu", "cpu"])
    assert [group.count for group in done.instance_group] == [3, 2]
    config.instance_group[1].passive = True
    kind, message = refused(lambda: place(config, "cpu", [], 8))
    assert (kind, message) == (Kind.INVALID, "every instance group of model 'm' is passive, so none would run")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_an_ensemble_needs_no_device(device: str) -> None:
    assert place(configuration(calling("a")), device, [], 8) == [Placement("cpu")]
    assert place(configuration(calling("a")), device, [0], 8) == [Placement("cpu")]
