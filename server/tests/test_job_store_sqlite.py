"""What is special to jobs in an SQLite file: the disk, the group commit, the plans of its queries."""

import asyncio
import logging
import os
import re
import resource
import sqlite3
import stat
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from penstock.errors import Kind, ServingError
from penstock.job_api import store_sqlite
from penstock.job_api.store import Request, State
from penstock.job_api.store_sqlite import SqliteJobStore

T0 = 1_700_000_000_000
LEASE = 15_000


def request(id: str, input: bytes = b"{}") -> Request:
    return Request(id, "m", input, T0, 600_000, 300_000, 60_000)


def run(path: Path, scenario: Callable[[SqliteJobStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = await SqliteJobStore.open(str(path))
        try:
            await scenario(store)
        finally:
            await store.close()

    asyncio.run(main())


def refusal(path: Path) -> str:
    """Why this file cannot be opened."""
    with pytest.raises(ServingError) as refused:
        asyncio.run(SqliteJobStore.open(str(path)))
    assert refused.value.kind is Kind.UNAVAILABLE
    return refused.value.message


def commits(path: Path) -> int:
    """How many transactions lie in the write-ahead log: frames that say how large the file is after a commit."""
    log = Path(f"{path}-wal").read_bytes()
    (page,) = struct.unpack_from(">I", log, 8)
    salts = log[16:24]
    frames = range(32, len(log), 24 + page)
    return sum(1 for at in frames if log[at + 8 : at + 16] == salts and log[at + 4 : at + 8] != b"\0\0\0\0")


def test_an_answer_waits_for_the_disk(tmp_path: Path) -> None:
    async def scenario(store: SqliteJobStore) -> None:
        assert await store.pragma("journal_mode") == "wal"
        assert await store.pragma("synchronous") == 2, "FULL: the log is synced at every commit"

    run(tmp_path / "jobs.db", scenario)


def test_what_is_called_together_is_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    async def scenario(store: SqliteJobStore) -> None:
        await store.add(request("first"))
        before = commits(path)
        await asyncio.gather(*(store.add(request(f"j{n}")) for n in range(64)), store.cancel("first", "m", T0))
        assert commits(path) == before + 1
        await asyncio.gather(*(store.get(f"j{n}", "m", T0) for n in range(64)), store.drain("j1"), store.counts("m"))
        assert commits(path) == before + 1, "reading writes nothing"

    run(path, scenario)


def test_one_that_cannot_be_written_leaves_its_group_unharmed(tmp_path: Path) -> None:
    async def scenario(store: SqliteJobStore) -> None:
        too_long = Request("long", "m", b"{}", T0, 2**63, 1, 1)
        outcomes = await asyncio.gather(
            store.add(request("a")), store.add(too_long), store.add(request("b")), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [type(None), OverflowError, type(None)]
        assert [job.request.id for job in await store.claim({"m": 9}, "w", T0, LEASE)] == ["a", "b"]

    run(tmp_path / "jobs.db", scenario)


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_overcome(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    async def scenario(store: SqliteJobStore) -> None:
        await store.add(request("a"))
        with full_disk(1 << 20):
            with pytest.raises(ServingError, match=re.escape(f"job store {path}: disk I/O error")) as refused:
                await store.add(request("big", b"x" * (4 << 20)))
            assert refused.value.kind is Kind.UNAVAILABLE
            assert await store.get("a", "m", T0) is not None, "what is there can be read"
        await store.add(request("big", b"x" * (4 << 20)))
        assert [job.request.id for job in await store.claim({"m": 9}, "w", T0, LEASE)] == ["a", "big"]

    run(path, scenario)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    assert (
        refusal(tmp_path / "missing" / "jobs.db") == f"job store {tmp_path}/missing/jobs.db: No such file or directory"
    )
    path.write_bytes(b"not a database, and longer than its header would be: " * 40)
    assert refusal(path) == f"job store {path}: file is not a database"
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE songs (title TEXT)")
    before = path.read_bytes()
    assert refusal(path) == f"job store {path}: this is a database of another program"
    assert path.read_bytes() == before


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    async def scenario(store: SqliteJobStore) -> None:
        await store.add(request("a"))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in os.scandir(tmp_path)}
        assert modes == dict.fromkeys(["jobs.db", "jobs.db-owners", "jobs.db-shm", "jobs.db-wal"], 0o600)

    run(tmp_path / "jobs.db", scenario)


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    async def nothing(store: SqliteJobStore) -> None:
        assert await store.pragma("user_version") == store_sqlite.VERSION

    run(path, nothing)
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {store_sqlite.VERSION + 1}")
    assert "written by a newer Penstock, as version 4; this one knows version 3" in refusal(path)


# What version 2 lacked, and what version 1 had besides: it counted each submission by itself.
VERSION_2 = """
    ALTER TABLE jobs DROP COLUMN request_id;
    PRAGMA user_version = 2;
"""
VERSION_1 = f"""
    {VERSION_2}
    CREATE TRIGGER entered AFTER INSERT ON jobs BEGIN
        INSERT INTO tally VALUES (new.endpoint, new.state, 1, 1)
            ON CONFLICT DO UPDATE SET here = here + 1, ever = ever + 1;
    END;
    PRAGMA user_version = 1;
"""


@pytest.mark.parametrize("older", [VERSION_1, VERSION_2], ids=["1", "2"])
def test_a_file_of_an_older_version_is_brought_up_to_date(tmp_path: Path, older: str) -> None:
    path = tmp_path / "jobs.db"

    async def submitted(store: SqliteJobStore) -> None:
        await store.add(request("a"))

    run(path, submitted)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(older)

    async def scenario(store: SqliteJobStore) -> None:
        await store.add(replace(request("b"), request_id="r"))
        assert (await store.counts("m")).in_queue == 2
        claimed = await store.claim({"m": 9}, "w", T0, LEASE)
        assert [(job.request.id, job.request.request_id) for job in claimed] == [("a", ""), ("b", "r")]

    run(path, scenario)


def test_an_update_that_was_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    async def submitted(store: SqliteJobStore) -> None:
        await store.add(replace(request("a"), request_id="r"))

    async def scenario(store: SqliteJobStore) -> None:
        assert [job.request.request_id for job in await store.claim({"m": 9}, "w", T0, LEASE)] == ["r"]

    run(path, submitted)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")  # the column is there, the version is not
    run(path, scenario)


def test_a_process_of_an_older_version_goes_on_while_the_file_is_updated(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"

    async def scenario(store: SqliteJobStore) -> None:
        await store.add(request("a"))
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.executescript(VERSION_2)
            columns = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
            names = ", ".join(name for name in columns if name != "n")
            newer = await SqliteJobStore.open(str(path))
            values = names.replace("id,", "'b',", 1)
            db.execute(f"INSERT INTO jobs ({names}) SELECT {values} FROM jobs")
        claimed = await newer.claim({"m": 9}, "w", T0, LEASE)
        assert {(job.request.id, job.request.request_id) for job in claimed} == {("a", ""), ("b", "")}
        await newer.close()

    run(path, scenario)


def test_only_a_process_that_is_alone_recovers_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "jobs.db"

    async def scenario(here: SqliteJobStore) -> None:
        await here.add(request("a"))
        await here.claim({"m": 1}, "w", T0, LEASE)
        there = await SqliteJobStore.open(str(path))
        assert list((await there.recover(T0 + 1)).changed) == []
        assert caplog.messages == [f"job store {path}: another server has it open too; they share its jobs"]
        assert list((await there.recover(T0 + LEASE)).changed) == ["a"], "its lease has lapsed"
        await here.claim({"m": 1}, "w", T0, LEASE)
        await here.close()
        assert list((await there.recover(T0 + 1)).changed) == ["a"]
        job = await there.get("a", "m", T0)
        assert job is not None
        assert job.state is State.FAILED
        await there.close()

    run(path, scenario)


ACCEPT = """
import asyncio, sys
from penstock.job_api.store import Claim, Request, State
from penstock.job_api.store_sqlite import SqliteJobStore

async def submit(store, part):
    n = 0
    while True:
        id = f"{part}-{n}"
        await store.add(Request(id, "m", b"{}", 1_700_000_000_000, 600_000, 300_000, 60_000))
        print(id, flush=True)
        n += 1

async def main():
    store = await SqliteJobStore.open(sys.argv[1])
    await asyncio.gather(*(submit(store, part) for part in "abcdefgh"))

asyncio.run(main())
"""


def test_what_was_accepted_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with subprocess.Popen([sys.executable, "-c", ACCEPT, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        accepted = [process.stdout.readline().strip() for _ in range(200)]
        process.kill()
        accepted += process.stdout.read().split("\n")[:-1]

    async def scenario(store: SqliteJobStore) -> None:
        await store.recover(T0)
        waiting = [job.request.id for job in await store.claim({"m": 1_000_000}, "w", T0, LEASE)]
        assert set(accepted) <= set(waiting)
        assert len(set(waiting)) == len(waiting) <= len(accepted) + 8, "at most one more of each submitter"

    run(path, scenario)


@pytest.mark.parametrize(
    "name",
    ["CLAIM", "EXTEND", "RELEASE", "FINISH", "CANCEL", "PURGE", "REQUEUE", "KEEP", "LIST", "LIST_BATCH", "TOTAL"],
)
def test_no_call_looks_at_every_job(tmp_path: Path, name: str) -> None:
    statement: str = getattr(store_sqlite, name)
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as db:
        db.executescript(store_sqlite.SCHEMA)
        given = dict.fromkeys(re.findall(r":(\w+)", statement))
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", given)]
    assert plan
    assert not [step for step in plan if step.startswith("SCAN") and re.search(r"\b(jobs|tally|inputs|vals)\b", step)]
