import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.runtime import ModelFiles, Placement
from penstock_runtimes.onnx import session
from penstock_runtimes.onnx.parameters import Parameters
from penstock_runtimes.onnx.providers import CPU, CUDA, Provider

SIMPLE = Path(__file__).parents[2] / "model_repository" / "simple" / "1" / "model.onnx"
LOGGER = "penstock_runtimes.onnx.session"
GPU_BUILD = (CUDA, CPU)

Level = onnxruntime.GraphOptimizationLevel
Mode = onnxruntime.ExecutionMode


def parameters(**values: str) -> Parameters:
    return Parameters("model 'm'", {key.replace("__", "."): value for key, value in values.items()})


def files(path: Path) -> ModelFiles:
    return ModelFiles("m", 1, path.parent, path)


def configuration(**values: str) -> pb.ModelConfig:
    config = pb.ModelConfig(name="m", default_model_filename="model.onnx")
    for key, value in values.items():
        config.parameters[key].string_value = value
    return config


class Session:
    """Stands for an InferenceSession that got certain providers."""

    def __init__(self, got: Sequence[str]) -> None:
        self.got = got

    def get_providers(self) -> list[str]:
        return list(self.got)


# -- options


@pytest.mark.parametrize(
    ("given", "attribute", "value"),
    [
        ({}, "execution_mode", Mode.ORT_SEQUENTIAL),
        ({"execution_mode": "0"}, "execution_mode", Mode.ORT_SEQUENTIAL),
        ({"execution_mode": "1"}, "execution_mode", Mode.ORT_PARALLEL),
        ({}, "intra_op_num_threads", 3),
        ({"intra_op_thread_count": "5"}, "intra_op_num_threads", 5),
        ({"intra_op_thread_count": "0"}, "intra_op_num_threads", 3),
        ({"intra_op_thread_count": "-1"}, "intra_op_num_threads", 3),
        ({}, "inter_op_num_threads", 0),
        ({"inter_op_thread_count": "2"}, "inter_op_num_threads", 2),
        ({"inter_op_thread_count": "-1"}, "inter_op_num_threads", 0),
        ({}, "enable_cpu_mem_arena", True),
        ({"enable_mem_arena": "0"}, "enable_cpu_mem_arena", False),
        ({"enable_mem_arena": "True"}, "enable_cpu_mem_arena", True),
        ({}, "enable_mem_pattern", True),
        ({"enable_mem_pattern": "false"}, "enable_mem_pattern", False),
    ],
)
def test_a_parameter_sets_its_session_option(given: dict[str, str], attribute: str, value: object) -> None:
    assert getattr(session.options(parameters(**given), level=0, threads=3), attribute) == value


@pytest.mark.parametrize(
    ("level", "meant"),
    [
        (-1, Level.ORT_ENABLE_BASIC),
        (0, Level.ORT_ENABLE_ALL),
        (1, Level.ORT_ENABLE_EXTENDED),
        (2, Level.ORT_DISABLE_ALL),
        (7, Level.ORT_ENABLE_ALL),
    ],
)
def test_levels_of_optimisation_are_tritons(level: int, meant: object) -> None:
    assert session.options(parameters(), level, threads=1).graph_optimization_level == meant


@pytest.mark.parametrize(("value", "entry"), [("1", "1"), ("true", "1"), ("0", "0")])
def test_initialisers_may_use_the_device_allocator(value: str, entry: str) -> None:
    given = parameters(session__use_device_allocator_for_initializers=value)
    made = session.options(given, level=0, threads=1)
    assert made.get_session_config_entry("session.use_device_allocator_for_initializers") == entry


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "execution_mode",
            "2",
            "Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 but got 2 .",
        ),
        (
            "intra_op_thread_count",
            "many",
            "model 'm': parameter 'intra_op_thread_count' expects a whole number, got 'many'",
        ),
        (
            "intra_op_thread_count",
            "99999999999999999999",
            "model 'm': parameter 'intra_op_thread_count' expects a whole number up to 1024, got "
            "'99999999999999999999'",
        ),
        (
            "inter_op_thread_count",
            "1.5",
            "model 'm': parameter 'inter_op_thread_count' expects a whole number, got '1.5'",
        ),
        ("enable_mem_arena", "yes", "model 'm': parameter 'enable_mem_arena' expects 0, 1, true or false, got 'yes'"),
        ("enable_mem_pattern", "", "model 'm': parameter 'enable_mem_pattern' expects 0, 1, true or false, got ''"),
        (
            "session__use_device_allocator_for_initializers",
            "2",
            "model 'm': parameter 'session.use_device_allocator_for_initializers' expects 0, 1, true or false, got '2'",
        ),
    ],
)
def test_a_value_that_a_parameter_cannot_have_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        session.options(parameters(**{key: value}), level=0, threads=1)
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_a_models_parameters_stand_over_the_defaults() -> None:
    given = Parameters.of(configuration(execution_mode="1"), {"execution_mode": "0", "inter_op_thread_count": "4"})
    assert given == Parameters("model 'm'", {"execution_mode": "1", "inter_op_thread_count": "4"})


