"""Log lines begin as Triton's do, and each level can be switched off by itself."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from penstock.access import LOGGER
from penstock.errors import Kind, ServingError
from penstock.logs import Formatter, JsonFormatter, make_handler
from penstock.settings import Settings


def record(level: int = logging.INFO, message: str = "hello %s", name: str = "penstock.lifecycle") -> logging.LogRecord:
    made = logging.LogRecord(name, level, "lifecycle.py", 1, message, ("you",), None)
    made.created = 1_700_000_000.123456
    return made


@contextmanager
def handler(settings: Settings) -> Iterator[logging.Handler]:
    made = make_handler(settings)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("level", "letter"),
    [(logging.DEBUG, "V"), (logging.INFO, "I"), (logging.WARNING, "W"), (logging.ERROR, "E"), (logging.CRITICAL, "E")],
)
def test_a_line_begins_with_its_level_and_the_time(level: int, letter: str) -> None:
    assert Formatter(iso8601=False).format(record(level)) == f"{letter}1114 22:13:20.123456 lifecycle] hello you"


def test_the_time_can_be_the_whole_date() -> None:
    assert Formatter(iso8601=True).format(record()) == "2023-11-14T22:13:20.123456Z I lifecycle] hello you"


def test_a_line_of_a_library_bears_its_whole_name() -> None:
    assert Formatter(iso8601=False).format(record(name="uvicorn.error")).endswith(" uvicorn.error] hello you")


def test_a_traceback_follows_its_line() -> None:
    try:
        raise RuntimeError("no luck")
    except RuntimeError as error:
        made = record()
        made.exc_info = (RuntimeError, error, error.__traceback__)
    lines = Formatter(iso8601=False).format(made).splitlines()
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "RuntimeError: no luck"


LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (Settings(), [False, True, True, True]),
        (Settings(log_verbose=1), [True, True, True, True]),
        (Settings(log_info=False), [False, False, True, True]),
        (Settings(log_warning=False), [False, True, False, True]),
        (Settings(log_error=False), [False, True, True, False]),
    ],
)
def test_each_level_can_be_switched_off_by_itself(settings: Settings, shown: list[bool]) -> None:
    with handler(settings) as made:
        assert [bool(made.filter(record(level))) for level in LEVELS] == shown


def test_the_log_goes_to_the_file_that_is_named(tmp_path: Path) -> None:
    with handler(Settings(log_file=str(tmp_path / "log"), log_format="ISO8601")) as made:
        made.handle(record())
    assert (tmp_path / "log").read_text() == "2023-11-14T22:13:20.123456Z I lifecycle] hello you\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"^--log-file cannot be written: .*nowhere") as caught:
        make_handler(Settings(log_file=str(tmp_path / "nowhere" / "log")))
    assert caught.value.kind is Kind.INVALID


SCRIPT = """
import json
import logging
from penstock import logs
from penstock.settings import Settings
logs.set_up(Settings(log_verbose={verbose}))
for name in ("penstock.engine", "penstock_runtimes.onnx", "library"):
    logging.getLogger(name).debug("quiet")
    logging.getLogger(name).info("loud")
"""


@pytest.mark.parametrize(("verbose", "ours", "libraries"), [(0, "I", "I"), (1, "VI", "I"), (2, "VI", "VI")])
def test_a_process_logs_itself_before_its_libraries(verbose: int, ours: str, libraries: str) -> None:
    script = SCRIPT.format(verbose=verbose)
    lines = subprocess.run(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, check=True
    ).stderr.splitlines()
    for name, letters in (("engine", ours), ("penstock_runtimes.onnx", ours), ("library", libraries)):
        assert "".join(line[0] for line in lines if f" {name}] " in line) == letters


def test_json_is_one_object_per_line_whatever_was_said() -> None:
    made = record(message="a\n%s \ud800")
    made.job, made.request_id = "j1", "r\n1"
    line = JsonFormatter().format(made)
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.123456Z",
        "level": "info",
        "logger": "lifecycle",
        "message": "a\nyou \\ud800",
        "job": "j1",
        "request_id": "r\n1",
    }
    assert "\n" not in line


@pytest.mark.parametrize(
    ("names", "end"),
    [
        ({"job": "j1", "request_id": "r\n1"}, " [job=j1 id=r\\n1]"),
        ({"job": "j1", "request_id": ""}, " [job=j1]"),
        ({"job": "", "request_id": "r1"}, ""),
        ({}, ""),
    ],
)
def test_a_line_about_a_job_ends_with_its_id_and_that_of_its_request(names: dict[str, str], end: str) -> None:
    made = record()
    made.__dict__.update(names)
    assert Formatter(iso8601=False).format(made) == f"I1114 22:13:20.123456 lifecycle] hello you{end}"
    found = json.loads(JsonFormatter().format(made))
    assert {name: found[name] for name in ("job", "request_id") if name in found} == {
        name: value for name, value in names.items() if value
    }


def test_json_holds_the_traceback() -> None:
    try:
        raise RuntimeError("no luck")
    except RuntimeError as error:
        made = record(logging.ERROR)
        made.exc_info = (RuntimeError, error, error.__traceback__)
    entry = json.loads(JsonFormatter().format(made))
    assert entry["level"] == "error"
    assert entry["traceback"].endswith("RuntimeError: no luck")


def test_the_setting_chooses_json() -> None:
    with handler(Settings(log_format="json")) as made:
        assert json.loads(made.format(record()))["message"] == "hello you"


def test_the_access_log_is_written_where_what_the_server_does_is_not() -> None:
    with handler(Settings(log_info=False)) as made:
        assert not made.filter(record())
        assert made.filter(record(name=LOGGER))
