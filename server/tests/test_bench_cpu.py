"""CPU time and listeners out of /proc: a made-up one, and this process's own."""

import os
import socket
import threading
from pathlib import Path

import pytest
from penstock.bench import cpu
from penstock.bench.cpu import TICK_NS, Stat


def stat_line(pid: int, name: str = "server", parent: int = 1, ticks: tuple[int, int, int, int] = (0, 0, 0, 0)) -> str:
    times = " ".join(map(str, ticks))
    return f"{pid} ({name}) S {parent} {pid} {pid} 0 -1 4194560 900 0 0 0 {times} 20 0 3 0 1234 99 5 1844674407\n"


def add_process(
    proc: Path,
    pid: int,
    *,
    parent: int = 1,
    ticks: tuple[int, int, int, int] = (0, 0, 0, 0),
    threads_ns: tuple[int, ...] = (),
    sockets: tuple[str, ...] = (),
) -> None:
    home = proc / str(pid)
    (home / "fd").mkdir(parents=True)
    (home / "stat").write_text(stat_line(pid, parent=parent, ticks=ticks))
    for number, used_ns in enumerate(threads_ns):
        thread = home / "task" / str(pid + number)
        thread.mkdir(parents=True)
        (thread / "schedstat").write_text(f"{used_ns} 5000 12\n")
    (home / "fd" / "0").symlink_to("/dev/null")
    for number, inode in enumerate(sockets):
        (home / "fd" / str(number + 3)).symlink_to(f"socket:[{inode}]")


def test_a_process_may_be_called_anything() -> None:
    line = stat_line(12, name="a) R 3 (b", parent=7, ticks=(100, 20, 3, 4))
    assert cpu.parse_stat(line) == Stat("a) R 3 (b", 7, 120 * TICK_NS, 7 * TICK_NS)


def test_used_time_is_that_of_threads_children_and_children_that_have_ended(tmp_path: Path) -> None:
    add_process(tmp_path, 10, ticks=(0, 1, 2, 3), threads_ns=(TICK_NS * 3 + 7, TICK_NS))
    add_process(tmp_path, 11, parent=10, threads_ns=(1000,))
    add_process(tmp_path, 12, parent=11, threads_ns=(200,))
    add_process(tmp_path, 13, parent=1, threads_ns=(99_999,))
    assert cpu.used_ns([10], tmp_path) == TICK_NS * 4 + 7 + TICK_NS * 5 + 1000 + 200
    assert cpu.used_ns([10, 11], tmp_path) == cpu.used_ns([10], tmp_path)
    assert cpu.used_ns([12, 13], tmp_path) == 200 + 99_999


def test_ticks_count_where_they_tell_more_than_living_threads(tmp_path: Path) -> None:
    add_process(tmp_path, 10, ticks=(30, 5, 0, 0), threads_ns=(TICK_NS,))  # another thread has ended
    add_process(tmp_path, 20, ticks=(2, 2, 0, 0))  # a kernel without schedstat
    assert cpu.used_ns([10], tmp_path) == TICK_NS * 35
    assert cpu.used_ns([20], tmp_path) == TICK_NS * 4


def test_a_process_that_is_gone_has_no_time(tmp_path: Path) -> None:
    add_process(tmp_path, 10)
    assert cpu.used_ns([11], tmp_path) is None
    assert cpu.used_ns([], tmp_path) == 0
    assert (cpu.name(10, tmp_path), cpu.name(11, tmp_path)) == ("server", "")


TABLE_HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def table_line(local: str, inode: str, state: str = "0A") -> str:
    return (
        f"   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100 0\n"
    )


@pytest.mark.parametrize(
    ("tcp", "tcp6"),
    [
        ("0100007F:1F40", ""),  # 127.0.0.1:8000
        ("00000000:1F40", ""),
        ("", "00000000000000000000000000000000:1F40"),
        ("", "0000000000000000FFFF00000100007F:1F40"),  # ::ffff:127.0.0.1
    ],
)
def test_who_listens_is_found_by_the_sockets_inode(tmp_path: Path, tcp: str, tcp6: str) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(TABLE_HEAD + (table_line(tcp, "501") if tcp else ""))
    (tmp_path / "net" / "tcp6").write_text(TABLE_HEAD + (table_line(tcp6, "501") if tcp6 else ""))
    add_process(tmp_path, 10, sockets=("500", "501"))
    add_process(tmp_path, 11, parent=10, sockets=("501",))  # a child has it too
    add_process(tmp_path, 12, sockets=("502",))
    assert cpu.listeners("127.0.0.1", 8000, tmp_path) == (10,)


def test_other_ports_addresses_states_and_machines_are_not_meant(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    lines = [
        table_line("0100007F:1F41", "501"),
        table_line("0200000A:1F40", "501"),  # 10.0.0.2
        table_line("0100007F:1F40", "501", state="01"),
    ]
    (tmp_path / "net" / "tcp").write_text(TABLE_HEAD + "".join(lines))
    add_process(tmp_path, 10, sockets=("501",))
    assert cpu.listeners("127.0.0.1", 8000, tmp_path) == ()
    assert cpu.listeners("192.0.2.1", 8001, tmp_path) == ()  # an address for documentation: nobody has it


def test_this_process_is_found_by_its_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert cpu.listeners("127.0.0.1", listener.getsockname()[1]) == (os.getpid(),)


def test_this_process_uses_time_on_any_thread() -> None:
    before_ns = cpu.used_ns([os.getpid()])
    worker = threading.Thread(target=lambda: sum(range(3_000_000)))
    worker.start()
    worker.join()
    after_ns = cpu.used_ns([os.getpid()])
    assert before_ns is not None
    assert after_ns is not None
    assert after_ns > before_ns