@pytest.mark.parametrize(
    ("device", "arenas", "entry"),
    [
        ("cpu", "cpu:0", "cpu:0"),
        ("cpu", "cpu:0;gpu:0", "cpu:0"),
        ("cuda:1", "cpu:0;gpu:1", "cpu:0;gpu:1"),
    ],
)
def test_arenas_to_shrink_are_a_run_option(device: str, arenas: str, entry: str) -> None:
    make = session.run_options(parameters(memory__enable_memory_arena_shrinkage=arenas), device)
    assert make is not None
    assert make() is not make()  # for the flag that ends a run stays set
    assert make().get_run_config_entry("memory.enable_memory_arena_shrinkage") == entry


def test_there_are_no_run_options_where_none_are_needed() -> None:
    assert session.run_options(parameters(), "cpu") is None
    assert session.run_options(parameters(memory__enable_memory_arena_shrinkage="gpu:0"), "cpu") is None


def test_arenas_that_onnx_runtime_would_refuse_with_every_run_are_refused_at_once() -> None:
    with pytest.raises(ServingError) as caught:
        session.run_options(parameters(memory__enable_memory_arena_shrinkage="all"), "cpu")
    assert (caught.value.kind, caught.value.message) == (
        Kind.INVALID,
        "model 'm': parameter 'memory.enable_memory_arena_shrinkage' expects devices such as cpu:0;gpu:0, got 'all'",
    )


# -- files


def test_a_model_is_a_file_of_its_own_one_in_a_version_or_a_directory(tmp_path: Path) -> None:
    inner = tmp_path / "2" / "model.onnx" / "model.onnx"
    inner.parent.mkdir(parents=True)
    shutil.copy(SIMPLE, inner)
    for path in (SIMPLE, SIMPLE.parent, tmp_path / "2"):
        made, device = session.build(files(path), configuration(), Placement("cpu", threads=2), {})
        assert device == "cpu"
        assert [node.name for node in made.get_inputs()] == ["INPUT0", "INPUT1"]
        assert made.get_session_options().intra_op_num_threads == 2


def test_a_file_that_is_not_there_cannot_be_found(tmp_path: Path) -> None:
    with pytest.raises(ServingError) as caught:
        session.build(files(tmp_path), configuration(), Placement("cpu"), {})
    assert (caught.value.kind, caught.value.message) == (
        Kind.INTERNAL,
        f"failed to stat file {tmp_path / 'model.onnx'}",
    )


def test_a_model_directory_must_hold_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ServingError) as caught:
        session.build(files(tmp_path), configuration(), Placement("cpu"), {})
    assert (caught.value.kind, caught.value.message) == (
        Kind.UNAVAILABLE,
        f"unable to find '{tmp_path / 'model.onnx' / 'model.onnx'}' for model instance 'm'",
    )


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [(b"This is no model.\n", 7, "Protobuf parsing failed."), (b"", 2, "No graph was found in the protobuf.")],
)
def test_a_file_that_is_no_model_is_an_internal_error_in_onnx_runtimes_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, code: int, reason: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ServingError) as caught:
        session.build(files(path), configuration(), Placement("cpu"), {})
    assert (caught.value.kind, caught.value.message) == (
        Kind.INTERNAL,
        f"onnx runtime error {code}: Load model from {path} failed:{reason}",
    )
    assert capfd.readouterr() == ("", "")


# -- devices


def test_cuda_without_support_for_it_fails_and_names_what_is_missing() -> None:
    with pytest.raises(ServingError) as caught:
        session.build(files(SIMPLE), configuration(), Placement("cuda"), {}, available=[CPU])
    assert (caught.value.kind, caught.value.message) == (
        Kind.UNAVAILABLE,
        "model 'm' was to run on cuda:0, but CUDAExecutionProvider is not in use: this build of ONNX Runtime "
        f"({onnxruntime.__version__}) does not have it; for CUDA install penstock[gpu] instead of penstock[cpu]",
    )


def test_an_accelerator_that_this_build_lacks_fails_on_the_cpu_too() -> None:
    config = configuration()
    config.optimization.execution_accelerators.cpu_execution_accelerator.add(name="openvino")
    with pytest.raises(ServingError) as caught:
        session.build(files(SIMPLE), config, Placement("cpu"), {}, available=[CPU])
    assert caught.value.kind is Kind.UNAVAILABLE
    assert caught.value.message.startswith("model 'm' was to run on cpu, but OpenVINOExecutionProvider is not in use: ")


def test_a_placement_that_may_falls_back_to_the_cpu_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    place = Placement("cuda", 1, may_fall_back=True)
    made, device = session.build(files(SIMPLE), configuration(), place, {}, available=[CPU])
    assert (made.get_providers(), device) == ([CPU], "cpu")
    assert caplog.record_tuples == [
        (
            LOGGER,
            logging.WARNING,
            "MODEL 'm' RUNS ON THE CPU, NOT ON CUDA:1: CUDAExecutionProvider is not in use: this build of ONNX Runtime "
            f"({onnxruntime.__version__}) does not have it; for CUDA install penstock[gpu] instead of penstock[cpu]",
        )
    ]


