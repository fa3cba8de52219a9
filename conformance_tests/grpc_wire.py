"""gRPC on grpcio, with the messages that tritonclient ships; health and reflection in bytes, for it ships none."""

from collections.abc import Iterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

LIMIT_S = 30.0
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
HEALTH = {1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN", 0: "UNKNOWN"}

pb: Any = service_pb2


class GrpcClient:
    """One channel. Calls raise grpc.RpcError; `refusal` turns one into its status and details."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, UNLIMITED)
        self.stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def call(self, method: str, request: Any, **options: Any) -> Any:
        """One unary call of GRPCInferenceService by name, such as `ModelInfer`."""
        return getattr(self.stub, method)(request, timeout=LIMIT_S, **options)

    def refusal(self, method: str, request: Any, **options: Any) -> tuple[str, str]:
        """Name of the status and details of a call that must fail."""
        try:
            answer = self.call(method, request, **options)
        except grpc.RpcError as error:
            return status(error), details(error)
        raise AssertionError(f"{method} was answered: {answer}")

    def health(self, service: str) -> str:
        """`Check` of grpc.health.v1. Raises grpc.RpcError."""
        check: Any = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        return _health(check(_text_field(1, service), timeout=LIMIT_S))

    def watch(self, service: str) -> str:
        """The first answer of `Watch`. Raises grpc.RpcError."""
        watch: Any = self.channel.unary_stream("/grpc.health.v1.Health/Watch")
        call = watch(_text_field(1, service), timeout=LIMIT_S)
        first = _health(next(call))
        call.cancel()
        return first

    def reflect(self, version: str, field: int, text: str) -> bytes:
        """The one answer to one question of server reflection; `field` 7 lists services, 4 finds a symbol's file."""
        path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        ask: Any = self.channel.stream_stream(path)
        return bytes(next(ask(iter([_text_field(field, text)]), timeout=LIMIT_S)))


def status(error: Any) -> str:
    """`INVALID_ARGUMENT` and so on, of a grpc.RpcError."""
    return str(error.code().name)


def details(error: Any) -> str:
    """The text of a grpc.RpcError."""
    return error.details() or ""


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of a message in bytes; length-delimited ones as bytes, varints as int."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value
        else:
            assert key & 7 == 0, f"wire type {key & 7} is not expected here"
            yield key >> 3, value


def _health(answer: bytes) -> str:
    number = dict(fields(answer)).get(1, 0)
    assert isinstance(number, int)
    return HEALTH[number]


def _text_field(number: int, text: str) -> bytes:
    encoded = text.encode()
    assert len(encoded) < 128, "one byte of length"
    return bytes([number << 3 | 2, len(encoded)]) + encoded


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
