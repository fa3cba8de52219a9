"""Requests are checked against the signature in the protocol's order and with its texts."""

import struct
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given as generated
from hypothesis import strategies as st
from penstock.admission import UNBATCHED_NOTE, Given, admit
from penstock.errors import Kind, ServingError
from penstock.model_config import Signature, TensorSpec
from penstock.tensor import DATATYPES, Array, objects, pack_bytes

RID = "[request id: 7] "


def signature(
    *inputs: tuple[str, str, Sequence[int]], batch: int = 0, limit: int = 0, optional: Sequence[str] = ()
) -> Signature:
    """Of model `m` with output Y; each input is (name, datatype, dims without the batch axis)."""
    leading = (-1,) if batch else ()
    specs = {
        name: TensorSpec(name, DATATYPES[datatype], tuple(dims), (*leading, *dims), optional=name in optional)
        for name, datatype, dims in inputs
    }
    outputs = {"Y": TensorSpec("Y", DATATYPES["FP32"], (1,), (*leading, 1))}
    return Signature("m", specs, outputs, frozenset(specs) - set(optional), batch, limit or batch)


def raw(name: str, datatype: str, shape: Sequence[int], size: int | None = None) -> Given:
    """Zeros; `size` bytes of them, or as many as the shape takes."""
    row = DATATYPES.get(datatype)
    wanted = int(np.prod([max(dim, 0) for dim in shape])) * (row.itemsize if row else 1)
    return Given(name, datatype, shape, memoryview(bytes(wanted if size is None else size)))


def strings(name: str, shape: Sequence[int], data: bytes) -> Given:
    return Given(name, "BYTES", shape, memoryview(data))


PLAIN = signature(("A", "FP32", [4]), ("B", "INT32", [-1]))
BATCHED = signature(("A", "FP32", [4]), ("B", "INT32", [-1]), batch=8)
OPTIONAL = signature(("A", "FP32", [4]), ("B", "FP32", [4]), ("C", "FP32", [4]), optional=["C"])
TEXT = signature(("S", "BYTES", [-1]))
TEXT_ROWS = signature(("S", "BYTES", [2]), batch=8)
A, B = raw("A", "FP32", [4]), raw("B", "INT32", [2])
ROWS_A, ROWS_B = raw("A", "FP32", [2, 4]), raw("B", "INT32", [2, 3])
ONE = pack_bytes([b"ab"])

