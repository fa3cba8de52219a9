"""API keys and restricted groups at the HTTP door and at the metrics port: what is told, and before what."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from penstock.auth import HTTP, Keys, make_guard
from penstock.auth.key_file import edit, make
from penstock.http_api import MetricsApp

from .test_http_api import LIMIT_S, Client, Doubler, Got, model

MISSING = "an API key is required, in the header 'Authorization: Bearer KEY'"


def add(path: Path, name: str, *scopes: str, rate: int = 0) -> dict[bytes, bytes]:
    """The header that brings a new key."""
    key, text = make(name, scopes, rate)
    with edit(path) as keys:
        keys.append(key)
    return {b"authorization": f"Bearer {text}".encode()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def guarded(path: Path | None, *restricted: str) -> Client:
    keys = None if path is None else Keys(path)
    return Client(model("m", Doubler()), guard=make_guard(HTTP, keys, restricted))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v2/models/m/infer"),
        ("POST", "/v2/models/nope/infer"),
        ("GET", "/v2/models/m/infer"),
        ("GET", "/v2"),
        ("GET", "/v2/models/m"),
        ("GET", "/v2/models/nope"),
        ("POST", "/v2/models/m"),
        ("GET", "/v2/models/m/ready"),
        ("GET", "/v2/models/nope/ready"),
        ("GET", "/v2/models/m/config"),
        ("GET", "/v2/models/stats"),
        ("GET", "/nope"),
    ],
)
def test_without_a_key_every_path_says_the_same(path: Path, method: str, target: str) -> None:
    add(path, "ci", "infer")
    got = guarded(path)(method, target)
    assert got.error == (401, MISSING)
    assert got.headers[b"www-authenticate"] == b"Bearer"


def test_a_request_without_a_key_is_refused_before_its_body_is_read(path: Path) -> None:
    add(path, "ci", "infer")

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    headers = {b"content-length": b"99999999999999", b"expect": b"100-continue"}
    got = asyncio.run(guarded(path).call("POST", "/v2/models/m/infer", headers=headers, receive=receive))
    assert got.error == (401, MISSING)
    assert got.headers[b"connection"] == b"close"


def test_a_key_for_inference_opens_inference_and_what_is_served(path: Path) -> None:
    headers = add(path, "ci", "infer")
    client = guarded(path)
    assert client.infer(headers=headers).status == 200
    for target in ("/v2", "/v2/models/m", "/v2/models/m/ready", "/v2/models/m/config", "/v2/models/m/stats"):
        assert client("GET", target, headers=headers).status == 200, target
    assert client("GET", "/v2/models/nope", headers=headers).status == 404
    assert client("GET", "/nope", headers=headers).error == (404, "Not Found")
    assert client("GET", "/v2/models/m/infer", headers=headers).error == (405, "Method Not Allowed")


def test_a_key_for_something_else_opens_neither(path: Path) -> None:
    headers = add(path, "scraper", "metrics")
    client = guarded(path)
    refusal = (403, "API key 'scraper' lacks the scope 'infer'; it has metrics")
    assert client.infer(headers=headers).error == refusal
    assert client("GET", "/v2/models/nope", headers=headers).error == refusal
    assert client("GET", "/nope", headers=headers).status == 404


def test_the_servers_own_health_needs_no_key(path: Path) -> None:
    add(path, "ci", "infer")
    client = guarded(path)
    for target in ("/v2/health/live", "/v2/health/ready"):
        assert client("GET", target).status == 200


def test_a_key_beyond_its_rate_is_told_when_to_come_again(path: Path) -> None:
    headers = add(path, "slow", "infer", rate=1)
    client = guarded(path)
    assert client.infer(headers=headers).status == 200
    got = client.infer(headers=headers)
    assert got.error == (429, "API key 'slow' is limited to 1 requests per second")
    assert got.headers[b"retry-after"] == b"1"


def test_a_restricted_group_asks_for_its_header_and_the_others_do_not() -> None:
    client = guarded(None, "inference,health:Team=red")
    refusal = (403, "This API is restricted, expecting header 'Team'")
    for headers in ({}, {b"team": b"blue"}):
        assert client.infer(headers=headers).error == refusal
        assert client("GET", "/v2/models/m/infer", headers=headers).error == refusal  # before the method is looked at
        for target in ("/v2/health/live", "/v2/models/m/ready"):
            assert client("GET", target, headers=headers).error == refusal
        assert client("GET", "/v2/models/m", headers=headers).status == 200
        assert client("GET", "/nope", headers=headers).status == 404
    assert client.infer(headers={b"team": b"red"}).status == 200
    assert client("GET", "/v2/health/live", headers={b"team": b"red"}).status == 200


def scrape(client: Client, keys: Keys | None, target: str, headers: dict[bytes, bytes], method: str = "GET") -> Got:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("a scrape has no body")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": target, "headers": list(headers.items())}
    asyncio.run(asyncio.wait_for(MetricsApp(client.engine, keys)(scope, receive, send), LIMIT_S))
    start, content = sent
    return Got(start["status"], dict(start["headers"]), content["body"])


def test_the_metrics_port_asks_for_a_key_of_its_scope(path: Path) -> None:
    infer, metrics = add(path, "ci", "infer"), add(path, "scraper", "metrics")
    client, keys = guarded(path), Keys(path)
    for target in ("/metrics", "/nope"):
        assert scrape(client, keys, target, {}).error == (401, MISSING)
        assert scrape(client, keys, target, infer).error == (
            403,
            "API key 'ci' lacks the scope 'metrics'; it has infer",
        )
    assert scrape(client, keys, "/metrics", metrics).status == 200
    assert scrape(client, keys, "/nope", metrics).error == (404, "Not Found")


def test_the_metrics_port_without_keys_is_open(path: Path) -> None:
    client = Client(model("m", Doubler()))
    got = scrape(client, None, "/metrics", {})
    assert (got.status, got.headers[b"content-type"]) == (200, b"text/plain; charset=utf-8")
    head = scrape(client, None, "/metrics", {}, "HEAD")
    assert (head.status, head.body, head.headers[b"content-length"]) == (200, b"", b"%d" % len(got.body))
    assert scrape(client, None, "/metrics", {}, "POST").error == (405, "Method Not Allowed")
