"""Binary tensor data over HTTP, and the raw binary request."""

from typing import Any

import numpy as np
import pytest

from conformance_tests.carriers import infer_path, read_reply, with_binary
from conformance_tests.clause_table import clause
from conformance_tests.http_wire import Answer, HttpClient, encode
from conformance_tests.tensors import pack, texts

needs = pytest.mark.needs
HEADER_LENGTH = "Inference-Header-Content-Length"
LEFT = np.arange(16, dtype=np.int32).tobytes()
RIGHT = np.ones(16, np.int32).tobytes()
SUM = (np.arange(16, dtype=np.int32) + 1).tobytes()
DIFFERENCE = (np.arange(16, dtype=np.int32) - 1).tobytes()


def tensor(name: str, **source: object) -> dict[str, object]:
    return {"name": name, "shape": [1, 16], "datatype": "INT32", **source}


def binary(name: str, size: int = 64) -> dict[str, object]:
    return tensor(name, parameters={"binary_data_size": size})


def post(http: HttpClient, document: object, *blobs: bytes, model: str = "simple") -> Answer:
    answer = http.request("POST", infer_path(model), *with_binary(document, *blobs))
    assert answer.status == 200, answer.body
    return answer


def split(answer: Answer) -> tuple[Any, bytes]:
    """JSON and bytes of a binary answer."""
    size = int(answer.headers["inference-header-content-length"])
    return Answer(200, answer.headers, answer.body[:size]).json(), answer.body[size:]


@clause("binary.inputs")
@needs("simple")
def test_bytes_follow_in_the_order_of_the_inputs(http: HttpClient) -> None:
    answer = post(http, {"inputs": [binary("INPUT1"), binary("INPUT0")]}, RIGHT, LEFT)
    assert read_reply(answer)["OUTPUT1"].tobytes() == DIFFERENCE


@clause("binary.mixed")
@needs("simple")
def test_json_and_binary_go_together(http: HttpClient) -> None:
    document = {
        "id": "w2",
        "inputs": [binary("INPUT0"), tensor("INPUT1", data=[1] * 16)],
        "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}],
    }
    head, blob = split(post(http, document, LEFT))
    assert head["id"] == "w2"
    assert head["outputs"] == [binary("OUTPUT0"), tensor("OUTPUT1", data=[*range(-1, 15)])]
    assert blob == SUM


@clause("binary.mixed", "binary.inputs")
@needs("simple")
def test_a_json_input_takes_no_bytes(http: HttpClient) -> None:
    document = {"inputs": [tensor("INPUT0", data=[*range(16)]), binary("INPUT1")]}
    assert read_reply(post(http, document, RIGHT))["OUTPUT0"].tobytes() == SUM


@clause("binary.outputs", "infer.output_order")
@needs("simple")
def test_bytes_come_in_the_order_of_the_outputs(http: HttpClient) -> None:
    outputs = [{"name": name, "parameters": {"binary_data": True}} for name in ("OUTPUT1", "OUTPUT0")]
    head, blob = split(post(http, {"inputs": [binary("INPUT0"), binary("INPUT1")], "outputs": outputs}, LEFT, RIGHT))
    assert [output["name"] for output in head["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    assert blob == DIFFERENCE + SUM


@clause("binary.output_default")
@needs("simple")
def test_the_default_is_for_outputs_that_are_not_named(http: HttpClient) -> None:
    document: dict[str, Any] = {
        "inputs": [binary("INPUT0"), binary("INPUT1")],
        "parameters": {"binary_data_output": True},
    }
    _, blob = split(post(http, document, LEFT, RIGHT))
    assert blob == SUM + DIFFERENCE
    document["outputs"] = [{"name": "OUTPUT1"}]
    assert post(http, document, LEFT, RIGHT).json()["outputs"] == [tensor("OUTPUT1", data=[*range(-1, 15)])]


@clause("binary.layout", "binary.content_types", "binary.header_length")
@needs("simple")
def test_a_binary_answer_is_laid_out_as_in_the_protocol(http: HttpClient) -> None:
    document = {"inputs": [binary("INPUT0"), binary("INPUT1")], "parameters": {"binary_data_output": True}}
    answer = post(http, document, LEFT, RIGHT)
    head = (
        b'{"model_name":"simple","model_version":"1","outputs":['
        b'{"name":"OUTPUT0","datatype":"INT32","shape":[1,16],"parameters":{"binary_data_size":64}},'
        b'{"name":"OUTPUT1","datatype":"INT32","shape":[1,16],"parameters":{"binary_data_size":64}}]}'
    )
    assert answer.body == head + SUM + DIFFERENCE
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["inference-header-content-length"] == str(len(head))
    assert answer.headers["content-length"] == str(len(head) + 128)


@clause("binary.content_types")
@needs("simple")
def test_binary_inputs_alone_make_no_binary_answer(http: HttpClient) -> None:
    answer = post(http, {"inputs": [binary("INPUT0"), binary("INPUT1")]}, LEFT, RIGHT)
    assert answer.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in answer.headers


@clause("binary.header_length")
@needs("simple")
def test_the_header_length_counts_bytes_not_characters(http: HttpClient) -> None:
    document = {
        "id": "äöü€😀",
        "inputs": [binary("INPUT0"), binary("INPUT1")],
        "parameters": {"binary_data_output": True},
    }
    head, blob = split(post(http, document, LEFT, RIGHT))
    assert head["id"] == "äöü€😀"
    assert blob == SUM + DIFFERENCE


@clause("binary.trailing_garbage")
@needs("simple")
def test_the_header_length_is_read_up_to_its_last_digit(http: HttpClient) -> None:
    body, headers = with_binary({"inputs": [binary("INPUT0"), binary("INPUT1")]}, LEFT, RIGHT)
    answer = http.request("POST", infer_path("simple"), body, {HEADER_LENGTH: headers[HEADER_LENGTH] + "x"})
    assert answer.status == 200, answer.body


@clause("binary.header_length")
@needs("simple")
def test_a_header_length_may_cover_a_body_without_bytes(http: HttpClient) -> None:
    document = {"inputs": [tensor("INPUT0", data=[*range(16)]), tensor("INPUT1", data=[1] * 16)]}
    assert read_reply(post(http, document))["OUTPUT0"].tobytes() == SUM


@clause("binary.unaligned")
@needs("two_inputs_mixed")
@pytest.mark.parametrize("odd", range(1, 9))
def test_a_tensor_at_any_offset_is_read(http: HttpClient, odd: int) -> None:
    """The text pushes the numbers behind it off every alignment."""
    words, numbers = texts(["x" * odd]), np.array([1.5, -2.25, 3e8], np.float32)
    blobs = [pack("BYTES", words), pack("FP32", numbers)]
    document = {
        "inputs": [
            {"name": "INPUT1", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(blobs[0])}},
            {"name": "INPUT0", "shape": [3], "datatype": "FP32", "parameters": {"binary_data_size": len(blobs[1])}},
        ],
        "parameters": {"binary_data_output": True},
    }
    reply = read_reply(post(http, document, *blobs, model="two_inputs_mixed"))
    assert reply["OUTPUT0"].tolist() == numbers.tolist()
    assert reply["OUTPUT1"].tolist() == words.tolist()


@clause("binary.zero_size")
@needs("identity_fp32")
def test_no_bytes_make_a_plain_answer(http: HttpClient) -> None:
    document = {
        "inputs": [{"name": "INPUT0", "shape": [0, 4], "datatype": "FP32", "parameters": {"binary_data_size": 0}}],
        "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": True}}],
    }
    answer = post(http, document, model="identity_fp32")
    assert answer.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in answer.headers
    assert answer.json()["outputs"] == [
        {"name": "OUTPUT0", "datatype": "FP32", "shape": [0, 4], "parameters": {"binary_data_size": 0}}
    ]


