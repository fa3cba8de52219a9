"""A process seen from its owner: frames, lines, and how it ended. The processes are small programs of their own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock_runtimes.handler.process import FRAME, LAST_LINES, Command, Line, Message, Poller, Process

from .handlers import LIMIT_S

PRELUDE = """
import json, os, socket, struct, sys, time
wire = socket.socket(fileno=int(sys.argv[-1]))
def frame(head, body=b""):
    text = json.dumps(head).encode()
    return struct.pack("<II", len(text), len(body)) + text + body
def take():
    head, body = struct.unpack("<II", wire.recv(8, socket.MSG_WAITALL))
    return json.loads(wire.recv(head, socket.MSG_WAITALL)), wire.recv(body, socket.MSG_WAITALL)
"""


@contextmanager
def running(code: str) -> Iterator[tuple[Process, Poller]]:
    with Poller() as poller:
        process = Process(Command([sys.executable, "-u", "-c", PRELUDE + code], "/", {}), poller)
        try:
            yield process, poller
        finally:
            process.close()


def all_of(process: Process, poller: Poller) -> list[Message | Line]:
    """Everything that it says until it has ended."""
    events = []
    while not process.ended:
        process.arrange()
        poller.wait(LIMIT_S)
        events += process.events()
    return events + process.events()


def test_frames_come_whole_however_they_are_cut() -> None:
    code = """
data = frame({"n": 1}) + frame({"n": 2}, b"x" * 100000) + frame({"n": 3}, b"y")
for start in range(0, len(data), 7777):
    wire.sendall(data[start : start + 7777])
"""
    with running(code) as (process, poller):
        messages = [event for event in all_of(process, poller) if isinstance(event, Message)]
        assert [(message.head["n"], len(message.body)) for message in messages] == [(1, 0), (2, 100000), (3, 1)]
        assert process.status == "exit status 0"


def test_what_does_not_fit_in_the_socket_is_sent_as_it_drains_and_in_order() -> None:
    code = """
time.sleep(0.05)
for _ in range(3):
    head, body = take()
    wire.sendall(frame({"n": head["n"], "size": len(body), "ends": body[-1:].decode()}))
"""
    with running(code) as (process, poller):
        for number in range(3):
            process.send({"n": number}, b"x" * 3_000_000, str(number).encode())
        heads = [event.head for event in all_of(process, poller) if isinstance(event, Message)]
        assert heads == [{"n": number, "size": 3_000_001, "ends": str(number)} for number in range(3)]


def test_lines_stand_before_the_message_that_follows_them() -> None:
    code = """
print("one")
print("\\x1e7\\x1ftwo", file=sys.stderr)
wire.sendall(frame({"n": 1}))
time.sleep(0.05)
print("three", end="")
"""
    with running(code) as (process, poller):
        events = all_of(process, poller)
        assert events == [Line(0, "one"), Line(7, "two"), Message({"n": 1}, b""), Line(0, "three")]
        assert process.last_words == "two"


def test_a_process_is_told_by_its_end_though_others_hold_its_pipes() -> None:
    code = """
if os.fork() == 0:
    os.setsid()
    time.sleep(5)
    os._exit(0)
os._exit(9)
"""
    with running(code) as (process, poller):
        all_of(process, poller)
        assert process.status == "exit status 9"


def test_the_last_words_are_the_last_lines_or_the_head_of_a_fault() -> None:
    many = f"for n in range({LAST_LINES * 2}): print(n, file=sys.stderr)\n"
    with running(many) as (process, poller):
        all_of(process, poller)
        last = LAST_LINES * 2
        assert process.last_words == " | ".join(str(number) for number in range(last - 5, last))
    fault = "print('Fatal Python error: Aborted', file=sys.stderr)\n" + "print('x', file=sys.stderr)\n" * 9
    with running(fault) as (process, poller):
        all_of(process, poller)
        assert process.last_words == "Fatal Python error: Aborted | x | x | x | x"


def test_nothing_is_sent_to_a_process_that_has_ended() -> None:
    with running("") as (process, poller):
        all_of(process, poller)
        process.send({"n": 1}, b"x" * 10_000_000)
    process.send({"n": 2})
    process.kill()
    poller.ring()  # is for any time, even afterwards


def test_a_program_that_is_not_there_leaves_nothing_open() -> None:
    import os

    import pytest

    before = len(os.listdir("/proc/self/fd"))
    with Poller() as poller, pytest.raises(FileNotFoundError):
        Process(Command([str(Path("/nowhere/python"))], "/", {}), poller)
    assert len(os.listdir("/proc/self/fd")) == before
    assert FRAME.size == 8
