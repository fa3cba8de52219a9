"""One instance of a handler model: a process that runs the file, and the thread that watches over it."""

import contextlib
import functools
import itertools
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TypeAlias

from msgspec import Struct
from penstock.access import names, plain
from penstock.errors import Kind, ServingError, WorkerLostError
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import PLENTY, Cancelled, Credit, ModelFiles, Reply
from penstock.tensor import BYTES, Tensor, objects

from penstock_runtimes.handler.options import Options
from penstock_runtimes.handler.process import Command, Line, Message, Poller, Process

logger = logging.getLogger(__name__)

INPUT, OUTPUT = "input", "output"
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 30.0  # before a process that failed is replaced
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ACKNOWLEDGED = 8  # chunks at a time; the worker stops when twice as many are unread


def delay_s(failures: int) -> float:
    """How long to wait before the next start, after so many processes in a row that did no work: twice as long each."""
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(failures - 1, 30))


class Job(Struct, eq=False):
    """A request that was started. Owned by the watching thread; others only read `ended`."""

    number: int
    request: InferRequest
    reply: Reply
    cancelled: Cancelled
    began: bool = False  # its handler was called
    yields: bool = False  # it can be cancelled without killing the process
    ended: bool = False  # its final reply was given
    unread: int = 0  # chunks that were replied and not acknowledged
    blocked: bool = False  # a thread waits for room
    newest: Message | None = None  # progress that has no room yet

    @property
    def id(self) -> str:
        return self.request.job.id if self.request.job else self.request.id


Note: TypeAlias = Callable[[], None]  # something that the watching thread shall do


