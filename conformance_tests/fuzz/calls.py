"""Good calls of many models: what every generator starts from before it breaks something."""

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from conformance_tests.carriers import Call, Input, Output, infer_message, simple
from conformance_tests.tensors import DATATYPES, Array, pack, texts, to_json

# Values that a reader may trip over, by datatype; the others count 0, 1, 2 and so on.
SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False, True, True, False, False],
    "UINT64": [0, 1, 2**32, 2**53 + 1, 2**63, 2**64 - 1],
    "INT64": [0, -1, 2**31, -(2**53) - 1, -(2**63), 2**63 - 1],
    "FP32": [0.0, -0.0, 1.5, float("nan"), float("inf"), -3.4e38],
    "FP64": [0.0, -0.0, 1.5, float("nan"), float("-inf"), 5e-324],
}


def _sample(datatype: str, shape: Sequence[int]) -> Array:
    if datatype == "BYTES":
        return texts(["", "a", "zwölf", "0", "a\0b", "x" * 40], shape)
    dtype = DATATYPES[datatype].dtype
    values = np.array(SAMPLES.get(datatype, range(6)), np.float32 if dtype == ml_dtypes.bfloat16 else dtype)
    return values.astype(dtype).reshape(shape)


def _floats(*shape: int) -> Array:
    return np.linspace(0, 6, int(np.prod(shape)), dtype=np.float32).reshape(shape)


def _calls() -> list[Call]:
    numbers = texts([str(number) for number in range(16)], (1, 16))
    good = [
        simple("fuzz"),
        simple(rows=3, outputs=[Output("OUTPUT1"), Output("OUTPUT0", classification=3)]),
        Call("simple_string", [Input("INPUT0", "BYTES", numbers), Input("INPUT1", "BYTES", numbers)]),
        Call("digits", [Input("image", "FP32", _floats(2, 1, 8, 8))], [Output("probabilities", classification=2)]),
        Call("iris", [Input("measurements", "FP32", _floats(2, 4))]),
        Call("sentiment", [Input("text", "BYTES", texts(["a fine film", ""], (2, 1)))], [Output("label")]),
        Call("matmul", [Input("a", "FP32", _floats(2, 3)), Input("b", "FP32", _floats(3, 2))]),
        Call("times_version", [Input("x", "FP32", _floats(3))], version="2"),
        Call("fixed_shape", [Input("INPUT0", "FP32", _floats(2, 3))]),
        Call("batched_identity_fp32", [Input("INPUT0", "FP32", _floats(3, 4))]),
        Call("identity_scalar_fp32", [Input("INPUT0", "FP32", _floats(1), [])]),
        Call("identity_1d_int64", [Input("INPUT0", "INT64", _sample("INT64", (6,)))]),
        Call("identity_rank4_fp32", [Input("INPUT0", "FP32", _floats(1, 2, 3, 1))]),
        Call("optional_input", [Input("INPUT0", "FP32", _floats(3)), Input("BIAS", "FP32", _floats(1))]),
        Call("optional_input", [Input("INPUT0", "FP32", _floats(0))]),
        Call(
            "two_inputs_mixed",
            [Input("INPUT0", "FP32", _floats(2)), Input("INPUT1", "BYTES", texts(["a", "b"]))],
            [Output("OUTPUT1")],
            id="1",
            parameters={"priority": 1, "note": "x", "on": True, "weight": 0.5},
        ),
        Call("string_classes", [Input("INPUT0", "FP32", _floats(2, 2))], [Output("OUTPUT0", classification=1)]),
        Call("failing", [Input("INPUT0", "INT64", np.array([0, 1, 3], np.int64))]),
        Call("failing", [Input("INPUT0", "INT64", np.array([77], np.int64))]),
    ]
    identities = [
        Call(f"identity_{name.lower()}", [Input("INPUT0", name, _sample(name, (2, 3)))]) for name in DATATYPES
    ]
    return good + identities


CALLS = _calls()
MODELS = sorted({call.model for call in CALLS})


def blobs(call: Call) -> list[bytes]:
    """The data of each input, as bytes."""
    return [pack(tensor.datatype, tensor.array) for tensor in call.inputs]


def document(call: Call, *, binary: bool = False) -> dict[str, Any]:
    """The request's JSON: data inside, or, where `binary`, behind it and wanted back like that."""
    inputs: list[dict[str, Any]] = []
    for tensor, blob in zip(call.inputs, blobs(call), strict=True):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.claimed}
        if binary:
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = to_json(tensor.datatype, tensor.array)
        inputs.append(entry)
    outputs: list[dict[str, Any]] = []
    for output in call.outputs:
        asked: dict[str, Any] = {"binary_data": True} if binary else {}
        if output.classification:
            asked["classification"] = output.classification
        outputs.append({"name": output.name, "parameters": asked})
    found: dict[str, Any] = {"id": call.id, "parameters": dict(call.parameters), "inputs": inputs, "outputs": outputs}
    if binary and not outputs:
        found["parameters"]["binary_data_output"] = True
    return {key: value for key, value in found.items() if value}


def message(call: Call, *, typed: bool = False) -> Any:
    """The request as a ModelInferRequest: raw contents, or typed ones where the datatypes have them."""
    made = infer_message(call)
    if typed and all(DATATYPES[tensor.datatype].typed for tensor in call.inputs):
        for entry, tensor in zip(made.inputs, call.inputs, strict=True):
            entry.contents.SetInParent()
            getattr(entry.contents, DATATYPES[tensor.datatype].typed).extend(tensor.array.ravel().tolist())
    else:
        made.raw_input_contents.extend(blobs(call))
    return made
