"""Commands that can be copied, run as they are printed."""

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from penstock import samples
from penstock.model_config import Signature, TensorSpec
from penstock.tensor import DATATYPES

URL = "http://localhost:8000"


def signature(
    *specs: tuple[str, str, tuple[int, ...]], optional: tuple[str, ...] = (), sequences: bool = False
) -> Signature:
    inputs = {
        name: TensorSpec(name, DATATYPES[datatype], shape, shape, optional=name in optional)
        for name, datatype, shape in specs
    }
    return Signature("it's", inputs, {}, frozenset(inputs) - set(optional), 0, 0, sequences)


def test_a_small_request_is_written_out() -> None:
    model = signature(
        ("a", "FP32", (-1, 2)), ("b", "BOOL", ()), ("c", "BYTES", (1,)), ("d", "INT8", (3,)), optional=("d",)
    )
    assert samples.elements(model) == 4
    command, silent, target, flag, body = shlex.split(samples.curl(model, URL))
    assert (command, silent, target, flag) == ("curl", "-s", f"{URL}/v2/models/it%27s/infer", "-d")
    assert json.loads(body) == {
        "inputs": [
            {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]},
            {"name": "b", "shape": [], "datatype": "BOOL", "data": [True]},
            {"name": "c", "shape": [1], "datatype": "BYTES", "data": ["1"]},
        ]
    }
    assert shlex.split(samples.infer(model, ["--local", "a b"])) == [
        "penstock", "infer", "it's", "--local", "a b", "a=[[1, 1]]", "b=true", 'c=["1"]',
    ]  # fmt: skip


def test_a_request_to_a_model_with_sequences_is_a_whole_one() -> None:
    model = signature(("a", "FP32", (1,)), sequences=True)
    body = json.loads(shlex.split(samples.curl(model, URL))[-1])
    assert body["parameters"] == {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
    assert shlex.split(samples.infer(model)) == [
        "penstock", "infer", "it's", "--sequence", "1", "--start", "--end", "a=[1]",
    ]  # fmt: skip


def test_a_large_request_to_a_model_with_sequences_is_a_whole_one(tmp_path: Path) -> None:
    line = samples.curl(signature(("a", "FP32", (2000,)), sequences=True), URL)
    body, _ = first_part(line, " | ", tmp_path)
    assert json.loads(body)["parameters"] == {"sequence_id": 1, "sequence_start": True, "sequence_end": True}


def test_a_keyed_request_takes_the_key_from_the_shell() -> None:
    line = samples.curl(signature(("a", "FP32", (1,))), URL, keyed=True)
    assert line.startswith(f'curl -s -H "Authorization: Bearer $KEY" {URL}/v2/models/')


def test_a_model_of_text_is_told_what_is_asked_for() -> None:
    model = signature(("input", "BYTES", (1,)))
    assert json.loads(shlex.split(samples.curl(model, URL, text="{}"))[-1])["inputs"][0]["data"] == ["{}"]
    assert shlex.split(samples.infer(model, text="{}"))[-1] == 'input=["{}"]'


def test_a_job_has_an_input_that_is_still_to_be_filled_in() -> None:
    assert shlex.split(samples.job("h", URL)) == ["curl", "-s", f"{URL}/v2/h/runsync", "-d", '{"input": {}}']
    assert '"Authorization: Bearer $KEY"' in samples.job("h", URL, keyed=True)


def first_part(line: str, divider: str, where: Path) -> tuple[str, str]:
    """What the part of a shell line before `divider` prints, and the part after it."""
    script, _, rest = line.partition(divider)
    return subprocess.run(script, shell=True, check=True, capture_output=True, text=True, cwd=where).stdout, rest


def test_the_body_of_a_large_request_is_made_by_python(tmp_path: Path) -> None:
    model = signature(("image", "FP32", (-1, 3, 224, 224)), ("s", "BYTES", (1,)), ("b", "BOOL", (1,)))
    body, rest = first_part(samples.curl(model, URL), " | ", tmp_path)
    assert rest == f"curl -s {URL}/v2/models/it%27s/infer -d @-"
    image, text, flag = json.loads(body)["inputs"]
    assert image == {"name": "image", "shape": [1, 3, 224, 224], "datatype": "FP32", "data": [1] * 3 * 224 * 224}
    assert text == {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["1"]}
    assert flag == {"name": "b", "shape": [1], "datatype": "BOOL", "data": [True]}


@pytest.mark.parametrize(
    ("datatype", "value", "saved"),
    [
        ("FP32", 1, "float32"),
        ("BYTES", b"1", "|S1"),
        ("BF16", 1, "float32"),
        ("BOOL", True, "bool"),
        ("INT8", 1, "int8"),
    ],
)
def test_the_values_of_a_large_request_are_saved_by_numpy(
    tmp_path: Path, datatype: str, value: Any, saved: str
) -> None:
    _, rest = first_part(samples.infer(signature(("x", datatype, (-1, 2000)))), " && ", tmp_path)
    assert shlex.split(rest) == ["penstock", "infer", "it's", "x=@0.npy"]
    array = np.load(tmp_path / "0.npy")
    assert (array.shape, array.dtype) == ((1, 2000), np.dtype(saved))
    assert (array == value).all()
