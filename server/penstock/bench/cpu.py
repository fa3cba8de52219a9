"""CPU time of a process with its threads and children, and which processes listen on a port: all from Linux's /proc."""

import ipaddress
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says of a process. Its times are whole ticks."""

    name: str
    parent: int
    own_ns: int  # all its threads, those that have ended too
    children_ns: int  # children that have ended and were waited for


def parse_stat(text: str) -> Stat:
    """The line of /proc/PID/stat. The name stands in parentheses and may hold any character."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()  # the first is field 3 of proc(5)
    user, system, children_user, children_system = map(int, fields[11:15])
    return Stat(
        head.partition("(")[2], int(fields[1]), (user + system) * TICK_NS, (children_user + children_system) * TICK_NS
    )


def used_ns(roots: Iterable[int], proc: Path = PROC) -> int | None:
    """CPU time that processes, their threads and their descendants have used; None where one of `roots` is gone."""
    stats = dict(_stats(proc))
    family = set(roots)
    if not family <= stats.keys():
        return None
    grown = 0
    while grown < len(family):
        grown = len(family)
        family.update(pid for pid, stat in stats.items() if stat.parent in family)
    # schedstat counts nanoseconds, but of living threads alone; stat counts all, in whole ticks rounded down.
    return sum(max(stats[pid].own_ns, _threads_ns(proc / str(pid))) + stats[pid].children_ns for pid in family)


def name(pid: int, proc: Path = PROC) -> str:
    """The process's name; "" where there is none of this number."""
    try:
        return parse_stat((proc / str(pid) / "stat").read_text()).name
    except OSError:
        return ""


def listeners(host: str, port: int, proc: Path = PROC) -> tuple[int, ...]:
    """The processes that listen on a port of this machine, outermost ones only, ascending.

    None are found where `host` is another machine, or where they belong to another user.
    """
    addresses = _own_addresses(host, port)
    inodes = {
        inode
        for table in ("tcp", "tcp6")
        for address, inode in _listening(_read(proc / "net" / table), port)
        if address in addresses or (addresses and address.is_unspecified)
    }
    holders = {pid: stat for pid, stat in _stats(proc) if inodes & set(_sockets(proc / str(pid)))}
    return tuple(sorted(pid for pid, stat in holders.items() if stat.parent not in holders))


Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _own_addresses(host: str, port: int) -> set[Address]:
    """Those of `host` that are this machine's: a packet for one would leave from the very same address."""
    own = set()
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(address)  # of a datagram socket: this sends nothing
            except OSError:
                continue  # no way there, so it is not here
            source = ipaddress.ip_address(probe.getsockname()[0])
        wanted = ipaddress.ip_address(address[0])
        if wanted.is_loopback or source == wanted:
            own.add(wanted)
    return own


def _listening(table: str, port: int) -> Iterator[tuple[Address, str]]:
    """(address, inode) of each socket in /proc/net/tcp or tcp6 that listens on `port`."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        address, _, hex_port = fields[1].partition(":")
        if fields[3] == LISTENING and int(hex_port, 16) == port:
            yield _address(address), fields[9]


def _address(digits: str) -> Address:
    """An address as the kernel prints it: 32-bit words in hexadecimal, each in the machine's byte order."""
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return getattr(address, "ipv4_mapped", None) or address


def _stats(proc: Path) -> Iterator[tuple[int, Stat]]:
    for entry in os.listdir(proc):
        if entry.isdecimal() and (text := _read(proc / entry / "stat")):
            yield int(entry), parse_stat(text)


def _threads_ns(process: Path) -> int:
    return sum(int((_read(thread / "schedstat") or "0").split()[0]) for thread in _list(process / "task"))


def _sockets(process: Path) -> Iterator[str]:
    """Inodes of the sockets that a process has open."""
    for link in _list(process / "fd"):
        try:
            target = os.readlink(link)
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _read(path: Path) -> str:
    """The text of a file of /proc; "" where the process has ended or the kernel does not offer it."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _list(directory: Path) -> list[Path]:
    """The entries of a directory of /proc; none where the process has ended or is another user's."""
    try:
        return list(directory.iterdir())
    except OSError:
        return []
