"""Numbers of little precision: both halves in and out of one model, and models of quantised weights."""

import ml_dtypes
import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, Input, infer
from conformance_tests.clause_table import clause
from conformance_tests.tensors import Array, same

WEIGHTS = np.array([[1, -2], [3, 4], [-5, 6], [7, -8]])


@clause("datatypes.mixed_halves")
@pytest.mark.needs("halves")
@pytest.mark.parametrize("carrier", ["http-json", "http-binary", "grpc-raw"], indirect=True)
def test_both_halves_go_in_and_come_out_of_one_model(carrier: Carrier) -> None:
    sixteen = np.array([[1.5, -2, 65504], [2.0**-24, 0.1, -0.0]], np.float16)
    brain = np.array([[3.140625, -1, 0.5], [2.0**-14, 1000, 7]], ml_dtypes.bfloat16)
    reply = infer(carrier, Call("halves", [Input("INPUT0", "FP16", sixteen), Input("INPUT1", "BF16", brain)]))
    assert [(output.name, output.datatype) for output in reply.outputs] == [("OUTPUT0", "BF16"), ("OUTPUT1", "FP16")]
    assert same("BF16", reply["OUTPUT0"], sixteen.astype(np.float32).astype(ml_dtypes.bfloat16))
    assert same("FP16", reply["OUTPUT1"], brain.astype(np.float32).astype(np.float16))


def rounded(numbers: Array) -> Array:
    return np.round(numbers / 0.25) * 0.25


@clause("datatypes.quantised")
@pytest.mark.needs("quantised_qdq")
def test_a_model_that_quantises_its_input_computes_with_what_that_was_rounded_to(carrier: Carrier) -> None:
    numbers = np.array([[0.3, -0.1, 2.6, 1], [31, -31, 0.12, 0.13], [1, 1, 1, 1]], np.float32)
    reply = infer(carrier, Call("quantised_qdq", [Input("INPUT0", "FP32", numbers)]))
    np.testing.assert_allclose(reply["OUTPUT0"], rounded(numbers) @ WEIGHTS, rtol=1e-6)


@clause("datatypes.quantised")
@pytest.mark.needs("quantised_qlinear")
def test_a_product_of_whole_numbers_is_whole_and_saturates(carrier: Carrier) -> None:
    numbers = np.array([[132, 128, 128, 128], [128, 136, 128, 120], [255, 255, 0, 255]], np.uint8)
    reply = infer(carrier, Call("quantised_qlinear", [Input("INPUT0", "UINT8", numbers)]))
    exact = (numbers.astype(np.int64) - 128) @ WEIGHTS * 0.25 + 128
    assert same("UINT8", reply["OUTPUT0"], np.clip(np.round(exact), 0, 255).astype(np.uint8))
