"""Handler processes: how they run jobs side by side, are cancelled, crash, are replaced and end."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from penstock.errors import Kind, WorkerLostError
from penstock_runtimes.handler.instance import delay_s

from .handlers import LIMIT_S, NOBODY, NOTHING, ends, opened, printed, send, until

# A handler that says when it has begun, and then waits: for ever, unless it is async and cancelled.
WAITS = """
    import asyncio, os, runpod, time
    began = runpod.serverless.progress_update

    def handler(job):
        began(job, os.getpid())
        while job["input"] == "wait":
            time.sleep(1000)
        return os.getpid()

    async def waits(job):
        began(job, os.getpid())
        try:
            await asyncio.sleep(1000 if job["input"] == "wait" else 0)
        finally:
            print("left", flush=True)
        return os.getpid()

    async def stubborn(job):
        began(job, os.getpid())
        while job["input"] == "wait":
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                print("never")
        return os.getpid()

    def generator(job):
        try:
            while job["input"] == "wait":
                yield os.getpid()
        finally:
            print("left", flush=True)

    def later(job):
        return waits(job)

    runpod.serverless.start({"handler": %s, "concurrency_modifier": lambda slots: 4})
"""


# -- side by side


def test_async_jobs_run_at_once_as_many_as_the_file_allows(tmp_path: Path) -> None:
    code = """
        import asyncio, runpod
        running = 0
        together = asyncio.Event()
        async def handler(job):
            global running
            running += 1
            if running == 50:
                together.set()
            await together.wait()
            return job["input"]
        runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda slots: 50})
    """
    with opened(tmp_path, code) as instance:
        assert (instance.kind, instance.max_in_flight) == ("async", 50)
        sent = [send(instance, number, id=str(number)) for number in range(50)]
        assert [one.result() for one in sent] == list(range(50))


def test_the_modifier_is_asked_at_the_start_and_after_each_job(tmp_path: Path) -> None:
    code = """
        import runpod
        def modifier(slots):
            if slots == 4:
                raise ValueError("no idea")
            return slots + 1
        runpod.serverless.start({"handler": lambda job: 1, "concurrency_modifier": modifier})
    """
    with opened(tmp_path, code) as instance:
        seen = [instance.max_in_flight]
        for _ in range(4):
            assert send(instance).result() == 1
            seen.append(instance.max_in_flight)
        assert seen == [2, 3, 4, 4, 4]


def test_plain_jobs_run_one_by_one(tmp_path: Path) -> None:
    code = """
        import runpod, time
        running = 0
        def handler(job):
            global running
            running += 1
            time.sleep(0.001)
            found, running = running, running - 1
            return found
        runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda slots: 20})
    """
    with opened(tmp_path, code) as instance:
        assert [one.result() for one in [send(instance) for _ in range(20)]] == [1] * 20


# -- cancelling


def test_a_plain_handler_is_cancelled_with_its_process_and_others_are_not_to_blame(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "handler", cancel_grace_s="1000") as instance:
        running = send(instance, "wait")
        [pid] = running.wait("progress")
        queued, unwanted = send(instance, "go", id="queued"), send(instance, "go", id="unwanted")
        unwanted.cancelled.set(NOBODY)
        assert unwanted.error() is NOBODY  # at once, and without harm to the one that runs
        assert (running.of("final"), instance.pid) == ([], pid)
        running.cancelled.set(NOBODY)
        assert running.error() is NOBODY
        lost = queued.error()
        assert isinstance(lost, WorkerLostError)
        assert not lost.blamed
        assert lost.message == "worker lost: a request was cancelled, and its handler cannot be interrupted"
        assert ends(pid)
        assert send(instance, "go").result() not in (pid, None)
        assert instance.starts == 2


@pytest.mark.parametrize("handler", ["waits", "later"])
def test_an_async_handler_is_cancelled_and_its_process_goes_on(
    tmp_path: Path, handler: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with opened(tmp_path, WAITS % handler, cancel_grace_s="1000") as instance:
        sent, other = send(instance, "wait", id="a"), send(instance, "wait", id="b")
        [pid], _ = sent.wait("progress"), other.wait("progress")
        sent.cancelled.set(NOBODY)
        assert sent.error() is NOBODY
        assert printed(caplog, "a") == ["left"]
        assert (other.of("final"), send(instance, "go").result()) == ([], pid)


def test_a_generator_is_cancelled_at_its_next_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with opened(tmp_path, WAITS % "generator", cancel_grace_s="1000") as instance:
        sent = send(instance, "wait")
        sent.wait("chunk", 3)
        pid = instance.pid
        sent.cancelled.set(NOBODY)
        assert sent.error() is NOBODY
        assert printed(caplog, "j") == ["left"]
        assert (send(instance, "go").result(), instance.pid) == (NOTHING, pid)


def test_one_that_will_not_be_cancelled_is_killed_after_the_grace(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "stubborn", cancel_grace_s="0.3") as instance:
        sent, other = send(instance, "wait", id="a"), send(instance, "wait", id="b")
        [pid], _ = sent.wait("progress"), other.wait("progress")
        started_s = time.monotonic()
        sent.cancelled.set(NOBODY)
        lost = other.error()
        assert time.monotonic() - started_s >= 0.3
        assert isinstance(lost, WorkerLostError)
        assert not lost.blamed
        assert "did not end within 0.3 s" in lost.message
        assert sent.error() is NOBODY
        assert ends(pid)
        assert send(instance, "go").result() != pid


def test_one_that_is_cancelled_before_it_is_started_never_runs(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "handler") as instance:
        running = send(instance, "wait")
        running.wait("progress")
        sent = send(instance, "go")
        sent.cancelled.set(NOBODY)
        assert sent.error() is NOBODY
        running.cancelled.set(NOBODY)
        held = send(instance, "wait")  # while the process is replaced, or for the new one
        held.cancelled.set(NOBODY)
        assert held.error() is NOBODY
        assert sent.of("progress") == []


# -- crashes

CRASHES = """
    import ctypes, os, runpod, signal, sys
    async def handler(job):
        if job["input"] == "wait":
            runpod.serverless.progress_update(job, os.getpid())
            import asyncio
            await asyncio.sleep(1000)
        print("about to", file=sys.stderr)
        eval(job["input"])
        return os.getpid()
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda slots: 4})
"""


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("os._exit(3)", "exit status 3", "about to"),
        ("sys.exit(4)", "exit status 4", "SystemExit: 4"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal SIGKILL", "about to"),
        ("ctypes.string_at(0)", "signal SIGSEGV", "Fatal Python error: Segmentation fault"),
    ],
)
def test_a_crash_is_told_at_once_to_what_ran_and_the_process_is_replaced(
    tmp_path: Path, how: str, status: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path, CRASHES) as instance:
        other = send(instance, "wait")
        [pid] = other.wait("progress")
        sent = send(instance, how)
        for one in (sent, other):
            lost = one.error()
            assert isinstance(lost, WorkerLostError)
            assert lost.blamed
            assert lost.kind is Kind.UNAVAILABLE
            assert lost.message.startswith(
                f"worker lost: the process that ran it ended with {status}; its last words: "
            )
            assert words in lost.message
        assert send(instance, "0").result() != pid
        assert f"ended with {status}" in caplog.text
        assert "its process is replaced in 0.1 s" in caplog.text


def test_there_is_no_room_while_the_process_is_replaced(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "waits") as instance:
        assert instance.max_in_flight == 4
        sent = send(instance, "wait")
        [pid] = sent.wait("progress")
        os.kill(pid, signal.SIGKILL)
        assert isinstance(sent.error(), WorkerLostError)
        assert instance.max_in_flight == 0, "for 0.1 s at least"
        until(lambda: instance.max_in_flight == 4)


def test_a_process_that_is_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "handler") as instance:
        running, queued = send(instance, "wait"), send(instance, "go")
        [pid] = running.wait("progress")
        os.kill(pid, signal.SIGKILL)
        lost, spared = running.error(), queued.error()
        assert isinstance(lost, WorkerLostError)
        assert isinstance(spared, WorkerLostError)
        assert (lost.blamed, spared.blamed) == (True, False)
        assert send(instance, "go").result() != pid


def test_a_process_that_closes_its_connection_is_replaced(tmp_path: Path) -> None:
    code = """
        import os, runpod, time
        def handler(job):
            if job["input"]:
                os.closerange(3, 100)
                time.sleep(1000)
            return 1
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code, cancel_grace_s="0.1") as instance:
        lost = send(instance, True).error()
        assert isinstance(lost, WorkerLostError)
        assert lost.blamed
        assert send(instance, False).result() == 1


