"""A door's guard: keys by category, restricted groups by header, in Triton's words, and nothing where both are off."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from penstock.auth import GRPC, HTTP, Category, Guard, Keys, make_guard
from penstock.auth.guard import Wording
from penstock.auth.key_file import SCOPES, edit, make
from penstock.errors import Kind, ServingError

HEADERS: dict[str, str | bytes] = {}


@pytest.fixture
def keyed(tmp_path: Path) -> tuple[Keys, str]:
    """Keys, and one of them, for inference."""
    key, text = make("ci", ["infer"])
    with edit(tmp_path / "keys.json") as keys:
        keys.append(key)
    return Keys(tmp_path / "keys.json"), text


def guarded(wording: Wording, keys: Keys | None, *restricted: str) -> Guard:
    made = make_guard(wording, keys, restricted)
    assert made is not None
    return made


def refused(
    guard: Guard, category: Category | None, headers: dict[str, str | bytes] = HEADERS, keyless: bool = False
) -> tuple[Kind, str]:
    with pytest.raises(ServingError) as caught:
        guard.check(category, headers.get, keyless)
    return caught.value.kind, caught.value.message


def test_there_is_no_guard_where_nothing_is_asked_for() -> None:
    assert make_guard(HTTP, None, ()) is None


@pytest.mark.parametrize("category", Category)
def test_a_category_needs_a_scope_that_there_is(category: Category) -> None:
    changes = {"shared-memory", "model-repository", "trace", "logging"}
    assert category.scope == ("admin" if category.value in changes else "infer")
    assert category.scope in SCOPES


@pytest.mark.parametrize("form", ["str", "bytes"])
def test_a_key_opens_the_categories_of_its_scope(keyed: tuple[Keys, str], form: str) -> None:
    keys, text = keyed
    value = f"Bearer {text}"
    headers: dict[str, str | bytes] = {"authorization": value if form == "str" else value.encode()}
    guard = guarded(HTTP, keys)
    guard.check(Category.INFERENCE, headers.get)
    assert refused(guard, Category.TRACE, headers) == (
        Kind.FORBIDDEN,
        "API key 'ci' lacks the scope 'admin'; it has infer",
    )
    assert refused(guard, Category.INFERENCE)[0] is Kind.UNAUTHENTICATED


def test_what_there_is_not_is_told_to_known_keys_only(keyed: tuple[Keys, str]) -> None:
    keys, text = keyed
    guard = guarded(HTTP, keys)
    guard.check(None, {"authorization": text}.get)
    assert refused(guard, None)[0] is Kind.UNAUTHENTICATED


def test_a_keyless_method_needs_no_key_but_its_groups_header(keyed: tuple[Keys, str]) -> None:
    guarded(HTTP, keyed[0]).check(Category.HEALTH, HEADERS.get, keyless=True)
    assert refused(guarded(HTTP, keyed[0], "health:probe=1"), Category.HEALTH, keyless=True) == (
        Kind.FORBIDDEN,
        "This API is restricted, expecting header 'probe'",
    )


def test_a_key_is_asked_for_before_a_groups_header(keyed: tuple[Keys, str]) -> None:
    keys, text = keyed
    guard = guarded(HTTP, keys, "inference:Team=red")
    assert refused(guard, Category.INFERENCE, {"team": "red"})[0] is Kind.UNAUTHENTICATED
    assert refused(guard, Category.INFERENCE, {"authorization": text})[1].endswith("expecting header 'Team'")
    guard.check(Category.INFERENCE, {"authorization": text, "team": "red"}.get)


@pytest.mark.parametrize("headers", [{}, {"admin-key": ""}, {"admin-key": "b=c "}, {"admin-key": b"x"}, {"key": "b=c"}])
def test_a_restricted_group_is_closed_without_its_value(headers: dict[str, str | bytes]) -> None:
    guard = guarded(HTTP, None, "statistics,model-config:Admin-Key=b=c", "trace:other=x")
    for category in (Category.STATISTICS, Category.MODEL_CONFIG):
        assert refused(guard, category, headers) == (
            Kind.FORBIDDEN,
            "This API is restricted, expecting header 'Admin-Key'",
        )
    guard.check(Category.STATISTICS, {"admin-key": "b=c"}.get)
    guard.check(Category.STATISTICS, {"admin-key": b"b=c"}.get)


def test_groups_that_are_not_restricted_are_open() -> None:
    guard = guarded(HTTP, None, "statistics:k=v")
    for category in Category:
        if category is not Category.STATISTICS:
            guard.check(category, HEADERS.get)
    guard.check(None, HEADERS.get)


def test_over_grpc_the_header_has_a_prefix_and_the_refusal_its_own_kind() -> None:
    guard = guarded(GRPC, None, "inference:k=v")
    assert refused(guard, Category.INFERENCE, {"k": "v"}) == (
        Kind.UNAVAILABLE,
        "This protocol is restricted, expecting header 'triton-grpc-protocol-k'",
    )
    guard.check(Category.INFERENCE, {"triton-grpc-protocol-k": "v"}.get)


@pytest.mark.parametrize(("wording", "what"), [(HTTP, "api"), (GRPC, "protocol")])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["infer:k=v"], "unknown restricted WHAT 'infer'"),
        (["health,:k=v"], "unknown restricted WHAT ''"),
        (["health,trace:k=v", "trace:q=v"], "restricted WHAT 'trace' can not be specified in multiple config groups"),
        (["trace,trace:k=v"], "restricted WHAT 'trace' can not be specified in multiple config groups"),
        (["trace"], "FLAG expects CATEGORY,...:HEADER=VALUE, got 'trace'"),
        (["trace:k"], "FLAG expects CATEGORY,...:HEADER=VALUE, got 'trace:k'"),
        ([":k=v"], "FLAG expects CATEGORY,...:HEADER=VALUE, got ':k=v'"),
        (["trace:=v"], "FLAG expects CATEGORY,...:HEADER=VALUE, got 'trace:=v'"),
        (["trace:k="], "FLAG expects CATEGORY,...:HEADER=VALUE, got 'trace:k='"),
    ],
)
def test_an_entry_that_is_no_group_is_refused(
    wording: Wording, what: str, entries: Sequence[str], message: str
) -> None:
    with pytest.raises(ServingError) as caught:
        make_guard(wording, None, entries)
    expected = message.replace("WHAT", what).replace("FLAG", wording.flag)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, expected)
