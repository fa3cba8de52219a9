"""API keys and restricted groups at the gRPC door, through a real client."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from penstock import pb
from penstock.auth import GRPC, Guard, Keys, make_guard
from penstock.auth.key_file import edit, make

from .test_grpc_methods import HEALTH, REFLECTION, Doubler, Serve, Served, model, refusal, request, run, same, serve

__all__ = ["serve"]  # a fixture: each transport in turn

MISSING = "an API key is required, in the header 'Authorization: Bearer KEY'"
SERVING = HEALTH.HealthCheckResponse.SERVING
CHECK = "/grpc.health.v1.Health/Check"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"

CALLS: list[tuple[str, Message]] = [
    ("ModelInfer", request("m", 1)),
    ("ModelInfer", request("nope", 1)),
    ("ServerMetadata", pb.ServerMetadataRequest()),
    ("ModelMetadata", pb.ModelMetadataRequest(name="m")),
    ("ModelMetadata", pb.ModelMetadataRequest(name="nope")),
    ("ModelReady", pb.ModelReadyRequest(name="m")),
    ("ModelConfig", pb.ModelConfigRequest(name="m")),
    ("ModelStatistics", pb.ModelStatisticsRequest()),
    (CHECK, HEALTH.HealthCheckRequest(service="m")),
    (CHECK, HEALTH.HealthCheckRequest(service="nope")),
]


def add(path: Path, name: str, *scopes: str, rate: int = 0) -> list[tuple[str, str]]:
    """The metadata that brings a new key."""
    key, text = make(name, scopes, rate)
    with edit(path) as keys:
        keys.append(key)
    return [("authorization", f"Bearer {text}")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keyed(path: Path) -> Guard | None:
    return make_guard(GRPC, Keys(path), ())


def reflect(served: Served, metadata: list[tuple[str, str]] | None = None) -> Any:
    question = REFLECTION.ServerReflectionRequest(list_services="").SerializeToString()
    return served.channel.stream_stream(REFLECT, same, same)(iter([question]), metadata=metadata).read()


def test_without_a_key_every_call_says_the_same(path: Path, serve: Serve) -> None:
    add(path, "ci", "infer")

    async def test() -> None:
        async with serve(model("m", Doubler()), guard=keyed(path)) as served:
            for rpc, message in CALLS:
                assert await refusal(served.unary(rpc, message)) == (grpc.StatusCode.UNAUTHENTICATED, MISSING), rpc
            for answer in (
                served.watch("m").read(),
                reflect(served),
                served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", same, same)(
                    iter([b""])
                ).read(),
            ):
                assert await refusal(answer) == (grpc.StatusCode.UNAUTHENTICATED, MISSING)

    run(test)


def test_the_servers_own_health_needs_no_key(path: Path, serve: Serve) -> None:
    add(path, "ci", "infer")

    async def test() -> None:
        async with serve(model("m", Doubler()), guard=keyed(path)) as served:
            for service in ("", "inference.GRPCInferenceService"):
                assert await served.check(service) == SERVING
                watch = served.watch(service)
                body = await watch.read()
                assert isinstance(body, bytes)
                assert HEALTH.HealthCheckResponse.FromString(body).status == SERVING
                watch.cancel()
            for rpc in ("ServerLive", "ServerReady"):
                await served.unary(rpc, pb.ServerLiveRequest())

    run(test)


def test_a_key_for_inference_opens_inference_and_what_is_served(path: Path, serve: Serve) -> None:
    metadata = add(path, "ci", "infer")

    async def test() -> None:
        async with serve(model("m", Doubler()), guard=keyed(path)) as served:
            for rpc, message in CALLS:
                call = served.unary(rpc, message, metadata=metadata)
                if "nope" in str(message):
                    assert (await refusal(call))[0] is grpc.StatusCode.NOT_FOUND
                else:
                    await call
            assert b"inference.GRPCInferenceService" in await reflect(served, metadata)

    run(test)


def test_a_key_for_something_else_is_denied_and_one_beyond_its_rate_exhausted(path: Path, serve: Serve) -> None:
    other, slow = add(path, "scraper", "metrics"), add(path, "slow", "infer", rate=1)

    async def test() -> None:
        async with serve(model("m", Doubler()), guard=keyed(path)) as served:
            for rpc, message in CALLS:
                assert await refusal(served.unary(rpc, message, metadata=other)) == (
                    grpc.StatusCode.PERMISSION_DENIED,
                    "API key 'scraper' lacks the scope 'infer'; it has metrics",
                )
            await served.infer(request("m", 1), metadata=slow)
            assert await refusal(served.infer(request("m", 1), metadata=slow)) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "API key 'slow' is limited to 1 requests per second",
            )

    run(test)


def test_a_restricted_group_asks_for_its_header_and_the_others_do_not(serve: Serve) -> None:
    guard = make_guard(GRPC, None, ["inference,health:Team=red"])
    closed = (
        grpc.StatusCode.UNAVAILABLE,
        "This protocol is restricted, expecting header 'triton-grpc-protocol-Team'",
    )

    async def test() -> None:
        async with serve(model("m", Doubler()), guard=guard) as served:
            for metadata in ([], [("team", "red")], [("triton-grpc-protocol-team", "blue")]):
                for rpc, message in (
                    ("ModelInfer", request("m", 1)),
                    ("ServerLive", pb.ServerLiveRequest()),
                    ("ModelReady", pb.ModelReadyRequest(name="m")),
                    (CHECK, HEALTH.HealthCheckRequest()),
                ):
                    assert await refusal(served.unary(rpc, message, metadata=metadata)) == closed, rpc
                await served.unary("ModelMetadata", pb.ModelMetadataRequest(name="m"), metadata=metadata)
                assert await reflect(served, metadata)
            opened = [("triton-grpc-protocol-team", "red")]
            await served.infer(request("m", 1), metadata=opened)
            await served.unary("ServerLive", pb.ServerLiveRequest(), metadata=opened)

    run(test)