def test_each_failure_in_a_row_doubles_the_delay_up_to_half_a_minute() -> None:
    assert [delay_s(failures) for failures in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, 0.8]
    assert delay_s(10) == delay_s(1000) == 30


def test_a_process_that_cannot_be_replaced_is_tried_again_later_and_what_waits_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        import os, runpod
        if os.path.exists("broken"):
            raise OSError("the disk is gone")
        def handler(job):
            if job["input"] == "break":
                open("broken", "w").close()
                os._exit(1)
            return "fine"
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code) as instance:
        assert send(instance, "break").error().message.startswith("worker lost: ")
        lost = send(instance, "x").error()
        assert isinstance(lost, WorkerLostError)
        assert not lost.blamed
        assert lost.message == "model 'm': its handler file failed: OSError: the disk is gone"
        until(lambda: len(re.findall(r"its process is replaced in", caplog.text)) >= 3)
        (tmp_path / "broken").unlink()
        until(lambda: instance.pid is not None)
        assert send(instance, "x").result() == "fine"
        assert re.findall(r"replaced in ([\d.]+) s", caplog.text)[:3] == ["0.1", "0.2", "0.4"]
        assert 'raise OSError("the disk is gone")' in caplog.text  # in full


# -- refreshing


@pytest.mark.parametrize(
    ("config", "result"),
    [('"refresh_worker": True', "os.getpid()"), ("", '{"pid": os.getpid(), "refresh_worker": True}')],
)
def test_a_worker_that_wants_to_be_new_is_replaced_after_the_job(tmp_path: Path, config: str, result: str) -> None:
    code = f"""
        import os, runpod
        runpod.serverless.start({{"handler": lambda job: {result}, {config}}})
    """
    with opened(tmp_path, code) as instance:
        pids = [str(send(instance).result()) for _ in range(3)]
        assert len(set(pids)) == 3
        assert "refresh" not in pids[0]


