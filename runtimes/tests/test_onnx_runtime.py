import logging
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from penstock import model_config, pb
from penstock.errors import Kind, ServingError
from penstock.runtime import ModelFiles, Placement, find
from penstock_runtimes.onnx import OnnxRuntime, session
from penstock_runtimes.onnx.memory import CudaMemory
from penstock_runtimes.onnx.runtime import SETTINGS

from .fakes_cuda import FakeCudart

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "model_repository"
CPU = Placement("cpu", threads=2)


class Builds:
    """Builds real sessions on the CPU, whatever the placement, and remembers them without keeping them alive."""

    def __init__(self, device: str = "") -> None:
        self.device = device  # that every session claims to run on; "": the placement's
        self.made: list[weakref.ref[Any]] = []
        self.threads: list[int] = []

    def __call__(
        self,
        files: ModelFiles,
        config: pb.ModelConfig,
        place: Placement,
        defaults: Mapping[str, str],
        *,
        stream: int = 0,
    ) -> tuple[Any, str]:
        built, _ = session.build(files, config, Placement("cpu", threads=place.threads), defaults)
        self.made.append(weakref.ref(built))
        self.threads.append(built.get_session_options().intra_op_num_threads)
        return built, self.device or str(place)

    @property
    def alive(self) -> int:
        return sum(made() is not None for made in self.made)


def sample(name: str) -> tuple[ModelFiles, pb.ModelConfig]:
    directory = SAMPLES / name
    path = directory / "config.pbtxt"
    config = model_config.read(path) if path.exists() else pb.ModelConfig()
    return ModelFiles(name, 1, directory, directory / "1"), model_config.identify(config, name, ["model.onnx"])


# -- found by its name


def test_the_backend_onnxruntime_is_this_runtime() -> None:
    assert isinstance(find("onnxruntime", {}), OnnxRuntime)
    with pytest.raises(ServingError, match="has no setting 'speed'"):
        find("onnxruntime", {"speed": "11"})


def test_a_backend_that_nobody_brings_is_refused_with_those_there_are() -> None:
    with pytest.raises(ServingError) as caught:
        find("tensorflow", {})
    assert caught.value.kind is Kind.INVALID
    assert caught.value.message.startswith("no runtime for backend 'tensorflow' is installed; there are: ")
    assert "onnxruntime" in caught.value.message


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed": "11"}, f"the onnxruntime runtime has no setting 'speed'; there are: {', '.join(SETTINGS)}"),
        (
            {"default-max-batch-size": "four"},
            "the onnxruntime runtime: parameter 'default-max-batch-size' expects a whole number, got 'four'",
        ),
        (
            {"intra_op_thread_count": "all"},
            "the onnxruntime runtime: parameter 'intra_op_thread_count' expects a whole number, got 'all'",
        ),
        ({"cudnn_conv_algo_search": "9"}, "unsupported cudnn_conv_algo_search value '9' is requested"),
        (
            {"memory.enable_memory_arena_shrinkage": "all"},
            "the onnxruntime runtime: parameter 'memory.enable_memory_arena_shrinkage' "
            "expects devices such as cpu:0;gpu:0, got 'all'",
        ),
    ],
)
def test_a_wrong_setting_is_refused_before_any_model_loads(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ServingError) as caught:
        OnnxRuntime(settings)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


@pytest.mark.parametrize(("size", "completed"), [("4", 4), ("0", 64), ("-1", 64)])
def test_the_default_batch_size_switches_to_tritons_rule(size: str, completed: int) -> None:
    files, config = sample("iris")  # whose first axes are all called N
    done = OnnxRuntime({"default-max-batch-size": size}).complete(files, config, CPU)
    assert done.max_batch_size == completed
    files, config = sample("matmul")  # a [m,k], b [k,n]
    done = OnnxRuntime({"default-max-batch-size": size}).complete(files, config, CPU)
    assert done.max_batch_size == (4 if size == "4" else 0)


def test_a_setting_is_the_default_of_a_model_parameter() -> None:
    builds = Builds()
    runtime = OnnxRuntime({"intra_op_thread_count": "3"}, builds)
    files, config = sample("simple")
    runtime.complete(files, config, CPU)
    config.parameters["intra_op_thread_count"].string_value = "1"
    runtime.complete(files, config, CPU)
    OnnxRuntime({}, builds).complete(files, config := sample("simple")[1], CPU)
    assert builds.threads == [3, 1, 2]


# -- sessions


