"""`penstock keys`, as it is typed: what it prints, what it leaves in the file, and what it refuses."""

from pathlib import Path

import pytest
from penstock.auth import Keys
from penstock.auth.key_file import SCOPES, read
from penstock.cli import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def typed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must work prints."""
    assert main(["keys", *arguments]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["keys", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_a_key_is_printed_once_on_the_last_line_and_a_server_knows_it(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = typed(capsys, "add", "--api-keys", str(path), "--name", "ci", "--scopes", "infer,jobs", "--rate", "5")
    text = said.splitlines()[-1]
    assert Keys(path).identify(f"Bearer {text}") == read(path)[0]
    assert (read(path)[0].name, read(path)[0].scopes, read(path)[0].rate) == ("ci", ("infer", "jobs"), 5)


def test_a_list_shows_what_keys_are_for_and_no_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        typed(capsys, "add", "--api-keys", str(path), *options).splitlines()[-1]
        for options in (
            ["--name", "ci", "--scopes", "infer", "--rate", "5"],
            ["--name", "all", "--scopes", ",".join(SCOPES)],
        )
    ]
    ci, everything = read(path)
    assert [line.split() for line in typed(capsys, "list", "--api-keys", str(path)).splitlines()] == [
        ["NAME", "ID", "SCOPES", "RATE", "CREATED"],
        ["ci", texts[0][:17], "infer", "5", ci.created],
        ["all", texts[1][:17], "infer,jobs,admin,metrics", "-", everything.created],
    ]


def test_a_removed_key_is_gone_and_the_others_stay(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        typed(capsys, "add", "--api-keys", str(path), "--name", name, "--scopes", "infer")
    assert typed(capsys, "remove", "--api-keys", str(path), "--name", "one") == f"Removed 'one' from {path}.\n"
    assert [key.name for key in read(path)] == ["two"]


def test_the_file_may_be_named_in_the_servers_settings(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text(f'api_keys = "{path}"')
    typed(capsys, "add", "--config", str(config), "--name", "ci", "--scopes", "infer")
    assert "ci" in typed(capsys, "list", "--config", str(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "--name", "ci", "--scopes", "infer"], "'PATH' has a key 'ci' already"),
        (
            ["add", "--name", "x", "--scopes", "infer,root"],
            "key 'x': expected scopes of infer, jobs, admin, metrics, got 'root'",
        ),
        (["remove", "--name", "x"], "'PATH' has no key 'x'; it has: ci"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    typed(capsys, "add", "--api-keys", str(path), "--name", "ci", "--scopes", "infer")
    before = path.read_bytes()
    said = refused(capsys, *arguments, "--api-keys", str(path))
    assert said == f"penstock: {message.replace('PATH', str(path))}\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize("arguments", [["list"], ["remove", "--name", "x"]])
def test_a_file_that_is_not_there_holds_nothing_to_show_or_remove(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "cannot read API keys from" in refused(capsys, *arguments, "--api-keys", str(path))
    assert not path.exists()


def test_without_a_file_one_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "list") == "penstock: --api-keys must name the file of keys\n"


def test_the_help_names_the_scopes_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "add", "--help"])
    assert f"what it is for: {', '.join(SCOPES)}" in " ".join(capsys.readouterr().out.split())
