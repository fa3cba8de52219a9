"""`penstock inspect` on the sample models, and on model files made for one question each."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from penstock import model_config, pb
from penstock.cli import main

SAMPLES = Path(__file__).parents[2] / "model_repository"
Axes = list[int | str | None]
Inspect = Callable[..., dict[str, Any]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Runs the command with --json and returns the object that it prints."""

    def run(*arguments: str) -> dict[str, Any]:
        assert main(["inspect", *arguments, "--device", "cpu", "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def reason(found: dict[str, Any], field: str) -> tuple[Any, str]:
    """Value and reason of a choice."""
    [choice] = [choice for choice in found["choices"] if choice["field"] == field]
    return choice["value"], choice["reason"]


def save(path: Path, a: Axes, b: Axes) -> Path:
    """A model file with input `a` and output `b`, its copy, of the given axes."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["b"])], "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, a)],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, b)],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_the_signature_and_the_file_are_shown(inspect: Inspect) -> None:
    found = inspect(str(SAMPLES / "digits"))
    assert (found["name"], found["version"], found["versions"]) == ("digits", "1", [1])
    assert Path(found["file"]).resolve() == SAMPLES / "digits" / "1" / "model.onnx"
    assert found["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    [output] = found["outputs"]
    assert output["labels"][:2] == ["zero", "one"]
    assert found["devices"] == ["cpu"]
    assert found["threads_per_instance"] >= 1
    assert found["instances"] == 2
    assert found["load_s"] > 0
    assert found["config"]["max_batch_size"] == 64


def test_a_model_is_found_by_its_name_in_a_repository(inspect: Inspect) -> None:
    assert inspect("simple", "--model-repository", str(SAMPLES))["name"] == "simple"


def test_one_of_several_versions_is_shown(inspect: Inspect) -> None:
    assert inspect(str(SAMPLES / "times_version"), "--version", "1")["version"] == "1"
    assert inspect(str(SAMPLES / "times_version"))["versions"] == [1, 2]


@pytest.mark.parametrize("model", sorted(path.name for path in SAMPLES.iterdir()))
def test_every_field_is_stated_or_has_a_reason(inspect: Inspect, model: str) -> None:
    found = inspect(str(SAMPLES / model))
    chosen = {choice["field"].split(".")[0].split("[")[0] for choice in found["choices"]}
    config = model_config.read_text(found["config_text"], model)
    fields = {field.name for field, _ in config.ListFields()}
    assert fields <= chosen | set(found["stated"])
    assert not {"name", "input", "output", "platform"} & chosen & set(found["stated"])
    assert model_config.to_json(config) == found["config"]


@pytest.mark.parametrize(
    ("a", "b", "size", "why"),
    [
        (["N", 4], ["N", 4], 64, "axis 0 of every input and output is named 'N'"),
        (["batch_size"], ["batch_size"], 64, "axis 0 of every input and output is named 'batch_size'"),
        (
            ["rows"],
            ["rows"],
            0,
            "axis 0 of input 'a' is named 'rows', not one of N, batch, batch_size, Batch, unk__batch",
        ),
        (
            ["N"],
            ["rows"],
            0,
            "axis 0 of output 'b' is named 'rows', not one of N, batch, batch_size, Batch, unk__batch",
        ),
        ([None, 4], [None, 4], 0, "axis 0 of input 'a' has no name"),
        (["N"], ["batch"], 0, "axis 0 is named 'N' in input 'a' and 'batch' in output 'b'"),
        ([1, 4], [1, 4], 0, "axis 0 of input 'a' is fixed at 1"),
        (["N"], [3], 0, "axis 0 of output 'b' is fixed at 3"),
        ([], [], 0, "input 'a' has no axes"),
    ],
)
def test_the_batch_size_is_explained_by_the_axes(
    inspect: Inspect, tmp_path: Path, a: Axes, b: Axes, size: int, why: str
) -> None:
    found = inspect(str(save(tmp_path / "m.onnx", a, b)))
    assert reason(found, "max_batch_size") == (size, why)
    assert found["config"]["max_batch_size"] == size
    assert ("dynamic_batching" in found["config"]) == (size > 0)


def test_the_default_batch_size_is_named_where_it_decided(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(str(save(tmp_path / "m.onnx", ["rows"], ["rows"])), "--default-max-batch-size", "4")
    assert reason(found, "max_batch_size") == (
        4, "--default-max-batch-size is 4, and axis 0 of every input and output is open",
    )  # fmt: skip
    assert reason(found, "dynamic_batching") == ("on", "max_batch_size is over 1 and no scheduler is stated")
    assert reason(found, "rows of a request")[0] == "any number"


def configured(directory: Path, text: str, filename: str = "model.onnx") -> str:
    """A model `m` with one version and a configuration; its directory."""
    (directory / "m" / "1").mkdir(parents=True)
    save(directory / "m" / "1" / filename, ["N", 4], ["N", 4])
    (directory / "m" / "config.pbtxt").write_text(text)
    return str(directory / "m")


STATED = (
    'input { name: "a" data_type: TYPE_FP32 dims: [-1, 4] } output { name: "b" data_type: TYPE_FP32 dims: [-1, 4] }'
)


def test_a_configuration_without_a_batch_size_is_left_without_one(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(configured(tmp_path, STATED))
    assert found["stated"] == ["input", "output"]
    assert reason(found, "max_batch_size") == (0, "inputs and outputs are stated without it")


@pytest.mark.parametrize(
    ("text", "filename", "field", "expected"),
    [
        ("", "model.onnx", "backend", ("onnxruntime", "there is a model file model.onnx")),
        ("", "other.onnx", "backend", ("onnxruntime", "other.onnx is the only ONNX file of the version")),
        ("", "other.onnx", "default_model_filename", ("other.onnx", "other.onnx is the only ONNX file of the version")),
        ('platform: "onnxruntime_onnx"', "model.onnx", "backend", ("onnxruntime", "the platform is onnxruntime_onnx")),
        ("", "model.onnx", "device", ("cpu", "the configuration leaves it open and --device is cpu")),
        ("instance_group { kind: KIND_CPU }", "model.onnx", "device", ("cpu", "an instance group says KIND_CPU")),
        (
            "instance_group { kind: KIND_CPU }", "model.onnx", "instance_group[0].name",
            ("m_0", "the group has no name"),
        ),
        (
            'parameters { key: "intra_op_thread_count" value { string_value: "3" } }', "model.onnx", "threads",
            (3, "the parameter intra_op_thread_count says so"),
        ),
        ("max_batch_size: 7", "model.onnx", "dynamic_batching.preferred_batch_size", (7, "it is max_batch_size")),
    ],
)  # fmt: skip
def test_a_choice_names_what_it_followed_from(
    inspect: Inspect, tmp_path: Path, text: str, filename: str, field: str, expected: tuple[Any, str]
) -> None:
    assert reason(inspect(configured(tmp_path, text, filename)), field) == expected


def test_threads_are_shared_out_among_instances(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(configured(tmp_path, "instance_group { count: 50 kind: KIND_CPU }"))
    value, why = reason(found, "threads")
    assert value == found["threads_per_instance"] == 1
    assert why.endswith("cores are shared out among 50 instances, at most 16 to each")
    assert found["instances"] == 50


def test_whether_it_runs_inline_is_measured(inspect: Inspect, tmp_path: Path) -> None:
    found = inspect(str(save(tmp_path / "m.onnx", ["N", 4], ["N", 4])))
    value, why = reason(found, "inline")
    assert value == f"up to {found['inline_bytes']} bytes"
    assert why.startswith(f"zeros of {found['inline_bytes']} bytes took ")


def test_the_text_says_what_the_object_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = save(tmp_path / "my model.onnx", ["rows", 2], ["rows", 2])
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        f"Model my model, version 1\n  {path}\n\nInputs\n  a  FP32  [-1,2]\n\nOutputs\n  b  FP32  [-1,2]\n"
    )
    assert "there is no configuration file, so all of it was chosen:\n  name  " in text
    assert "because axis 0 of input 'a' is named 'rows', not one of N, " in text
    printed = text.partition("Configuration\n")[2].partition("\nChosen")[0]
    assert model_config.read_text(printed, "the text").input[0].data_type == pb.TYPE_FP32
    lines = dict(line.split(None, 1) for line in text.partition("Running\n")[2].partition("\nTry")[0].splitlines())
    assert set(lines) == {"instances", "threads", "device", "inline", "load"}
    assert f"Or, beside penstock serve '{path}'\n  curl -s http://127.0.0.1:8000/v2/models/my%20model/infer -d " in text


def test_the_command_that_it_prints_runs(inspect: Inspect, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = shlex.split(inspect(str(save(tmp_path / "m.onnx", ["N", 2], ["N", 2])))["samples"]["infer"])
    assert command[0] == "penstock"
    assert main(command[1:]) == 0
    assert capsys.readouterr().out == "b  FP32  [1,2]\n  [[1. 1.]]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [str(SAMPLES)],
            f"'{SAMPLES}' holds {len(list(SAMPLES.iterdir()))} models: digits, iris, matmul, running_sum, sentiment, "
            f"simple, simple_string, times_version; name one with penstock inspect NAME --model-repository {SAMPLES}",
        ),
        (["/none"], "model repository '/none' does not exist"),
        (
            [str(SAMPLES / "simple"), "--version", "5"],
            "Request for unknown model: 'simple' version 5 is not found",
        ),
    ],
)
def test_what_cannot_be_inspected_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["inspect", *arguments]) == 1
    assert capsys.readouterr().err == f"penstock: {message}\n"


ENSEMBLE = """
    platform: "ensemble" max_batch_size: 8
    input [ { name: "A" data_type: TYPE_INT32 dims: 16 }, { name: "B" data_type: TYPE_INT32 dims: 16 } ]
    output { name: "Y" data_type: TYPE_INT32 dims: 16 }
    ensemble_scheduling { step [
        { model_name: "simple" input_map [ { key: "INPUT0" value: "s" }, { key: "INPUT1" value: "B" } ]
          output_map { key: "OUTPUT0" value: "Y" } },
        { model_name: "simple" input_map [ { key: "INPUT0" value: "A" }, { key: "INPUT1" value: "B" } ]
          output_map { key: "OUTPUT0" value: "s" } }
    ] }
"""


def test_the_graph_of_an_ensemble_is_shown(
    inspect: Inspect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sums" / "1").mkdir(parents=True)
    (tmp_path / "sums" / "config.pbtxt").write_text(ENSEMBLE)
    where = ["--model-repository", str(tmp_path), "--model-repository", str(SAMPLES)]
    found = inspect("sums", *where)
    assert found["steps"] == [
        {"model": "simple", "version": "1", "inputs": {"INPUT0": "s", "INPUT1": "B"}, "outputs": {"OUTPUT0": "Y"},
         "after": [1]},
        {"model": "simple", "version": "1", "inputs": {"INPUT0": "A", "INPUT1": "B"}, "outputs": {"OUTPUT0": "s"},
         "after": []},
    ]  # fmt: skip
    assert (found["instances"], found["devices"], found["inline_bytes"]) == (0, ["cpu"], -1)
    assert main(["inspect", "sums", *where, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert f"penstock infer sums --local {tmp_path} " in text
    assert "  0  simple 1  INPUT0 from s, INPUT1 from B  OUTPUT0 to Y  after 1\n" in text
    assert "  1  simple 1  INPUT0 from A, INPUT1 from B  OUTPUT0 to s  at once\n" in text
    assert "  runs       2        of models that call no others, for one request\n" in text


def test_a_model_that_calls_no_others_has_no_steps(inspect: Inspect) -> None:
    assert inspect(str(SAMPLES / "digits"))["steps"] == []
