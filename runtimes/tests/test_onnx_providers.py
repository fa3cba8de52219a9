from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from penstock import pb
from penstock.devices import Driver, Gpu
from penstock.errors import Kind, ServingError
from penstock.runtime import Placement
from penstock_runtimes.onnx import providers
from penstock_runtimes.onnx.parameters import Parameters
from penstock_runtimes.onnx.providers import CPU, CUDA, OPENVINO, TENSORRT

GPU_BUILD = [TENSORRT, CUDA, CPU]
ON_CPU, ON_GPU = Placement("cpu"), Placement("cuda", 3)

# What the loader of shared libraries said where they were not there.
NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"
NO_CUBLAS = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


ON_CUDA_13 = Driver("580.1", (13, 0), (Gpu(0, "A GPU", "9.0", 1 << 30),))


def configuration(text: str) -> pb.ModelConfig:
    config = pb.ModelConfig()
    text_format.Parse('name: "m" ' + text, config, descriptor_pool=pb.POOL)
    return config


def gpu(accelerators: str, rest: str = "") -> pb.ModelConfig:
    return configuration(
        f"optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {accelerators} ] }} }} {rest}"
    )


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }} '


def loader(**faults: str) -> Callable[[str], object]:
    """Loads every library but those whose path contains a key of `faults`."""

    def load(library: str) -> None:
        for part, fault in faults.items():
            if part in library:
                raise OSError(fault)

    return load


def test_an_instance_on_the_cpu_asks_for_the_cpu_alone() -> None:
    assert providers.wanted(gpu('{ name: "tensorrt" }'), ON_CPU, {}) == [(CPU, {})]


def test_an_instance_on_a_gpu_asks_for_cuda_on_its_device_and_for_the_cpu_last() -> None:
    assert providers.wanted(configuration(""), ON_GPU, {}) == [(CUDA, {"device_id": "3"}), (CPU, {})]


def test_openvino_is_for_instances_on_the_cpu() -> None:
    text = 'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }'
    assert providers.wanted(configuration(text), ON_CPU, {}) == [(OPENVINO, {"device_type": "CPU"}), (CPU, {})]
    assert providers.wanted(configuration(text), ON_GPU, {}) == [(CUDA, {"device_id": "3"}), (CPU, {})]


def test_tensorrt_stands_before_cuda_with_its_options_by_the_names_of_onnx_runtime() -> None:
    config = gpu(
        '{ name: "cuda" parameters { key: "use_tf32" value: "0" } }, { name: "tensorrt"'
        ' parameters { key: "precision_mode" value: "FP16" }'
        ' parameters { key: "max_workspace_size_bytes" value: "1000" }'
        ' parameters { key: "trt_engine_cache_enable" value: "1" } }'
    )
    assert providers.wanted(config, ON_GPU, {}) == [
        (
            TENSORRT,
            {
                "device_id": "3",
                "trt_fp16_enable": "1",
                "trt_max_workspace_size": "1000",
                "trt_engine_cache_enable": "1",
            },
        ),
        (CUDA, {"use_tf32": "0", "device_id": "3"}),
        (CPU, {}),
    ]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("FP32", {}),
        ("FP16", {"trt_fp16_enable": "1"}),
        ("BF16", {"trt_bf16_enable": "1"}),
        ("INT8", {"trt_int8_enable": "1"}),
    ],
)
def test_a_precision_mode_of_tensorrt_is_one_option(mode: str, options: dict[str, str]) -> None:
    config = gpu(f'{{ name: "tensorrt" parameters {{ key: "precision_mode" value: "{mode}" }} }}')
    assert providers.wanted(config, ON_GPU, {})[0] == (TENSORRT, {"device_id": "3", **options})


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("cudnn_conv_algo_search", "0", "EXHAUSTIVE"),
        ("cudnn_conv_algo_search", "1", "HEURISTIC"),
        ("cudnn_conv_algo_search", "2", "DEFAULT"),
        ("arena_extend_strategy", "0", "kNextPowerOfTwo"),
        ("arena_extend_strategy", "1", "kSameAsRequested"),
        ("gpu_mem_limit", "2147483648", "2147483648"),
        ("do_copy_in_default_stream", "false", "0"),
        ("use_tf32", "0", "0"),
        ("cudnn_conv_use_max_workspace", "True", "1"),
    ],
)
def test_a_model_parameter_is_a_cuda_option_in_tritons_values(key: str, value: str, option: str) -> None:
    config = configuration(parameter(key, value))
    assert providers.wanted(config, ON_GPU, {})[0] == (CUDA, {key: option, "device_id": "3"})


