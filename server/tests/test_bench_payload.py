"""The request that a load sends."""

import json
from pathlib import Path

import numpy as np
import pytest
from penstock.bench import payload
from penstock.bench.payload import Wanted
from penstock.client.transport import Metadata, TensorInfo
from penstock.errors import ServingError
from penstock.messages import InferRequest
from penstock.tensor import BOOL, BYTES, DATATYPES, FP16, FP32, Datatype, Tensor, objects


def metadata(**inputs: tuple[Datatype, tuple[int, ...]]) -> Metadata:
    return Metadata({name: TensorInfo(name, datatype, shape) for name, (datatype, shape) in inputs.items()}, {})


@pytest.mark.parametrize("datatype", DATATYPES.values(), ids=str)
def test_data_are_generated_for_every_datatype(datatype: Datatype) -> None:
    made = payload.request("m", "3", metadata(X=(datatype, (-1, 4))), Wanted(rows=2))
    array = made.inputs["X"].array
    assert (made.model, made.version, made.outputs) == ("m", "3", {})
    assert (array.dtype, array.shape) == (datatype.dtype, (2, 4))
    if datatype is BYTES:
        assert set(array.flat) == {b"1"}
    else:
        assert ((array >= 0) & (array <= 1)).all()


def test_data_are_the_same_in_every_run() -> None:
    first, second = (payload.request("m", "", metadata(X=(FP32, (3,))), Wanted()) for _ in range(2))
    assert first.inputs["X"].array.tolist() == second.inputs["X"].array.tolist()


def test_a_shape_is_stated_for_open_dimensions() -> None:
    inputs = metadata(X=(FP32, (-1, -1)), Y=(FP32, (-1, 2)), Z=(FP32, ()))
    made = payload.request("m", "", inputs, Wanted(rows=1, shapes={"X": (5, 6)}))
    assert {name: tensor.array.shape for name, tensor in made.inputs.items()} == {"X": (5, 6), "Y": (1, 2), "Z": ()}


@pytest.mark.parametrize(
    ("shape", "wanted", "message"),
    [
        ((-1, -1), Wanted(), "input 'X' has the shape [-1,-1]: state one with --shape X:DIM,DIM,..."),
        ((4,), Wanted(rows=2), "input 'X' has the shape [4]: no room for 2 rows"),
        ((4,), Wanted(shapes={"W": (1,)}), "model 'm' has no input 'W'; its inputs are: X"),
        ((4,), Wanted(data={"W": np.zeros(4)}), "model 'm' has no input 'W'; its inputs are: X"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(shape: tuple[int, ...], wanted: Wanted, message: str) -> None:
    with pytest.raises(ServingError) as refusal:
        payload.request("m", "", metadata(X=(FP32, shape)), wanted)
    assert refusal.value.message == message


def test_arrays_of_a_file_are_sent_and_nothing_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", X=np.array([[0.5, 2.0]]), TEXT=np.array(["a", "bc"]))
    inputs = metadata(X=(FP32, (-1, 2)), TEXT=(BYTES, (-1,)), OPTIONAL=(FP32, (1,)))
    made = payload.request("m", "", inputs, Wanted(data=payload.read(tmp_path / "data.npz")))
    assert [*made.inputs] == ["X", "TEXT"]
    assert made.inputs["X"].array.dtype == np.float32
    assert made.inputs["X"].array.tolist() == [[0.5, 2.0]]
    assert made.inputs["TEXT"].array.tolist() == [b"a", b"bc"]


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("nothing")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("data.npz", "one.npy", "missing.npz"):
        with pytest.raises(ServingError, match="cannot read arrays from '"):
            payload.read(tmp_path / name)


def test_a_request_in_json_has_numbers_texts_and_truth_values() -> None:
    inputs = {
        "X": Tensor("X", FP32, np.array([[0.1, 2]], np.float32)),
        "H": Tensor("H", FP16, np.array([0.5], np.float16)),
        "B": Tensor("B", BOOL, np.array([True, False])),
        "T": Tensor("T", BYTES, objects(["é".encode()], (1, 1))),
    }
    assert json.loads(payload.json_body(InferRequest("m", "", "", inputs, {}))) == {
        "inputs": [
            {"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [0.1, 2.0]},
            {"name": "H", "datatype": "FP16", "shape": [1], "data": [0.5]},
            {"name": "B", "datatype": "BOOL", "shape": [2], "data": [True, False]},
            {"name": "T", "datatype": "BYTES", "shape": [1, 1], "data": ["é"]},
        ]
    }


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("X", FP32, np.array([np.nan], np.float32)),
        Tensor("X", FP16, np.array([np.inf], np.float16)),
        Tensor("X", BYTES, objects([b"\xff"], (1,))),
    ],
    ids=["NaN", "infinity", "no UTF-8"],
)
def test_what_json_cannot_carry_is_refused(tensor: Tensor) -> None:
    with pytest.raises(ServingError, match="input 'X' holds"):
        payload.json_body(InferRequest("m", "", "", {"X": tensor}, {}))
