"""Waits for what changes."""

import asyncio
from collections.abc import Awaitable, Callable

from penstock.job_api.changes import REMEMBERED, Changes, work


async def ends_early(changes: Changes, keys: list[str], since: int) -> bool:
    """Whether a wait ends before its time, with nothing more happening."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await changes.wait(keys, 0.02, since)
    return loop.time() - began < 0.015


def run(scenario: Callable[[Changes], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Changes())

    asyncio.run(main())


def test_a_change_between_the_tick_and_the_wait_is_not_missed() -> None:
    async def scenario(changes: Changes) -> None:
        tick = changes.tick
        changes.note(["a", work("m")])
        assert await ends_early(changes, ["a"], tick)
        assert await ends_early(changes, ["b", work("m")], tick)
        assert not await ends_early(changes, ["b"], tick)
        assert not await ends_early(changes, ["a"], changes.tick)

    run(scenario)


def test_a_tick_that_is_too_old_to_tell_ends_a_wait_at_once() -> None:
    async def scenario(changes: Changes) -> None:
        tick = changes.tick
        for n in range(REMEMBERED + 1):
            changes.note([f"j{n}"])
        assert await ends_early(changes, ["other"], tick)
        assert not await ends_early(changes, ["other"], tick + 1)
        assert await ends_early(changes, ["j1"], tick + 1)
        tick = changes.tick
        changes.note([f"k{n}" for n in range(REMEMBERED + 1)])
        assert await ends_early(changes, ["k5"], tick)

    run(scenario)


def test_every_waiter_wakes_and_nothing_of_it_stays() -> None:
    async def scenario(changes: Changes) -> None:
        waits = [asyncio.create_task(changes.wait(["a", "b"], 60, changes.tick)) for _ in range(3)]
        cancelled = asyncio.create_task(changes.wait(["c"], 60, changes.tick))
        await asyncio.sleep(0)
        awaited = [changes.awaited]
        cancelled.cancel()
        changes.note(["b"])
        await asyncio.gather(*waits)
        await asyncio.wait([cancelled])
        awaited.append(changes.awaited)
        assert awaited == [True, False]
        everything = asyncio.create_task(changes.wait(["d"], 60, changes.tick))
        await asyncio.sleep(0)
        changes.note_all()
        await everything

    run(scenario)
