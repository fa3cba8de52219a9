"""What a server tells about itself and its models, asked over HTTP or over gRPC, in the protocol's JSON shape."""

from typing import Any, Protocol
from urllib.parse import quote

import grpc
from google.protobuf import message

from conformance_tests.carriers import JSON, Refusal, refused
from conformance_tests.grpc_wire import GrpcClient, details, pb, status
from conformance_tests.http_wire import HttpClient

Document = dict[str, Any]


class Door(Protocol):
    """The questions that both protocols know."""

    def live(self) -> bool: ...

    def ready(self) -> bool: ...

    def model_ready(self, model: str, version: str = "") -> bool | Refusal: ...

    def server(self) -> Document: ...

    def metadata(self, model: str, version: str = "") -> Document | Refusal: ...

    def config(self, model: str, version: str = "") -> Document | Refusal: ...

    def statistics(self, model: str = "", version: str = "") -> Document | Refusal: ...


def known(answer: Document | Refusal) -> Document:
    """The answer to a question that must not be refused."""
    assert not isinstance(answer, Refusal), answer
    return answer


class HttpDoor:
    """Over HTTP."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client

    def live(self) -> bool:
        return self._healthy("/v2/health/live")

    def ready(self) -> bool:
        return self._healthy("/v2/health/ready")

    def model_ready(self, model: str, version: str = "") -> bool | Refusal:
        answer = self._client.get(f"{model_path(model, version)}/ready")
        return True if answer.status == 200 else refused(answer)

    def server(self) -> Document:
        return known(self._document("/v2"))

    def metadata(self, model: str, version: str = "") -> Document | Refusal:
        return self._document(model_path(model, version))

    def config(self, model: str, version: str = "") -> Document | Refusal:
        return self._document(f"{model_path(model, version)}/config")

    def statistics(self, model: str = "", version: str = "") -> Document | Refusal:
        return self._document(f"{model_path(model, version)}/stats" if model else "/v2/models/stats")

    def _healthy(self, path: str) -> bool:
        answer = self._client.get(path)
        assert answer.status in (200, 400), answer
        return answer.status == 200

    def _document(self, path: str) -> Document | Refusal:
        answer = self._client.get(path)
        if answer.status != 200:
            return refused(answer)
        assert answer.headers["content-type"].partition(";")[0] == JSON
        document: Document = answer.json()
        return document


class GrpcDoor:
    """Over gRPC."""

    def __init__(self, client: GrpcClient) -> None:
        self._client = client

    def live(self) -> bool:
        return bool(self._client.call("ServerLive", pb.ServerLiveRequest()).live)

    def ready(self) -> bool:
        return bool(self._client.call("ServerReady", pb.ServerReadyRequest()).ready)

    def model_ready(self, model: str, version: str = "") -> bool | Refusal:
        answer = self._ask("ModelReady", pb.ModelReadyRequest(name=model, version=version))
        return answer if isinstance(answer, Refusal) else bool(answer["ready"])

    def server(self) -> Document:
        return known(self._ask("ServerMetadata", pb.ServerMetadataRequest()))

    def metadata(self, model: str, version: str = "") -> Document | Refusal:
        return self._ask("ModelMetadata", pb.ModelMetadataRequest(name=model, version=version))

    def config(self, model: str, version: str = "") -> Document | Refusal:
        answer = self._ask("ModelConfig", pb.ModelConfigRequest(name=model, version=version))
        if isinstance(answer, Refusal):
            return answer
        config: Document = answer["config"]
        return config

    def statistics(self, model: str = "", version: str = "") -> Document | Refusal:
        return self._ask("ModelStatistics", pb.ModelStatisticsRequest(name=model, version=version))

    def _ask(self, method: str, request: Any) -> Document | Refusal:
        try:
            return as_json(self._client.call(method, request))
        except grpc.RpcError as error:
            return Refusal(status(error), details(error))


def model_path(model: str, version: str = "") -> str:
    return f"/v2/models/{quote(model)}{f'/versions/{version}' if version else ''}"


def as_json(answer: message.Message) -> Document:
    """A message as the protocol writes it in JSON: enums by name, integers as numbers, every scalar and list printed,
    messages and members of a oneof that are not set left out, keys in the order of the file.
    """
    document: Document = {}
    for entry in answer.DESCRIPTOR.fields:
        value = getattr(answer, entry.name)
        if entry.message_type is not None and entry.message_type.GetOptions().map_entry:
            of = entry.message_type.fields_by_name["value"]
            document[entry.name] = {str(key): _value(of, value[key]) for key in value}
        elif entry.is_repeated:
            document[entry.name] = [_value(entry, item) for item in value]
        elif not entry.has_presence or answer.HasField(entry.name):
            document[entry.name] = _value(entry, value)
    return document


def _value(entry: Any, value: Any) -> Any:
    if entry.message_type is not None:
        return as_json(value)
    return entry.enum_type.values_by_number[value].name if entry.enum_type is not None else value
