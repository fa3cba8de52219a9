"""model_repository/ as plain ONNX Runtime sees it: every file loads and computes what its name says."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "model_repository"


def run(model: str, version: int = 1, **inputs: Any) -> list[Any]:
    """The model's outputs, in the file's order."""
    path = SAMPLES / model / str(version) / "model.onnx"
    outputs: list[Any] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
    return outputs


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*/*/model.onnx")), ids=lambda path: path.parts[-3])
def test_a_sample_is_no_newer_than_older_runtimes_can_load(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert model.producer_name == "penstock"
    assert model.ir_version <= 10
    assert all(opset.version <= 21 for opset in model.opset_import)


def test_the_samples_stay_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 500_000


def test_every_directory_of_the_repository_is_a_model() -> None:
    assert {path.parts[-3] for path in SAMPLES.glob("*/*/model.onnx")} == {path.name for path in SAMPLES.iterdir()}


def test_digits_reads_at_least_97_percent_of_the_images_it_never_saw() -> None:
    images, labels = runpy.run_path(str(ROOT / "conformance_tests/models/digits_data.py"))["held_out"]()
    (probabilities,) = run("digits", image=images)
    assert probabilities.shape == (355, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() >= 0.97


def test_simple_adds_and_subtracts() -> None:
    left, right = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 5, np.int32)
    total, difference = run("simple", INPUT0=left, INPUT1=right)
    np.testing.assert_array_equal(total, left + 5)
    np.testing.assert_array_equal(difference, left - 5)


def test_simple_string_adds_and_subtracts_numbers_written_as_text() -> None:
    left, right = np.array([["7", "-3"] * 8], object), np.array([["10", "20"] * 8], object)
    total, difference = run("simple_string", INPUT0=left, INPUT1=right)
    assert total.tolist() == [["17", "17"] * 8]
    assert difference.tolist() == [["-3", "-23"] * 8]


def test_the_two_versions_of_times_version_differ() -> None:
    x = np.array([1, -2.5], np.float32)
    assert run("times_version", version=1, x=x)[0].tolist() == [1, -2.5]
    assert run("times_version", version=2, x=x)[0].tolist() == [2, -5]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(2, 3, 4), (1, 1, 1), (5, 2, 0)])
def test_matmul_takes_any_sizes(rows: int, inner: int, columns: int) -> None:
    a = np.arange(rows * inner, dtype=np.float32).reshape(rows, inner)
    b = np.arange(inner * columns, dtype=np.float32).reshape(inner, columns)
    np.testing.assert_array_equal(run("matmul", a=a, b=b)[0], a @ b)


def test_iris_gives_a_class_and_a_map_of_probabilities_per_flower() -> None:
    label, probability = run("iris", measurements=np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32))
    assert label.tolist() == [0, 2]
    assert [max(row, key=row.__getitem__) for row in probability] == [0, 2]
    assert [sum(row.values()) for row in probability] == pytest.approx([1, 1])


def test_sentiment_tells_praise_from_complaint_in_either_case() -> None:
    texts = np.array([["What a lovely, comfortable room!"], ["SLOW, RUDE AND DIRTY."]], object)
    label, probabilities = run("sentiment", text=texts)
    assert label.tolist() == [1, 0]
    assert probabilities[0, 1] > 0.7
    assert probabilities[1, 0] > 0.7
