"""Servers that do next to nothing: what gRPC and bytes themselves cost.

Run as `python -m conformance_tests.benchmarks.references WHICH`. `grpc`: grpcio's asyncio server as its documentation
shows it, which answers ModelInfer for `simple` with one constant message, and what perf_analyzer asks besides.
`asgi MODEL`: an ASGI application without a framework on uvicorn, that runs `simple` from the file MODEL on ONNX Runtime
within the call. `bytes SIZE`: an asyncio Protocol on uvloop that reads SIZE bytes and writes
as many. Each prints its address.
"""

import asyncio
import socket
import sys
from typing import Any

import grpc
import numpy as np
import onnxruntime
import orjson
import uvicorn
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


class Inline:
    """An ASGI application that serves `simple` as one would write it: it reads the JSON and the tensors of a POST, runs
    ONNX Runtime, and writes JSON and tensors. It checks, counts and limits nothing.

    GET gets what perf_analyzer and `penstock bench` ask of a model, and its statistics.
    """

    def __init__(self, model: str) -> None:
        self._session: Any = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._served = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if scope["method"] == "POST":
            before = int(dict(scope["headers"])[b"inference-header-content-length"])
            head, answer = self._infer(body, before)
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"inference-header-content-length", b"%d" % len(head)),
                (b"content-length", b"%d" % (len(head) + len(answer))),
            ]
            answer = head + answer
        else:
            answer = orjson.dumps(self._document(scope["path"].rpartition("/")[2]))
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _infer(self, body: bytes, at: int) -> tuple[bytes, bytes]:
        """The JSON and the tensors of the answer. The request's tensors lie behind its first `at` bytes."""
        request = orjson.loads(body[:at])
        feed = {}
        for entry in request["inputs"]:
            end = at + entry["parameters"]["binary_data_size"]
            feed[entry["name"]] = np.frombuffer(body[at:end], np.int32).reshape(entry["shape"])
            at = end
        names = [entry["name"] for entry in request.get("outputs", ())] or list(TENSORS["output"])
        arrays = self._session.run(names, feed)
        self._served += 1
        outputs = [
            {"name": name, "datatype": "INT32", "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
            for name, array in zip(names, arrays, strict=True)
        ]
        head = orjson.dumps({"model_name": "simple", "model_version": "1", "outputs": outputs})
        return head, b"".join(array.tobytes() for array in arrays)

    def _document(self, asked: str) -> dict[str, Any]:
        if asked == "config":
            config = {side: [{"name": name, "data_type": "TYPE_INT32", "dims": [16]} for name in names]
                      for side, names in TENSORS.items()}  # fmt: skip
            return {"name": "simple", "max_batch_size": 8, "backend": "constant", **config}
        if asked == "stats":
            parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit",
                     "cache_miss")  # fmt: skip
            counts = {part: {"count": self._served, "ns": 0} for part in parts}
            return {"model_stats": [{"name": "simple", "version": "1", "last_inference": 0, "inference_count":
                                     self._served, "execution_count": self._served, "inference_stats": counts,
                                     "batch_stats": []}]}  # fmt: skip
        sides = {f"{side}s": [{"name": name, "datatype": "INT32", "shape": [-1, 16]} for name in names]
                 for side, names in TENSORS.items()}  # fmt: skip
        return {"name": "simple", "versions": ["1"], "platform": "inline", "extensions": ["statistics"], **sides}


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


async def serve_asgi(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(Inline(model), loop="none", lifespan="off", log_level="warning", access_log=False)
        await uvicorn.Server(config).serve(sockets=[listener])


async def serve_bytes(size: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Bytes(size), "127.0.0.1", 0)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        asyncio.run(serve_grpc())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_asgi(sys.argv[2]) if sys.argv[1] == "asgi" else serve_bytes(int(sys.argv[2])))