def test_a_worker_is_refreshed_when_its_other_jobs_have_ended(tmp_path: Path) -> None:
    code = """
        import asyncio, os, runpod
        go = asyncio.Event()
        async def handler(job):
            if job["input"] == "wait":
                runpod.serverless.progress_update(job, 1)
                await go.wait()
            return {"pid": os.getpid(), "refresh_worker": job["input"] == "refresh"}
        async def release(job):
            pass
        def start(job):
            if job["input"] == "go":
                go.set()
                return {"error": "went", "refresh_worker": True}
            return handler(job)
        runpod.serverless.start({"handler": start, "concurrency_modifier": lambda slots: 4})
    """
    with opened(tmp_path, code) as instance:
        waiting = send(instance, "wait")
        waiting.wait("progress")
        assert send(instance, "go").error().message == "went"
        after = send(instance, "x")
        assert waiting.result()["pid"] != after.result()["pid"]
        assert instance.starts == 2


# -- output


def test_output_is_logged_under_the_model_with_the_job_that_printed_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code = """
        import asyncio, os, runpod, subprocess, sys
        print("loading")
        log = runpod.RunPodLogger()
        async def handler(job):
            for step in range(3):
                print(job["id"], step)
                await asyncio.sleep(0)
            print(f"{job['id']} err\\nand more", file=sys.stderr)
            print("10%\\r50%\\r100%")
            log.info("hi", job["id"])
        runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda slots: 4})
    """
    with opened(tmp_path, code) as instance:
        sent = [send(instance, id=id) for id in "ab"]
        assert [one.result() for one in sent] == [None, None]
        until(lambda: all(len(printed(caplog, id)) >= 7 for id in "ab"))  # results do not wait for what is printed
        for id in "ab":
            lines = printed(caplog, id)
            out = [line for line in lines if "err" not in line and "more" not in line]
            assert out == [f"{id} 0", f"{id} 1", f"{id} 2", "100%", f"INFO   | {id} | hi"]
            assert [line for line in lines if line not in out] == [f"{id} err", "and more"]
    assert printed(caplog, "") == ["loading"]


