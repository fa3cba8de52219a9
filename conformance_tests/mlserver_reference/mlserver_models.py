"""Models of the conformance tests as MLServer serves them: runtimes of its own kind, run in its environment.

MLServer leaves it to a runtime to look for its inputs and outputs, so these do, and raise MLServer's own error.
"""

from collections.abc import Mapping

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput


class Model(MLModel):  # type: ignore[misc]  # MLServer is not installed where types are checked
    """Finds inputs and outputs by name."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        results = self.outputs_of({tensor.name: tensor for tensor in self.required(payload)})
        asked = [output.name for output in payload.outputs or ()] or list(results)
        for name in asked:
            if name not in results:
                raise InferenceError(f"model '{self.name}' has no output '{name}'")
        outputs = [results[name] for name in asked]
        return InferenceResponse(id=payload.id, model_name=self.name, model_version=self.version, outputs=outputs)

    def required(self, payload: InferenceRequest) -> list[RequestInput]:
        given = {tensor.name: tensor for tensor in payload.inputs}
        for tensor in self.inputs:
            if tensor.name not in given:
                raise InferenceError(f"model '{self.name}' requires the input '{tensor.name}'")
        return [given[tensor.name] for tensor in self.inputs]

    def outputs_of(self, inputs: Mapping[str, RequestInput]) -> dict[str, ResponseOutput]:
        raise NotImplementedError


class Simple(Model):
    """INT32 INPUT0, INPUT1 [n,16] → OUTPUT0 their sum, OUTPUT1 their difference."""

    def outputs_of(self, inputs: Mapping[str, RequestInput]) -> dict[str, ResponseOutput]:
        left, right = (self.decode(inputs[name], default_codec=NumpyCodec) for name in ("INPUT0", "INPUT1"))
        results = {"OUTPUT0": left + right, "OUTPUT1": left - right}
        return {name: NumpyCodec.encode_output(name, result) for name, result in results.items()}


class SimpleString(Model):
    """The same for integers written as BYTES."""

    def outputs_of(self, inputs: Mapping[str, RequestInput]) -> dict[str, ResponseOutput]:
        left, right = ([*map(int, StringCodec.decode_input(inputs[name]))] for name in ("INPUT0", "INPUT1"))
        results = {
            "OUTPUT0": [b"%d" % (a + b) for a, b in zip(left, right, strict=True)],
            "OUTPUT1": [b"%d" % (a - b) for a, b in zip(left, right, strict=True)],
        }
        shape = inputs["INPUT0"].shape
        return {
            name: ResponseOutput(name=name, datatype="BYTES", shape=shape, data=result)
            for name, result in results.items()
        }


class Identity(Model):
    """INPUT0 → OUTPUT0, and so on, whatever they hold."""

    def outputs_of(self, inputs: Mapping[str, RequestInput]) -> dict[str, ResponseOutput]:
        return {
            name.replace("INPUT", "OUTPUT"): ResponseOutput(
                name=name.replace("INPUT", "OUTPUT"), datatype=sent.datatype, shape=sent.shape, data=sent.data
            )
            for name, sent in inputs.items()
        }


class TimesVersion(Model):
    """y = x times the model's version."""

    def outputs_of(self, inputs: Mapping[str, RequestInput]) -> dict[str, ResponseOutput]:
        y = self.decode(inputs["x"], default_codec=NumpyCodec) * int(self.version)
        # Not by NumpyCodec, which makes [n] of one axis [n,1].
        return {"y": ResponseOutput(name="y", datatype="FP32", shape=list(y.shape), data=y.tolist())}
