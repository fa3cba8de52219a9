"""API keys and headers of the commands that ask a server: against one with keys, and what is refused."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from penstock import settings
from penstock.auth import key_file
from penstock.cli import main
from penstock.client import access
from penstock.errors import ServingError

SAMPLES = Path(__file__).parents[2] / "model_repository"
INFER = ("infer", "times_version", "x=[2,3]")
BENCH = ("bench", "times_version", "--requests", "20", "--warmup", "0", "--concurrency", "2")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with keys and a group of its own: where it answers `http` and `grpc`, and a `key`."""
    folder = tmp_path_factory.mktemp("access")
    made, key = key_file.make("tests", ["infer"])
    with key_file.edit(folder / "keys.json") as keys:
        keys.append(made)
    command = [sys.executable, "-m", "penstock.cli", "serve", str(SAMPLES), "--announce", "json", "--log-info", "false"]
    command += ["--http-port", "0", "--grpc-port", "0", "--allow-metrics", "false", "--job-store", "none"]
    command += ["--api-keys", str(folder / "keys.json"), "--http-restricted-api", "inference:Team=mill"]
    command += ["--grpc-restricted-protocol", "inference:Team=mill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield {**json.loads(process.stdout.readline()), "key": key}
        process.terminate()


@pytest.mark.parametrize("door", ["http", "grpc"])
@pytest.mark.parametrize("command", [INFER, BENCH], ids=["infer", "bench"])
def test_a_key_and_a_header_open_a_server(
    served: dict[str, str], command: tuple[str, ...], door: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--url" if door == "http" else "--grpc", served[door]]
    team = "Team=mill" if door == "http" else "triton-grpc-protocol-Team=mill"
    assert main([*command, *where, "--api-key", served["key"], "--header", team]) == 0
    assert main([*command, *where, "--header", f"Authorization=Bearer {served['key']}", "--header", team]) == 0
    capsys.readouterr()
    assert main([*command, *where, "--header", team]) == 1
    assert "an API key is required" in capsys.readouterr().err
    assert main([*command, *where, "--api-key", served["key"]]) == 1
    assert "is restricted, expecting header" in capsys.readouterr().err


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    access.add_options(parser)
    return parser.parse_args(arguments)


VARIABLE = {settings.KEY_VARIABLE: "from-variable"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), (("authorization", "Bearer from-variable"),)),
        (("--api-key", "k"), (("authorization", "Bearer k"),)),
        (("--header", "AUTHORIZATION=k"), (("AUTHORIZATION", "k"),)),
        (("--header", "X-Team=a b=c"), (("authorization", "Bearer from-variable"), ("X-Team", "a b=c"))),
    ],
)
def test_an_option_comes_before_the_variable(arguments: tuple[str, ...], expected: access.Headers) -> None:
    assert access.headers(parsed(*arguments), VARIABLE) == expected


def test_without_a_key_nothing_is_shown() -> None:
    assert access.headers(parsed(), {}) == access.headers(parsed(), {settings.KEY_VARIABLE: ""}) == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--api-key", "a b"), "--api-key expects a key, which has no blanks and only ASCII characters"),
        (("--api-key", ""), "--api-key expects a key, which has no blanks and only ASCII characters"),
        (
            ("--api-key", "k", "--header", "authorization=k"),
            "--api-key and --header Authorization say the same; give one of them",
        ),
        (("--header", "a=1", "--header", "A=2"), "--header gives one header twice"),
    ],
)
def test_what_is_no_key_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ServingError) as caught:
        access.headers(parsed(*arguments), {})
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("Team", "expected NAME=VALUE in ASCII, got 'Team'"),
        ("Te am=1", "expected NAME=VALUE in ASCII, got 'Te am=1'"),
        ("Team=a\r\nHost: b", "expected NAME=VALUE in ASCII, got 'Team=a"),
        ("Content-Length=1", "'Content-Length' is no header that can be chosen"),
        ("grpc-timeout=1S", "'grpc-timeout' is no header that can be chosen"),
        ("x-bin=1", "'x-bin' is no header that can be chosen"),
    ],
)
def test_what_is_no_header_is_refused(header: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--header", header)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--api-key", "k"), ("--header", "a=1")])
@pytest.mark.parametrize(
    ("command", "where"), [(INFER, "with --local there is none"), (BENCH, "with --local alone there is none")]
)
def test_without_a_server_nobody_asks_for_a_key(
    option: tuple[str, ...], command: tuple[str, ...], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--local", str(SAMPLES), *option]) == 1
    assert capsys.readouterr().err == f"penstock: {option[0]} needs a server: {where}\n"


def test_the_variable_is_no_option_of_a_server() -> None:
    assert settings.from_sources({}, VARIABLE) == settings.Settings()
