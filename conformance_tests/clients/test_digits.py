"""Every handwritten digit that was held out from training, read whichever way it is carried."""

import numpy as np
import pytest

from conformance_tests.carriers import Call, Carrier, HttpJson, Input, infer
from conformance_tests.clause_table import clause
from conformance_tests.http_wire import HttpClient
from conformance_tests.models.digits_data import Images, held_out
from conformance_tests.server import Target
from conformance_tests.tensors import Array

BATCH = 50
pytestmark = [clause("clients.digits"), pytest.mark.needs("digits")]


def probabilities(carrier: Carrier, images: Images) -> Array:
    """[n,10] of n images, asked for in batches."""
    batches = [Input("image", "FP32", images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
    return np.concatenate([infer(carrier, Call("digits", [batch]))["probabilities"] for batch in batches])


def test_97_percent_are_read_and_alike_on_every_way(carrier: Carrier, target: Target) -> None:
    images, labels = held_out()
    found = probabilities(carrier, images).argmax(axis=1)
    assert (found == labels).mean() >= 0.97
    in_json = probabilities(HttpJson(HttpClient(target.http)), images).argmax(axis=1)
    assert found.tolist() == in_json.tolist()


def test_one_by_one_gives_the_labels_of_the_batch(carrier: Carrier) -> None:
    images = held_out()[0][:BATCH]
    together = probabilities(carrier, images)
    for row, expected in zip(images, together, strict=True):
        alone = probabilities(carrier, row[np.newaxis])[0]
        assert alone.argmax() == expected.argmax()
        assert np.allclose(alone, expected, atol=1e-5)
