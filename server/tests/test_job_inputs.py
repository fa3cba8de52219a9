"""A job's JSON becomes tensors by the model's signature, and its answers become JSON. Protocol page jobs, section 6."""

import base64
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from penstock import oip_json
from penstock.errors import Kind, ServingError
from penstock.job_api.inputs import FieldError, Prepared, is_handler, is_oip, prepare
from penstock.messages import InferResponse, JobContext
from penstock.tensor import BF16, BOOL, BYTES, DATATYPES, FP32, Array, Tensor, objects

from . import fakes

LIMITS = oip_json.Limits(1 << 20, 8, 4)
TWO = """
    name: "m" backend: "fake" max_batch_size: 8
    input { name: "A" data_type: TYPE_FP32 dims: 2 } input { name: "B" data_type: TYPE_INT8 dims: -1 optional: true }
    output { name: "Y" data_type: TYPE_FP32 dims: 2 }
"""


def one(datatype: str, *dims: int, more: str = "") -> str:
    shape = " ".join(f"dims: {dim}" for dim in dims)
    return (
        f'name: "m" backend: "fake" {more} input {{ name: "A" data_type: TYPE_{datatype} {shape} }}'
        f' output {{ name: "Y" data_type: TYPE_{datatype} {shape} }}'
    )


class Still(fakes.EchoInstance):
    """Never runs: these tests end before and begin after the model."""

    def __init__(self) -> None:
        super().__init__(device="cuda:0")


def prepared(config: str, value: Any) -> Prepared:
    model = fakes.model(Still(), config=fakes.configuration(config))
    try:
        return prepare(model, value, orjson.dumps(value), JobContext("j", b"{}"), LIMITS)
    finally:
        model.close()


def array(config: str, value: Any, name: str = "A") -> Array:
    return prepared(config, value).request.inputs[name].array


def refused(config: str, value: Any) -> tuple[str, str]:
    """The field and the reason."""
    with pytest.raises(FieldError) as caught:
        prepared(config, value)
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message == f"INVALID_INPUT: {caught.value.field}: {caught.value.reason}"
    return caught.value.field, caught.value.reason


def written(made: Prepared, *tensors: Tensor) -> Any:
    return orjson.loads(made.write(InferResponse("m", "1", "j", list(tensors))))


# -- which form it is (6.1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"inputs": [{"name": "A", "datatype": "FP32"}]}, True),
        ({"inputs": [{"name": "A", "parameters": {"shared_memory_region": "r"}}]}, True),
        ({"inputs": [{"name": "A"}]}, False),
        ({"inputs": []}, False),
        ({"inputs": [1]}, False),
        ({"inputs": {"name": "A", "datatype": "FP32"}}, False),
        ([{"name": "A", "datatype": "FP32"}], False),
        (3, False),
    ],
)
def test_an_oip_request_is_told_by_its_inputs(value: Any, expected: bool) -> None:
    assert is_oip(value) is expected


def test_an_oip_request_is_handled_as_infer_handles_it() -> None:
    made = prepared(
        one("FP32", -1),
        {
            "id": "mine",
            "parameters": {"colour": "blue"},
            "inputs": [{"name": "A", "datatype": "FP32", "shape": [2], "data": [1, "NaN"]}],
            "outputs": [{"name": "Y"}],
        },
    )
    assert made.request.inputs["A"].array.tolist()[0] == 1
    assert (made.request.parameters, list(made.request.outputs)) == ({"colour": "blue"}, ["Y"])
    assert made.request.job == JobContext("j", b"{}")
    assert written(made, Tensor("Y", FP32, np.array([1.5, np.nan], np.float32))) == {
        "id": "mine",
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [2], "data": [1.5, "NaN"]}],
    }


def test_an_oip_answer_bears_no_id_that_was_not_sent() -> None:
    made = prepared(one("FP32", -1), {"inputs": [{"name": "A", "datatype": "FP32", "shape": [1], "data": [1]}]})
    assert made.request.id == "j"
    assert "id" not in written(made, Tensor("Y", FP32, np.ones(1, np.float32)))


