"""A gRPC server that computes nothing: it answers each method as another server once did.

`python -m conformance_tests.gpu.constant DIRECTORY` serves the messages that lie there, each in a file called after its
method, and prints its address. It is grpcio's asyncio server, as its documentation shows it.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc

SERVICE = "/inference.GRPCInferenceService/"
METHODS = ("ServerLive", "ModelMetadata", "ModelInfer")
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def record(address: str, directory: Path, requests: dict[str, bytes]) -> None:
    """Keep what the server at `address` answers to these messages, by method."""
    directory.mkdir()
    with grpc.insecure_channel(address, UNLIMITED) as channel:
        for method, message in requests.items():
            call: Any = channel.unary_unary(SERVICE + method)
            (directory / method).write_bytes(call(message))


class Constant(grpc.GenericRpcHandler):
    """The same bytes for each method, whatever comes."""

    def __init__(self, directory: Path) -> None:
        self._answers = {SERVICE + path.name: path.read_bytes() for path in directory.iterdir()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        body = self._answers.get(handler_call_details.method)
        if body is None:
            return None

        async def answer(_request: bytes, _context: object) -> bytes:
            return body

        return grpc.unary_unary_rpc_method_handler(answer)


async def serve(directory: Path) -> None:
    server = grpc.aio.server(handlers=(Constant(directory),), options=UNLIMITED)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