REFUSALS: list[tuple[str, Signature, list[Given], list[str], str]] = [
    ("duplicate input", PLAIN, [A, A], [], f"{RID}input 'A' already exists in request"),
    ("duplicate output", PLAIN, [A, B], ["Y", "Y"], f"{RID}output 'Y' already exists in request"),
    ("unknown output", PLAIN, [A, B], ["Z"], "unexpected inference output 'Z' for model 'm'"),
    (
        "an input is missing", PLAIN, [A], [],
        f"{RID}expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['A'], but missing required input(s) "
        "['B']. Please provide all required input(s).",
    ),
    (
        "all inputs are missing", PLAIN, [], [],
        f"{RID}expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required input(s) "
        "['A','B']. Please provide all required input(s).",
    ),
    (
        "too many inputs", PLAIN, [A, B, raw("C", "FP32", [1])], [],
        f"{RID}expected 2 inputs but got 3 inputs for model 'm'. Got input(s) ['A','B','C'], but missing required "
        "input(s) ]. Please provide all required input(s).",
    ),
    (
        "missing, some are optional", OPTIONAL, [A], [],
        f"{RID}expected number of inputs between 2 and 3 but got 1 inputs for model 'm'. Got input(s) ['A'], "
        "but missing required input(s) ['B']. Please provide all required input(s).",
    ),
    (
        "too many, some are optional", OPTIONAL, [raw(name, "FP32", [4]) for name in "ABCD"], [],
        f"{RID}expected number of inputs between 2 and 3 but got 4 inputs for model 'm'. "
        "Got input(s) ['A','B','C','D'], but missing required input(s) ]. Please provide all required input(s).",
    ),
    ("unknown input", PLAIN, [A, raw("Q", "INT32", [2])], [], "unexpected inference input 'Q' for model 'm'"),
    (
        "an optional input for a required one", OPTIONAL, [A, raw("C", "FP32", [4])], [],
        f"{RID}missing required input 'B' for model 'm'",
    ),
    (
        "no batch axis", BATCHED, [ROWS_A, raw("B", "INT32", [])], [],
        f"{RID}input 'B' has no shape but model requires batch dimension for 'm'",
    ),
    (
        "rows differ", BATCHED, [ROWS_A, raw("B", "INT32", [3, 3])], [],
        f"{RID}input 'B' batch size does not match other inputs for 'm'",
    ),
    (
        "too many rows", BATCHED, [raw("A", "FP32", [9, 4]), raw("B", "INT32", [9, 3])], [],
        f"{RID}inference request batch-size must be <= 8 for 'm'",
    ),
    (
        "negative rows", TEXT_ROWS, [strings("S", [-1, 2], b"")], [],
        f"{RID}inference request batch-size must be <= 8 for 'm'",
    ),
    (
        "datatype", PLAIN, [A, raw("B", "INT64", [2])], [],
        f"{RID}inference input 'B' data-type is 'INT64', but model 'm' expects 'INT32'",
    ),
    (
        "unknown datatype", PLAIN, [A, raw("B", "INT31", [2])], [],
        f"{RID}inference input 'B' data-type is '<invalid>', but model 'm' expects 'INT32'",
    ),
    (
        "negative dimension", PLAIN, [A, raw("B", "INT32", [-1])], [],
        f"{RID}All input dimensions should be specified for input 'B' for model 'm', got [-1]",
    ),
    (
        "negative dimension behind the rows", BATCHED, [ROWS_A, raw("B", "INT32", [2, -1])], [],
        f"{RID}All input dimensions should be specified for input 'B' for model 'm', got [2,-1]",
    ),
    (
        "shape", PLAIN, [raw("A", "FP32", [5]), B], [],
        f"{RID}unexpected shape for input 'A' for model 'm'. Expected [4], got [5]. ",
    ),
    (
        "rank", PLAIN, [raw("A", "FP32", [1, 4]), B], [],
        f"{RID}unexpected shape for input 'A' for model 'm'. Expected [4], got [1,4]. ",
    ),
    (
        "shape behind the rows", BATCHED, [raw("A", "FP32", [2, 5]), ROWS_B], [],
        f"{RID}unexpected shape for input 'A' for model 'm'. Expected [-1,4], got [2,5]. {UNBATCHED_NOTE}",
    ),
    (
        "a scalar for an open dimension", PLAIN, [A, raw("B", "INT32", [])], [],
        f"{RID}unexpected shape for input 'B' for model 'm'. Expected [-1], got []. ",
    ),
    (
        "two elements for a scalar", signature(("A", "FP32", [])), [raw("A", "FP32", [2])], [],
        f"{RID}unexpected shape for input 'A' for model 'm'. Expected [], got [2]. ",
    ),
    (
        "too many elements", signature(("A", "INT8", [-1, -1])), [Given("A", "INT8", [2**32, 2**32], b"")], [],
        "invalid shape for input 'A': shape [4294967296,4294967296] causes total element count to exceed maximum size "
        "of 9223372036854775807",
    ),
    (
        "too many elements but for a zero", signature(("A", "INT8", [-1, -1])), [Given("A", "INT8", [0, 2**64], b"")],
        [], "invalid shape for input 'A': shape [0,18446744073709551616] causes total element count to exceed maximum "
        "size of 9223372036854775807",
    ),
    (
        "too many bytes", signature(("A", "FP64", [-1])), [Given("A", "FP64", [2**61], b"")], [],
        "byte size overflow for input 'A': element count (2305843009213693952) * data type size (8) exceeds maximum "
        "allowed size (9223372036854775807)",
    ),
    (
        "too many references", signature(("A", "BYTES", [-1, -1])), [Given("A", "BYTES", [0, 2**61], b"")], [],
        "byte size overflow for input 'A': element count (2305843009213693952) * data type size (8) exceeds maximum "
        "allowed size (9223372036854775807)",
    ),
    (
        "too few bytes", PLAIN, [raw("A", "FP32", [4], size=15), B], [],
        f"{RID}input byte size mismatch for input 'A' for model 'm'. Expected 16, got 15",
    ),
    (
        "too many bytes sent", PLAIN, [A, raw("B", "INT32", [2], size=12)], [],
        f"{RID}input byte size mismatch for input 'B' for model 'm'. Expected 8, got 12",
    ),
    (
        "too few decoded elements", PLAIN, [Given("A", "FP32", [4], np.zeros(3, "<f4")), B], [],
        f"{RID}input byte size mismatch for input 'A' for model 'm'. Expected 16, got 12",
    ),
    (
        "too few strings", TEXT, [strings("S", [2], ONE)], [],
        f"{RID}expected 2 string elements for inference input 'S' for model 'm', got 1",
    ),
    (
        "too few decoded strings", TEXT, [Given("S", "BYTES", [2], objects([b"a"], [1]))], [],
        f"{RID}expected 2 string elements for inference input 'S' for model 'm', got 1",
    ),
    (
        "too many strings", TEXT, [strings("S", [1], ONE * 3)], [],
        f"{RID}unexpected number of string elements 3 for inference input 'S' for model 'm', expecting 1",
    ),
    (
        "too many strings, the last cut short", TEXT, [strings("S", [1], ONE + ONE[:-1])], [],
        f"{RID}unexpected number of string elements 2 for inference input 'S' for model 'm', expecting 1",
    ),
    (
        "a length cut short", TEXT, [strings("S", [2], ONE + b"\x01\x00\x00")], [],
        f"{RID}incomplete string length indicator for inference input 'S' for model 'm', expecting 4 bytes but only 3 "
        "bytes available. Please make sure the string length indicator is in one buffer.",
    ),
    (
        "the last string cut short", TEXT, [strings("S", [2], ONE + struct.pack("<I", 9) + b"abc")], [],
        "incomplete string data for inference input 'S', expecting string of length 9 but only 3 bytes available",
    ),
    (
        "a string cut short before others", TEXT, [strings("S", [3], ONE + struct.pack("<I", 9) + b"abc")], [],
        f"{RID}expected 3 string elements for inference input 'S' for model 'm', got 2",
    ),
    (
        "no rows, with the bytes of one", BATCHED, [raw("A", "FP32", [0, 4], 16), raw("B", "INT32", [0, 3], 12)], [],
        f"{RID}input byte size mismatch for input 'A' for model 'm'. Expected 0, got 16",
    ),
    (
        "no rows, with the strings of one", TEXT_ROWS, [strings("S", [0, 2], ONE * 2)], [],
        f"{RID}unexpected number of string elements 2 for inference input 'S' for model 'm', expecting 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("signature", "given", "outputs", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_what_is_wrong_is_refused_in_the_protocols_words(
    signature: Signature, given: list[Given], outputs: list[str], message: str
) -> None:
    with pytest.raises(ServingError) as caught:
        admit(signature, "7", given, outputs)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_a_request_without_an_id_says_so() -> None:
    with pytest.raises(ServingError, match=r"^\[request id: <id_unknown>\] expected 2 inputs"):
        admit(PLAIN, "", [A], [])


# Two inputs a step apart each: all the faults from the step on are in the request, and only its own is told.
LADDER: list[tuple[list[Given], list[str], str]] = [
    ([raw("B", "INT31", [9, 2]), raw("B", "INT31", [])], ["Z", "Z"], "input 'B' already exists"),
    ([raw("Q", "INT31", [9, 2])], ["Z", "Z"], "output 'Z' already exists"),
    ([raw("Q", "INT31", [9, 2])], ["Z"], "unexpected inference output"),
    ([raw("Q", "INT31", [9, 2])], [], "expected 2 inputs but got 1"),
    ([raw("Q", "INT31", []), raw("B", "INT31", [9, -1])], [], "unexpected inference input 'Q'"),
    ([raw("A", "INT31", []), raw("B", "INT31", [9, -1])], [], "input 'A' has no shape"),
    ([raw("A", "INT31", [8, 5]), raw("B", "INT31", [9, -1])], [], "batch size does not match"),
    ([raw("A", "INT31", [9, 5]), raw("B", "INT31", [9, -1])], [], "batch-size must be <= 8"),
    ([raw("A", "FP32", [8, 5]), raw("B", "INT31", [8, -1])], [], "data-type is '<invalid>'"),
    ([raw("A", "FP32", [8, 5]), raw("B", "INT32", [8, -1])], [], "All input dimensions should be specified"),
    ([raw("A", "FP32", [8, 5]), Given("B", "INT32", [8, 2**62], b"")], [], "unexpected shape for input 'A'"),
    ([raw("A", "FP32", [8, 4], size=1), Given("B", "INT32", [8, 2**62], b"")], [], "total element count"),
    ([raw("A", "FP32", [8, 4], size=1), Given("B", "INT32", [8, 2**59], b"")], [], "byte size overflow"),
    ([raw("A", "FP32", [8, 4], size=1), raw("B", "INT32", [8, 2], size=1)], [], "input byte size mismatch"),
]


@pytest.mark.parametrize(("given", "outputs", "message"), LADDER, ids=[row[2] for row in LADDER])
def test_of_several_faults_the_first_in_the_protocols_order_is_told(
    given: list[Given], outputs: list[str], message: str
) -> None:
    with pytest.raises(ServingError) as caught:
        admit(BATCHED, "", given, outputs)
    assert message in caught.value.message


def test_sizes_are_told_before_strings() -> None:
    both = signature(("S", "BYTES", [1]), ("A", "FP32", [4]))
    with pytest.raises(ServingError, match="input byte size mismatch for input 'A'"):
        admit(both, "", [strings("S", [1], b""), raw("A", "FP32", [4], size=1)], [])


def test_bytes_become_a_view_over_the_same_memory() -> None:
    body = bytearray(struct.pack("<4f", 1, 2, 3, 4))
    admitted = admit(signature(("A", "FP32", [2, 2])), "", [Given("A", "FP32", [2, 2], memoryview(body))], ["Y"])
    array = admitted.inputs["A"].array
    assert (array.tolist(), array.shape, admitted.rows) == ([[1, 2], [3, 4]], (2, 2), 1)
    body[0:4] = struct.pack("<f", 9)
    assert array[0, 0] == 9


def test_bytes_need_not_be_aligned() -> None:
    body = memoryview(b"?" + struct.pack("<2d", 1, 2))[1:]
    admitted = admit(signature(("A", "FP64", [2])), "", [Given("A", "FP64", [2], body)], [])
    assert admitted.inputs["A"].array.tolist() == [1, 2]


def test_a_decoded_array_is_taken_as_it_is() -> None:
    flat: Array = np.arange(6, dtype="<i4")
    array = admit(signature(("A", "INT32", [2, -1])), "", [Given("A", "INT32", [2, 3], flat)], []).inputs["A"].array
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert np.shares_memory(array, flat)


def test_rows_are_those_of_the_batch_axis() -> None:
    assert admit(BATCHED, "", [ROWS_A, ROWS_B], []).rows == 2


def test_a_completed_batch_limit_does_not_limit_a_request() -> None:
    unlimited = signature(("A", "INT8", [1]), batch=4, limit=2**31)
    assert admit(unlimited, "", [raw("A", "INT8", [1000, 1])], []).rows == 1000


def test_an_optional_input_may_be_left_out() -> None:
    admitted = admit(OPTIONAL, "", [raw("A", "FP32", [4]), raw("B", "FP32", [4])], [])
    assert list(admitted.inputs) == ["A", "B"]


@pytest.mark.parametrize(("batch", "rows"), [(0, 1), (8, 1)])
def test_all_inputs_may_be_optional(batch: int, rows: int) -> None:
    assert admit(signature(("A", "FP32", [4]), batch=batch, optional=["A"]), "", [], []).rows == rows


@pytest.mark.parametrize("stated", [[], [1]])
@pytest.mark.parametrize("sent", [[], [1]])
def test_a_scalar_may_be_sent_in_either_form_and_gets_the_models(stated: list[int], sent: list[int]) -> None:
    admitted = admit(signature(("A", "FP32", stated)), "", [Given("A", "FP32", sent, struct.pack("<f", 5))], [])
    assert admitted.inputs["A"].array.shape == tuple(stated)
    assert admitted.inputs["A"].array.reshape(-1).tolist() == [5]


@pytest.mark.parametrize("data", [b"", np.empty(0, "<f4")], ids=["bytes", "decoded"])
def test_a_dimension_may_be_zero(data: bytes | Array) -> None:
    admitted = admit(signature(("A", "FP32", [-1, 3])), "", [Given("A", "FP32", [0, 3], data)], [])
    assert admitted.inputs["A"].array.shape == (0, 3)


def test_a_batch_may_have_no_rows() -> None:
    admitted = admit(BATCHED, "", [raw("A", "FP32", [0, 4]), raw("B", "INT32", [0, 3])], [])
    assert (admitted.inputs["A"].array.shape, admitted.rows) == ((0, 4), 0)


def test_a_dimension_of_strings_may_be_zero() -> None:
    assert admit(TEXT, "", [strings("S", [0], b"")], []).inputs["S"].array.shape == (0,)


def test_a_dimension_may_be_zero_beside_rows() -> None:
    admitted = admit(BATCHED, "", [ROWS_A, raw("B", "INT32", [2, 0])], [])
    assert (admitted.inputs["B"].array.shape, admitted.rows) == ((2, 0), 2)


def test_strings_become_objects() -> None:
    admitted = admit(
        signature(("S", "BYTES", [2, 2])), "", [strings("S", [2, 2], pack_bytes([b"a", b"", b"c", b"\x00"]))], []
    )
    assert admitted.inputs["S"].array.tolist() == [[b"a", b""], [b"c", b"\x00"]]


def test_any_byte_but_zero_is_true() -> None:
    array = admit(signature(("A", "BOOL", [3])), "", [Given("A", "BOOL", [3], b"\x00\x01\xff")], []).inputs["A"].array
    assert array.view(np.uint8).tolist() == [0, 1, 1]


def test_bfloat16_is_read_as_such() -> None:
    array = admit(signature(("A", "BF16", [1])), "", [Given("A", "BF16", [1], b"\x80\x3f")], []).inputs["A"].array
    assert (array.dtype, float(array[0])) == (np.dtype(ml_dtypes.bfloat16), 1.0)


DIMS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**59, 2**62, 2**64]))
SENT = st.builds(
    Given,
    name=st.sampled_from(["A", "S", "Q"]),
    datatype=st.sampled_from(["FP32", "BYTES", "nonsense"]),
    shape=st.lists(DIMS, max_size=3),
    data=st.binary(max_size=40).map(memoryview),
)


@generated(
    batch=st.sampled_from([0, 4]),
    optional=st.sampled_from([[], ["A"], ["A", "S"]]),
    given=st.lists(SENT, max_size=3),
    outputs=st.lists(st.sampled_from(["Y", "Z"]), max_size=2),
)
def test_whatever_comes_is_admitted_as_it_was_described_or_refused_as_the_clients_fault(
    batch: int, optional: list[str], given: list[Given], outputs: list[str]
) -> None:
    wanted = signature(("A", "FP32", [-1]), ("S", "BYTES", [-1]), batch=batch, optional=optional)
    refusal = None
    try:
        admitted = admit(wanted, "", given, outputs)
    except ServingError as error:
        refusal = error
    if refusal is not None:
        assert refusal.kind is Kind.INVALID
    else:
        assert {name: list(tensor.array.shape) for name, tensor in admitted.inputs.items()} == {
            sent.name: list(sent.shape) for sent in given
        }
