"""The k greatest values of an output, as strings."""

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, Output, Refusal, Tensor, infer, refusal
from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.server import Target
from conformance_tests.tensors import DATATYPES, Array, texts

needs = pytest.mark.needs
VALUES = [5, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 7]


def classes(carrier: Carrier, k: int, rows: Array, model: str = "simple") -> Tensor:
    """OUTPUT0 as classes: the rows themselves, for the other input is zero."""
    datatype = next(name for name, entry in DATATYPES.items() if entry.dtype == rows.dtype)
    inputs = [Input("INPUT0", datatype, rows)]
    if model == "simple":
        inputs.append(Input("INPUT1", datatype, np.zeros_like(rows)))
    (output,) = infer(carrier, Call(model, inputs, [Output("OUTPUT0", k)])).outputs
    assert (output.name, output.datatype) == ("OUTPUT0", "BYTES")
    return output


@clause("classification.topk", "classification.encodings")
@needs("simple")
def test_the_greatest_come_first(carrier: Carrier) -> None:
    assert classes(carrier, 3, np.array([VALUES], np.int32)).array.tolist() == [[b"9:7", b"7:15", b"5:0"]]


@clause("classification.shape")
@needs("simple")
def test_each_row_of_a_batch_has_its_own(carrier: Carrier) -> None:
    rows = np.array([VALUES, [-value for value in range(16)]], np.int32)
    assert classes(carrier, 2, rows).array.tolist() == [[b"9:7", b"7:15"], [b"0:0", b"-1:1"]]


@clause("classification.shape")
@needs("identity_int32")
def test_a_model_that_does_not_batch_has_one_list_for_all(carrier: Carrier) -> None:
    matrix = np.array([[1, 9], [7, 3]], np.int32)
    assert classes(carrier, 3, matrix, "identity_int32").array.tolist() == [b"9:1", b"7:2", b"3:3"]


@clause("classification.k_beyond")
@needs("simple")
def test_k_beyond_the_elements_gives_all(carrier: Carrier) -> None:
    found = classes(carrier, 100, np.arange(16, dtype=np.int32).reshape(1, 16)).array
    assert found.tolist() == [[f"{i}:{i}".encode() for i in reversed(range(16))]]


@clause("classification.labels", "classification.number_format")
@needs("digits")
def test_labels_are_appended(carrier: Carrier) -> None:
    image = np.zeros((1, 1, 8, 8), np.float32)
    image[0, 0, 1:7, 3:5] = 16  # an upright stroke
    inputs = [Input("image", "FP32", image)]
    plain = infer(carrier, Call("digits", inputs))["probabilities"]
    (output,) = infer(carrier, Call("digits", inputs, [Output("probabilities", 10)])).outputs
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    found = [element.decode().split(":") for element in output.array[0]]
    assert {int(index): label for _, index, label in found} == dict(enumerate(names))
    assert [value for value, _, _ in found] == [f"{plain[0, int(index)]:.6f}" for _, index, _ in found]
    assert [float(value) for value, _, _ in found] == sorted((float(value) for value, _, _ in found), reverse=True)
    assert found[0][2] == "one"


@clause("classification.number_format")
@pytest.mark.parametrize(
    ("datatype", "values", "want"),
    [
        ("FP32", [0.95, -1.5], ["0.950000:0", "-1.500000:1"]),
        ("FP32", [1e10, 1e-9], ["10000000000.000000:0", "0.000000:1"]),
        ("FP64", [1 / 3, 2.0], ["2.000000:1", "0.333333:0"]),
        ("UINT64", [2**64 - 1, 1], ["18446744073709551615:0", "1:1"]),
        ("INT8", [-128, 127], ["127:1", "-128:0"]),
        ("UINT8", [7, 255], ["255:1", "7:0"]),
    ],
)
def test_numbers_are_printed_so(
    carrier: Carrier, target: Target, datatype: str, values: list[float], want: list[str]
) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    rows = np.array([values], DATATYPES[datatype].dtype)
    assert classes(carrier, 2, rows, model).array.tolist() == [text.encode() for text in want]


@clause("classification.other_outputs")
@needs("simple")
def test_the_other_outputs_remain_tensors(carrier: Carrier) -> None:
    rows = np.array([VALUES], np.int32)
    inputs = [Input("INPUT0", "INT32", rows), Input("INPUT1", "INT32", np.ones_like(rows))]
    reply = infer(carrier, Call("simple", inputs, [Output("OUTPUT0", 1), Output("OUTPUT1")]))
    assert reply["OUTPUT0"].tolist() == [[b"10:7"]]
    assert reply["OUTPUT1"].tolist() == [[value - 1 for value in VALUES]]


@clause("classification.unsupported")
@pytest.mark.parametrize(
    ("carrier", "datatype"),
    [
        (carrier, datatype)
        for datatype in ("BOOL", "FP16", "BF16", "BYTES")
        for carrier in ("http-json", "http-binary", "grpc-raw", "grpc-typed")
        if carrier != "grpc-typed" or DATATYPES[datatype].typed
    ],
    indirect=["carrier"],
)
def test_what_has_no_order_of_numbers_has_no_classes(carrier: Carrier, target: Target, datatype: str) -> None:
    model = f"identity_{datatype.lower()}"
    target.require(model)
    data = texts(["a"], (1, 1)) if datatype == "BYTES" else np.ones((1, 1), DATATYPES[datatype].dtype)
    text = f"class result not available for output due to unsupported type '{datatype}'"
    call = Call(model, [Input("INPUT0", datatype, data)], [Output("OUTPUT0", 1)])
    assert refusal(carrier, call) == Refusal("INVALID_ARGUMENT", text)


@clause("classification.zero")
@needs("identity_int32")
def test_no_classes_asked_for_means_the_tensor(http: HttpClient) -> None:
    document = {
        "inputs": [{"name": "INPUT0", "shape": [1, 2], "datatype": "INT32", "data": [3, 4]}],
        "outputs": [{"name": "OUTPUT0", "parameters": {"classification": 0}}],
    }
    answer = http.post("/v2/models/identity_int32/infer", document)
    assert answer.json()["outputs"] == [{"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 2], "data": [3, 4]}]


@clause("classification.encodings")
@needs("simple")
def test_classes_are_text_in_json(http: HttpClient) -> None:
    document = {
        "inputs": [
            {"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": VALUES},
            {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [0] * 16},
        ],
        "outputs": [{"name": "OUTPUT0", "parameters": {"classification": 3}}],
    }
    assert http.post("/v2/models/simple/infer", document).body == (
        b'{"model_name":"simple","model_version":"1","outputs":'
        b'[{"name":"OUTPUT0","datatype":"BYTES","shape":[1,3],"data":["9:7","7:15","5:0"]}]}'
    )


@clause("classification.type")
@needs("simple")
@pytest.mark.parametrize("k", [1.5, True])
def test_k_is_an_unsigned_integer(http: HttpClient, k: object) -> None:
    document = {
        "inputs": [{"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": VALUES}],
        "outputs": [{"name": "OUTPUT0", "parameters": {"classification": k}}],
    }
    answer = http.post("/v2/models/simple/infer", document)
    text = "Unable to set 'classification': attempt to access JSON non-unsigned-integer as unsigned-integer"
    assert (answer.status, answer.error) == (400, text)
