"""Messages are plain data, so a request can go to another process unchanged."""

import pickle

import numpy as np
from penstock.messages import InferRequest, InferResponse, RequestedOutput, Sequence
from penstock.tensor import BF16, BYTES, DATATYPES, FP32, Tensor, objects


def test_a_request_survives_pickling() -> None:
    sent = InferRequest(
        "m",
        "3",
        "id-1",
        {
            "X": Tensor("X", FP32, np.array([[1.5, 2.5]], np.float32)),
            "B": Tensor("B", BF16, np.array([1.0]).astype(BF16.dtype)),
            "S": Tensor("S", BYTES, objects([b"a", b"\x00"], [2, 1])),
        },
        {"Y": RequestedOutput("Y", classification=3)},
        parameters={"int": 1, "flag": True, "text": "x", "number": 0.5},
        priority=2,
        deadline_ns=123,
        sequence=Sequence("s", start=True),
        rows=1,
    )
    got = pickle.loads(pickle.dumps(sent))
    assert (got.model, got.version, got.id, got.priority, got.deadline_ns, got.rows) == ("m", "3", "id-1", 2, 123, 1)
    assert (got.outputs, got.parameters, got.sequence) == (sent.outputs, sent.parameters, sent.sequence)
    for name, tensor in sent.inputs.items():
        assert got.inputs[name].datatype is tensor.datatype
        assert got.inputs[name].array.dtype == tensor.array.dtype
        np.testing.assert_array_equal(got.inputs[name].array, tensor.array)


def test_every_datatype_is_the_same_row_after_pickling() -> None:
    for row in DATATYPES.values():
        assert pickle.loads(pickle.dumps(row)) is row


def test_a_response_survives_pickling() -> None:
    sent = InferResponse("m", "1", "id", [Tensor("Y", FP32, np.array([1.0], np.float32))], {"a": 1})
    got = pickle.loads(pickle.dumps(sent))
    assert (got.model, got.version, got.id, got.parameters) == ("m", "1", "id", {"a": 1})
    np.testing.assert_array_equal(got.outputs[0].array, sent.outputs[0].array)