def test_instances_on_the_cpu_share_the_session_that_completed_the_configuration() -> None:
    builds = Builds()
    runtime = OnnxRuntime({}, builds)
    files, config = sample("simple")
    done = runtime.complete(files, config, CPU)
    instances = [runtime.open(files, done, CPU, None) for _ in range(2)]
    assert len(builds.made) == 1
    assert [instance.device for instance in instances] == ["cpu", "cpu"]


def test_each_instance_on_a_gpu_has_a_session_of_its_own_and_the_first_the_one_that_completed() -> None:
    builds = Builds()
    runtime = OnnxRuntime({}, builds)
    files, config = sample("simple")
    place = Placement("cuda", 1)
    done = runtime.complete(files, config, place)
    instances = [runtime.open(files, done, place, None) for _ in range(4)]
    assert len(builds.made) == 4
    assert {instance.device for instance in instances} == {"cuda:1"}
    for instance in instances:
        instance.close()
    assert builds.alive == 0


class OnTheCpu(CudaMemory):
    """CUDA's, for a session on the CPU: the fake's device memory is the host's."""

    device = "cpu"


class Streams:
    """Gives each instance memory of a fake GPU, and builds sessions that tell which stream they were given."""

    def __init__(self, got: str = "") -> None:
        self.cudart = FakeCudart(eager=True)
        self.builds = Builds(got)
        self.made: list[tuple[str, int]] = []  # place and stream of each session

    def on(self, place: Placement) -> OnTheCpu:
        return OnTheCpu(place.device_id, lambda name: self.cudart, "13.0")

    def build(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, defaults: Any, *, stream: int) -> Any:
        self.made.append((str(place), stream))
        return self.builds(files, config, place, defaults)


def test_each_instance_on_a_gpu_computes_on_a_stream_of_its_own() -> None:
    streams = Streams()
    runtime = OnnxRuntime({}, streams.build, streams.on)
    files, config = sample("simple")
    places = [Placement("cuda", 0), Placement("cuda", 0), Placement("cuda", 1)]
    done = runtime.complete(files, config, places[0])
    instances = [runtime.open(files, done, place, None) for place in places]
    assert [place for place, _ in streams.made] == ["cuda:0", "cuda:0", "cuda:1"]
    assert {stream for _, stream in streams.made} == streams.cudart.streams
    assert len(streams.cudart.streams) == 3
    for instance in instances:
        instance.close()
    assert (streams.cudart.streams, streams.cudart.memory, streams.builds.alive) == (set(), {}, 0)


def test_the_stream_of_a_gpu_that_a_session_has_not_got_is_let_go_of() -> None:
    streams = Streams(got="cpu")
    runtime = OnnxRuntime({}, streams.build, streams.on)
    files, config = sample("simple")
    runtime.complete(files, config, Placement("cuda", may_fall_back=True))
    assert (len(streams.made), streams.cudart.streams) == (1, set())


@pytest.mark.parametrize(("value", "streams"), [("0", 0), ("1", 1)])
def test_io_binding_may_be_switched_off(value: str, streams: int) -> None:
    fake = Streams()
    runtime = OnnxRuntime({"io_binding": value}, fake.build, fake.on)
    files, config = sample("simple")
    instance = runtime.open(files, runtime.complete(files, config, Placement("cuda")), Placement("cuda"), None)
    assert len(fake.cudart.streams) == streams
    assert [stream != 0 for _, stream in fake.made] == [bool(streams)]
    instance.close()


@pytest.mark.parametrize("off", [{"io_binding": "0"}, {}])
def test_a_cuda_graph_needs_bound_tensors_of_fixed_shapes(off: dict[str, str]) -> None:
    fake = Streams()
    runtime = OnnxRuntime({"cuda_graph": "1", **off}, fake.build, fake.on)
    files, config = sample("matmul" if not off else "simple")  # matmul's shapes are open
    place = Placement("cuda")
    done = runtime.complete(files, config, place)
    with pytest.raises(ServingError, match="a CUDA graph needs io_binding" if off else "a CUDA graph has fixed shapes"):
        runtime.open(files, done, place, None)


def test_instances_that_fell_back_to_the_cpu_share_a_session_too() -> None:
    builds = Builds(device="cpu")
    runtime = OnnxRuntime({}, builds)
    files, config = sample("simple")
    place = Placement("cuda", may_fall_back=True)
    done = runtime.complete(files, config, place)
    assert {runtime.open(files, done, place, None).device for _ in range(3)} == {"cpu"}
    assert len(builds.made) == 1


