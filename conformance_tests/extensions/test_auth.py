"""API keys: over both protocols and at the metrics port, of a server that asks for them."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc as grpcio
import pytest

from conformance_tests.asking import QUESTIONS, Asker, asking
from conformance_tests.clause_table import clause
from conformance_tests.grpc_wire import GrpcClient, status
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import PENSTOCK, SAMPLES, START_LIMIT_S, Running, penstock

OPEN = ("live", "ready")
MODELS = tuple(question for question in QUESTIONS if question not in (*OPEN, "unknown"))
UNKNOWN_KEY = "penstock_00000000_" + "A" * 43


def add_key(file: Path, name: str, scopes: str, *options: str) -> str:
    """A new key, which the command prints on its last line."""
    command = [str(PENSTOCK), "keys", "add", "--api-keys", str(file), "--name", name, "--scopes", scopes, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=START_LIMIT_S)
    return done.stdout.splitlines()[-1]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="session")
def own(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--url"):
        pytest.skip("only of a server started here")


@dataclass(frozen=True, slots=True)
class Keyed:
    """A server that asks for keys, and keys by their scopes."""

    running: Running
    file: Path
    keys: Mapping[str, str]


@pytest.fixture(scope="module")
def keyed(own: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = {scope: add_key(folder / "keys.json", scope, scope) for scope in ("infer", "jobs", "admin", "metrics")}
    keys["slow"] = add_key(folder / "keys.json", "slow", "infer", "--rate", "1")
    with penstock([SAMPLES], folder / "server.log", "--api-keys", str(folder / "keys.json")) as running:
        yield Keyed(running, folder / "keys.json", keys)


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, keyed: Keyed) -> Iterator[Asker]:
    """The server with keys, over each protocol in turn."""
    with asking(keyed.running, request.param) as asker:
        yield asker


@clause("auth.missing_key")
@pytest.mark.parametrize("question", [question for question in QUESTIONS if question not in OPEN])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": ""}, bearer(UNKNOWN_KEY), bearer(""), {"Authorization": UNKNOWN_KEY}],
    ids=["none", "empty", "unknown", "scheme alone", "bare"],
)
def test_without_a_known_key_nothing_is_told(door: Asker, question: str, headers: dict[str, str]) -> None:
    said, text = door.ask(question, headers)
    assert said == door.either(401, "UNAUTHENTICATED")
    assert "API key" in text
    assert "simple" not in text
    assert "nope" not in text


@clause("auth.missing_key")
def test_the_servers_health_is_told_to_everyone(door: Asker) -> None:
    for question in OPEN:
        assert door.ask(question) == door.ok


@clause("auth.missing_key")
@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER {}", "{}"])
def test_a_known_key_opens_what_it_is_for(door: Asker, keyed: Keyed, form: str) -> None:
    headers = {"Authorization": form.format(keyed.keys["infer"])}
    for question in MODELS:
        assert door.ask(question, headers) == door.ok, question
    assert door.ask("unknown", headers)[0] == door.either(404, "NOT_FOUND")


@clause("auth.scope")
@pytest.mark.parametrize("scope", ["jobs", "admin", "metrics"])
def test_a_key_without_the_scope_is_told_which_it_lacks(door: Asker, keyed: Keyed, scope: str) -> None:
    for question in (*MODELS, "unknown"):
        said, text = door.ask(question, bearer(keyed.keys[scope]))
        assert said == door.either(403, "PERMISSION_DENIED")
        assert "'infer'" in text


@clause("auth.rate")
def test_a_key_beyond_its_rate_is_limited(door: Asker, keyed: Keyed) -> None:
    said = [door.ask("metadata", bearer(keyed.keys["slow"]))[0] for _ in range(20)]
    assert door.either(429, "RESOURCE_EXHAUSTED") in said
    assert door.ask("metadata", bearer(keyed.keys["infer"])) == door.ok


@clause("auth.rate")
@pytest.mark.over("http")
def test_a_limited_key_is_told_when_to_come_again(keyed: Keyed) -> None:
    http = HttpClient(keyed.running.http)
    answers = [http.request("GET", "/v2", headers=bearer(keyed.keys["slow"])) for _ in range(20)]
    assert {answer.headers["retry-after"] for answer in answers if answer.status == 429} == {"1"}


@clause("auth.missing_key", "auth.scope")
@pytest.mark.over("http")
def test_the_metrics_port_asks_for_a_key_of_its_own_scope(keyed: Keyed) -> None:
    http = HttpClient(keyed.running.metrics)
    got = {scope: http.request("GET", "/metrics", headers=bearer(key)) for scope, key in keyed.keys.items()}
    assert got["metrics"].status == 200
    assert {got[scope].status for scope in ("infer", "jobs", "admin")} == {403}
    assert "'metrics'" in got["infer"].error
    assert http.get("/metrics").status == 401


@clause("auth.missing_key")
@pytest.mark.over("http")
def test_a_body_is_not_waited_for_without_a_key(keyed: Keyed) -> None:
    with HttpClient(keyed.running.http).connect() as connection:
        headers = {"Content-Length": "1000000", "Expect": "100-continue"}
        connection.send(connection.head("POST", "/v2/models/simple/infer", headers))
        answer = connection.receive()
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"


@clause("auth.missing_key")
@pytest.mark.over("grpc")
def test_reflection_and_the_health_of_models_ask_for_a_key(keyed: Keyed) -> None:
    with contextlib.closing(GrpcClient(keyed.running.grpc)) as client:
        assert client.health("") == "SERVING"
        for refused in (
            lambda: client.health("simple"),
            lambda: client.watch("simple"),
            lambda: client.reflect("v1", 7, ""),
        ):
            with pytest.raises(grpcio.RpcError) as caught:
                refused()
            assert status(caught.value) == "UNAUTHENTICATED"


@clause("auth.missing_key")
@pytest.mark.over("http")
def test_a_key_counts_soon_after_it_is_added_and_no_more_after_it_is_removed(keyed: Keyed) -> None:
    http = HttpClient(keyed.running.http)

    def wait_for(key: str, wanted: int) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        with http.connect() as connection:
            while time.monotonic() < deadline_s:
                connection.send(connection.head("GET", "/v2", bearer(key)))
                if connection.receive().status == wanted:
                    return
        raise AssertionError(f"{wanted} never came")

    key = add_key(keyed.file, "late", "infer")
    wait_for(key, 200)
    command = [str(PENSTOCK), "keys", "remove", "--api-keys", str(keyed.file), "--name", "late"]
    subprocess.run(command, check=True, capture_output=True, timeout=START_LIMIT_S)
    wait_for(key, 401)


@clause("auth.missing_key")
@pytest.mark.over("http")
@pytest.mark.parametrize("content", [None, "{", json.dumps({"keys": [{"name": "x"}]})])
def test_a_file_of_keys_that_is_missing_or_broken_stops_the_start(
    own: None, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    command = [str(PENSTOCK), "serve", str(SAMPLES), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    ended = subprocess.run([*command, "--api-keys", str(file)], capture_output=True, text=True, timeout=START_LIMIT_S)
    assert ended.returncode == 1
    assert f"cannot read API keys from '{file}'" in ended.stderr