def test_cuda_graphs_are_a_parameter_or_an_option_of_the_accelerator() -> None:
    by_option = gpu('{ name: "cuda" parameters { key: "enable_cuda_graph" value: "true" } }')
    for config in (configuration(parameter("cuda_graph", "true")), by_option):
        assert providers.wanted(config, ON_GPU, {})[0] == (CUDA, {"enable_cuda_graph": "1", "device_id": "3"})


def test_an_instance_computes_on_the_stream_that_it_is_given() -> None:
    assert providers.wanted(configuration(""), ON_GPU, {}, stream=4096)[0] == (
        CUDA,
        {"device_id": "3", "user_compute_stream": "4096"},
    )


def test_a_model_parameter_beats_the_accelerator_which_beats_the_default() -> None:
    defaults = {"gpu_mem_limit": "1", "arena_extend_strategy": "1", "cudnn_conv_algo_search": "2"}
    config = gpu(
        '{ name: "cuda" parameters { key: "gpu_mem_limit" value: "2" }'
        ' parameters { key: "arena_extend_strategy" value: "kNextPowerOfTwo" } }',
        parameter("gpu_mem_limit", "3"),
    )
    assert providers.wanted(config, ON_GPU, defaults)[0] == (
        CUDA,
        {
            "gpu_mem_limit": "3",
            "arena_extend_strategy": "kNextPowerOfTwo",
            "cudnn_conv_algo_search": "DEFAULT",
            "device_id": "3",
        },
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gpu('{ name: "gpu" }'), "unknown Execution Accelerator 'gpu' is requested"),
        (
            gpu('{ name: "tensorrt" parameters { key: "precision_mode" value: "FP8" } }'),
            "unsupported precision mode 'FP8' is requested",
        ),
        (
            gpu('{ name: "tensorrt" parameters { key: "speed" value: "1" } }'),
            "unknown parameter 'speed' is provided for TensorRT Execution Accelerator",
        ),
        (
            gpu('{ name: "cuda" parameters { key: "use_ep_level_unified_stream" value: "maybe" } }'),
            "model 'm': parameter 'use_ep_level_unified_stream' expects 0, 1, true or false, got 'maybe'",
        ),
        (
            gpu('{ name: "cuda" parameters { key: "device_id" value: "1" } }'),
            "model 'm': parameter 'device_id' of CUDA is the server's to set",
        ),
        (
            gpu('{ name: "cuda" parameters { key: "fast" value: "1" } }'),
            "unknown parameter 'fast' is provided for CUDA Execution Accelerator",
        ),
        (
            configuration(parameter("cudnn_conv_algo_search", "3")),
            "unsupported cudnn_conv_algo_search value '3' is requested",
        ),
        (
            configuration(parameter("arena_extend_strategy", "kSameAsRequested")),
            "unsupported arena_extend_strategy value 'kSameAsRequested' is requested",
        ),
        (
            configuration(parameter("gpu_mem_limit", "2G")),
            "model 'm': parameter 'gpu_mem_limit' expects a whole number, got '2G'",
        ),
    ],
)
def test_a_name_or_value_that_there_is_not_is_refused(config: pb.ModelConfig, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        providers.wanted(config, ON_GPU, {})
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


def test_an_unknown_accelerator_for_the_cpu_is_refused() -> None:
    config = configuration('optimization { execution_accelerators { cpu_execution_accelerator { name: "cuda" } } }')
    with pytest.raises(ServingError, match=r"^unknown Execution Accelerator 'cuda' is requested$"):
        providers.wanted(config, ON_CPU, {})


def test_cuda_options_are_told_apart_from_other_parameters() -> None:
    assert providers.cuda_options(Parameters("m", {"execution_mode": "1", "gpu_mem_limit": "5"})) == {
        "gpu_mem_limit": "5"
    }


def test_nothing_is_missing_where_a_session_got_all_that_was_asked_for() -> None:
    assert providers.missing([(CUDA, {}), (CPU, {})], [CUDA, CPU], GPU_BUILD) is None


def test_the_first_provider_that_a_session_did_not_get_is_missing() -> None:
    reason = providers.missing([(OPENVINO, {}), (CUDA, {}), (CPU, {})], [CPU], [OPENVINO, *GPU_BUILD])
    assert reason == (
        "OpenVINOExecutionProvider is not in use: its libraries load, but ONNX Runtime could not start it"
    )


def test_a_build_without_cuda_is_told_from_one_that_cannot_load_it() -> None:
    explained = providers.explain(CUDA, [CPU])
    assert explained.startswith("this build of ONNX Runtime (")
    assert explained.endswith(" does not have it; for CUDA install penstock[gpu] instead of penstock[cpu]")
    assert providers.explain(OPENVINO, [CPU]).endswith(" does not have it")


@pytest.mark.parametrize(
    ("faults", "explained"),
    [
        ({"libcuda.so.1": NO_DRIVER, "providers_cuda": NO_DRIVER}, f"the NVIDIA driver is not there ({NO_DRIVER})"),
        (
            {"providers_cuda": NO_CUBLAS},
            f"a library is missing ({NO_CUBLAS}); penstock[gpu] brings those of CUDA",
        ),
        (
            {"libcuda.so.1": NO_DRIVER, "providers_cuda": NO_CUBLAS},
            f"the NVIDIA driver is not there ({NO_DRIVER}) and "
            f"a library is missing ({NO_CUBLAS}); penstock[gpu] brings those of CUDA",
        ),
        (
            {"providers_cuda": "libm.so.6: version `GLIBC_2.99' not found"},
            "a library does not fit (libm.so.6: version `GLIBC_2.99' not found); penstock[gpu] brings those of CUDA",
        ),
        (
            {"providers_cuda": "undefined symbol: Provider_GetHost"},
            "its libraries load, but ONNX Runtime could not start it",
        ),
        ({}, "its libraries load, but ONNX Runtime could not start it"),
    ],
)
def test_what_keeps_cuda_from_loading_is_named(faults: dict[str, str], explained: str) -> None:
    no_driver = Driver(fault=f"the NVIDIA driver is not there ({NO_DRIVER})")
    shown = no_driver if "libcuda.so.1" in faults else ON_CUDA_13
    assert providers.explain(CUDA, GPU_BUILD, loader(**faults), lambda: shown, "13.0") == explained


@pytest.mark.parametrize(
    ("driver", "explained"),
    [
        (
            Driver("550.54", (12, 4), fault=""),
            "the NVIDIA driver 550.54 runs programs of CUDA 12.4 and older, and this build of ONNX Runtime needs CUDA "
            "13: install driver 580 or newer, or the build for CUDA 12 that server/docs/gpu.md names",
        ),
        (Driver("580.1", (13, 0), fault="the NVIDIA driver shows no GPU"), "the NVIDIA driver shows no GPU"),
    ],
)
def test_a_driver_that_will_not_do_is_named_with_the_one_that_would(driver: Driver, explained: str) -> None:
    assert providers.explain(CUDA, GPU_BUILD, loader(), lambda: driver, "13.0") == explained


@pytest.mark.parametrize(("cuda", "old"), [("13.0", True), ("12.8", False), ("", False)])
def test_a_driver_is_too_old_by_the_major_version_of_cuda(cuda: str, old: bool) -> None:
    assert bool(providers.too_old(Driver("550.54", (12, 4)), cuda)) is old
    assert providers.too_old(Driver(), cuda) == ""


def test_a_missing_library_of_tensorrt_is_named_without_the_hint_for_cuda() -> None:
    fault = "libnvinfer.so.10: cannot open shared object file: No such file or directory"
    explained = providers.explain(TENSORRT, GPU_BUILD, loader(providers_tensorrt=fault), lambda: ON_CUDA_13, "13.0")
    assert explained == f"a library is missing ({fault})"


def test_libraries_are_loaded_from_nvidias_packages_wherever_they_lie(tmp_path: Path) -> None:
    there = [tmp_path / "a" / "cu13" / "lib" / "libcublas.so.13", tmp_path / "b" / "cudnn" / "lib" / "libcudnn.so.9"]
    for path in (*there, tmp_path / "b" / "cudnn" / "lib" / "libother.so"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    loaded: list[str] = []
    providers.load_packaged(13, [str(tmp_path / "a"), str(tmp_path / "b")], loaded.append)
    assert loaded == [str(path) for path in there]


def test_preparing_prints_nothing_whatever_is_installed(capfd: pytest.CaptureFixture[str]) -> None:
    providers.prepare()
    assert capfd.readouterr() == ("", "")


def test_both_packages_of_onnx_runtime_at_once_are_warned_of(tmp_path: Path) -> None:
    for name in ("onnxruntime-1.30.0.dist-info", "onnxruntime_gpu-1.31.1.dist-info", "onnxruntime"):
        (tmp_path / name).mkdir()
    assert providers.installed_twice(tmp_path) == (
        "both onnxruntime 1.30.0 and onnxruntime-gpu 1.31.1 are installed: they share one import name, and files of "
        "one have overwritten files of the other. Uninstall both, then install penstock[cpu] or penstock[gpu]"
    )


@pytest.mark.parametrize("installed", ["onnxruntime", "onnxruntime_gpu"])
def test_either_package_alone_is_fine(installed: str, tmp_path: Path) -> None:
    (tmp_path / f"{installed}-1.31.1.dist-info").mkdir()
    assert providers.installed_twice(tmp_path) is None