def test_instances_on_different_devices_do_not_share() -> None:
    builds = Builds()
    runtime = OnnxRuntime({}, builds)
    files, config = sample("simple")
    done = runtime.complete(files, config, CPU)
    devices = [runtime.open(files, done, place, None).device for place in (CPU, Placement("cuda"), CPU)]
    assert devices == ["cpu", "cuda:0", "cpu"]
    assert len(builds.made) == 2


@pytest.mark.parametrize("name", ["simple", "iris"])
def test_no_session_outlives_its_last_instance(name: str) -> None:
    builds = Builds()
    runtime = OnnxRuntime({}, builds)
    files, config = sample(name)
    done = runtime.complete(files, config, CPU)
    instances = [runtime.open(files, done, CPU, None) for _ in range(2)]
    files.kept.clear()  # as a load does after the last `open`
    instances[0].close()
    assert builds.alive == 1
    instances[1].close()
    assert builds.alive == 0


def test_a_configuration_that_contradicts_the_file_opens_nothing() -> None:
    runtime = OnnxRuntime({})
    files, config = sample("simple")
    config.input[1].dims[0] = 17
    done = runtime.complete(files, config, CPU)
    with pytest.raises(ServingError, match=r"model 'simple', tensor 'INPUT1': the model expects 2 dimensions"):
        runtime.open(files, done, CPU, None)


# -- labels


def test_labels_of_maps_are_learnt_whether_a_configuration_is_completed_or_not() -> None:
    runtime = OnnxRuntime({})
    files, config = sample("iris")
    done = runtime.complete(files, config, CPU)
    assert files.labels == {"output_probability": ("0", "1", "2")}
    assert {output.name: (list(output.dims), output.HasField("reshape")) for output in done.output} == {
        "output_label": ([1], True),
        "output_probability": ([3], False),
    }
    fresh, _ = sample("iris")
    runtime.open(fresh, done, CPU, None)
    assert fresh.labels == files.labels


# -- files that do not load


BROKEN = {
    "broken": (Kind.INTERNAL, "onnx runtime error 7: Load model from {path} failed:Protobuf parsing failed."),
    "empty": (Kind.INTERNAL, "onnx runtime error 2: Load model from {path} failed:No graph was found in the protobuf."),
    "no_model": (Kind.INTERNAL, "failed to stat file {path}"),
    "wrong_datatype": (
        Kind.INVALID,
        "unable to load model 'wrong_datatype', configuration expects datatype TYPE_INT32 for input 'INPUT0', "
        "model provides TYPE_FP32",
    ),
    "wrong_dims": (
        Kind.INVALID,
        "model 'wrong_dims', tensor 'INPUT0': the model expects 2 dimensions (shape [-1,-1]) but the model "
        "configuration specifies 3 dimensions (shape [-1,-1,-1])",
    ),
    "wrong_output": (Kind.INVALID, "unexpected inference output 'OUTPUT9', allowed outputs are: OUTPUT0"),
    "wrong_batching": (
        Kind.INVALID,
        "autofill failed for model 'wrong_batching': model does not support batching while non-zero max_batch_size "
        "is specified",
    ),
    "unsupported_datatype": (
        Kind.INTERNAL,
        "unsupported datatype tensor(float8e4m3fn) for output 'OUTPUT0' for model 'unsupported_datatype'",
    ),
    "sequence_output": (
        Kind.UNSUPPORTED,
        "Unsupported ONNX Type 'ONNX_TYPE_SEQUENCE' for I/O 'OUTPUT0', expected 'ONNX_TYPE_TENSOR'.",
    ),
}


@pytest.fixture(scope="session")
def broken_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the conformance tests that do not load, made by a process that can import them."""
    directory = tmp_path_factory.mktemp("broken")
    code = "import sys, pathlib; from conformance_tests.models.fixtures import make_broken_fixtures as make"
    subprocess.run(
        [sys.executable, "-c", f"{code}; make(pathlib.Path(sys.argv[1]))", str(directory)], cwd=ROOT, check=True
    )
    return directory


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_does_not_load_says_why_and_prints_nothing(
    broken_fixtures: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = broken_fixtures / name
    path = directory / "config.pbtxt"
    config = model_config.read(path) if path.exists() else pb.ModelConfig()
    config = model_config.identify(config, name, ["model.onnx"])
    files, runtime = ModelFiles(name, 1, directory, directory / "1"), OnnxRuntime({})
    with pytest.raises(ServingError) as caught:
        runtime.open(files, runtime.complete(files, config, CPU), CPU, None)
    kind, message = BROKEN[name]
    assert (caught.value.kind, caught.value.message) == (kind, message.format(path=directory / "1" / "model.onnx"))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert capfd.readouterr() == ("", "")
