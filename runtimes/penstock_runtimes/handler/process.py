"""A handler process as its owner sees it: frames to and from it, its output by lines, and how it ended.

A frame is two lengths, a head and a body: `<II`, JSON, bytes. `worker` holds the other end and lists the messages.
"""

import contextlib
import functools
import itertools
import os
import re
import selectors
import signal
import socket
import struct
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import orjson
from msgspec import Struct

FRAME = struct.Struct("<II")  # bytes of the head, bytes of the body
READ_BYTES = 1 << 18  # from the socket at a time
PIPE_BYTES = 1 << 16  # what a pipe holds: one read empties it
LONGEST_LINE = 8 << 10  # bytes of output; a longer line is cut into several
LAST_LINES = 200  # of standard error that are kept, of which so many tell why a process ended
LAST_WORDS = 5
FATAL = "Fatal Python error"  # the first line of what the interpreter prints when it is killed by a fault
SIGNALS = {int(number): number.name for number in signal.Signals}
MARK = re.compile(r"\x1e(\d+)\x1f")  # the worker marks lines that were printed in the course of a job

Happened: TypeAlias = Callable[[int], None]  # is told the selector's events


class Poller:
    """What one thread waits for: descriptors, and the bell that other threads ring. Only `ring` is for these."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # a closed bell's number may be another file's
        self._closed = False
        self.add(self._bell, selectors.EVENT_READ, lambda _events: self._silence())

    def __enter__(self) -> "Poller":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            self._selector.close()
            os.close(self._bell)

    def add(self, descriptor: int, events: int, happened: Happened) -> None:
        self._selector.register(descriptor, events, happened)

    def change(self, descriptor: int, events: int, happened: Happened) -> None:
        self._selector.modify(descriptor, events, happened)

    def remove(self, descriptor: int) -> None:
        self._selector.unregister(descriptor)

    def wait(self, timeout_s: float | None) -> None:
        """Make the calls of all that has happened; of nothing, when the time is over first."""
        for key, events in self._selector.select(timeout_s):
            key.data(events)

    def ring(self) -> None:
        """End the current or the next wait. Any thread, at any time."""
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._bell, 1)

    def _silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)


class Command(Struct, frozen=True):
    """How a process is started: with one more argument, the number of its end of the socket."""

    arguments: Sequence[str]
    directory: str
    environment: Mapping[str, str]


class Message(Struct, frozen=True):
    """A frame that came."""

    head: dict[str, Any]
    body: bytes


class Line(Struct, frozen=True):
    """Of output, without its end."""

    job: int  # the number of the job that printed it; 0 where that is not known
    text: str


class Process:
    """One process and what belongs to it. Owned by the thread that made it; `send` is for any thread.

    That thread must outlive the process, because the kernel ends the process with it. All descriptors are the poller's
    until `close`.
    """

    def __init__(self, command: Command, poller: Poller) -> None:
        """Raises OSError where it cannot be started."""
        self._poller = poller
        self._lock = threading.Lock()
        self._unsent: deque[memoryview] = deque()  # owned by the lock, like `_closed`
        self._closed = False
        self._writing = False  # the poller tells when the socket can be written to
        self._received = bytearray()
        self._events: deque[Message | Line] = deque()
        self._last_words: deque[str] = deque(maxlen=LAST_LINES)
        self.cut = False  # nothing more comes from its socket
        self.ended = False
        self.status = ""  # how it ended, such as `exit status 3` or `signal SIGSEGV`
        with contextlib.ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            self._socket = stack.enter_context(ours)
            self._popen = subprocess.Popen(
                [*command.arguments, str(theirs.fileno())],
                cwd=command.directory,
                env=command.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own, so that what it starts ends with it
                bufsize=0,
            )
            theirs.close()
            stack.callback(_abandon, self._popen)
            self._pidfd = os.pidfd_open(
                self._popen.pid
            )  # the socket's end says too little: what was forked may hold it
            stack.pop_all()
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self.pid = self._popen.pid
        self._socket.setblocking(False)
        self._outputs = [
            _Output(self._popen.stdout.fileno(), self._printed),
            _Output(self._popen.stderr.fileno(), self._complained),
        ]
        poller.add(self._socket.fileno(), selectors.EVENT_READ, self._on_socket)
        poller.add(self._pidfd, selectors.EVENT_READ, lambda _events: self._on_end())
        for output in self._outputs:
            os.set_blocking(output.descriptor, False)
            poller.add(output.descriptor, selectors.EVENT_READ, functools.partial(self._on_output, output))

    @property
    def last_words(self) -> str:
        """The last lines of standard error, or the first of a fault's report, in one; "" if there were none."""
        lines = list(self._last_words)
        faults = [number for number, line in enumerate(lines) if line.startswith(FATAL)]
        return " | ".join(lines[faults[-1] :][:LAST_WORDS] if faults else lines[-LAST_WORDS:])

    def events(self) -> list[Message | Line]:
        """All that has come since the last call. Lines that were printed before a message stand before it."""
        events = list(self._events)
        self._events.clear()
        return events

    def send(self, head: Mapping[str, object], *body: bytes) -> None:
        """Send a frame, as much as the socket takes now and the rest as it drains. Lost if the process has ended."""
        encoded = orjson.dumps(head)
        parts = (FRAME.pack(len(encoded), sum(map(len, body))), encoded, *body)
        with self._lock:
            if self._closed:
                return
            waiting = bool(self._unsent)
            self._unsent.extend(memoryview(part) for part in parts if part)
            if not waiting:
                self._flush()
                waiting = bool(self._unsent)
        if waiting:
            self._poller.ring()

    def arrange(self) -> None:
        """Tell the poller whether there is something to send. Before each wait."""
        writing = bool(self._unsent)
        if writing != self._writing and not self.cut:
            self._writing = writing
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
            self._poller.change(self._socket.fileno(), events, self._on_socket)

    def kill(self) -> None:
        """End it and all that it started, at once. Its end is still to come."""
        if not self.ended:  # its number is its own until it is waited for
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Release everything; kills a process that has not ended."""
        if not self.ended:
            self.kill()
            self._on_end()
        with self._lock:
            self._closed = True
            self._unsent.clear()
        self._cut_off()
        for output in self._outputs:
            self._end_output(output)
        self._socket.close()

    def _flush(self) -> None:
        """Send what can be. Holds the lock."""
        while self._unsent:
            try:
                sent = self._socket.sendmsg(list(itertools.islice(self._unsent, 16)))
            except BlockingIOError:
                return
            except OSError:  # the process has closed its end; that it ended, or is to be ended, is told by `cut`
                self._unsent.clear()
                return
            while sent:
                part = self._unsent.popleft()
                if sent < len(part):
                    self._unsent.appendleft(part[sent:])
                sent -= min(sent, len(part))

    def _on_socket(self, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            with self._lock:
                self._flush()
        if events & selectors.EVENT_READ and not self.cut:
            for output in self._outputs:  # first, so that what a job printed comes before its result
                self._on_output(output)
            self._receive()

    def _receive(self) -> bool:
        """Take what the socket has. False if there was nothing."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # reset, because the process ended with unread messages
            data = b""
        if not data:
            self._cut_off()
            return False
        self._received += data
        start, end = 0, len(self._received)
        while end - start >= FRAME.size:
            head_size, body_size = FRAME.unpack_from(self._received, start)
            body_start = start + FRAME.size + head_size
            if body_start + body_size > end:
                break
            with memoryview(self._received) as view:
                head = orjson.loads(view[start + FRAME.size : body_start])
                self._events.append(Message(head, bytes(view[body_start : body_start + body_size])))
            start = body_start + body_size
        del self._received[:start]
        return True

    def _cut_off(self) -> None:
        if not self.cut:
            self.cut = True
            self._poller.remove(self._socket.fileno())

    def _on_output(self, output: "_Output", _events: int = selectors.EVENT_READ) -> None:
        if not output.ended and not output.read():
            self._end_output(output)

    def _end_output(self, output: "_Output") -> None:
        if not output.ended:
            output.finish()
            self._poller.remove(output.descriptor)
            pipe = self._popen.stdout if output is self._outputs[0] else self._popen.stderr
            assert pipe is not None
            pipe.close()

    def _printed(self, text: str) -> None:
        found = MARK.match(text)
        text = text[found.end() :] if found else text
        shown = text.rstrip("\r").rpartition("\r")[2]  # of a progress bar, what it shows in the end
        self._events.append(Line(int(found[1]) if found else 0, shown))

    def _complained(self, text: str) -> None:
        self._printed(text)
        line = self._events[-1]
        assert isinstance(line, Line)
        if line.text.strip():
            self._last_words.append(line.text.strip()[:300])

    def _on_end(self) -> None:
        """It has ended. What it started is ended too, and what it said is taken in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # before `wait`: until then the number of its group is its own
        code = self._popen.wait()
        self.ended = True
        self.status = f"exit status {code}" if code >= 0 else f"signal {SIGNALS.get(-code, -code)}"
        self._poller.remove(self._pidfd)
        os.close(self._pidfd)
        for output in self._outputs:
            self._on_output(output)
        while not self.cut and self._receive():
            pass


def _abandon(popen: "subprocess.Popen[bytes]") -> None:
    """End a process that cannot be watched."""
    popen.kill()
    popen.communicate()


class _Output:
    """A pipe that is read by lines."""

    def __init__(self, descriptor: int, take: Callable[[str], None]) -> None:
        self.descriptor = descriptor
        self.ended = False
        self._take = take
        self._rest = b""

    def read(self) -> bool:
        """Take what is there. False when it has ended."""
        try:
            data = os.read(self.descriptor, PIPE_BYTES)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            for start in range(0, len(line) or 1, LONGEST_LINE):
                self._take(line[start : start + LONGEST_LINE].decode(errors="replace"))
        while len(self._rest) > LONGEST_LINE:
            self._take(self._rest[:LONGEST_LINE].decode(errors="replace"))
            self._rest = self._rest[LONGEST_LINE:]
        return bool(data)

    def finish(self) -> None:
        """Nothing more is read."""
        self.ended = True
        if self._rest:
            self._take(self._rest.decode(errors="replace"))
            self._rest = b""
