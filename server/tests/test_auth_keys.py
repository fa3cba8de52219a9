"""API keys in force: whom a header lets in, what for, how often, and when a changed file counts."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
from penstock.auth import Keys
from penstock.auth.key_file import edit, make
from penstock.auth.keys import SECOND_NS, Limit
from penstock.errors import Kind, ServingError


@dataclass(slots=True)
class Clock:
    """A time that stands until it is set."""

    now_ns: int = 0

    def __call__(self) -> int:
        return self.now_ns


def add(path: Path, name: str, *scopes: str, rate: int = 0) -> str:
    key, text = make(name, scopes, rate)
    with edit(path) as keys:
        keys.append(key)
    return text


def remove(path: Path, name: str) -> None:
    with edit(path) as keys:
        keys[:] = [key for key in keys if key.name != name]


def refused(keys: Keys, authorization: str | None, scope: str = "infer") -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        keys.check(authorization, scope)
    return caught.value.kind, caught.value.message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer  {} ", "{}"])
def test_a_key_is_known_with_the_scheme_in_any_case_or_bare(path: Path, form: str) -> None:
    text = add(path, "ci", "infer", "jobs")
    keys = Keys(path)
    keys.check(form.format(text), "infer")
    keys.check(form.format(text), "jobs")
    assert keys.identify(form.format(text)).name == "ci"


@pytest.mark.parametrize("authorization", [None, ""])
def test_without_a_key_the_header_is_asked_for(path: Path, authorization: str | None) -> None:
    add(path, "ci", "infer")
    assert refused(Keys(path), authorization) == (
        Kind.UNAUTHENTICATED,
        "an API key is required, in the header 'Authorization: Bearer KEY'",
    )


@pytest.mark.parametrize(
    "form", ["Bearer {}x", "Bearer x{}", "Bearer", "Bearer ", "Basic {}", "{} {}", "Bearer {id}", "é", "Bearer \u4f60"]
)
def test_anything_else_is_no_known_key(path: Path, form: str) -> None:
    text = add(path, "ci", "infer")
    authorization = form.replace("{id}", text[:17]).replace("{}", text)
    assert refused(Keys(path), authorization) == (Kind.UNAUTHENTICATED, "the API key is not known")


def test_another_secret_behind_a_known_id_is_no_known_key(path: Path) -> None:
    text = add(path, "ci", "infer")
    _, other = make("ci", ["infer"])
    assert refused(Keys(path), f"Bearer {text[:17]}{other[17:]}")[0] is Kind.UNAUTHENTICATED


def test_a_key_without_the_scope_is_told_which_it_lacks(path: Path) -> None:
    text = add(path, "ci", "infer", "metrics")
    assert refused(Keys(path), text, "admin") == (
        Kind.FORBIDDEN,
        "API key 'ci' lacks the scope 'admin'; it has infer, metrics",
    )


def test_a_file_without_keys_lets_nobody_in(path: Path) -> None:
    path.write_text('{"keys": []}')
    assert refused(Keys(path), "Bearer x")[0] is Kind.UNAUTHENTICATED


@pytest.mark.parametrize("content", [None, "{"])
def test_a_file_that_is_missing_or_broken_stops_the_start(path: Path, content: str | None) -> None:
    if content is not None:
        path.write_text(content)
    with pytest.raises(ServingError, match="cannot read API keys from"):
        Keys(path)


def test_a_changed_file_counts_after_a_second_and_not_before(path: Path) -> None:
    clock = Clock()
    old = add(path, "old", "infer")
    keys = Keys(path, clock)
    new = add(path, "new", "infer")
    remove(path, "old")
    clock.now_ns = SECOND_NS - 1
    keys.check(old, "infer")
    assert refused(keys, new)[0] is Kind.UNAUTHENTICATED
    clock.now_ns = SECOND_NS
    keys.check(new, "infer")
    assert refused(keys, old)[0] is Kind.UNAUTHENTICATED


def test_a_file_that_breaks_or_goes_leaves_the_old_keys_and_is_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    text = add(path, "ci", "infer")
    keys = Keys(path, clock)
    whole = path.read_text()
    with caplog.at_level(logging.INFO, "penstock.auth"):
        for change in (lambda: path.write_text("{"), path.unlink):
            change()
            caplog.clear()
            for _ in range(3):
                clock.now_ns += SECOND_NS
                keys.check(text, "infer")
            [record] = caplog.records
            assert record.levelno == logging.ERROR
            assert record.getMessage().startswith(f"cannot read API keys from '{path}': ")
            assert record.getMessage().endswith("; the API keys read before stay in force")
        caplog.clear()
        path.write_text(whole)
        clock.now_ns += SECOND_NS
        keys.check(text, "infer")
        assert caplog.messages == [f"API keys were read again from '{path}'"]


def test_a_rate_allows_a_burst_of_one_second_and_then_its_pace() -> None:
    limit = Limit(4)
    assert [limit.take(0) for _ in range(6)] == [True, True, True, True, False, False]
    assert not limit.take(SECOND_NS // 4 - 1)
    assert limit.take(SECOND_NS // 4)
    assert not limit.take(SECOND_NS // 4)
    assert [limit.take(10 * SECOND_NS) for _ in range(5)] == [True, True, True, True, False]


def test_a_steady_stream_at_its_rate_is_never_limited() -> None:
    limit = Limit(7)
    assert all(limit.take(number * (SECOND_NS // 7)) for number in range(1000))


def test_a_key_beyond_its_rate_is_limited_and_others_are_not(path: Path) -> None:
    clock = Clock()
    slow, fast = add(path, "slow", "infer", rate=2), add(path, "fast", "infer")
    keys = Keys(path, clock)
    for _ in range(2):
        keys.check(slow, "infer")
    assert refused(keys, slow) == (Kind.LIMITED, "API key 'slow' is limited to 2 requests per second")
    for _ in range(10):
        keys.check(fast, "infer")
    clock.now_ns = SECOND_NS // 2
    keys.check(slow, "infer")


def test_a_file_read_again_gives_no_new_burst_unless_the_rate_has_changed(path: Path) -> None:
    clock = Clock()
    text = add(path, "ci", "infer", rate=1)
    keys = Keys(path, clock)
    clock.now_ns = SECOND_NS - 1
    keys.check(text, "infer")
    add(path, "more", "infer")
    clock.now_ns = SECOND_NS
    assert refused(keys, text)[0] is Kind.LIMITED
    path.write_text(path.read_text().replace('"rate": 1', '"rate": 100'))
    clock.now_ns = 2 * SECOND_NS
    for _ in range(100):
        keys.check(text, "infer")
    assert refused(keys, text)[0] is Kind.LIMITED
