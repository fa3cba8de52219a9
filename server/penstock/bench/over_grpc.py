"""gRPC on grpcio's asyncio client, with a request that is serialised once and answers that are not read."""

from contextlib import closing

import grpc

from penstock.bench import cpu
from penstock.bench.awaited import AwaitedCarrier
from penstock.client.access import Headers
from penstock.client.over_grpc import SERVICE, UNLIMITED, Grpc, encode, metadata
from penstock.client.transport import Metadata
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest


class GrpcTarget:
    """A server at HOST:PORT. All requests share one connection. Raises ServingError(INVALID) for no such address."""

    def __init__(self, address: str, headers: Headers = ()) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ServingError(Kind.INVALID, f"--grpc expects HOST:PORT, got '{address}'")
        self.address = address
        self._host, self._port = host.strip("[]"), int(port)
        self._headers = headers
        self._channel: grpc.aio.Channel | None = None

    def metadata(self, model: str, version: str) -> Metadata:
        with closing(Grpc(self.address, self._headers)) as client:
            return client.metadata(model, version)

    async def connect(self, request: InferRequest, count: int) -> list[AwaitedCarrier]:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, UNLIMITED)
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/ModelInfer")
        message, shown = encode(request).SerializeToString(), metadata(self._headers)

        async def exchange() -> str:
            try:
                await call(message, metadata=shown)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name} {' '.join((error.details() or '').split())}".strip()
            return ""

        return [AwaitedCarrier(exchange) for _ in range(count)]

    def server_pids(self) -> tuple[int, ...]:
        return cpu.listeners(self._host, self._port)

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