def post_raw(http: HttpClient, model: str, body: bytes) -> Answer:
    return http.request("POST", infer_path(model), body, {HEADER_LENGTH: "0"})


@clause("raw_request.single_input", "raw_request.free_axis")
@needs("identity_1d_int64")
def test_a_raw_body_is_the_only_input(http: HttpClient) -> None:
    numbers = np.array([3, -1, 1 << 60], np.int64)
    answer = post_raw(http, "identity_1d_int64", numbers.tobytes())
    assert answer.headers["content-type"] == "application/octet-stream"
    assert read_reply(answer)["OUTPUT0"].tolist() == numbers.tolist()


@clause("raw_request.single_input")
@needs("fixed_shape")
def test_a_raw_body_takes_the_models_shape(http: HttpClient) -> None:
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert read_reply(post_raw(http, "fixed_shape", numbers.tobytes()))["OUTPUT0"].tolist() == numbers.tolist()


@clause("raw_request.batch")
@needs("digits")
def test_a_raw_body_is_a_batch_of_one(http: HttpClient) -> None:
    answer = post_raw(http, "digits", bytes(8 * 8 * 4))
    assert read_reply(answer)["probabilities"].shape == (1, 10)


@clause("raw_request.bytes")
@needs("sentiment")
def test_a_raw_body_may_be_one_text(http: HttpClient) -> None:
    answer = post_raw(http, "sentiment", b"A wonderful place, I love it.")
    assert read_reply(answer)["label"].tolist() == [[1]]


@clause("raw_request.empty")
@needs("identity_1d_int64")
@pytest.mark.parametrize("headers", [{}, {HEADER_LENGTH: "0"}])
def test_no_body_is_a_raw_body_of_no_elements(http: HttpClient, headers: dict[str, str]) -> None:
    answer = http.request("POST", infer_path("identity_1d_int64"), b"", headers)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["outputs"][0]["shape"] == [0]


@clause("binary.inputs")
@needs("identity_fp32")
def test_megabytes_go_there_and_back(http: HttpClient) -> None:
    numbers = np.arange(1 << 22, dtype=np.float32).reshape(1, -1)
    document = {
        "inputs": [
            {
                "name": "INPUT0",
                "shape": list(numbers.shape),
                "datatype": "FP32",
                "parameters": {"binary_data_size": numbers.nbytes},
            }
        ],
        "parameters": {"binary_data_output": True},
    }
    assert read_reply(post(http, document, numbers.tobytes(), model="identity_fp32"))["OUTPUT0"].tobytes() == (
        numbers.tobytes()
    )


def test_the_protocols_worked_example_has_the_lengths_it_states() -> None:
    request = {
        "id": "7",
        "inputs": [{"name": "A", "shape": [1, 2], "datatype": "INT32", "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "Y", "parameters": {"binary_data": True}}],
    }
    assert len(encode(request)) == 162
