"""Runs one handler file, as `__main__`, in a process of its own: `python worker.py FILE SERVER_PID MOST_BYTES SOCKET`.

Needs nothing but the standard library, so that a model's own interpreter can run it: Python 3.9 or newer.

`runpod.serverless.start` is where control passes from the file to here. From then on an asyncio loop in the thread that
called it takes jobs from the socket. Plain handlers run on the loop too, and so one at a time, as on the job platform.

Messages, each a head and a body. From the server:
    run {job, id, input, request_id}
                              body: the job's input, that many bytes of JSON, and a JSON object of what else it brings;
                              `request_id`, where there is one: of the request that handed it in
    cancel {job}              end it, if that can be done
    more {job, chunks}        so many of its chunks were read
    stop {}                   leave, when nothing runs
To the server:
    failed {error}            the file ended, or cannot be run; body: the traceback
    ready {kind, generator, slots}
    began {job, yields}       the handler was called; `yields`: it can be cancelled without killing the process
    chunk {job}, progress {job}                  body: JSON
    done {job, slots, refresh}                   body: the result, as JSON
    error {job, slots, refresh, kind, logged}    body: text
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

FRAME = struct.Struct("<II")  # bytes of the head, bytes of the body
READ_BYTES = 1 << 18
WINDOW = 16  # chunks of a job that may be unread
LONGEST_ERROR = 64 << 10  # characters
PR_SET_PDEATHSIG = 1
STANDIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "standin")

RUNNING: contextvars.ContextVar[int] = contextvars.ContextVar("job", default=0)


def main() -> int:
    path, server, most_bytes, descriptor = sys.argv[1:]
    die_with(int(server))
    connection = socket.socket(fileno=int(descriptor))
    connection.settimeout(None)
    connection.set_inheritable(False)
    sys.argv[:] = [path]
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]
    sys.path.insert(0, os.path.dirname(path))  # as if the file had been run
    for name in ("stdout", "stderr"):
        text = MarkedText(getattr(sys, name).detach())
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    worker = Worker(connection, int(most_bytes))
    try:
        take_over(worker)
        run_file(path)
        for thread in threading.enumerate():  # `start` may have been called on one of them
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        if not worker.started:
            worker.send(
                {"is": "failed", "error": f"it called sys.exit({error.code!r}) instead of runpod.serverless.start"}
            )
        raise
    except BaseException as error:
        if not worker.ready:
            last = traceback.format_exception_only(type(error), error)[-1].strip()
            worker.send({"is": "failed", "error": last}, traceback_of(error).encode())
            return 1
        raise
    if not worker.started:
        worker.send({"is": "failed", "error": "it ended without calling runpod.serverless.start"})
    return 1


def die_with(server: int) -> None:
    """Let the kernel kill this process when the server's thread that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:  # it went before that
        os._exit(1)
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")  # when memory runs out, this process shall be killed and not the server
    except OSError as error:
        print(f"penstock: oom_score_adj stays as it is: {error}", file=sys.stderr)


def take_over(worker: Worker) -> None:
    """Make `runpod` importable and its `start` and `progress_update` the worker's."""
    if importlib.util.find_spec("runpod") is None:
        sys.path.append(STANDIN)
    runpod = importlib.import_module("runpod")
    worker.version = str(getattr(runpod, "__version__", "unknown"))
    serverless: Any = importlib.import_module("runpod.serverless")
    serverless.start = worker.start
    serverless.progress_update = worker.progress
    module: Any = sys.modules.get("runpod.serverless.modules.rp_progress")
    if module is not None:
        module.progress_update = worker.progress


def run_file(path: str) -> None:
    """Execute a file as `__main__`, in a module of its own."""
    sys.modules["penstock_handler_worker"] = sys.modules["__main__"]
    module = types.ModuleType("__main__")
    module.__file__ = path
    sys.modules["__main__"] = module
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, module.__dict__)


