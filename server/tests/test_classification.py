"""The largest elements of an output, as text."""

import numpy as np
import pytest
from penstock.classification import MAX_CLASSES, top
from penstock.errors import Kind, ServingError
from penstock.tensor import BYTES, DATATYPES, FP32, Array, Tensor


def texts(tensor: Tensor) -> list[object]:
    assert tensor.datatype is BYTES
    found: list[object] = np.vectorize(bytes.decode, otypes=[object])(tensor.array).tolist()
    return found


def fp32(values: object) -> Tensor:
    return Tensor("Y", FP32, np.array(values, np.float32))


def test_floats_have_six_decimals_and_the_largest_comes_first() -> None:
    assert texts(top(fp32([0.05, 0.95, 0.0]), 2, (), batched=False)) == ["0.950000:1", "0.050000:0"]


def test_each_row_is_ranked_by_itself() -> None:
    found = top(fp32([[1, 2], [4, 3]]), 1, (), batched=True)
    assert (found.name, found.array.shape, texts(found)) == ("Y", (2, 1), [["2.000000:1"], ["4.000000:0"]])


def test_without_a_batch_axis_the_whole_tensor_is_ranked() -> None:
    assert texts(top(fp32([[1, 2], [4, 3]]), 3, (), batched=False)) == ["4.000000:2", "3.000000:3", "2.000000:1"]


def test_dimensions_behind_the_rows_are_one_list_of_classes() -> None:
    assert texts(top(fp32([[[1, 2], [4, 3]]]), 1, (), batched=True)) == [["4.000000:2"]]


def test_more_classes_than_there_are_means_all() -> None:
    assert len(texts(top(fp32([1, 2, 3]), 100, (), batched=False))) == 3


def test_equal_values_keep_the_order_of_their_indices() -> None:
    assert texts(top(fp32([7, 1, 7, 7]), 3, (), batched=False)) == ["7.000000:0", "7.000000:2", "7.000000:3"]


def test_labels_stand_behind_the_index_where_there_is_one() -> None:
    found = top(fp32([1, 4, 3, 2]), 4, ("zero", "one", ""), batched=False)
    assert texts(found) == ["4.000000:1:one", "3.000000:2", "2.000000:3", "1.000000:0:zero"]


@pytest.mark.parametrize("name", [name for name, row in DATATYPES.items() if row.is_integer])
def test_integers_are_printed_in_full(name: str) -> None:
    row = DATATYPES[name]
    values: Array = np.array([row.low, row.high], row.dtype)
    assert texts(top(Tensor("Y", row, values), 2, (), batched=False)) == [f"{row.high}:1", f"{row.low}:0"]


def test_no_rows_and_no_classes_give_no_texts() -> None:
    assert top(fp32(np.empty((0, 3))), 2, (), batched=True).array.shape == (0, 0)
    assert top(fp32(np.empty((2, 0))), 2, (), batched=True).array.shape == (2, 0)


def test_a_tensor_that_lacks_the_batch_axis_is_one_row() -> None:
    assert texts(top(fp32(5), 1, (), batched=True)) == [["5.000000:0"]]


@pytest.mark.parametrize("name", ["BOOL", "FP16", "BF16", "BYTES"])
def test_datatypes_without_a_class_result_are_refused(name: str) -> None:
    tensor = Tensor("Y", DATATYPES[name], np.zeros(1, DATATYPES[name].dtype))
    with pytest.raises(ServingError) as caught:
        top(tensor, 1, (), batched=False)
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        f"class result not available for output due to unsupported type '{name}'",
    )


def test_too_many_classes_are_refused() -> None:
    tensor = Tensor("Y", DATATYPES["INT8"], np.zeros((1, MAX_CLASSES + 1), np.int8))
    with pytest.raises(ServingError, match=r"^classification output tensor too large$"):
        top(tensor, 1, (), batched=True)