def test_long_lines_are_cut_and_what_a_job_has_started_speaks_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code = """
        import os, runpod
        def handler(job):
            os.system("echo from elsewhere")
            print("x" * 20_000)
        runpod.serverless.start({"handler": handler})
    """
    with opened(tmp_path, code) as instance:
        send(instance, id="long").result()
        first, *rest = printed(caplog, "long")
        assert first == "from elsewhere"
        assert [len(part) for part in rest] == [8192 - 3, 8192, 20_000 - 2 * 8192 + 3]


# -- the end


def test_closing_lets_the_file_clean_up(tmp_path: Path) -> None:
    code = """
        import atexit, runpod
        atexit.register(lambda: open("left", "w").close())
        runpod.serverless.start({"handler": lambda job: 1})
    """
    with opened(tmp_path, code) as instance:
        pid = instance.pid
        assert pid
    assert ends(pid)
    assert (tmp_path / "left").exists()
    instance.close()  # and once more does nothing


def test_what_runs_when_it_is_closed_is_lost_and_not_to_blame(tmp_path: Path) -> None:
    with opened(tmp_path, WAITS % "handler", cancel_grace_s="0.1") as instance:
        running = send(instance, "wait")
        running.wait("progress")
    lost = running.error()
    assert isinstance(lost, WorkerLostError)
    assert (lost.blamed, lost.message) == (False, "worker lost: the model is being unloaded")


def test_what_a_handler_has_started_ends_with_it(tmp_path: Path) -> None:
    code = """
        import runpod, subprocess
        child = subprocess.Popen(["sleep", "1000"])
        runpod.serverless.start({"handler": lambda job: child.pid})
    """
    with opened(tmp_path, code) as instance:
        first = send(instance).result()
        killed = instance.pid
        assert killed
        os.kill(killed, signal.SIGKILL)
        assert ends(first)
        until(lambda: instance.pid != killed)  # else the next goes to the process that has just ended
        second = send(instance).result()
        assert second != first
    assert ends(second)


def test_a_handler_process_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/handler.py").write_text("import runpod\nrunpod.serverless.start({'handler': lambda job: 1})\n")
    code = f"""
import pathlib, threading
from runtimes.tests.handlers import opened
path = pathlib.Path({str(tmp_path / "m")!r})
with opened(path, (path / "handler.py").read_text()) as instance:
    print(instance.pid, flush=True)
    threading.Event().wait()
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        server.kill()
        assert server.wait(LIMIT_S) == -signal.SIGKILL
    assert ends(pid)


# Speaks the protocol for one job and asks to be replaced, and starts many times faster than the worker.
BRIEF = """
import os, sys
wire = int(sys.argv[1])
def send(head, body=b""):
    os.write(wire, len(head).to_bytes(4, "little") + len(body).to_bytes(4, "little") + head + body)
send(b'{"is":"ready","kind":"plain","generator":false,"slots":1}')
job = os.read(wire, 65536).split(b'"job":')[1].split(b",")[0]
send(b'{"is":"done","job":%b,"slots":1,"refresh":true}' % job, b"%d" % os.getpid())
os.read(wire, 65536)
"""


def test_two_hundred_processes_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "brief.py").write_text(BRIEF)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor last; do :; done\nexec {sys.executable} -S -I {tmp_path}/brief.py "$last"\n')
    python.chmod(0o755)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def memory_kb() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    before, threads = descriptors(), threading.active_count()
    with opened(tmp_path / "m", "", python=str(python)) as instance:
        pids = {send(instance).result() for _ in range(50)}
        resident_kb = memory_kb()
        pids |= {send(instance).result() for _ in range(150)}
        assert (len(pids), instance.starts >= 200) == (200, True)
        assert memory_kb() - resident_kb < 2_000
        until(lambda: instance.pid is not None)
        assert descriptors() == before + 6  # poller, bell, socket, process and two pipes
    assert (descriptors(), threading.active_count()) == (before, threads)
