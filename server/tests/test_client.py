"""`penstock infer` on the sample models: in process, and against a server over HTTP and gRPC."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from penstock import pb
from penstock.cli import main
from penstock.client import over_grpc, over_http
from penstock.errors import ServingError
from penstock.messages import InferRequest, RequestedOutput
from penstock.tensor import BYTES, DATATYPES, FP32, Tensor, objects

SAMPLES = Path(__file__).parents[2] / "model_repository"
Infer = Callable[..., tuple[int, str, str]]
SIMPLE = ("simple", "INPUT0=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]", f"INPUT1={[1] * 16}")


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """A server of the samples: where it answers `http` and `grpc`."""
    command = [sys.executable, "-m", "penstock.cli", "serve", str(SAMPLES), "--announce", "json", "--log-info", "false"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--allow-metrics", "false"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()


@pytest.fixture(params=["http", "grpc", "local"])
def infer(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Infer:
    """Runs the command by each way in turn: exit status, output and errors."""
    if request.param == "local":
        where = ["--local", str(SAMPLES)]
    else:
        address = request.getfixturevalue("server")[request.param]
        where = ["--url" if request.param == "http" else "--grpc", address]

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["infer", *where, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_outputs_are_printed_with_datatype_and_shape(infer: Infer) -> None:
    status, out, _ = infer(*SIMPLE)
    assert status == 0
    assert out.splitlines() == [
        "OUTPUT0  INT32  [1,16]",
        "  [[ 1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16]]",
        "OUTPUT1  INT32  [1,16]",
        "  [[-1  0  1  2  3  4  5  6  7  8  9 10 11 12 13 14]]",
    ]


def test_options_may_stand_between_the_inputs(infer: Infer) -> None:
    model, first, second = SIMPLE
    status, out, _ = infer(model, "--id", "a1", first, "--json", second, "--output", "OUTPUT1", "--version", "1")
    assert status == 0
    assert json.loads(out) == {
        "id": "a1",
        "model_name": "simple",
        "model_version": "1",
        "outputs": [{"name": "OUTPUT1", "datatype": "INT32", "shape": [1, 16], "data": list(range(-1, 15))}],
    }


def test_a_version_is_asked_for_by_number(infer: Infer) -> None:
    for version, expected in (("1", "[2. 3.]"), ("2", "[4. 6.]"), ("", "[4. 6.]")):
        status, out, _ = infer("times_version", "x=[2,3]", "--version", version)
        assert (status, out.splitlines()[1].strip()) == (0, expected)


def test_text_and_classes_with_labels(infer: Infer) -> None:
    status, out, _ = infer("sentiment", "text=What a lovely, comfortable room!", "--classes", "2")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["label", "INT64", "[1,1]"]  # no floats: it comes as it is
    assert lines[2] == ["probabilities", "BYTES", "[1,2]"]
    assert [line[1:] for line in lines[3:]] == [["1", "positive"], ["0", "negative"]]
    assert float(lines[3][0]) > float(lines[4][0])


def test_classes_of_several_rows_stand_apart(infer: Infer, tmp_path: Path) -> None:
    images = tmp_path / "images.npy"
    np.save(images, np.zeros((2, 1, 8, 8)))
    status, out, _ = infer("digits", f"image=@{images}", "--classes", "1", "--output", "probabilities")
    assert status == 0
    head, first, between, second = out.splitlines()
    assert head == "probabilities  BYTES  [2,1]"
    assert first == second
    assert between == ""


def test_strings_go_and_come(infer: Infer) -> None:
    status, out, _ = infer("simple_string", f"INPUT0={json.dumps(['7'] * 16)}", f"INPUT1={json.dumps([['1'] * 16])}")
    assert status == 0
    eights = " ".join(["'8'"] * 16)
    assert out.splitlines()[:2] == ["OUTPUT0  BYTES  [1,16]", f"  [[{eights}]]"]


def test_a_request_may_be_a_part_of_a_sequence(infer: Infer) -> None:
    for id in ("7", "seven"):
        status, out, _ = infer("running_sum", "x=[3]", "--sequence", id, "--start", "--end")
        assert (status, out.splitlines()) == (0, ["sum  FP32  [1,1]", "  [[3.]]"])
    status, _, errors = infer("running_sum", "x=[3]")
    assert status == 1
    assert "must specify a non-zero or non-empty correlation ID" in errors


def test_a_sequence_goes_on_from_request_to_request(server: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for where, name in (("--url", "http"), ("--grpc", "grpc")):
        for flags, total in ((["--start"], "3."), ([], "6."), (["--end"], "9.")):
            assert main(["infer", where, server[name], "running_sum", "x=[3]", "--sequence", name, *flags]) == 0
            assert capsys.readouterr().out.splitlines()[1] == f"  [[{total}]]"


def test_large_outputs_are_abbreviated(infer: Infer, tmp_path: Path) -> None:
    a, b = tmp_path / "a.npy", tmp_path / "b.npy"
    np.save(a, np.ones((300, 1), np.float32))
    np.save(b, np.ones((1, 300), np.float32))
    status, out, _ = infer("matmul", f"a=@{a}", f"b=@{b}")
    assert status == 0
    assert out.startswith("product  FP32  [300,300]\n")
    assert "..." in out
    assert len(out) < 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simple", "INPUT9=1"), "model 'simple' has no input 'INPUT9'; its inputs are: INPUT0, INPUT1"),
        ((*SIMPLE, "--output", "nope"), "model 'simple' has no output 'nope'; its outputs are: OUTPUT0, OUTPUT1"),
        (("simple", "INPUT0=[1]"), "input 'INPUT0' (INT32): expects shape [-1,16], got [1]"),
        (("simple", "INPUT0"), "expected NAME=VALUE, got 'INPUT0'"),
        (("digits", "image=1", "image=2"), "input 'image' is given twice"),
        ((*SIMPLE, "--classes", "-1"), "--classes expects a positive number, got -1"),
        ((*SIMPLE, "--classes", "1"), "no output of model 'simple' is FP32 or FP64; name one with --output"),
        (("simple", "INPUT0=@-", "INPUT1=@-"), "only one input can come from standard input"),
        ((*SIMPLE, "--end"), "--start and --end need --sequence ID"),
    ],
)
def test_a_mistake_is_named_before_anything_is_asked(infer: Infer, arguments: tuple[str, ...], message: str) -> None:
    assert infer(*arguments) == (1, "", f"penstock: {message}\n")


MISSING = (
    "[request id: <id_unknown>] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], "
    "but missing required input(s) ['INPUT1']. Please provide all required input(s)."
)


@pytest.mark.parametrize(
    ("infer", "status"), [("http", "HTTP 400 Bad Request: "), ("grpc", "gRPC INVALID_ARGUMENT: "), ("local", "")],
    indirect=["infer"],
)  # fmt: skip
def test_what_the_server_refuses_is_printed_with_its_status(infer: Infer, status: str) -> None:
    assert infer("simple", SIMPLE[1]) == (1, "", f"penstock: {status}{MISSING}\n")


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        ("http", "HTTP 404 Not Found: Request for unknown model: 'nope' is not found"),
        ("grpc", "gRPC NOT_FOUND: Request for unknown model: 'nope' is not found"),
        ("local", f"no model 'nope' in '{SAMPLES}'; there are: {', '.join(sorted(p.name for p in SAMPLES.iterdir()))}"),
    ],
    indirect=["infer"],
)
def test_a_model_that_is_not_there_is_said_to_be_none(infer: Infer, message: str) -> None:
    assert infer("nope") == (1, "", f"penstock: {message}\n")


def test_standard_input_holds_a_value(server: dict[str, str]) -> None:
    command = [sys.executable, "-m", "penstock.cli", "infer", "times_version", "x=@-", "--url", server["http"]]
    asked = subprocess.run(command, input=b"[1, 2.5]", capture_output=True, check=True)
    assert asked.stdout == b"y  FP32  [2]\n  [2. 5.]\n"


def test_options_of_loading_need_a_model_to_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", *SIMPLE, "--default-max-batch-size", "4"]) == 1
    assert capsys.readouterr().err == (
        "penstock: --default-max-batch-size needs --local: it says how a model is loaded\n"
    )


def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", *SIMPLE, "--url", "localhost:1/"]) == 1
    assert capsys.readouterr().err.startswith("penstock: cannot ask http://localhost:1/: ")
    assert main(["infer", *SIMPLE, "--grpc", "localhost:1"]) == 1
    assert capsys.readouterr().err.startswith("penstock: gRPC UNAVAILABLE: ")


@pytest.mark.parametrize("url", ["ftp://localhost", "http://localhost:x"])
def test_a_url_must_be_one_of_http(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", *SIMPLE, "--url", url]) == 1
    assert capsys.readouterr().err == f"penstock: --url expects http://HOST:PORT, got '{url}'\n"


# -- what other servers may answer


def test_a_request_is_json_with_binary_tensors() -> None:
    inputs = {
        "x": Tensor("x", FP32, np.array([[1.5]], np.float32)),
        "s": Tensor("s", BYTES, objects([b"ab"], [1])),
        "none": Tensor("none", FP32, np.empty((0,), np.float32)),
    }
    head, buffers = over_http.encode(InferRequest("m", "", "7", inputs, {"y": RequestedOutput("y", 3)}))
    assert json.loads(head) == {
        "id": "7",
        "parameters": {"binary_data_output": True},
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}},
            {"name": "s", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}},
            {"name": "none", "datatype": "FP32", "shape": [0], "parameters": {"binary_data_size": 0}},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True, "classification": 3}}],
    }
    assert [bytes(buffer) for buffer in buffers] == [b"\x00\x00\xc0\x3f", b"\x02\x00\x00\x00ab"]


def test_an_answer_may_be_json_alone() -> None:
    document = {
        "model_name": "m",
        "outputs": [
            {"name": "y", "datatype": "INT64", "shape": [2, 1], "data": [[1], [2]]},
            {"name": "s", "datatype": "BYTES", "shape": [1], "data": ["é"]},
            {"name": "h", "datatype": "FP16", "shape": [1], "data": [0.5], "parameters": {"note": "x"}},
        ],
    }
    response = over_http.decode(json.dumps(document).encode(), None)
    assert (response.model, response.version, response.id) == ("m", "", "")
    assert [tensor.array.tolist() for tensor in response.outputs] == [[[1], [2]], ["é".encode()], [0.5]]
    assert [tensor.datatype.name for tensor in response.outputs] == ["INT64", "BYTES", "FP16"]


OUTPUT = '{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[2],%s}]}'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<html>", "the server's answer is no JSON: "),
        ("[]", "the server's answer has no list 'outputs'"),
        (OUTPUT % '"data":[1]', "the server sent output 'y', which is no FP32 of shape [2]: "),
        (OUTPUT % '"data":["x",1]', "the server sent output 'y', which is no FP32 of shape [2]: "),
        (
            OUTPUT % '"parameters":{"binary_data_size":4}',
            "the server sent 0 bytes for output 'y' of type FP32 and shape",
        ),
        (OUTPUT % '"parameters":{}', "the server's answer has no int 'binary_data_size'"),
        (OUTPUT.replace("FP32", "FP8") % '"data":[1,2]', "the server uses datatype 'FP8', which the protocol lacks"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_said_to(body: str, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        over_http.decode(body.encode(), len(body))
    assert caught.value.message.startswith(message)


@contextmanager
def answering(status: int, body: bytes, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A server that gives every request one answer: its address, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            asked.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name is the library's

        def log_message(self, *arguments: object) -> None:
            """Nothing is logged."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"error":"not now"}', "not now"),
        (b"Bad gateway\n", "Bad gateway"),
        (b'{"detail":1}', '{"detail":1}'),
        (b"", "no reason was given"),
    ],
)
def test_the_reason_of_a_refusal_is_its_error_or_its_body(body: bytes, reason: str) -> None:
    with answering(502, body) as (url, asked), pytest.raises(ServingError) as caught:
        over_http.Http(f"{url}/proxy/").metadata("a b/c", "3")
    assert caught.value.message == f"HTTP 502 Bad Gateway: {reason}"
    assert asked == ["/proxy/v2/models/a%20b%2Fc/versions/3"]


def test_a_header_length_beyond_the_answer_is_refused() -> None:
    message = "the server's answer has 2 bytes, Inference-Header-Content-Length 9"
    with (
        answering(200, b"{}", Inference_Header_Content_Length="9") as (url, _),
        pytest.raises(ServingError, match=message),
    ):
        over_http.Http(url).infer(InferRequest("m", "", "", {}, {}))


def test_typed_contents_are_read_like_raw_ones() -> None:
    message = pb.ModelInferResponse(model_name="m", model_version="2", id="i")
    message.outputs.add(name="y", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -1])
    message.outputs.add(name="s", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"\xff")
    response = over_grpc.decode(message)
    assert [tensor.array.tolist() for tensor in response.outputs] == [[1, -1], [b"\xff"]]
    assert response.outputs[0].datatype is DATATYPES["INT8"]
    message.raw_output_contents.append(b"\x01\x02")
    with pytest.raises(ServingError, match="the server sent 1 raw contents for 2 outputs"):
        over_grpc.decode(message)
