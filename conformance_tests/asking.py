"""One question of each kind, asked over HTTP or over gRPC with headers: was it answered, or how was it refused."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc as grpcio
import numpy as np

from conformance_tests.carriers import Call, Input, infer_message
from conformance_tests.grpc_wire import GrpcClient, details, pb, status
from conformance_tests.http_wire import HttpClient, encode
from conformance_tests.server import Running

ONES = np.ones((1, 16), np.int32)
INFER = infer_message(Call("simple", [Input("INPUT0", "INT32", ONES), Input("INPUT1", "INT32", ONES)]))
INFER.raw_input_contents.extend([ONES.tobytes()] * 2)
INFER_JSON = encode(
    {
        "inputs": [
            {"name": name, "datatype": "INT32", "shape": [1, 16], "data": [1] * 16} for name in ("INPUT0", "INPUT1")
        ]
    }
)
# What can be asked of both protocols: verb, path and body, and the RPC with its message.
QUESTIONS: dict[str, tuple[tuple[str, str, bytes | None], tuple[str, Any]]] = {
    "live": (("GET", "/v2/health/live", None), ("ServerLive", pb.ServerLiveRequest())),
    "ready": (("GET", "/v2/health/ready", None), ("ServerReady", pb.ServerReadyRequest())),
    "model ready": (("GET", "/v2/models/simple/ready", None), ("ModelReady", pb.ModelReadyRequest(name="simple"))),
    "server": (("GET", "/v2", None), ("ServerMetadata", pb.ServerMetadataRequest())),
    "metadata": (("GET", "/v2/models/simple", None), ("ModelMetadata", pb.ModelMetadataRequest(name="simple"))),
    "unknown": (("GET", "/v2/models/nope", None), ("ModelMetadata", pb.ModelMetadataRequest(name="nope"))),
    "config": (("GET", "/v2/models/simple/config", None), ("ModelConfig", pb.ModelConfigRequest(name="simple"))),
    "statistics": (("GET", "/v2/models/stats", None), ("ModelStatistics", pb.ModelStatisticsRequest())),
    "infer": (("POST", "/v2/models/simple/infer", INFER_JSON), ("ModelInfer", INFER)),
}


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one protocol; an answer is its status, as that protocol writes it, and the text of an error or ""."""

    http: HttpClient | None = None
    grpc: GrpcClient | None = None

    @property
    def ok(self) -> tuple[int | str, str]:
        return self.either(200, "OK"), ""

    def ask(self, question: str, headers: Mapping[str, str] | None = None) -> tuple[int | str, str]:
        (verb, path, body), (rpc, message) = QUESTIONS[question]
        if self.http is not None:
            answer = self.http.request(verb, path, body, headers)
            return answer.status, "" if answer.status == 200 else answer.error
        assert self.grpc is not None
        metadata = [(name.lower(), value) for name, value in (headers or {}).items()]
        try:
            self.grpc.call(rpc, message, metadata=metadata)
        except grpcio.RpcError as error:
            return status(error), details(error)
        return "OK", ""

    def either(self, http: int, grpc: str) -> int | str:
        return http if self.http is not None else grpc


@contextlib.contextmanager
def asking(running: Running, protocol: str) -> Iterator[Asker]:
    if protocol == "http":
        yield Asker(http=HttpClient(running.http))
        return
    with contextlib.closing(GrpcClient(running.grpc)) as client:
        yield Asker(grpc=client)
