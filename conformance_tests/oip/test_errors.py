"""Refusals that mean the same whichever way the inference is carried.

What the Open Inference Protocol says is that such a call fails; with which status and words is Triton's. Each case
is tried for both.
"""

import re
from dataclasses import dataclass

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, HttpJson, Input, Output, Refusal, infer, refusal, simple
from conformance_tests.clause_table import clause
from conformance_tests.server import Target
from conformance_tests.tensors import texts

UNKNOWN_ID = "[request id: <id_unknown>] "
BATCHING_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
ROW = np.zeros((1, 16), np.int32)
INPUT0, INPUT1 = Input("INPUT0", "INT32", ROW), Input("INPUT1", "INT32", ROW)
ALL_REQUIRED = "Please provide all required input(s)."


def rows(name: str, *shape: int) -> Input:
    return Input(name, "INT32", np.zeros(shape, np.int32))


def call(*inputs: Input, model: str = "simple", outputs: tuple[str, ...] = (), call_id: str = "") -> Call:
    return Call(model, inputs, [Output(name) for name in outputs], id=call_id)


@dataclass(frozen=True, slots=True)
class Case:
    """A call and the refusal that it must get; `text` is exact, or a pattern where the protocol leaves a choice.

    `clause` is about status and text, `refused` about the refusal as such where OIP asks for it.
    """

    name: str
    clause: str
    call: Call
    text: str | re.Pattern[str]
    status: str = "INVALID_ARGUMENT"
    refused: str = ""


CASES = (
    Case(
        "unknown model",
        "error_texts.unknown_model",
        call(INPUT0, INPUT1, model="nope"),
        "Request for unknown model: 'nope' is not found",
        "NOT_FOUND",
        refused="errors.unknown_model",
    ),
    Case(
        "unknown version",
        "error_texts.unknown_version",
        simple(version="9"),
        "Request for unknown model: 'simple' version 9 is not found",
        "NOT_FOUND",
        refused="errors.unknown_version",
    ),
    Case(
        "version 0",
        "error_texts.unknown_version",
        simple(version="0"),
        "Request for unknown model: 'simple' version 0 is not found",
        "NOT_FOUND",
        refused="errors.unknown_version",
    ),
    Case(
        "unknown output",
        "error_texts.unknown_output",
        call(INPUT0, INPUT1, outputs=("NOPE",)),
        "unexpected inference output 'NOPE' for model 'simple'",
        refused="errors.unknown_output",
    ),
    Case(
        "input left out",
        "errors.input_count",
        call(INPUT0, call_id="e"),
        "[request id: e] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], but missing "
        f"required input(s) ['INPUT1']. {ALL_REQUIRED}",
    ),
    Case(
        "no inputs",
        "errors.input_count",
        call(),
        f"{UNKNOWN_ID}expected 2 inputs but got 0 inputs for model 'simple'. Got input(s) [], but missing required "
        f"input(s) ['INPUT0','INPUT1']. {ALL_REQUIRED}",
    ),
    Case(
        "too many inputs",
        "errors.input_count",
        call(INPUT0, INPUT1, rows("EXTRA", 1, 16)),
        re.compile(
            re.escape(f"{UNKNOWN_ID}expected 2 inputs but got 3 inputs for model 'simple'. Got input(s) [")
            + r"('(EXTRA|INPUT0|INPUT1)',?){3}"
            + re.escape(f"], but missing required input(s) ]. {ALL_REQUIRED}")
        ),
    ),
    Case(
        "no inputs, one of them optional",
        "errors.input_count",
        call(model="optional_input"),
        f"{UNKNOWN_ID}expected number of inputs between 1 and 2 but got 0 inputs for model 'optional_input'. Got "
        f"input(s) [], but missing required input(s) ['INPUT0']. {ALL_REQUIRED}",
    ),
    Case(
        "unknown input",
        "errors.unknown_input",
        call(rows("NOPE", 1, 16), INPUT1),
        "unexpected inference input 'NOPE' for model 'simple'",
    ),
    Case(
        "duplicate input",
        "errors.duplicate_input",
        call(INPUT0, INPUT0, INPUT1),
        f"{UNKNOWN_ID}input 'INPUT0' already exists in request",
    ),
    Case(
        "duplicate output",
        "errors.duplicate_input",
        call(INPUT0, INPUT1, outputs=("OUTPUT0", "OUTPUT0")),
        f"{UNKNOWN_ID}output 'OUTPUT0' already exists in request",
    ),
    Case(
        "no batch dimension",
        "errors.batch_dimension",
        call(rows("INPUT0"), INPUT1),
        f"{UNKNOWN_ID}input 'INPUT0' has no shape but model requires batch dimension for 'simple'",
    ),
    Case(
        "batches differ",
        "errors.batch_dimension",
        call(INPUT0, rows("INPUT1", 2, 16)),
        re.compile(re.escape(UNKNOWN_ID) + "input 'INPUT[01]' batch size does not match other inputs for 'simple'"),
    ),
    Case(
        "batch too large",
        "errors.batch_size",
        simple(rows=9),
        f"{UNKNOWN_ID}inference request batch-size must be <= 8 for 'simple'",
    ),
    Case(
        "datatype",
        "errors.datatype",
        call(Input("INPUT0", "FP32", np.zeros((1, 16), np.float32)), INPUT1),
        f"{UNKNOWN_ID}inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
    ),
    Case(
        "text for numbers",
        "errors.datatype",
        call(Input("INPUT0", "BYTES", texts(["1"] * 16, (1, 16))), INPUT1, call_id="x"),
        "[request id: x] inference input 'INPUT0' data-type is 'BYTES', but model 'simple' expects 'INT32'",
    ),
    Case(
        "numbers for text",
        "errors.datatype",
        call(rows("text", 1, 1), model="sentiment"),
        f"{UNKNOWN_ID}inference input 'text' data-type is 'INT32', but model 'sentiment' expects 'BYTES'",
    ),
    Case(
        "shape",
        "errors.shape",
        call(rows("INPUT0", 1, 15), INPUT1),
        f"{UNKNOWN_ID}unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,15]. "
        + BATCHING_NOTE,
    ),
    Case(
        "rank",
        "errors.shape",
        call(rows("INPUT0", 1, 16, 1), INPUT1),
        f"{UNKNOWN_ID}unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,16,1]. "
        + BATCHING_NOTE,
    ),
    Case(
        "shape without batching",
        "errors.shape",
        call(Input("INPUT0", "FP32", np.zeros((3, 2), np.float32)), model="fixed_shape"),
        f"{UNKNOWN_ID}unexpected shape for input 'INPUT0' for model 'fixed_shape'. Expected [2,3], got [3,2]. ",
    ),
    Case(
        "rank without batching",
        "errors.shape",
        call(Input("INPUT0", "FP32", np.zeros((2, 3, 1), np.float32)), model="identity_fp32"),
        f"{UNKNOWN_ID}unexpected shape for input 'INPUT0' for model 'identity_fp32'. Expected [-1,-1], got [2,3,1]. ",
    ),
    Case(
        "too few strings",
        "errors.string_elements",
        call(Input("INPUT0", "BYTES", texts(["a", "b"]), (1, 3)), model="identity_bytes"),
        f"{UNKNOWN_ID}expected 3 string elements for inference input 'INPUT0' for model 'identity_bytes', got 2",
    ),
    Case(
        "too many strings",
        "errors.string_elements",
        call(Input("INPUT0", "BYTES", texts(["a", "b"]), (1, 1)), model="identity_bytes"),
        f"{UNKNOWN_ID}unexpected number of string elements 2 for inference input 'INPUT0' for model 'identity_bytes', "
        "expecting 1",
    ),
    Case(
        "the id leads",
        "errors.request_id",
        Call("simple", [INPUT0, rows("INPUT1", 1, 15)], id="nr. 7"),
        "[request id: nr. 7] unexpected shape for input 'INPUT1' for model 'simple'. Expected [-1,16], got [1,15]. "
        + BATCHING_NOTE,
    ),
)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=clause(case.clause)) for case in CASES])
def test_a_refusal_says_what_was_expected(carrier: Carrier, target: Target, case: Case) -> None:
    if case.call.model != "nope":
        target.require(case.call.model)
    refused = refusal(carrier, case.call)
    assert refused.status == case.status, refused
    if isinstance(case.text, str):
        assert refused.text == case.text
    else:
        assert case.text.fullmatch(refused.text), refused.text


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=clause(case.refused)) for case in CASES if case.refused]
)
@pytest.mark.needs("simple")
def test_what_does_not_exist_is_refused(carrier: Carrier, case: Case) -> None:
    refusal(carrier, case.call)