def test_outputs_of_an_oip_request_may_be_asked_for_in_binary() -> None:
    entry = {"name": "A", "datatype": "FP32", "shape": [1], "data": [1]}
    made = prepared(one("FP32", -1), {"parameters": {"binary_outputs": ["Y"]}, "inputs": [entry]})
    assert made.request.parameters == {}
    values = np.array([1, 2], np.float32)
    [output] = written(made, Tensor("Y", FP32, values))["outputs"]
    assert output == {
        "name": "Y",
        "datatype": "FP32",
        "shape": [2],
        "b64": base64.b64encode(values.tobytes()).decode(),
    }
    [output] = written(made, Tensor("Y", FP32, np.empty(0, np.float32)))["outputs"]
    assert output["b64"] == ""


@pytest.mark.parametrize(
    ("names", "reason"), [(["Z"], "unexpected output 'Z' for model 'm'"), ("Y", "expected a list of output names")]
)
def test_wrong_names_of_binary_outputs_are_refused(names: Any, reason: str) -> None:
    entry = {"name": "A", "datatype": "FP32", "shape": [1], "data": [1]}
    value = {"parameters": {"binary_outputs": names}, "inputs": [entry]}
    assert refused(one("FP32", -1), value) == ("input.parameters.binary_outputs", reason)


def test_an_oip_request_is_refused_in_the_protocols_words() -> None:
    value = {"inputs": [{"name": "A", "datatype": "INT8", "shape": [1], "data": [1]}]}
    field, reason = refused(one("FP32", -1), value)
    assert (field, reason.partition("] ")[2]) == (
        "input",
        "inference input 'A' data-type is 'INT8', but model 'm' expects 'FP32'",
    )


def test_a_single_input_needs_no_name() -> None:
    assert array(one("FP32", -1), [1, 2.5]).tolist() == [1, 2.5]
    assert array(one("FP32"), 7).shape == ()
    assert refused(TWO, [1, 2]) == ("input", "expected an object with the inputs A, B, got a list")


def test_a_second_wrapping_is_taken_off_unless_it_is_the_inputs_name() -> None:
    assert array(one("FP32", -1), {"input": {"A": [1]}}).tolist() == [1]
    assert refused(one("FP32", -1), {"input": {"A": [1]}, "seed": 1}) == (
        "input.input",
        "unknown input; model 'm' has A",
    )
    named = one("FP32", -1).replace('"A"', '"input"')
    assert array(named, {"input": [1]}, "input").tolist() == [1]


def test_a_handlers_input_goes_in_untouched() -> None:
    config = """
        name: "m" backend: "handler"
        input { name: "input" data_type: TYPE_STRING dims: 1 } output { name: "output" data_type: TYPE_STRING dims: 1 }
    """
    made = prepared(config, {"input": {"inputs": [{"name": "A", "datatype": "FP32"}]}})
    assert is_handler(made.model)
    assert made.request.inputs["input"].array.tolist() == [b'{"input":{"inputs":[{"name":"A","datatype":"FP32"}]}}']
    assert made.write(InferResponse("m", "1", "j", [Tensor("output", BYTES, objects([b'{"a":1}'], [1]))])) == b'{"a":1}'


# -- names


def test_missing_and_unknown_inputs_are_named() -> None:
    assert refused(TWO, {"B": [1]}) == ("input", "missing required input A")
    assert refused(TWO, {"A": [1, 2], "C": 1}) == ("input.C", "unknown input; model 'm' has A, B")
    assert refused(TWO, {}) == ("input", "missing required input A")


def test_keys_are_case_sensitive() -> None:
    assert refused(one("FP32", -1), {"a": [1]})[0] == "input.a"


# -- values (6.2)


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("BOOL", [True, False], [True, False]),
        ("INT8", [-128, 3.0], [-128, 3]),
        ("UINT64", [2**64 - 1], [2**64 - 1]),
        ("FP32", [1, 0.5, "Infinity", "-Infinity"], [1, 0.5, np.inf, -np.inf]),
        ("FP16", [65504], [65504]),
        ("BF16", [1.5], [1.5]),
        ("FP64", [1e300], [1e300]),
        ("STRING", ["ä", {"b64": "/w=="}, ""], ["ä".encode(), b"\xff", b""]),
        ("FP32", [], []),
    ],
)
def test_json_is_typed_by_the_signature(datatype: str, value: Any, expected: Any) -> None:
    assert array(one(datatype, -1), {"A": value}).tolist() == expected


