"""curl and a text file: nothing else is needed to ask a model."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from conformance_tests.clause_table import clause
from conformance_tests.models.digits_data import held_out
from conformance_tests.server import Target

CURL = shutil.which("curl")
pytestmark = [
    clause("clients.curl"),
    pytest.mark.needs("digits"),
    pytest.mark.skipif(CURL is None, reason="curl is not installed"),
]


def curl(url: str, *options: str) -> str:
    """The body of an answer; another status than 2xx fails."""
    command = [CURL or "curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "20", *options, url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def http(target: Target) -> str:
    """The model's address."""
    return f"{target.http}/v2/models/digits"


def test_curl_reads_a_digit(http: str, tmp_path: Path) -> None:
    images, labels = held_out()
    document = {"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": images[0].tolist()}]}
    request = tmp_path / "request.json"
    request.write_text(json.dumps(document))
    (output,) = json.loads(curl(f"{http}/infer", "--data", f"@{request}"))["outputs"]
    assert max(range(10), key=output["data"].__getitem__) == labels[0]


def test_curl_reads_a_digit_by_name(http: str) -> None:
    images, labels = held_out()
    document = {
        "inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": images[0].ravel().tolist()}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}],
    }
    (output,) = json.loads(curl(f"{http}/infer", "--json", json.dumps(document)))["outputs"]
    assert int(output["data"][0].split(":")[1]) == labels[0]


def test_curl_asks_whether_the_model_is_ready(http: str) -> None:
    assert json.loads(curl(f"{http}/ready")) == {"name": "digits", "ready": True}
    assert curl(f"{http}/ready", "--head").startswith("HTTP/1.1 200")


def test_curl_may_compress_and_wait_for_leave(http: str, tmp_path: Path) -> None:
    """A body over a megabyte makes curl ask with Expect: 100-continue."""
    images, labels = held_out()
    rows = images[:64]
    document = {"inputs": [{"name": "image", "shape": [64, 1, 8, 8], "datatype": "FP32", "data": rows.tolist()}]}
    request = tmp_path / "request.json"
    request.write_text(json.dumps(document) + " " * (2 << 20))
    answer = curl(f"{http}/infer", "--compressed", "--data-binary", f"@{request}")
    (output,) = json.loads(answer)["outputs"]
    assert output["shape"] == [64, 10]
    found = [max(range(10), key=output["data"][10 * i : 10 * i + 10].__getitem__) for i in range(64)]
    assert sum(a == b for a, b in zip(found, labels[:64].tolist(), strict=True)) >= 62
