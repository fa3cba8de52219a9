"""The stand-in for the `runpod` package, on its own."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from penstock_runtimes.handler.standin import runpod
from penstock_runtimes.handler.standin.runpod.serverless import utils
from penstock_runtimes.handler.standin.runpod.serverless.modules.rp_logger import RunPodLogger
from penstock_runtimes.handler.standin.runpod.serverless.utils import rp_cleanup, rp_debugger
from penstock_runtimes.handler.standin.runpod.serverless.utils.rp_validator import validate

SCHEMA = {
    "text": {"type": str, "required": True},
    "steps": {"type": int, "required": False, "default": 5, "constraints": lambda steps: steps < 10},
    "scale": {"type": float, "required": False, "default": None},
}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"text": "t"}, {"text": "t", "steps": 5, "scale": None}),
        ({"text": "t", "steps": 9, "scale": 2}, {"text": "t", "steps": 9, "scale": 2.0}),
        ({"text": "t", "scale": None}, {"text": "t", "steps": 5, "scale": None}),
    ],
)
def test_a_right_input_is_completed(given: dict[str, Any], found: dict[str, Any]) -> None:
    before = dict(given)
    assert validate(given, SCHEMA) == {"validated_input": found}
    assert given == before


@pytest.mark.parametrize(
    ("given", "errors"),
    [
        ({}, ["text is a required input."]),
        ({"text": "t", "x": 1}, ["Unexpected input. x is not a valid input option."]),
        ({"text": 1}, ["text should be <class 'str'> type, not <class 'int'>."]),
        ({"text": "t", "steps": 10}, ["steps does not meet the constraints."]),
    ],
)
def test_a_wrong_input_is_told_with_every_mistake(given: dict[str, Any], errors: list[str]) -> None:
    assert validate(given, SCHEMA) == {"errors": errors}


def test_a_wrong_schema_is_told() -> None:
    schema = {"a": "no dict", "b": {"required": False, "default": 1}, "c": {"type": int, "required": False}}
    assert validate({}, schema)["errors"] == [
        "Schema error, a is not a dictionary.",
        "Schema error, missing type for b.",
        "Schema error, missing default value for c.",
    ]


def test_what_is_missing_says_so_when_it_is_used() -> None:
    uses: tuple[Callable[[], object], ...] = (
        lambda: runpod.Endpoint("id"),
        lambda: runpod.AsyncioEndpoint.run,
        lambda: utils.download_files_from_urls("id", []),
        lambda: utils.upload_file_to_bucket("name", "path"),
        lambda: runpod.serverless.VolumeCache(),
    )
    for use in uses:
        with pytest.raises(NotImplementedError, match="needs the runpod package, and this is Penstock's stand-in"):
            use()


def test_the_logger_prints_what_is_of_its_level(capsys: pytest.CaptureFixture[str]) -> None:
    said = runpod.RunPodLogger()
    assert said.level == "DEBUG"
    said.set_level("warn")
    try:
        said.info("unseen")
        said.error("seen", "job-1")
        said.warn("plain")
        said.set_level(3)
        said.secret("key", "abcd")
        with pytest.raises(ValueError, match="'loud' is no log level"):
            said.set_level("loud")
    finally:
        said.set_level("DEBUG")
    assert capsys.readouterr().out == "ERROR  | job-1 | seen\nWARN   | plain\nINFO   | key: a**d\n"
    assert RunPodLogger is runpod.RunPodLogger


def test_timers_give_milliseconds_once() -> None:
    @rp_debugger.FunctionTimer
    def work(value: int) -> int:
        return value

    assert work(3) == 3
    with rp_debugger.LineTimer("block"):
        pass
    stamps = rp_debugger.get_debugger_output()["timestamps"]
    assert [stamp["name"] for stamp in stamps] == ["work", "block"]
    assert all(0 <= stamp["duration_ms"] < 1000 for stamp in stamps)
    assert rp_debugger.get_debugger_output() == {"timestamps": []}


def test_cleaning_removes_what_jobs_leave(tmp_path: Path) -> None:
    for name in ("input_objects", "mine", "kept"):
        (tmp_path / name).mkdir()
    (tmp_path / "output.zip").touch()
    with contextlib.chdir(tmp_path):
        rp_cleanup.clean(["mine"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_start_works_in_a_handler_process_only() -> None:
    with pytest.raises(RuntimeError, match="handler process"):
        runpod.serverless.start({})