@pytest.mark.parametrize(
    ("datatype", "value", "reason"),
    [
        ("BOOL", [1], "expected BOOL [-1], got a number as element 0"),
        ("BOOL", ["true"], "expected BOOL [-1], got a string as element 0"),
        ("INT8", [1, True], "expected INT8 [-1], got a boolean as element 1"),
        ("INT8", ["1"], "expected INT8 [-1], got a string as element 0"),
        (
            "INT8",
            [1, 128],
            "expected INT8 [-1], element 1 of input 'A' is 128, but INT8 expects an integer from -128 to 127",
        ),
        (
            "INT32",
            [2.5],
            "expected INT32 [-1], element 0 of input 'A' is 2.5, but INT32 expects an integer from -2147483648 to "
            "2147483647",
        ),
        ("FP32", [None], "expected FP32 [-1], got null as element 0"),
        ("FP32", [True], "expected FP32 [-1], got a boolean as element 0"),
        ("FP32", ["one"], "expected FP32 [-1], attempt to access JSON non-number as double"),
        (
            "FP16",
            [1e5],
            "expected FP16 [-1], element 0 of input 'A' is 100000.0, but FP16 reaches only to 65504.0",
        ),
        ("STRING", ["a", 1], "expected BYTES [-1], got a number as element 1"),
        ("STRING", [None], "expected BYTES [-1], got null as element 0"),
        ("STRING", [{"b64": "%"}], "expected BYTES [-1], got 'b64' that is no base64 text"),
    ],
)
def test_values_of_another_kind_are_refused(datatype: str, value: Any, reason: str) -> None:
    assert refused(one(datatype, -1), {"A": value}) == ("input.A", reason)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([[1], [2, 3]], "[1]"),
        ([[1, 2], [3]], "[1]"),
        ([1, [2]], "[1]"),
        ([[1], 2], "[1]"),
        ([[[1], [2]], [[3], [4, 5]]], "[1][1]"),
    ],
)
def test_a_ragged_list_is_refused_where_it_deviates(value: Any, place: str) -> None:
    assert refused(one("FP32", -1, -1), {"A": value}) == (
        "input.A",
        f"expected FP32 [-1,-1], got ragged list at {place}",
    )


def test_shapes_follow_from_nesting_and_must_match() -> None:
    assert array(one("FP32", -1, 2), {"A": [[1, 2], [3, 4], [5, 6]]}).shape == (3, 2)
    assert array(one("FP32", -1, 0), {"A": [[], []]}).shape == (2, 0)
    assert refused(one("FP32", -1, 4), {"A": [[1, 2]]}) == ("input.A", "expected FP32 [-1,4], got [1,2]")
    assert refused(one("FP32", 2), {"A": 1}) == ("input.A", "expected FP32 [2], got []")


def test_nesting_is_limited() -> None:
    field, reason = refused(one("FP32", -1), {"A": [[[[[1]]]]]})
    assert (field, reason) == (
        "input.A",
        "expected FP32 [-1], got more than 4 dimensions. Use --max-rank to increase the limit.",
    )


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP32", {"b64": base64.b64encode(np.array([1, 2], "<f4").tobytes()).decode(), "shape": [2]}, [1, 2]),
        ("STRING", {"b64": base64.b64encode(b"\x01\0\0\0a\0\0\0\0").decode(), "shape": [2]}, [b"a", b""]),
        ("FP32", {"data": [1, 2]}, [1, 2]),
        ("FP32", {"data": [[1], [2]], "shape": [2], "datatype": "FP32"}, None),
        ("FP32", {"data": [1, 2], "shape": [2], "datatype": "FP32"}, [1, 2]),
    ],
)
def test_values_may_come_as_objects(datatype: str, value: Any, expected: Any) -> None:
    if expected is None:
        assert refused(one(datatype, -1), {"A": value}) == (
            "input.A",
            "expected FP32 [-1], got data of shape [2,1] for shape [2]",
        )
    else:
        assert array(one(datatype, -1), {"A": value}).tolist() == expected


def test_flat_data_takes_the_shape_that_is_given() -> None:
    assert array(one("INT8", -1, 2), {"A": {"data": [1, 2, 3, 4], "shape": [2, 2]}}).tolist() == [[1, 2], [3, 4]]


