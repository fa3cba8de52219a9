"""A model without any protocol: an engine in this process, and its answers awaited on this loop."""

import asyncio
import os

from msgspec.structs import replace

from penstock.admission import Given, admit
from penstock.bench.awaited import AwaitedCarrier
from penstock.client.transport import Metadata, TensorInfo
from penstock.engine import Engine
from penstock.errors import ServingError
from penstock.messages import InferRequest
from penstock.tensor import pack


class LocalTarget:
    """An engine; its models lie at `address`."""

    def __init__(self, engine: Engine, address: str) -> None:
        self.address = address
        self._engine = engine

    def metadata(self, model: str, version: str) -> Metadata:
        signature = self._engine.model(model, version).signature
        inputs, outputs = (
            {spec.name: TensorInfo(spec.name, spec.datatype, spec.shape) for spec in side.values()}
            for side in (signature.inputs, signature.outputs)
        )
        return Metadata(inputs, outputs)

    async def connect(self, request: InferRequest, count: int) -> list[AwaitedCarrier]:
        model = self._engine.model(request.model, request.version)
        given = [
            Given(tensor.name, tensor.datatype.name, tensor.array.shape, pack(tensor.array, tensor.datatype))
            for tensor in request.inputs.values()
        ]
        admitted = admit(model.signature, "", given, ())
        request = replace(request, version=model.version, inputs=admitted.inputs, rows=admitted.rows)

        async def exchange() -> str:
            try:
                await self._engine.infer(model, request)
            except ServingError as error:
                return error.message
            finally:
                await asyncio.sleep(0)  # a model that runs inline leaves the loop no other moment
            return ""

        return [AwaitedCarrier(exchange) for _ in range(count)]

    def server_pids(self) -> tuple[int, ...]:
        """This process: its CPU time is the engine's and the load's together."""
        return (os.getpid(),)

    async def close(self) -> None:
        """The engine is its owner's to close."""
