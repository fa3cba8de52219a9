"""`penstock jobs`, as it is typed, against a real server with keys; and what it shows on a terminal."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from penstock.auth import key_file
from penstock.cli import main
from penstock.client import job_input
from penstock.client.connection import Connection
from penstock.client.job_display import Display, JsonLines, Lines, Live, error_of, gauge
from penstock.client.jobs import Jobs, Look
from penstock.errors import ServingError

LIMIT_S = 60.0  # no wait takes this long, but a lost job must not hang a test
HANDLER = """
    import time
    from pathlib import Path

    import runpod

    def handler(job):
        asked = job["input"]
        for number, word in enumerate(asked["text"].split(), 1):
            yield word.upper()
            runpod.serverless.progress_update(job, {"progress": 50, "step": word})
        while not Path(asked.get("until", "/")).exists():
            time.sleep(0.01)

    runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
"""
Run = Callable[..., tuple[int, str, str]]


@contextmanager
def serving(folder: Path, store: Path, port: str = "0") -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server of `folder/models` with the keys there: its address and process."""
    command = [sys.executable, "-m", "penstock.cli", "serve", str(folder / "models"), "--announce", "json"]
    command += ["--log-info", "false", "--http-port", port, "--allow-grpc", "false", "--allow-metrics", "false"]
    command += ["--job-store", f"sqlite:{store}", "--api-keys", str(folder / "keys.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["http"], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model `words` and a file of keys."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "models/words").mkdir(parents=True)
    (folder / "models/words/handler.py").write_text(textwrap.dedent(HANDLER))
    return folder


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    made, text = key_file.make("tests", ["jobs"])
    with key_file.edit(folder / "keys.json") as keys:
        keys.append(made)
    return text


@pytest.fixture(scope="module")
def url(folder: Path, key: str) -> Iterator[str]:
    with serving(folder, folder / "jobs.db") as (url, _):
        yield url


@pytest.fixture
def run(url: str, key: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Types a command: its exit status, output and errors."""

    def typed(action: str, *arguments: str) -> tuple[int, str, str]:
        status = main(["jobs", action, *arguments, "--url", url, "--api-key", key])
        said = capsys.readouterr()
        return status, said.out, said.err

    return typed


def submitted(run: Run, *arguments: str) -> str:
    status, out, _ = run("submit", *arguments)
    assert status == 0
    return out.strip()


def test_a_job_that_is_waited_for_shows_chunks_as_results_and_the_rest_beside_them(run: Run) -> None:
    status, out, err = run("submit", "words", "--wait", "text=a mill")
    assert (status, out) == (0, '"A"\n"MILL"\n')
    id, *said = err.splitlines()
    assert id.endswith("-u1")
    assert said[-1].startswith("COMPLETED after 0.")


def test_a_finished_job_can_be_watched_again_and_its_stream_is_left_to_others(run: Run) -> None:
    id = submitted(run, "words", '{"text": "a mill"}')
    for _ in range(2):
        assert run("watch", id)[:2] == (0, '"A"\n"MILL"\n')
    status, out, _ = run("watch", id, "--json")
    *chunks, ended = map(json.loads, out.splitlines())
    assert (status, chunks) == (0, [{"chunk": "A"}, {"chunk": "MILL"}])
    assert (ended["id"], ended["status"], ended["output"]) == (id, "COMPLETED", ["A", "MILL"])


def test_a_job_that_runs_shows_its_progress(run: Run, tmp_path: Path) -> None:
    until = tmp_path / "until"
    id = submitted(run, "words", "text=slow", f"until={until}")
    wait_for(lambda: "slow" in run("show", id)[1])
    _, out, _ = run("show", id)
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert (shown["model"], shown["status"]) == ("words", "IN_PROGRESS")
    assert json.loads(shown["progress"]) == {"progress": 50, "step": "slow"}
    until.touch()
    assert run("watch", id)[0] == 0
    assert json.loads(run("show", id, "--json")[1])["output"] == ["SLOW"]


def test_a_failed_job_is_told_listed_and_tried_again(run: Run) -> None:
    status, out, err = run("submit", "words", "texts=none", "--wait")
    id = err.splitlines()[0]
    assert (status, out, err.splitlines()[-1]) == (1, "", "KeyError: 'text'")
    _, listed, _ = run("list", "words", "--status", "failed")
    assert any(line.startswith(id) and line.endswith("KeyError: 'text'") for line in listed.splitlines())
    assert run("retry", id) == (0, "IN_QUEUE\n", "")
    assert run("watch", id)[0] == 1


def test_a_list_has_pages(run: Run) -> None:
    for _ in range(2):
        submitted(run, "words", "text=")
    _, out, _ = run("list", "words", "--limit", "1")
    head, _, more = out.splitlines()
    assert head.split() == ["ID", "STATUS", "WAITED", "RAN", "RESULT"]
    assert more.startswith("1 of ")
    assert more.endswith("; --offset 1 shows what follows")
    _, out, _ = run("list", "words", "--offset", "1", "--json")
    page = json.loads(out)
    assert (page["offset"], page["total"]) == (1, len(page["requests"]) + 1)


def test_what_waits_is_purged_and_what_runs_is_cancelled(run: Run, tmp_path: Path) -> None:
    runs = submitted(run, "words", "text=x", f"until={tmp_path / 'never'}")
    wait_for(lambda: "IN_PROGRESS" in run("show", runs)[1])
    waits = [submitted(run, "words", "text=x", *flags) for flags in ((), ("--low-priority", "--ttl", "60"))]
    assert run("purge", "words") == (0, "Removed 2 jobs of 'words' that waited.\n", "")
    assert [run("show", id, "--json")[1] for id in waits] == [f'{{"id":"{id}","status":"CANCELLED"}}\n' for id in waits]
    assert run("cancel", runs) == (0, "CANCELLED\n", "")
    status, _, err = run("watch", runs)
    assert (status, err.splitlines()[-1].split()[0]) == (1, "CANCELLED")


def test_a_job_that_has_ended_is_not_cancelled(run: Run) -> None:
    id = run("submit", "words", "text=", "--wait")[2].splitlines()[0]
    assert run("cancel", id) == (1, "COMPLETED\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nope"), "HTTP 404 Not Found: job 'nope' is not found"),
        (("list", "nope"), "HTTP 404 Not Found: endpoint 'nope' is not found"),
        (("list", "words", "--status", "done"), "HTTP 400 Bad Request: status: expected one of "),
        (("submit", "words", "text=", "--ttl", "1"), "HTTP 400 Bad Request: policy.ttl: expected milliseconds from "),
        (("submit", "words", "text=", "--execution-timeout", "1"), "HTTP 400 Bad Request: policy.executionTimeout: "),
        (("submit", "words", "text=", "--webhook", "mill"), "HTTP 400 Bad Request: webhook: expected an absolute "),
        (("submit", "words", "mill"), "'mill' is no JSON: "),
    ],
)
def test_what_is_refused_is_told(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"penstock: {message}")


def test_the_key_may_stand_in_a_variable_and_is_needed(url: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "penstock.cli", "jobs", "list", "words", "--url", url]
    done = subprocess.run(command, env={**os.environ, "PENSTOCK_API_KEY": key}, capture_output=True, check=True)
    assert done.stdout.startswith(b"ID ")
    assert main(["jobs", "list", "words", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("penstock: HTTP 401 Unauthorized: an API key is required")
    assert main(["jobs", "list", "words", "--url", url, "--header", f"Authorization={key}"]) == 0


def test_a_watched_job_outlives_its_server(folder: Path, key: str, tmp_path: Path) -> None:
    until, store, looks = tmp_path / "until", tmp_path / "jobs.db", list[Look]()
    with ExitStack() as stack:
        url, process = stack.enter_context(serving(folder, store))
        jobs, watcher = (
            stack.enter_context(closing(Jobs(Connection(url, (("authorization", f"Bearer {key}"),))))) for _ in range(2)
        )
        id = jobs.submit("words", {"input": {"text": "a mill", "until": str(until)}})["id"]
        watching = threading.Thread(target=lambda: looks.extend(jobs.follow("words", id)))
        wait_for(lambda: bool(watcher.status("words", id).get("output")))
        watching.start()
        wait_for(lambda: bool(chunks(looks)))
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        wait_for(lambda: bool(looks[-1].away))
        until.touch()
        with serving(folder, store, url.rpartition(":")[2]):
            watching.join(LIMIT_S)
            assert not watching.is_alive()
    assert (looks[-1].job["status"], looks[-1].job["output"]) == ("COMPLETED", ["A", "MILL"])
    assert looks[-1].job["retries"] == 1
    assert chunks(looks[[look.restarted for look in looks].index(True) :]) == ["A", "MILL"]


def chunks(looks: list[Look]) -> list[Any]:
    return [chunk for look in looks for chunk in look.chunks]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)  # between two looks at the condition


# -- inputs


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        (['{"a": "b=c"}'], {"a": "b=c"}),
        (["[1,2]"], [1, 2]),
        (["5"], 5),
        (["text=hello there", "n=5", 'q="5"', "x=[[1]]", "flag=true", "none="],
         {"text": "hello there", "n": 5, "q": "5", "x": [[1]], "flag": True, "none": ""}),
        (["a=b=c"], {"a": "b=c"}),
        (["@-"], {"from": "input"}),
        (["x=@-"], {"x": {"from": "input"}}),
        (["@FOLDER/x.json"], [1]),
        (["x=@FOLDER/x.json", "y=@FOLDER/y.txt"], {"x": [1], "y": "[1]"}),
    ],
)  # fmt: skip
def test_operands_are_an_input(tmp_path: Path, operands: list[str], expected: Any) -> None:
    for name in ("x.json", "y.txt"):
        (tmp_path / name).write_text("[1]")
    typed = [operand.replace("FOLDER", str(tmp_path)) for operand in operands]
    assert job_input.read(typed, lambda: '{"from": "input"}') == expected


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (["a=1", "a=2"], "input 'a' is given twice"),
        (["a=1", "{}"], "expected one JSON value, or NAME=VALUE for each input, got '{}'"),
        (["a=[1"], "input 'a': '[1' is no JSON: "),
        (["NaN"], "'NaN' is no JSON: "),
        (["@/nowhere"], "cannot read '/nowhere' as text: "),
    ],
)
def test_operands_that_are_no_input_are_refused(operands: list[str], message: str) -> None:
    with pytest.raises(ServingError) as caught:
        job_input.read(operands, lambda: "")
    assert caught.value.message.startswith(message)


# -- what is shown


LOOKS = (
    Look({"id": "j", "status": "IN_QUEUE"}),
    Look({"id": "j", "status": "IN_PROGRESS", "output": {"progress": 25, "step": "grind"}}, ["A"]),
    Look({"id": "j", "status": "IN_PROGRESS", "output": {"progress": 25, "step": "grind"}}, away="cannot ask it"),
    Look({"id": "j", "status": "IN_PROGRESS"}, restarted=True),
    Look({"id": "j", "status": "COMPLETED", "executionTime": 1500, "output": 7}),
)


def shown(display: Display) -> None:
    for look in LOOKS:
        display.show(look)


def test_lines_tell_what_is_new() -> None:
    out, log = io.StringIO(), io.StringIO()
    shown(Lines(out, log))
    assert out.getvalue() == '"A"\n7\n'
    assert log.getvalue().splitlines() == [
        "IN_QUEUE",
        "IN_PROGRESS",
        'progress: {"progress":25,"step":"grind"}',
        "away: cannot ask it",
        "restarted: what was streamed so far counts for nothing",
        "COMPLETED after 1.500 s",
    ]


def test_json_lines_end_with_the_job() -> None:
    out = io.StringIO()
    shown(JsonLines(out))
    documents = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [next(iter(document)) for document in documents] == [
        "status", "status", "chunk", "progress", "away", "restarted", "id",
    ]  # fmt: skip
    assert documents[-1] == LOOKS[-1].job


def test_a_terminal_has_one_line_that_replaces_itself() -> None:
    out, log = io.StringIO(), io.StringIO()
    shown(Live(out, log, lambda: 3.0))
    assert out.getvalue() == '"A"\n7\n'
    assert log.getvalue().split("\r\033[K")[1:] == [
        "IN_QUEUE  0 s  ",
        "IN_PROGRESS  0 s  [######------------------] 25 %  step grind",
        "IN_PROGRESS  0 s  cannot ask it",
        "restarted: what was streamed so far counts for nothing\nIN_PROGRESS  0 s  ",
        "COMPLETED after 1.500 s\n",
    ]


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (None, ""),
        ("step\n2", "step 2"),
        (100, "[########################] 100 %"),
        (0.0, "[------------------------] 0 %"),
        (101, "101"),
        (True, "true"),
        ({"done": 3}, '{"done":3}'),
    ],
)
def test_progress_is_a_bar_where_it_is_a_percentage(progress: Any, line: str) -> None:
    assert gauge(progress) == line


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("worker lost", "worker lost"),
        ('{"error_message": "no", "error_traceback": "Traceback\\nValueError: no\\n"}', "Traceback\nValueError: no"),
        ('{"error_message": "no"}', "no"),
        ('{"code": 3}', '{"code": 3}'),
    ],
)
def test_an_error_of_a_handler_is_its_traceback(error: str, shown: str) -> None:
    assert error_of({"id": "j", "status": "FAILED", "error": error}) == shown
