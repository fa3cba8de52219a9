"""The client without a server: the model runs in this process."""

import threading
from contextlib import ExitStack

from msgspec import structs

from penstock import in_process
from penstock.admission import Given, admit
from penstock.client.transport import Metadata, TensorInfo
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.runtime import PLENTY, Credit
from penstock.settings import Settings

Result = InferResponse | ServingError


class Local:
    """The model `name` out of `path`: a file, a model's directory or a repository.

    Raises ServingError where it does not load.
    """

    def __init__(self, name: str, path: str, settings: Settings) -> None:
        settings = structs.replace(settings, model_repository=(path,))
        self._stack = ExitStack()
        self._engine = self._stack.enter_context(in_process.loaded(name, settings))

    def metadata(self, model: str, version: str) -> Metadata:
        signature = self._engine.model(model, version).signature
        return Metadata(
            *(
                {spec.name: TensorInfo(spec.name, spec.datatype, spec.shape) for spec in side.values()}
                for side in (signature.inputs, signature.outputs)
            )
        )

    def infer(self, request: InferRequest) -> InferResponse:
        model = self._engine.model(request.model, request.version)
        if model.decoupled:
            raise ServingError(Kind.UNSUPPORTED, f"model '{model.name}' is decoupled: it may answer more than once")
        given = [
            Given(tensor.name, tensor.datatype.name, tensor.array.shape, tensor.array.reshape(-1))
            for tensor in request.inputs.values()
        ]
        admitted = admit(model.signature, request.id, given, request.outputs)
        request = structs.replace(request, version=model.version, inputs=admitted.inputs, rows=admitted.rows)
        answer = Answer()
        self._engine.submit(model, request, answer)
        return answer.wait()

    def close(self) -> None:
        self._stack.close()


class Answer:
    """A reply that a thread waits for. Progress is passed over."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._results: list[Result] = []

    def __call__(self, result: Result, final: bool = True, partial: bool = False) -> Credit:
        if not partial:
            self._results.append(result)
        if final:
            self._came.set()
        return PLENTY

    def wait(self) -> InferResponse:
        """Block until the final one has come. Raises the ServingError that it is."""
        self._came.wait()
        result = self._results[-1]
        if isinstance(result, ServingError):
            raise result
        return result