class MarkedText(io.TextIOWrapper):
    """Standard output or error. Each line that is printed in the course of a job starts with the job's number."""

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True, write_through=True)
        self._at_start = True

    def write(self, text: str) -> int:
        number = RUNNING.get()
        if number and text:
            mark = f"\x1e{number}\x1f"
            inner = text[:-1].replace("\n", "\n" + mark) + text[-1]
            super().write(mark + inner if self._at_start else inner)
        else:
            super().write(text)
        if text:
            self._at_start = text.endswith("\n")
        return len(text)


class JobError(Exception):
    """The job has failed, and this is its error, word for word. `refresh`: the worker is to be restarted after it."""

    def __init__(self, text: str, refresh: bool = False) -> None:
        super().__init__(text)
        self.refresh = refresh


class Job:
    """A job that was taken. Owned by the loop's thread, but for `ended`, which is the connection lock's."""

    def __init__(self, number: int, given: dict[str, Any]) -> None:
        self.number = number
        self.given = given  # what the handler gets
        self.room = WINDOW  # chunks that may still be sent
        self.more = asyncio.Event()  # there is room again
        self.task: asyncio.Task[None] | None = None
        self.began = False
        self.stopped = False  # by the server
        self.ended = False


class Worker:
    """Calls the handler. `send` and `progress` are for any thread, the rest for the loop's."""

    def __init__(self, connection: socket.socket, most_bytes: int) -> None:
        self.connection = connection
        self.most_bytes = most_bytes
        self.version = ""  # of the runpod package
        self.started = False  # `start` was called
        self.ready = False
        self.leaving = False  # by the user's will or the server's: what the loop cancels then is nobody's business
        self.config: dict[str, Any] = {}
        self.handler: Callable[[dict[str, Any]], Any]
        self.yields = False  # whether the handler gives way to the loop, so that it can be cancelled
        self.slots = 1
        self.jobs: dict[int, Job] = {}
        self.received = bytearray()
        self.lock = threading.Lock()  # of the connection's sending end
        self.stopping: asyncio.Event

    def start(self, config: Any) -> NoReturn:
        """What a handler file calls as `runpod.serverless.start`. Never returns."""
        if not isinstance(config, dict):
            raise TypeError(f"runpod.serverless.start expects a dict, got {type(config).__name__}")
        if not callable(config.get("handler")):
            raise ValueError("runpod.serverless.start expects a function under the key 'handler'")
        if self.started:
            raise RuntimeError("runpod.serverless.start was called before")
        self.started = True
        self.config, self.handler = config, config["handler"]
        config["reference_counter_start"] = time.perf_counter()
        config["rp_args"] = {
            "rp_log_level": None,
            "rp_debugger": None,
            "rp_serve_api": None,
            "rp_api_port": 8000,
            "rp_api_concurrency": 1,
            "rp_api_host": "localhost",
            "test_input": None,
        }
        asyncio.run(self.serve())
        raise SystemExit(0)

    async def serve(self) -> None:
        """Take jobs until the server says stop."""
        self.stopping = asyncio.Event()
        await self.check_fitness()
        kind = kind_of(self.handler)
        self.yields = kind != "plain"
        self.ask_slots()
        self.ready = True
        self.send({"is": "ready", "kind": kind, "generator": "generator" in kind, "slots": self.slots})
        asyncio.get_running_loop().add_reader(self.connection.fileno(), self.receive)
        await self.stopping.wait()
        self.leaving = True

    async def check_fitness(self) -> None:
        """Run the checks that the file registered, and none of the package's own. Raises what they raise."""
        module = sys.modules.get("runpod.serverless.modules.rp_fitness")
        for check in list(getattr(module, "_fitness_checks", ())):
            found = check()
            if inspect.isawaitable(found):
                await found

    def ask_slots(self) -> None:
        """How many jobs may run at once, by the file's `concurrency_modifier`."""
        modifier = self.config.get("concurrency_modifier")
        if modifier is None:
            return
        try:
            self.slots = max(1, int(modifier(self.slots)))
        except Exception:  # noqa: BLE001 - a modifier that fails must not fail jobs
            print(f"concurrency_modifier failed, and {self.slots} jobs at once remain:", file=sys.stderr)
            traceback.print_exc()

    # -- the connection

    def send(self, head: dict[str, Any], body: bytes = b"", job: Job | None = None, last: bool = False) -> None:
        """Send a frame, for `job` unless its last one was sent."""
        encoded = json.dumps(head).encode()
        frame = FRAME.pack(len(encoded), len(body)) + encoded + body
        with self.lock:
            if job is not None:
                if job.ended:
                    return
                job.ended = last
            try:
                self.connection.sendall(frame)
            except OSError:
                self.server_is_gone()

    def receive(self) -> None:
        """Take what the socket has, and do what it says."""
        try:
            data = self.connection.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.server_is_gone()
        self.received += data
        while len(self.received) >= FRAME.size:
            head_size, body_size = FRAME.unpack_from(self.received)
            start = FRAME.size + head_size
            end = start + body_size
            if len(self.received) < end:
                break
            head, body = json.loads(self.received[FRAME.size : start]), bytes(self.received[start:end])
            del self.received[:end]
            self.obey(head, body)

    def server_is_gone(self) -> NoReturn:
        """Nobody is left to work for: end, with everything that was started here."""
        os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def obey(self, head: dict[str, Any], body: bytes) -> None:
        what = head["do"]
        if what == "run":
            self.run(head, body)
        elif what == "stop":
            self.stopping.set()
        else:
            job = self.jobs.get(head["job"])
            if job is None:
                return  # it has ended meanwhile
            if what == "more":
                job.room += head["chunks"]
                job.more.set()
            else:
                self.cancel(job)

    # -- jobs

    def run(self, head: dict[str, Any], body: bytes) -> None:
        job = Job(head["job"], {})
        self.jobs[job.number] = job
        try:
            given = json.loads(body[: head["input"]])
            passed = json.loads(body[head["input"] :])
        except (ValueError, RecursionError) as error:
            self.end_failed(job, readable(f"input is not JSON: {error}"), kind="INVALID")
            return
        asked = {"requestId": head["request_id"]} if "request_id" in head else {}
        job.given = {**passed, "id": head["id"], "input": given, **asked}
        job.task = asyncio.get_running_loop().create_task(self.work(job))

    def cancel(self, job: Job) -> None:
        job.stopped = True
        if job.task is not None:
            job.task.cancel()
        if not job.began:  # then its task never will
            self.end_failed(job, "cancelled")

    async def work(self, job: Job) -> None:
        """Call the handler and send what becomes of it."""
        RUNNING.set(job.number)
        job.began = True
        self.send({"is": "began", "job": job.number, "yields": self.yields}, job=job)
        generator = False
        try:
            value = self.handler(job.given)
            if inspect.isawaitable(value):
                if not self.yields:
                    self.send({"is": "began", "job": job.number, "yields": True}, job=job)
                value = await value
            refresh = False
            if inspect.isgenerator(value) or inspect.isasyncgen(value):
                if not self.yields:
                    self.send({"is": "began", "job": job.number, "yields": True}, job=job)
                generator = True
                body = await self.stream(job, value)
            else:
                value, refresh = settle(value)
                body = self.encode(value, "result")
        except JobError as error:
            self.end_failed(job, readable(str(error)), refresh=error.refresh)
        except asyncio.CancelledError as error:
            if self.leaving:
                raise
            self.end_failed(job, "cancelled" if job.stopped else self.error_text(error, generator), logged=True)
        except (SystemExit, KeyboardInterrupt):
            self.leaving = True  # the process ends now, with all that runs in it
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises fails this job alone
            self.end_failed(job, self.error_text(error, generator), logged=True)
        else:
            self.end(job, {"is": "done", "refresh": refresh}, body)

    async def stream(self, job: Job, values: Any) -> bytes:
        """Send what a generator yields, as fast as it is read. The result: all of it if that was asked for, else []."""
        aggregate = bool(self.config.get("return_aggregate_stream"))
        total = 2
        chunks = []
        try:
            while True:
                while job.room <= 0:
                    job.more.clear()
                    await job.more.wait()
                try:
                    value = next(values) if inspect.isgenerator(values) else await values.__anext__()
                except (StopIteration, StopAsyncIteration):
                    break
                if isinstance(value, dict) and value.get("error"):
                    raise JobError(as_text(value["error"]))
                chunk = self.encode(value, "chunk")
                if aggregate:
                    total += len(chunk) + 1
                    self.check_size(total, "result")
                    chunks.append(chunk)
                job.room -= 1
                self.send({"is": "chunk", "job": job.number}, chunk, job)
                await asyncio.sleep(0)  # so that others run, and this can be cancelled
        finally:
            if inspect.isgenerator(values):
                values.close()
            else:
                await values.aclose()
        return b"[" + b",".join(chunks) + b"]"

    def progress(self, job: Any, progress: Any) -> None:
        """What a handler calls as `runpod.serverless.progress_update`. Dropped when the job has ended."""
        running = list(self.jobs.values())
        found = [known for known in running if known.given is job]
        if not found and isinstance(job, dict):
            found = [known for known in running if known.given.get("id") == job.get("id")]
        if not found:
            return
        try:
            body = self.encode(progress, "progress report")
        except JobError as error:
            print(error, file=sys.stderr)
            return
        self.send({"is": "progress", "job": found[-1].number}, body, found[-1])

    def end_failed(
        self, job: Job, text: str, kind: str = "INTERNAL", logged: bool = False, refresh: bool = False
    ) -> None:
        head = {"is": "error", "refresh": refresh, "kind": kind, "logged": logged}
        self.end(job, head, text.encode())

    def end(self, job: Job, head: dict[str, Any], body: bytes) -> None:
        del self.jobs[job.number]
        self.ask_slots()
        head["refresh"] = bool(head["refresh"] or self.config.get("refresh_worker"))
        self.send({**head, "job": job.number, "slots": self.slots}, body, job, last=True)

    def encode(self, value: Any, what: str) -> bytes:
        """The value as JSON. Raises JobError where JSON cannot hold it, or it is too large."""
        try:
            body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise JobError(f"the handler's {what} cannot be written as JSON: {error}") from error
        self.check_size(len(body), what)
        return body

    def check_size(self, size: int, what: str) -> None:
        if size > self.most_bytes:
            raise JobError(f"the handler's {what} has {size} bytes, over the limit of {self.most_bytes}")

    def error_text(self, error: BaseException, generator: bool) -> str:
        """How the job platform words an exception of a handler: a JSON text, or for a generator a plain one."""
        message = readable(str(error))
        trace = traceback_of(error)
        if generator:
            return f"handler: {message}\ntraceback: {trace}"
        facts = {
            "error_type": str(type(error)),
            "error_message": message,
            "error_traceback": trace,
            "hostname": os.environ.get("RUNPOD_POD_HOSTNAME") or socket.gethostname(),
            "worker_id": os.environ.get("RUNPOD_POD_ID", "unknown"),
            "runpod_version": self.version,
        }
        return json.dumps(facts)


