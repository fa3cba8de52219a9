"""Models of the conformance tests as MLServer serves them: runtimes of its own kind, run in its environment."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class Simple(MLModel):  # type: ignore[misc]  # MLServer is not installed where types are checked
    """INT32 INPUT0, INPUT1 [n,16] → OUTPUT0 their sum, OUTPUT1 their difference."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        left, right = (self.decode(tensor, default_codec=NumpyCodec) for tensor in payload.inputs)
        results = {"OUTPUT0": left + right, "OUTPUT1": left - right}
        asked = [output.name for output in payload.outputs or ()] or list(results)
        outputs = [NumpyCodec.encode_output(name, results[name]) for name in asked]
        return InferenceResponse(id=payload.id, model_name=self.name, model_version=self.version, outputs=outputs)


class Identity(MLModel):  # type: ignore[misc]
    """INPUT0 → OUTPUT0, whatever it holds."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (sent,) = payload.inputs
        output = ResponseOutput(name="OUTPUT0", datatype=sent.datatype, shape=sent.shape, data=sent.data)
        return InferenceResponse(id=payload.id, model_name=self.name, model_version=self.version, outputs=[output])