class HandlerInstance:
    """Runs requests in its process, and replaces that when it ends. A request's answer is given by the watching thread.

    `_ready`, `_jobs`, `_held` and `_closing` are owned by the lock; everything else by the watching thread, which is
    also the one that starts processes: the kernel ends them with it.
    """

    streams = True
    inputs_ready_ns = 0
    outputs_came_ns = 0

    def __init__(self, files: ModelFiles, device: str, command: Command, options: Options) -> None:
        """Returns when the file has called `start`. Raises ServingError if it never does."""
        self.device = device
        self._slots = 1  # as the file's concurrency_modifier says
        self.generator = False  # whether the handler is one
        self.kind = ""  # of the handler: plain, async, generator, async generator
        self.starts = 0  # processes that were started
        self._files = files
        self._command = command
        self._options = options
        self._version = str(files.version)
        self._output = logging.getLogger(f"penstock.model.{files.model}")
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._ready: Process | None = None  # takes requests
        self._jobs: dict[int, Job] = {}  # that the current process has
        self._held: deque[Job] = deque()  # that wait for the next process
        self._closing = False
        self._notes: deque[Note] = deque()
        self._poller = Poller()
        self._process: Process | None = None  # that runs, whether it takes requests or not
        self._deadlines: dict[int | str, float] = {}  # when to kill the process: for a job by number, or for a reason
        self._sacrificed = ""  # why it was killed, or is to end; "": its end would be a crash
        self._problem = ""  # why its file failed
        self._started = False  # its file has called `start`
        self._worked = False  # it has done a job
        self._refreshing = False  # it is to be replaced when nothing runs
        self._failure: ServingError | None = self._error("could not be watched", Kind.INTERNAL)  # of the load
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"handler-{files.model}", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._failure:
            self._thread.join()
            raise self._failure

    def execute(
        self,
        batch: Sequence[InferRequest],  # noqa: ARG002
        unwanted: Cancelled | None = None,  # noqa: ARG002
    ) -> Sequence[InferResponse | ServingError]:
        """Never called: see `streams`."""
        raise ServingError(Kind.UNSUPPORTED, f"model '{self._files.model}' runs in a process; use start")

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        job = Job(next(self._numbers), request, reply, cancelled)
        with self._lock:
            process = self._ready
            if process is not None:
                self._jobs[job.number] = job
            elif not self._closing:
                self._held.append(job)
            else:
                raise ServingError(Kind.UNAVAILABLE, f"model '{self._files.model}' is being unloaded")
        if process is not None:
            _send_job(process, job)
        cancelled.watch(lambda: None if job.ended else self._tell(functools.partial(self._cancel, job)))

    @property
    def max_in_flight(self) -> int:
        """How many requests its process runs at a time; 0 while that is replaced."""
        return self._slots if self._ready is not None else 0

    @property
    def pid(self) -> int | None:
        """The number of the process that takes requests; None while it is replaced."""
        process = self._ready
        return process.pid if process else None

    def memory_bytes(self) -> int:
        """What its process has resident."""
        pid = self.pid
        try:
            pages = Path(f"/proc/{pid}/statm").read_text().split()[1] if pid else "0"
        except OSError:  # it has ended meanwhile
            return 0
        return int(pages) * PAGE_BYTES

    def close(self) -> None:
        """Let the process end, by itself if it does so in time. What still runs is answered as lost."""
        with self._lock:
            self._closing = True
        self._poller.ring()
        self._thread.join()

    # -- the watching thread

    def _tell(self, note: Note) -> None:
        """Have the watching thread do something. Any thread; never blocks."""
        self._notes.append(note)
        self._poller.ring()

    def _watch(self) -> None:
        failures = 0
        with self._poller:
            try:
                while not self._closing:
                    failure = self._run_process()
                    if not self._opened.is_set():
                        self._failure = failure
                        break
                    failures = 0 if failure is None else 1 if self._worked else failures + 1
                    if failure and not self._closing:
                        wait_s = delay_s(failures)
                        logger.error("%s; its process is replaced in %.1f s", failure, wait_s)
                        self._rest(wait_s)
            finally:
                with self._lock:
                    self._closing = True
                    self._held.extendleft(self._jobs.values())  # there are none, unless this thread has failed
                    self._jobs.clear()
                self._lose_held(f"model '{self._files.model}' is being unloaded")
                self._opened.set()

    def _rest(self, wait_s: float) -> None:
        until_s = monotonic() + wait_s
        while not self._closing and (left_s := until_s - monotonic()) > 0:
            self._poller.wait(left_s)
            self._do_notes()

    def _run_process(self) -> ServingError | None:
        """Start a process and see to it until it has ended. Returns why that was a failure; None where it was not."""
        self._sacrificed = self._problem = ""
        self._started = self._worked = self._refreshing = False
        self._deadlines = {"start": monotonic() + self._options.start_timeout_s}
        self.starts += 1
        try:
            process = self._process = Process(self._command, self._poller)
        except OSError as error:
            failure = self._error(f"cannot be started with {self._command.arguments[0]}: {error}")
            self._lose_held(failure.message)
            return failure
        with contextlib.closing(process):
            while not process.ended:
                self._check_time(process)
                process.arrange()
                self._poller.wait(self._left_s())
                self._take_in(process)
                self._do_notes()
                if process.cut and "cut" not in self._deadlines:
                    self._deadlines["cut"] = monotonic() + self._options.cancel_grace_s
                if self._closing and not self._sacrificed:
                    self._end(process, "the model is being unloaded")
            self._take_in(process)
        return self._ended(process)

    def _ended(self, process: Process) -> ServingError | None:
        """Answer what ran in a process that has ended. Returns why that was a failure."""
        with self._lock:
            self._process = self._ready = None
            lost = list(self._jobs.values())
            self._jobs.clear()
        words = f"; its last words: {process.last_words}" if process.last_words else ""
        failure = None
        if not self._sacrificed and self._started:
            failure = self._error(f"ended with {process.status}{words}", Kind.UNAVAILABLE)
        elif not self._sacrificed:
            before = f"ended with {process.status} before it called runpod.serverless.start{words}"
            failure = self._error(self._problem or before)
        for job in lost:
            if failure and job.began:
                text = f"worker lost: the process that ran it ended with {process.status}{words}"
                self._lose(job, text, blamed=True)
            else:
                self._lose(job, f"worker lost: {self._sacrificed or failure}", blamed=False)
        if failure and not self._started:
            self._lose_held(failure.message)
        if self._sacrificed and not (self._refreshing or self._closing):
            logger.info("model '%s': its process was ended: %s", self._files.model, self._sacrificed)
        return failure

    def _lose_held(self, text: str) -> None:
        """There is no process, and none will be for a while: let what waits be tried elsewhere."""
        with self._lock:
            held = list(self._held)
            self._held.clear()
        for job in held:
            self._lose(job, text, blamed=False)

    def _error(self, what: str, kind: Kind = Kind.INVALID) -> ServingError:
        return ServingError(kind, f"model '{self._files.model}': its handler file {what}")

    def _do_notes(self) -> None:
        while self._notes:
            self._notes.popleft()()

    def _left_s(self) -> float | None:
        """How long nothing need be done; None: for ever."""
        return max(0.0, min(self._deadlines.values()) - monotonic()) if self._deadlines else None

    def _check_time(self, process: Process) -> None:
        now_s = monotonic()
        for key, deadline_s in list(self._deadlines.items()):
            if now_s < deadline_s:
                continue
            self._deadlines.clear()
            if key == "start":
                self._problem = f"did not call runpod.serverless.start within {self._options.start_timeout_s:g} s"
                self._kill(process, "")
            elif isinstance(key, int):
                grace = f"{self._options.cancel_grace_s:g} s"
                self._kill(process, f"a request that was cancelled did not end within {grace}")
            else:
                self._kill(process, self._sacrificed)
            return

    def _kill(self, process: Process, reason: str) -> None:
        """End the process at once for the sake of something else than what it runs; "" where it is at fault itself."""
        with self._lock:
            self._ready = None
        self._sacrificed = reason
        process.kill()

    def _end(self, process: Process, reason: str) -> None:
        """Let the process end in its own time, where it has come so far as to listen."""
        with self._lock:
            self._ready = None
        self._sacrificed = reason
        if self._started:
            process.send({"do": "stop"})
            self._deadlines["stop"] = monotonic() + self._options.cancel_grace_s
        else:
            process.kill()

    # -- messages

    def _take_in(self, process: Process) -> None:
        """Handle what the process has said."""
        for event in process.events():
            if isinstance(event, Line):
                self._log(event)
            elif event.head["is"] == "failed":
                self._failed(event)
            elif event.head["is"] == "ready":
                self._begin(process, event)
            elif (job := self._jobs.get(event.head["job"])) is not None:
                MESSAGES[event.head["is"]](self, process, job, event)

    def _failed(self, message: Message) -> None:
        text = f"failed: {message.head['error']}"
        if "ModuleNotFoundError" in text and (self._files.directory / "requirements.txt").exists():
            text += (
                " (there is a requirements.txt: install it with `pip install --target site -r requirements.txt` and set"
                " the parameter python_path to site, or set the parameter python to an interpreter that has it)"
            )
        if message.body:
            logger.error("model '%s': its handler file failed\n%s", self._files.model, message.body.decode().rstrip())
        self._problem = text

    def _begin(self, process: Process, message: Message) -> None:
        """The file has called `start`: from now on the process takes requests."""
        if self._deadlines.pop("start", None) is None or self._sacrificed:
            return  # too late: it is being killed
        self._started = True
        self.kind = message.head["kind"]
        self.generator = message.head["generator"]
        self._slots = message.head["slots"]
        with self._lock:
            self._ready = process
            held = list(self._held)
            self._held.clear()
            self._jobs.update((job.number, job) for job in held)
        for job in held:
            _send_job(process, job)
        self._failure = None
        self._opened.set()

    def _began(self, process: Process, job: Job, message: Message) -> None:
        job.began = True
        job.yields = message.head["yields"]
        if job.cancelled:
            self._interrupt(process, job)

    def _chunk(self, process: Process, job: Job, message: Message) -> None:
        credit = self._answer(job, self._response(job, message.body), final=False)
        job.unread += 1
        if job.unread >= ACKNOWLEDGED and not job.blocked:
            self._acknowledge(process, job, credit)

    def _acknowledge(self, process: Process, job: Job, credit: Credit) -> None:
        """Let the worker send more, when there is room for it."""
        if credit.left > 0:
            process.send({"do": "more", "job": job.number, "chunks": job.unread})
            job.unread = 0
        else:
            self._block(process, job, credit)

    def _block(self, process: Process, job: Job, credit: Credit) -> None:
        """Wait for room on another thread: this one has other requests to see to."""
        job.blocked = True

        def resume() -> None:
            job.blocked = False
            if not job.ended:
                if job.newest is not None:
                    newest, job.newest = job.newest, None
                    self._progress(process, job, newest)
                if job.unread and not job.blocked:
                    self._acknowledge(process, job, credit)

        def wait() -> None:
            credit.wait()
            self._tell(resume)

        threading.Thread(target=wait, name=f"handler-{self._files.model}-room", daemon=True).start()

    def _progress(self, process: Process, job: Job, message: Message) -> None:
        """Reports that nobody has read yet give way to the newest."""
        if job.blocked:
            job.newest = message
            return
        credit = self._answer(job, self._response(job, message.body), final=False, partial=True)
        if credit.left <= 0:
            self._block(process, job, credit)

    def _done(self, process: Process, job: Job, message: Message) -> None:
        response = self._response(job, message.body)
        if self.generator and message.body == b"[]":
            response.outputs.clear()  # its answers were what it yielded, and it was not asked for all of them
        self._finish(process, job, message, response)

    def _erred(self, process: Process, job: Job, message: Message) -> None:
        text = message.body.decode()
        if message.head["logged"] and not job.cancelled:
            id = plain(job.id or "<id_unknown>")
            logger.error("model '%s' failed on request %s: %s", self._files.model, id, text, extra=job.request.names)
        self._finish(process, job, message, ServingError(Kind[message.head["kind"]], text))

    def _finish(self, process: Process, job: Job, message: Message, result: InferResponse | ServingError) -> None:
        """The job is over, one way or another; and before that is said, what changes for the next ones does."""
        self._worked = True
        self._deadlines.pop(job.number, None)
        self._slots = message.head["slots"]
        with self._lock:
            del self._jobs[job.number]
            if message.head["refresh"]:
                self._refreshing = True
                self._ready = None
            empty = not self._jobs
        self._answer(job, result)
        if self._refreshing and empty and not self._sacrificed:
            self._end(process, "the handler asked for a new one")

    def _response(self, job: Job, body: bytes) -> InferResponse:
        request = job.request
        return InferResponse(request.model, self._version, request.id, [Tensor(OUTPUT, BYTES, objects([body], (1,)))])

    # -- cancelling and losing

    def _cancel(self, job: Job) -> None:
        """Nobody wants the answer any more: stop the work."""
        if job.ended:
            return
        with self._lock:
            held = job in self._held
            if held:
                self._held.remove(job)
            running = job.number in self._jobs
        process = self._process if running else None
        if held or not job.began:
            if process:
                process.send({"do": "cancel", "job": job.number})
            self._answer(job, _reason(job))
        elif process:
            self._interrupt(process, job)

    def _interrupt(self, process: Process, job: Job) -> None:
        """End a request whose handler was called: with grace where it can hear of it, else with its process."""
        if job.yields:
            process.send({"do": "cancel", "job": job.number})
            self._deadlines[job.number] = monotonic() + self._options.cancel_grace_s
        else:
            self._kill(process, "a request was cancelled, and its handler cannot be interrupted")

    def _lose(self, job: Job, text: str, blamed: bool) -> None:
        self._answer(job, _reason(job) if job.cancelled else WorkerLostError(text, blamed))

    def _answer(
        self, job: Job, result: InferResponse | ServingError, final: bool = True, partial: bool = False
    ) -> Credit:
        """Reply, unless the final reply was given. What comes of a request that is cancelled is its reason."""
        if job.ended or (job.cancelled and not final):
            return PLENTY
        job.ended = final
        try:
            return job.reply(_reason(job) if job.cancelled else result, final, partial)
        except Exception as error:
            # As with every runtime: it is its receiver's loss, and must not cost other requests their process.
            text = "model '%s': a reply to request %s failed"
            logger.error(text, self._files.model, plain(job.id), exc_info=error, extra=job.request.names)
            return PLENTY

    def _log(self, line: Line) -> None:
        """Output goes to the log of the model, under the names of the request that printed it."""
        job = self._jobs.get(line.job)
        if job is None and not line.job:
            with self._lock:
                running = [known for known in self._jobs.values() if known.began]
            job = running[0] if len(running) == 1 else None
        self._output.info("%s", line.text, extra=job.request.names if job else names(""))


MESSAGES: dict[str, Callable[[HandlerInstance, Process, Job, Message], None]] = {
    "began": HandlerInstance._began,
    "chunk": HandlerInstance._chunk,
    "progress": HandlerInstance._progress,
    "done": HandlerInstance._done,
    "error": HandlerInstance._erred,
}


def _reason(job: Job) -> ServingError:
    assert job.cancelled.reason is not None
    return job.cancelled.reason


def _send_job(process: Process, job: Job) -> None:
    """Send a request to the worker. An answer through another door has an id of its own."""
    request = job.request
    given: bytes = request.inputs[INPUT].array.flat[0]
    passed = request.job.passed if request.job else b"{}"
    head = {"do": "run", "job": job.number, "id": job.id or str(uuid.uuid4()), "input": len(given)}
    if request.job and request.job.request_id:
        head["request_id"] = request.job.request_id
    process.send(head, given, passed)