def kind_of(handler: Any) -> str:
    """What a handler is, as far as can be told without calling it."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    forms = (handler, getattr(handler, "__call__", None))  # noqa: B004 - its method, if it is an object
    for name, test in (
        ("async generator", inspect.isasyncgenfunction),
        ("generator", inspect.isgeneratorfunction),
        ("async", inspect.iscoroutinefunction),
    ):
        if any(map(test, forms)):
            return name
    return "plain"


def settle(value: Any) -> tuple[Any, bool]:
    """A handler's result without the keys that mean something, and whether to restart the worker.

    Raises JobError for a result that says so.
    """
    if not isinstance(value, dict):
        return value, False
    rest = dict(value)
    refresh = bool(rest.pop("refresh_worker", False))
    if error := rest.pop("error", None):
        raise JobError(as_text(error), refresh)
    return rest, refresh


def traceback_of(error: BaseException) -> str:
    """The traceback of a file's own exception, from its own frames on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return readable("".join(traceback.format_exception(type(error), error, frames)))


def readable(text: str) -> str:
    """An error's text that UTF-8 can hold, and no longer than anybody would read."""
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]}... ({len(text)} characters)"
    return text.encode(errors="backslashreplace").decode()


def as_text(error: Any) -> str:
    """An error that is no string is its JSON text, or what Python prints of it."""
    if isinstance(error, str):
        return error
    try:
        return json.dumps(error, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return repr(error)


if __name__ == "__main__":
    sys.exit(main())
