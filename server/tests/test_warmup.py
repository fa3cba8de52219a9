"""Samples become requests, and every instance answers them before the model serves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from penstock import model_config, warmup
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest
from penstock.tensor import Array

from .fakes import EchoInstance, Result, ScriptedInstance, configuration

CONFIG = """
    name: "m" max_batch_size: 4
    input { name: "X" data_type: TYPE_%s dims: -1 }
    output { name: "Y" data_type: TYPE_FP32 dims: -1 }
    model_warmup { name: "w" %s inputs { key: "X" value { %s } } }
"""


def sampled(
    directory: Path, data: str, datatype: str = "FP32", how: str = "batch_size: 2"
) -> list[tuple[str, int, Array]]:
    config = configuration(CONFIG % (datatype, how, f"data_type: TYPE_{datatype} {data}"))
    found = warmup.samples(config, model_config.signature(config), directory)
    return [(name, times, sent.inputs["X"].array) for name, times, sent in found]


def test_a_sample_of_zeros_has_the_rows_it_says_and_runs_at_least_once(tmp_path: Path) -> None:
    [(name, times, array)] = sampled(tmp_path, "dims: 3 zero_data: true")
    assert (name, times, array.tolist()) == ("w", 1, [[0, 0, 0], [0, 0, 0]])
    [(_, times, _)] = sampled(tmp_path, "dims: 3 zero_data: true", how="batch_size: 1 count: 5")
    assert times == 5


def test_a_batch_size_of_0_skips_the_sample(tmp_path: Path) -> None:
    assert sampled(tmp_path, "dims: 3 zero_data: true", how="") == []


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16", "FP64", "INT8", "UINT64", "BOOL"])
def test_random_data_is_finite_and_the_same_for_each_row_and_load(tmp_path: Path, datatype: str) -> None:
    [(_, _, array)] = sampled(tmp_path, "dims: 50 random_data: true", datatype)
    [(_, _, again)] = sampled(tmp_path, "dims: 50 random_data: true", datatype)
    assert array.shape == (2, 50)
    assert len({*array[0].tolist()}) > 1
    assert np.isfinite(array.astype(np.float64)).all()
    assert array[0].tolist() == array[1].tolist() == again[0].tolist()


@pytest.mark.parametrize("data", ["zero_data", "random_data"])
def test_bytes_that_are_made_are_empty(tmp_path: Path, data: str) -> None:
    [(_, _, array)] = sampled(tmp_path, f"dims: 3 {data}: true", "STRING", "batch_size: 1")
    assert array.tolist() == [[b"", b"", b""]]


def test_a_file_holds_one_row(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "x").write_bytes(np.array([1, 2, 3], np.float32).tobytes())
    (tmp_path / "warmup" / "t").write_bytes(b"\x02\0\0\0hi\0\0\0\0")
    [(_, _, array)] = sampled(tmp_path, 'dims: 2 input_data_file: "x"')
    assert array.tolist() == [[1, 2], [1, 2]]
    [(_, _, array)] = sampled(tmp_path, 'dims: 2 input_data_file: "t"', "STRING", "batch_size: 1")
    assert array.tolist() == [[b"hi", b""]]


@pytest.mark.parametrize(
    ("data", "how", "reason"),
    [
        (
            "dims: -1 zero_data: true",
            "batch_size: 1",
            "warmup setting expects all variable-size dimensions are specified for input 'X'",
        ),
        ("dims: 1", "batch_size: 1", "[request id: <id_unknown>] warmup setting expects input 'X' to have "
         "input_data_type set"),
        (
            'dims: 9 input_data_file: "short"',
            "batch_size: 1",
            "[request id: <id_unknown>] warmup setting expects 36 bytes, but the data provided from shortonly has "
            "8 bytes",
        ),
        (
            "dims: 1 zero_data: true",
            "batch_size: 9",
            "[request id: <id_unknown>] inference request batch-size must be <= 4 for 'm'",
        ),
    ],
)  # fmt: skip
def test_a_sample_that_is_no_request_fails(tmp_path: Path, data: str, how: str, reason: str) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "short").write_bytes(bytes(8))
    with pytest.raises(ServingError) as caught:
        sampled(tmp_path, data, how=how)
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        f"failed to run warmup sample 'w': {reason}; ",
    )


@pytest.mark.parametrize("file", ["../secret", "/etc/hostname", "nowhere"])
def test_a_file_that_is_not_among_the_models_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(100))
    with pytest.raises(ServingError, match=r"is outside|failed to read"):
        sampled(tmp_path, f'dims: 1 input_data_file: "{file}"')


def test_every_instance_answers_every_sample_as_often_as_it_says(tmp_path: Path) -> None:
    config = configuration(CONFIG % ("FP32", "batch_size: 1 count: 3", "data_type: TYPE_FP32 dims: 1 zero_data: true"))
    instances = [EchoInstance(), EchoInstance()]
    warmup.run(config, model_config.signature(config), tmp_path, instances)
    assert [len(instance.batches) for instance in instances] == [3, 3]


@pytest.mark.parametrize("raises", [True, False])
def test_a_sample_that_the_model_refuses_fails_with_its_reason(tmp_path: Path, raises: bool) -> None:
    def script(batch: Sequence[InferRequest]) -> Sequence[Result]:
        if raises:
            raise ServingError(Kind.INVALID, "no luck")
        return [ServingError(Kind.INVALID, "no luck")]

    config = configuration(CONFIG % ("FP32", "batch_size: 1", "data_type: TYPE_FP32 dims: 1 zero_data: true"))
    with pytest.raises(ServingError) as caught:
        warmup.run(config, model_config.signature(config), tmp_path, [ScriptedInstance(script)])
    assert caught.value.message == "failed to run warmup sample 'w': no luck; "