def test_base64_without_a_shape_is_one_element_of_bytes() -> None:
    assert array(one("STRING", 1), {"A": {"b64": "/w=="}}).tolist() == [b"\xff"]
    assert refused(one("FP32", 1), {"A": {"b64": "/w=="}}) == (
        "input.A",
        "expected FP32 [1], got 'b64' without 'shape'",
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"b64": "AAA=", "shape": [1]}, "got 2 bytes for shape [1], which takes 4"),
        ({"b64": 1, "shape": [1]}, "got 'b64' that is no base64 text"),
        ({"b64": "AA==", "shape": [-1]}, "got a 'shape' that is no list of sizes"),
        ({"b64": "AA==", "shape": [1] * 5}, "got a 'shape' of 5 dimensions, the limit is 4"),
        ({"data": [1], "datatype": "FP64"}, "got datatype FP64"),
        ({"data": [1, 2], "shape": [3]}, "got data of shape [2] for shape [3]"),
        ({"data": [1], "extra": 1}, "got an object with the members data, extra"),
        ({}, "got an object with the members none"),
    ],
)
def test_objects_that_say_too_little_or_too_much_are_refused(value: Any, reason: str) -> None:
    assert refused(one("FP32", -1), {"A": value}) == ("input.A", f"expected FP32 [-1], {reason}")


def test_bytes_that_are_not_the_packed_elements_are_refused() -> None:
    _, reason = refused(one("STRING", -1), {"A": {"b64": "AAAA", "shape": [1]}})
    assert reason == "expected BYTES [-1], got bytes that are not the 1 length-prefixed elements of shape [1]"


# -- one row without its batch dimension


def test_one_row_needs_no_batch_dimension() -> None:
    made = prepared(TWO, {"A": [1, 2], "B": [3]})
    assert [tensor.array.shape for tensor in made.request.inputs.values()] == [(1, 2), (1, 1)]
    assert written(made, Tensor("Y", FP32, np.array([[5, 6]], np.float32))) == {"Y": [5, 6]}
    assert written(made, Tensor("Y", FP32, np.array([[5, 6]] * 2, np.float32))) == {"Y": [[5, 6]] * 2}


def test_the_batch_dimension_is_added_to_all_values_or_to_none() -> None:
    assert refused(TWO, {"A": [1, 2], "B": [[3]]}) == ("input.A", "expected FP32 [-1,2], got [2]")
    mixed = one("FP32", -1).replace("output", 'input { name: "C" data_type: TYPE_FP32 dims: 2 } output')
    assert refused(mixed, {"A": 1, "C": 1}) == ("input.A", "expected FP32 [-1], got []")


def test_a_wrong_row_is_refused_with_the_shape_that_was_sent() -> None:
    assert refused(TWO, {"A": [1, 2, 3]}) == ("input.A", "expected FP32 [-1,2], got [3]")


def test_inputs_that_disagree_with_each_other_are_refused() -> None:
    field, reason = refused(TWO, {"A": [[1, 2]], "B": [[1], [2]]})
    assert (field, reason.partition("] ")[2]) == ("input", "input 'B' batch size does not match other inputs for 'm'")


# -- outputs (6.3)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (Tensor("Y", FP32, np.array([[1, 2.5]], np.float32)), [[1, 2.5]]),
        (Tensor("Y", FP32, np.array(3, np.float32)), 3),
        (Tensor("Y", FP32, np.array([[np.nan], [-np.inf]], np.float32)), [["NaN"], ["-Infinity"]]),
        (Tensor("Y", FP32, np.array(np.inf, np.float32)), "Infinity"),
        (Tensor("Y", FP32, np.empty((2, 0), np.float32)), [[], []]),
        (Tensor("Y", BF16, np.array([1.5], ml_dtypes.bfloat16)), [1.5]),
        (Tensor("Y", BOOL, np.array([True, False])), [True, False]),
        (Tensor("Y", DATATYPES["UINT64"], np.array([2**64 - 1], np.uint64)), [2**64 - 1]),
        (Tensor("Y", DATATYPES["INT32"], np.arange(8, dtype=np.int32).reshape(2, 2, 2).T), None),
        (Tensor("Y", BYTES, objects(["ä".encode(), b"\xff"], [1, 2])), [["ä", {"b64": "/w=="}]]),
        (Tensor("Y", BYTES, objects([b"x"], [])), "x"),
    ],
)
def test_outputs_are_plain_values(tensor: Tensor, expected: Any) -> None:
    made = prepared(one("FP32", -1), {"A": [1]})
    if expected is None:
        expected = tensor.array.tolist()
    assert written(made, tensor) == {"Y": expected}


def test_a_field_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FieldError("policy.ttl", "too short", "VALIDATION_ERROR")))
    assert (error.field, error.reason, error.code, error.message) == (
        "policy.ttl",
        "too short",
        "VALIDATION_ERROR",
        "policy.ttl: too short",
    )
    assert isinstance(error, ServingError)
