"""The parameters of a model that say how inputs are padded and outputs cut back."""

import numpy as np
import pytest
from google.protobuf import text_format
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.model_config import Cut, Padding, cuts, paddings, validate

MODEL = """
name: "m" max_batch_size: 4 instance_group { count: 1 kind: KIND_CPU }
input { name: "ids" data_type: TYPE_INT64 dims: [ -1 ] }
input { name: "mask.1" data_type: TYPE_BOOL dims: [ 2, -1 ] }
input { name: "text" data_type: TYPE_STRING dims: [ -1 ] }
input { name: "ragged" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
output { name: "scores" data_type: TYPE_FP32 dims: [ 3, -1 ] }
output { name: "label" data_type: TYPE_FP32 dims: [ -1 ] }
"""


def model(backend: str = "onnxruntime", text: str = MODEL, /, **parameters: str) -> pb.ModelConfig:
    """Parameters by their names, with `__` for a dot."""
    config = pb.ModelConfig(backend=backend)
    text_format.Merge(text, config, descriptor_pool=pb.POOL)
    for key, value in parameters.items():
        config.parameters[key.replace("__", ".")].string_value = value
    return config


def test_without_parameters_nothing_is_padded() -> None:
    assert (paddings(model()), cuts(model())) == ((), {})


def test_inputs_are_padded_as_their_parameters_say() -> None:
    config = model(
        pad__ids__axis="1",
        pad__ids__value="-7",
        pad__ids__buckets="16, 32,64",
        pad__mask__1__axis="2",
        pad__text__axis="1",
        pad__text__value="[PAD]",
    )
    validate(config, complete=True)
    assert paddings(config) == (
        Padding("ids", 1, np.int64(-7), (16, 32, 64)),
        Padding("mask.1", 2, False),
        Padding("text", 1, b"[PAD]"),
    )


def test_an_output_follows_the_only_padded_input_or_the_one_that_is_named_or_none() -> None:
    config = model(pad__ids__axis="1", cut__scores__axis="2", cut__label__axis="none")
    validate(config, complete=True)
    assert cuts(config) == {"scores": Cut("scores", 2, "ids"), "label": None}
    both = {"pad__ids__axis": "1", "pad__text__axis": "1"}
    config = model(**both, cut__label__axis="1", cut__label__input="text")
    validate(config, complete=True)
    assert cuts(config) == {"label": Cut("label", 1, "text")}


def test_parameters_of_a_backend_that_does_not_pad_are_its_own() -> None:
    config = model("handler", pad__ids__axis="about ten")
    validate(config, complete=True)
    assert paddings(config) == ()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"pad__nothing__axis": "1"},
            "parameter 'pad.nothing.axis' names no input; there are: ids, mask.1, text, ragged for m",
        ),
        ({"cut__ids__axis": "1"}, "parameter 'cut.ids.axis' names no output; there are: scores, label for m"),
        (
            {"pad__ids__size": "1"},
            "parameter 'pad.ids.size' is none of pad.INPUT.axis, pad.INPUT.value, pad.INPUT.buckets for m",
        ),
        ({"pad__ids__value": "1"}, "parameter 'pad.ids.axis' is missing for m"),
        ({"pad__ids__axis": "0"}, "parameter 'pad.ids.axis' expects an axis from 1 to 1, got '0' for m"),
        ({"pad__ids__axis": "2"}, "parameter 'pad.ids.axis' expects an axis from 1 to 1, got '2' for m"),
        ({"pad__ids__axis": "last"}, "parameter 'pad.ids.axis' expects an axis from 1 to 1, got 'last' for m"),
        ({"pad__mask__1__axis": "1"}, "parameter 'pad.mask.1.axis' is 1, but that axis always has 2 elements for m"),
        (
            {"pad__ids__axis": "1", "pad__ids__value": "0.5"},
            "parameter 'pad.ids.value' expects one of INT64, got '0.5' for m",
        ),
        (
            {"pad__ids__axis": "1", "pad__ids__value": str(2**63)},
            f"parameter 'pad.ids.value' expects one of INT64, got '{2**63}' for m",
        ),
        (
            {"pad__mask__1__axis": "2", "pad__mask__1__value": "no"},
            "parameter 'pad.mask.1.value' expects one of BOOL, got 'no' for m",
        ),
        *(
            (
                {"pad__ids__axis": "1", "pad__ids__buckets": buckets},
                f"parameter 'pad.ids.buckets' expects rising lengths such as 16,32,64, got '{buckets}' for m",
            )
            for buckets in ("", "0,2", "4,2", "2,2", "two")
        ),
        (
            {"pad__ragged__axis": "1"},
            "input 'ragged' can not be both padded and 'allow_ragged_batch' for m",
        ),
        (
            {"pad__ids__axis": "1", "cut__scores__axis": "3"},
            "parameter 'cut.scores.axis' expects an axis from 1 to 2 or none, got '3' for m",
        ),
        (
            {"pad__ids__axis": "1", "cut__scores__axis": "1"},
            "parameter 'cut.scores.axis' is 1, but that axis always has 3 elements for m",
        ),
        ({"cut__label__axis": "1"}, "parameter 'cut.label.input' is missing: 0 inputs are padded for m"),
        (
            {"pad__ids__axis": "1", "pad__text__axis": "1", "cut__label__axis": "1"},
            "parameter 'cut.label.input' is missing: 2 inputs are padded for m",
        ),
        (
            {"pad__ids__axis": "1", "cut__label__axis": "1", "cut__label__input": "text"},
            "parameter 'cut.label.input' expects a padded input, got 'text' for m",
        ),
    ],
)
def test_a_parameter_that_is_wrong_is_refused_with_what_it_should_be(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(ServingError) as caught:
        validate(model(**parameters), complete=True)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_only_models_that_batch_are_padded() -> None:
    text = 'name: "m" instance_group { kind: KIND_CPU } input { name: "ids" data_type: TYPE_INT64 dims: [ -1, -1 ] }'
    with pytest.raises(ServingError, match=r"^inputs are padded for batches, but max_batch_size is 0 for m$"):
        validate(model("onnxruntime", text, pad__ids__axis="1"), complete=True)


@pytest.mark.parametrize(
    ("buckets", "longest", "length"),
    [((), 7, 7), ((4, 8), 3, 4), ((4, 8), 4, 4), ((4, 8), 5, 8), ((4, 8), 9, 9), ((4, 8), 0, 0)],
)
def test_a_length_grows_to_the_next_bucket_and_beyond_the_last_it_stays(
    buckets: tuple[int, ...], longest: int, length: int
) -> None:
    assert Padding("x", 1, 0, buckets).length(longest) == length


def test_shapes_that_may_share_a_batch_are_those_of_one_bucket() -> None:
    padding = Padding("x", 2, 0, (4, 8))
    assert padding.kind((3, 1)) == padding.kind((3, 4)) != padding.kind((3, 5))
    assert padding.kind((3, 9)) != padding.kind((3, 10))
    assert padding.kind((2, 1)) != padding.kind((3, 1))
    assert Padding("x", 2, 0).kind((3, 1)) == Padding("x", 2, 0).kind((3, 100))