def test_the_device_is_what_a_session_really_got(caplog: pytest.LogCaptureFixture) -> None:
    asked_for: list[list[Provider]] = []

    def without_cuda(path: Path, options: Any, asked: list[Provider]) -> Session:
        asked_for.append(asked)
        return Session([CPU])

    def with_cuda(path: Path, options: Any, asked: list[Provider]) -> Session:
        return Session([CUDA, CPU])

    def build(load: session.Load, may_fall_back: bool) -> tuple[Any, str]:
        place = Placement("cuda", 1, may_fall_back=may_fall_back)
        return session.build(files(SIMPLE), configuration(), place, {}, GPU_BUILD, load)

    assert build(with_cuda, may_fall_back=False)[1] == "cuda:1"
    with pytest.raises(ServingError, match=r"^model 'm' was to run on cuda:1, but CUDAExecutionProvider is not"):
        build(without_cuda, may_fall_back=False)
    assert not caplog.records
    assert build(without_cuda, may_fall_back=True)[1] == "cpu"
    assert len(caplog.records) == 1
    assert asked_for[-1] == [(CPU, {})]


def test_defaults_reach_the_provider() -> None:
    def load(path: Path, options: Any, asked: list[Provider]) -> Session:
        assert asked == [(CUDA, {"gpu_mem_limit": "9", "device_id": "0"}), (CPU, {})]
        return Session([CUDA, CPU])

    defaults = {"gpu_mem_limit": "9"}
    assert session.build(files(SIMPLE), configuration(), Placement("cuda"), defaults, GPU_BUILD, load)[1] == "cuda:0"


def test_a_gpu_on_which_a_session_cannot_start_counts_as_missing(caplog: pytest.LogCaptureFixture) -> None:
    failure = ServingError(Kind.INTERNAL, "onnx runtime error 1: CUDA failure 35: driver too old")

    def load(path: Path, options: Any, asked: list[Provider]) -> Session:
        if asked != [(CPU, {})]:
            raise failure
        return Session([CPU])

    place = Placement("cuda", may_fall_back=True)
    _, device = session.build(files(SIMPLE), configuration(), place, {}, GPU_BUILD, load)
    assert device == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "MODEL 'm' RUNS ON THE CPU, NOT ON CUDA:0: onnx runtime error 1: CUDA failure 35: driver too old"
    ]
    with pytest.raises(ServingError) as caught:
        session.build(files(SIMPLE), configuration(), Placement("cuda"), {}, GPU_BUILD, load)
    assert caught.value is failure


def test_a_broken_model_is_no_reason_to_say_that_it_runs_on_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    place = Placement("cuda", may_fall_back=True)
    with pytest.raises(ServingError, match=r"No graph was found in the protobuf\.$"):
        session.build(files(path), configuration(), place, {}, available=[CPU])
    assert not caplog.records


def test_a_session_never_changes_its_providers_behind_our_back(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's own fallback prints to standard output and goes on with the CPU for good."""
    wrong: Any = (CPU, None)
    with pytest.raises(ServingError) as caught:
        session.load(SIMPLE, None, [wrong])
    assert caught.value.kind is Kind.INTERNAL
    assert caught.value.message == "onnx runtime error: ValueError: 'provider_options' values must be dicts."
    assert capfd.readouterr() == ("", "")


# -- errors


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
            "Name:'cuda/alloc' Status Message: indices element out of data bounds, idx=9",
            Kind.INVALID,
            "onnx runtime error 2: Non-zero status code returned while running Gather node. "
            "Name:'cuda/alloc' Status Message: indices element out of data bounds, idx=9",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : MatMul dimension mismatch",
            Kind.INVALID,
            "onnx runtime error 1: MatMul dimension mismatch",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Name:'' Status Message: stoll",
            Kind.INVALID,
            "onnx runtime error 6: Name:'' Status Message: stoll",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Name:'' Status Message: Failed to allocate memory for "
            "requested buffer of size 9",
            Kind.INTERNAL,
            "onnx runtime error 6: Name:'' Status Message: Failed to allocate memory for requested buffer of size 9",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ;\nGPU=0",
            Kind.INTERNAL,
            "onnx runtime error 1: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ;\nGPU=0",
        ),
        (
            "[ONNXRuntimeError] : 11 : EP_FAIL : the device was lost : for good",
            Kind.INTERNAL,
            "onnx runtime error 11: the device was lost : for good",
        ),
        ("something else", Kind.INTERNAL, "onnx runtime error: RuntimeError: something else"),
    ],
)
def test_a_run_that_fails_by_its_values_is_the_clients_mistake_and_no_other(
    text: str, kind: Kind, message: str
) -> None:
    failure = session.translate(RuntimeError(text))
    assert (failure.kind, failure.message) == (kind, message)


def test_a_load_that_fails_is_never_the_clients_mistake() -> None:
    failure = session.translate(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : no such operator"), loading=True)
    assert (failure.kind, failure.message) == (Kind.INTERNAL, "onnx runtime error 1: no such operator")
