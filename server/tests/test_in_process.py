"""One model in this process."""

from pathlib import Path

import pytest
from penstock.errors import Kind, ServingError
from penstock.in_process import find, loaded
from penstock.settings import Settings

SAMPLES = Path(__file__).parents[2] / "model_repository"


def test_only_the_model_that_is_named_is_loaded_and_only_for_a_while() -> None:
    with loaded("simple", Settings(model_repository=(str(SAMPLES),))) as engine:
        [model] = engine.lifecycle.models()
        assert model.name == "simple"
        assert not model.draining
    assert model.draining


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ServingError) as caught:
        find("m", Settings(model_repository=(str(SAMPLES), str(tmp_path))))
    assert caught.value.kind is Kind.NOT_FOUND
    assert caught.value.message.startswith(f"no model 'm' in '{SAMPLES}' and '{tmp_path}'; there are: digits, iris, ")
    with pytest.raises(ServingError, match="there are: none"):
        find("m", Settings(model_repository=(str(tmp_path),)))


def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with (
        pytest.raises(ServingError, match="load failed for model 'bad': version 1 is at UNAVAILABLE state: "),
        loaded("bad", Settings(model_repository=(str(tmp_path / "bad.onnx"),))),
    ):
        raise AssertionError("it cannot be loaded")
