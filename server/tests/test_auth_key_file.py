"""The file of API keys: hashes only, for its owner only, whole at every moment, and refused where it is wrong."""

import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest
from penstock.auth.key_file import SCOPES, Key, digest, edit, make, read
from penstock.errors import Kind, ServingError

WHOLE: dict[str, Any] = {
    "name": "ci",
    "id": "penstock_01234567",
    "sha256": "0" * 64,
    "scopes": ["infer"],
    "created": "2026-01-01T00:00:00+00:00",
    "rate": 5,
}


def add(path: Path, name: str) -> str:
    key, text = make(name, ["infer"])
    with edit(path) as keys:
        keys.append(key)
    return text


def add_many(path: Path, prefix: str) -> None:
    for number in range(20):
        add(path, f"{prefix}{number}")


def test_a_key_is_256_random_bits_behind_its_id() -> None:
    made = [make("ci", ["infer", "jobs", "infer"], 5) for _ in range(2)]
    for key, text in made:
        assert text.startswith(f"{key.id}_")
        assert len(text) == len(key.id) + 1 + 43  # 32 bytes in base64
        assert (key.name, key.scopes, key.rate, key.sha256) == ("ci", ("infer", "jobs"), 5, digest(text))
    assert made[0][1] != made[1][1]
    assert made[0][0].id != made[1][0].id


def test_the_file_holds_the_hash_and_not_the_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    text = add(path, "ci")
    [key] = read(path)
    assert (key.name, key.sha256) == ("ci", digest(text))
    assert text not in path.read_text()
    assert text[len(key.id) + 1 :] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    add(path, "two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [*tmp_path.iterdir()] == [path]


def test_an_edit_replaces_the_file_so_that_a_reader_has_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, "one")
    with path.open() as old:
        add(path, "two")
        assert [key["name"] for key in json.load(old)["keys"]] == ["one"]
    assert [key.name for key in read(path)] == ["one", "two"]


def test_an_edit_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add(path, "one")
    before = path.read_bytes()

    def fail() -> None:
        with edit(path) as keys:
            keys.clear()
            raise ServingError(Kind.EXISTS, "no")

    with pytest.raises(ServingError, match="no"):
        fail()
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


def test_edits_of_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    context = multiprocessing.get_context("spawn")
    editors = [context.Process(target=add_many, args=(path, prefix)) for prefix in "ab"]
    for editor in editors:
        editor.start()
    for editor in editors:
        editor.join(60)
        assert editor.exitcode == 0
    assert {key.name for key in read(path)} == {f"{prefix}{number}" for prefix in "ab" for number in range(20)}


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "keys.json"
    link.symlink_to("real/keys.json")
    add(link, "one")
    add(link, "two")
    assert link.is_symlink()
    assert len(read(tmp_path / "real" / "keys.json")) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"cannot write API keys to '.*nowhere/keys\.json': .*No such file"):
        add(tmp_path / "nowhere" / "keys.json", "one")


@pytest.mark.parametrize(
    ("name", "scopes", "rate", "message"),
    [
        ("ci", ["infer", "root"], 0, "key 'ci': expected scopes of infer, jobs, admin, metrics, got 'root'"),
        ("ci", [], 0, "key 'ci': expected scopes of infer, jobs, admin, metrics, got none"),
        ("ci", [""], 0, "key 'ci': expected scopes of infer, jobs, admin, metrics, got ''"),
        ("", ["infer"], 0, "a key needs a name that can be printed, got ''"),
        ("a\nb", ["infer"], 0, "a key needs a name that can be printed, got 'a\\nb'"),
        ("ci", ["infer"], -1, "key 'ci': expected a number of requests per second, got -1"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(name: str, scopes: list[str], rate: int, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        make(name, scopes, rate)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [WHOLE]}))
    [key] = read(path)
    assert key == Key("ci", "penstock_01234567", "0" * 64, ("infer",), "2026-01-01T00:00:00+00:00", 5)
    with edit(path):
        pass
    assert json.loads(path.read_text()) == {"keys": [WHOLE]}
    path.write_text('{"keys": []}')
    assert read(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "Expecting value"),
        ("[]", 'expected {"keys": [...]}'),
        ('{"keys": {}}', 'expected {"keys": [...]}'),
        ('{"keys": [], "more": 1}', 'expected {"keys": [...]}'),
        ({"keys": ["x"]}, "expected an object for each key, got 'x'"),
        ({"keys": [{**WHOLE, "rates": 1}]}, "key 'ci': 'rates' is unknown"),
        ({"keys": [{k: v for k, v in WHOLE.items() if k != "sha256"}]}, "key 'ci': 'sha256' is missing"),
        ({"keys": [{k: v for k, v in WHOLE.items() if k != "name"}]}, "key None: 'name' is missing"),
        ({"keys": [{**WHOLE, "scopes": "infer"}]}, "key 'ci': 'scopes' is no list"),
        ({"keys": [{**WHOLE, "rate": True}]}, "key 'ci': 'rate' is no int"),
        ({"keys": [{**WHOLE, "scopes": ["root"]}]}, f"expected scopes of {', '.join(SCOPES)}, got 'root'"),
        ({"keys": [{**WHOLE, "scopes": [1]}]}, f"expected scopes of {', '.join(SCOPES)}, got 1"),
        ({"keys": [{**WHOLE, "scopes": [[]]}]}, f"expected scopes of {', '.join(SCOPES)}, got []"),
        ({"keys": [{**WHOLE, "sha256": "00"}]}, "key 'ci': its id or its hash is damaged"),
        ({"keys": [WHOLE, {**WHOLE, "id": "penstock_89abcdef"}]}, "two keys have the same name"),
        ({"keys": [WHOLE, {**WHOLE, "name": "two"}]}, "two keys have the same id"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_reason(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ServingError) as caught:
        read(path)
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message.startswith(f"cannot read API keys from '{path}': ")
    assert message in caught.value.message
