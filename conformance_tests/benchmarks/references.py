"""Servers that do next to nothing: what gRPC and bytes themselves cost.

Run as `python -m conformance_tests.benchmarks.references WHICH`. `grpc`: grpcio's asyncio server as its documentation
shows it, which answers ModelInfer for `simple` with one constant message, and what perf_analyzer asks besides.
`bytes SIZE`: an asyncio Protocol on uvloop that reads SIZE bytes and writes as many. Each prints its address.
"""

import asyncio
import sys
from typing import Any

import grpc
import uvloop
from tritonclient.grpc import model_config_pb2, service_pb2

SERVICE = "/inference.GRPCInferenceService/"
pb: Any = service_pb2
TENSORS = {"input": ("INPUT0", "INPUT1"), "output": ("OUTPUT0", "OUTPUT1")}


def answers() -> dict[str, bytes]:
    """By method, what never changes."""
    metadata = pb.ModelMetadataResponse(name="simple", versions=["1"], platform="constant")
    config = pb.ModelConfigResponse()
    config.config.name, config.config.max_batch_size, config.config.backend = "simple", 8, "constant"
    infer = pb.ModelInferResponse(model_name="simple", model_version="1")
    int32: Any = model_config_pb2
    for side, names in TENSORS.items():
        for name in names:
            getattr(metadata, f"{side}s").add(name=name, datatype="INT32", shape=[-1, 16])
            getattr(config.config, side).add(name=name, data_type=int32.TYPE_INT32, dims=[16])
    for name in TENSORS["output"]:
        infer.outputs.add(name=name, datatype="INT32", shape=[1, 16])
        infer.raw_output_contents.append(bytes(64))
    messages = {
        "ServerLive": pb.ServerLiveResponse(live=True),
        "ServerReady": pb.ServerReadyResponse(ready=True),
        "ModelReady": pb.ModelReadyResponse(ready=True),
        "ServerMetadata": pb.ServerMetadataResponse(name="constant", extensions=["statistics"]),
        "ModelMetadata": metadata,
        "ModelConfig": config,
        "ModelInfer": infer,
    }
    return {SERVICE + name: message.SerializeToString() for name, message in messages.items()}


class Constant(grpc.GenericRpcHandler):
    """Bytes in, the same bytes out for each method; and how often it was asked to infer."""

    def __init__(self) -> None:
        self._answers = answers()
        self._served = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        path = handler_call_details.method
        if path == f"{SERVICE}ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._infer)
        if path == f"{SERVICE}ModelStatistics":
            return grpc.unary_unary_rpc_method_handler(self._statistics)
        if path not in self._answers:
            return None

        async def other(_body: bytes, _context: object) -> bytes:
            return self._answers[path]

        return grpc.unary_unary_rpc_method_handler(other)

    async def _infer(self, _body: bytes, _context: object) -> bytes:
        self._served += 1
        return self._answers[f"{SERVICE}ModelInfer"]

    async def _statistics(self, _body: bytes, _context: object) -> bytes:
        statistics = pb.ModelStatisticsResponse()
        model = statistics.model_stats.add(name="simple", version="1", inference_count=self._served)
        for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            getattr(model.inference_stats, part).count = self._served
        return bytes(statistics.SerializeToString())


class Bytes(asyncio.Protocol):
    """Reads so many bytes, then writes as many."""

    def __init__(self, size: int) -> None:
        self._answer = bytes(size)
        self._left = size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if not self._left:
            self._left = len(self._answer)
            self._transport.write(self._answer)


async def serve_grpc() -> None:
    server = grpc.aio.server(handlers=(Constant(),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


async def serve_bytes(size: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Bytes(size), "127.0.0.1", 0)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        asyncio.run(serve_grpc())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_bytes(int(sys.argv[2])))
