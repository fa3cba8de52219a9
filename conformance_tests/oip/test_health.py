"""Health of the server and of its models, in the protocol's own form and in grpc.health.v1."""

import contextlib

import grpc as grpcio
import pytest

from conformance_tests.carriers import Refusal
from conformance_tests.clause_table import clause
from conformance_tests.doors import Door
from conformance_tests.grpc_wire import GrpcClient, status
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import Running

SERVICE = "inference.GRPCInferenceService"


@clause("health.live")
def test_a_started_server_lives(door: Door) -> None:
    assert door.live()


@clause("health.ready")
def test_a_server_whose_models_serve_is_ready(door: Door) -> None:
    assert door.ready()


@clause("health.model_ready")
@pytest.mark.needs("simple")
@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_is_ready_by_name_and_by_version(door: Door, version: str) -> None:
    assert door.model_ready("simple", version) is True


@clause("health.objects")
@pytest.mark.needs("simple")
@pytest.mark.parametrize(
    ("path", "members"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/models/simple/ready", {"name": "simple", "ready": True}),
        ("/v2/models/simple/versions/1/ready", {"name": "simple", "ready": True}),
    ],
)
def test_health_is_told_as_an_object(http: HttpClient, path: str, members: dict[str, object]) -> None:
    assert http.get(path).json().items() >= members.items()


@clause("health.bodies")
@pytest.mark.needs("simple")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/simple/ready", {"name": "simple", "ready": True}),
        ("/v2/models/simple/versions/1/ready", {"name": "simple", "ready": True}),
    ],
)
def test_the_object_has_no_other_member(http: HttpClient, path: str, body: object) -> None:
    answer = http.get(path)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == body


@clause("errors.unknown_model")
def test_an_unknown_model_is_not_ready(door: Door) -> None:
    assert door.model_ready("nope") is not True


@clause("errors.unknown_version")
@pytest.mark.needs("simple")
def test_an_unknown_version_is_not_ready(door: Door) -> None:
    assert door.model_ready("simple", "9") is not True


@clause("error_texts.unknown_model")
def test_readiness_of_an_unknown_model_is_not_found(door: Door) -> None:
    assert door.model_ready("nope") == Refusal("NOT_FOUND", "Request for unknown model: 'nope' is not found")


@clause("error_texts.unknown_version")
@pytest.mark.needs("simple")
def test_readiness_of_an_unknown_version_is_not_found(door: Door) -> None:
    text = "Request for unknown model: 'simple' version 9 is not found"
    assert door.model_ready("simple", "9") == Refusal("NOT_FOUND", text)


@clause("health.not_ready")
def test_a_server_with_a_failed_model_lives_and_is_not_ready(broken_door: Door) -> None:
    assert broken_door.live()
    assert not broken_door.ready()


@clause("lifecycle.failed_models")
def test_models_that_load_serve_beside_those_that_do_not(broken_door: Door) -> None:
    assert broken_door.model_ready("simple") is True


@clause("health.unready_model")
def test_readiness_of_a_failed_model_is_unavailable(broken_door: Door) -> None:
    text = "Request for unknown model: 'broken' version 1 is not at ready state"
    assert broken_door.model_ready("broken", "1") == Refusal("UNAVAILABLE", text)


@clause("health.unready_model")
def test_without_a_version_a_failed_model_has_none_available(broken_door: Door) -> None:
    text = "Request for unknown model: 'broken' has no available versions"
    assert broken_door.model_ready("broken") == Refusal("NOT_FOUND", text)


@clause("health.grpc_check")
def test_the_standard_health_service_follows_readiness(grpc: GrpcClient) -> None:
    assert grpc.health("") == "SERVING"


@clause("health.grpc_check_names")
@pytest.mark.needs("simple")
@pytest.mark.parametrize("name", [SERVICE, "simple"])
def test_the_standard_health_service_knows_service_and_models(grpc: GrpcClient, name: str) -> None:
    assert grpc.health(name) == "SERVING"


@clause("health.grpc_check_names")
def test_the_standard_health_service_knows_no_other_name(grpc: GrpcClient) -> None:
    with pytest.raises(grpcio.RpcError) as caught:
        grpc.health("nope")
    assert status(caught.value) == "NOT_FOUND"


@clause("health.grpc_check")
@pytest.mark.over("grpc")
def test_the_standard_health_service_tells_of_a_server_that_is_not_ready(broken: Running) -> None:
    with contextlib.closing(GrpcClient(broken.grpc)) as client:
        assert client.health("") == "NOT_SERVING"


@clause("health.grpc_watch")
def test_a_watch_begins_with_the_present_state(grpc: GrpcClient) -> None:
    assert grpc.watch("") == "SERVING"
