"""Requests that a version answers before it is ready."""

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.doors import Door, known
from conformance_tests.server import Running

needs = pytest.mark.needs


@clause("warmup.runs")
@needs("warmed")
def test_a_version_is_ready_after_its_samples_which_are_not_counted(door: Door) -> None:
    assert door.model_ready("warmed") is True
    (found,) = known(door.statistics("warmed"))["model_stats"]
    assert (found["execution_count"], found["inference_stats"]["fail"]["count"]) == (0, 0)


@clause("warmup.runs", "warmup.failure")
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("warmup_fails", "failed to run warmup sample 'file': onnx runtime error 2:"),  # so the sample did run
        (
            "warmup_short",
            "failed to run warmup sample 'file': [request id: <id_unknown>] warmup setting expects 24 bytes, but the "
            "data provided from indicesonly has 8 bytes; ",
        ),
    ],
)
def test_a_sample_that_fails_fails_the_load(broken_door: Door, broken: Running, model: str, reason: str) -> None:
    assert broken_door.model_ready(model, "1") is not True
    assert reason in broken.log.read_text()
