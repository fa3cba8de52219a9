"""Who may run when several want the same resources: arithmetic on amounts and turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from penstock.errors import Kind, ServingError
from penstock.model_config import RateLimit, Resource
from penstock.rate import Key, RateLimiter, Turn, parse


class Bench:
    """A limiter, and who was woken."""

    def __init__(self, *entries: str) -> None:
        self.limiter = RateLimiter(parse(entries))
        self.woken: list[str] = []

    def enter(self, name: str, *needs: Resource, priority: int = 1, device: str = "cpu") -> Turn:
        return self.limiter.enter(device, RateLimit(needs, priority), lambda: self.woken.append(name))


def r(count: int, name: str = "R", everywhere: bool = False) -> Resource:
    return Resource(name, count, everywhere)


def test_what_needs_nothing_always_runs() -> None:
    bench = Bench()
    first, second = bench.enter("a"), bench.enter("b")
    assert (bench.limiter.take(first), bench.limiter.take(second)) == (True, True)


def test_without_a_statement_there_is_as_much_as_the_one_asks_for_that_asks_for_most() -> None:
    bench = Bench()
    small, other, large = bench.enter("a", r(2)), bench.enter("b", r(2)), bench.enter("c", r(4))
    assert [bench.limiter.take(turn) for turn in (small, other, large)] == [True, True, False]
    bench.limiter.give_back(small, ran=True)
    assert bench.woken == []
    bench.limiter.give_back(other, ran=True)
    assert bench.woken == ["c"]
    assert large.granted


def test_a_newcomer_that_brings_more_of_a_resource_wakes_who_waits_for_it() -> None:
    bench = Bench()
    first, second = bench.enter("a", r(1)), bench.enter("b", r(1))
    assert (bench.limiter.take(first), bench.limiter.take(second)) == (True, False)
    bench.enter("c", r(2))
    assert bench.woken == ["b"]


def test_one_that_waits_for_a_resource_is_not_overtaken_for_it() -> None:
    bench = Bench("R:4")
    running, large, small, free = (
        bench.enter(name, *needs) for name, needs in {"a": [r(2)], "b": [r(4)], "c": [r(1)], "d": [r(1, "S")]}.items()
    )
    assert bench.limiter.take(running)
    assert not bench.limiter.take(large)
    assert not bench.limiter.take(small)  # though two are left: they are kept for the one in front
    assert bench.limiter.take(free)  # which needs another resource
    bench.limiter.give_back(running, ran=True)
    assert (bench.woken, large.granted, small.granted) == (["b"], True, False)


def test_resources_are_of_each_device_unless_they_are_global() -> None:
    bench = Bench()
    first, second = (bench.enter(device, r(1), device=device) for device in ("cuda:0", "cuda:1"))
    assert (bench.limiter.take(first), bench.limiter.take(second)) == (True, True)
    third, fourth = (bench.enter(device, r(1, "G", True), device=device) for device in ("cuda:0", "cuda:1"))
    assert (bench.limiter.take(third), bench.limiter.take(fourth)) == (True, False)


@pytest.mark.parametrize(
    ("entries", "runs"),
    [
        (["R:2"], [True, True, False]),
        (["R:2:global", "R:1"], [True, True, False]),
        (["R:2:cpu"], [True, False, False]),  # of another R than the one that is global
    ],
)
def test_an_amount_without_a_place_is_that_of_a_global_resource_too(entries: list[str], runs: list[bool]) -> None:
    bench = Bench(*entries)
    assert [bench.limiter.take(bench.enter(name, r(1, everywhere=True))) for name in "abc"] == runs


def test_priority_2_has_half_as_many_turns_as_priority_1() -> None:
    bench = Bench("R:1")
    turns = {"one": bench.enter("one", r(1)), "two": bench.enter("two", r(1), priority=2)}
    runs = {"one": 0, "two": 0}
    for turn in turns.values():
        bench.limiter.take(turn)
    for _ in range(300):
        [name] = [name for name, turn in turns.items() if turn.granted]
        runs[name] += 1
        bench.limiter.give_back(turns[name], ran=True, again=True)
    assert abs(runs["one"] - 200) <= 2


def test_a_newcomer_has_no_turns_to_make_up_for() -> None:
    bench = Bench("R:1")
    first = bench.enter("a", r(1))
    for _ in range(10):
        assert bench.limiter.take(first)
        bench.limiter.give_back(first, ran=True)
    second = bench.enter("b", r(1))
    assert (bench.limiter.take(first), bench.limiter.take(second)) == (True, False)
    ran = ""
    for _ in range(4):
        name, turn = next((name, turn) for name, turn in (("a", first), ("b", second)) if turn.granted)
        ran += name
        bench.limiter.give_back(turn, ran=True, again=True)
    assert ran == "abab"


def test_a_turn_that_was_not_used_does_not_count() -> None:
    bench = Bench("R:1")
    first = bench.enter("a", r(1), priority=9)
    assert bench.limiter.take(first)
    bench.limiter.give_back(first, ran=False)
    assert first.passed == 0


def test_one_that_leaves_gives_back_what_it_had() -> None:
    bench = Bench("R:1")
    first, second = bench.enter("a", r(1)), bench.enter("b", r(1))
    bench.limiter.take(first)
    bench.limiter.take(second)
    bench.limiter.leave(first)
    assert (bench.woken, second.granted) == (["b"], True)


def test_an_instance_that_could_never_run_is_refused() -> None:
    with pytest.raises(ServingError) as caught:
        Bench("R:2").enter("a", r(4))
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        'Resource count for "R" is limited to 2 which will prevent scheduling of one or more model instances, the '
        "minimum required count is 4",
    )


@pytest.mark.parametrize(
    ("entry", "amount"),
    [("R:3", ("", "R")), ("R:3:global", ("global", "R")), ("R:3:1", ("cuda:1", "R")), ("R:3:cpu", ("cpu", "R"))],
)
def test_amounts_are_read_from_the_command_line(entry: str, amount: Key) -> None:
    assert parse([entry]) == {amount: 3}


@pytest.mark.parametrize("entry", ["", "R", "R:", ":3", "R:x", "R:-1", "R:3:gpu", "R:3:1:2"])
def test_what_is_no_amount_is_refused(entry: str) -> None:
    with pytest.raises(ServingError) as caught:
        parse([entry])
    assert caught.value.message == f"--rate-limit-resource expects NAME:COUNT[:DEVICE], got '{entry}'"


@given(
    needs=st.lists(st.lists(st.sampled_from([r(1), r(2), r(1, "G", True)]), max_size=2), min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.sampled_from(["take", "give back"]), st.integers(0, 9)), max_size=40),
)
def test_no_resource_is_given_out_twice_and_somebody_always_runs(
    needs: list[list[Resource]], steps: list[tuple[str, int]]
) -> None:
    most = {("cpu", "R"): 4, ("global", "G"): 2}
    bench = Bench("R:4", "G:2:global")
    turns = [bench.enter(str(number), *mine) for number, mine in enumerate(needs)]
    for step, number in steps:
        turn = turns[number % len(turns)]
        if step == "take":
            assert bench.limiter.take(turn) == turn.granted
        else:
            bench.limiter.give_back(turn, ran=True, again=number % 2 == 0)
        for key, amount in most.items():
            assert sum(turn.needs.get(key, 0) for turn in turns if turn.granted) <= amount
        if any(turn.waits for turn in turns):
            assert any(turn.granted for turn in turns)