@clause("errors.missing_input")
@pytest.mark.parametrize("given", [(), (INPUT0,)], ids=["none", "one of two"])
@pytest.mark.needs("simple")
def test_a_required_input_cannot_be_left_out(carrier: Carrier, given: tuple[Input, ...]) -> None:
    refusal(carrier, call(*given))


@clause("errors.survives")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
@pytest.mark.needs("simple")
def test_after_a_refusal_the_next_call_is_answered(carrier: Carrier, target: Target, case: Case) -> None:
    if case.call.model != "nope":
        target.require(case.call.model)
    refusal(carrier, case.call)
    assert infer(carrier, simple())["OUTPUT0"].tolist() == [list(range(1, 17))]


FIVE_FOR_SIX = Call("identity_fp32", [Input("INPUT0", "FP32", np.zeros(5, np.float32), (2, 3))])


@clause("errors.byte_size")
@pytest.mark.needs("identity_fp32")
@pytest.mark.parametrize("carrier", ["grpc-raw", "grpc-typed"], indirect=True)
def test_data_that_the_shape_does_not_have_are_refused(carrier: Carrier) -> None:
    refusal(carrier, FIVE_FOR_SIX)


@clause("error_texts.byte_size")
@pytest.mark.needs("identity_fp32")
def test_a_refusal_tells_both_sizes(carrier: Carrier) -> None:
    if isinstance(carrier, HttpJson):
        text = "Failed to parse 'data' field: shape does not match true shape"
    else:
        text = f"{UNKNOWN_ID}input byte size mismatch for input 'INPUT0' for model 'identity_fp32'. Expected 24, got 20"
    assert refusal(carrier, FIVE_FOR_SIX) == Refusal("INVALID_ARGUMENT", text)
