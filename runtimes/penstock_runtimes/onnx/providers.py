"""Which execution providers an instance asks for, and why one that was asked for is not there."""

import contextlib
import ctypes
import importlib.util
import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
from penstock import devices, pb
from penstock.devices import Driver
from penstock.errors import Kind, ServingError
from penstock.runtime import Placement

from penstock_runtimes.onnx.parameters import Parameters

CPU, CUDA, TENSORRT, OPENVINO = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt", "OpenVINO"))

OLDEST_DRIVERS = {12: "525", 13: "580"}  # that run programs of a major version of CUDA
GRAPHS = "enable_cuda_graph"
STREAM = "user_compute_stream"
LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}

UNEXPLAINED = "its libraries load, but ONNX Runtime could not start it"

Provider: TypeAlias = tuple[str, dict[str, str]]
Library: TypeAlias = Callable[[str], object]  # loads a shared library, or raises OSError

# Triton's names for model parameters that are CUDA provider options, with Triton's values.
_CUDA_VALUES = {
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
}
# Model parameters that switch a CUDA provider option on or off, and the option; all but the last are called alike.
_CUDA_SWITCHES = {
    "do_copy_in_default_stream": "do_copy_in_default_stream",
    "use_tf32": "use_tf32",
    "cudnn_conv_use_max_workspace": "cudnn_conv_use_max_workspace",
    "cuda_graph": GRAPHS,
}
# Options that ONNX Runtime takes under the accelerator `cuda`, by its own names. It would refuse others as well, but
# only once it has a GPU; and with `--device auto` the model would run on the CPU then.
_CUDA_NAMES = {
    *_CUDA_VALUES, "do_copy_in_default_stream", "use_tf32", "cudnn_conv_use_max_workspace", GRAPHS, "gpu_mem_limit",
    "cudnn_conv1d_pad_to_nc1d", "enable_skip_layer_norm_strict_mode", "fuse_conv_bias", "prefer_nhwc", "sdpa_kernel",
    "tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms", "use_ep_level_unified_stream",
}  # fmt: skip
_CUDA_BOOLEANS = (
    "do_copy_in_default_stream", "use_tf32", "cudnn_conv_use_max_workspace", GRAPHS, "use_ep_level_unified_stream",
)  # fmt: skip

_TENSORRT_NAMES = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
} | {
    name: name
    for name in (
        "trt_max_partition_iterations", "trt_min_subgraph_size", "trt_dla_enable", "trt_dla_core",
        "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_dump_subgraphs",
        "trt_force_sequential_engine_build", "trt_context_memory_sharing_enable", "trt_layer_norm_fp32_fallback",
        "trt_timing_cache_enable", "trt_timing_cache_path", "trt_force_timing_cache", "trt_detailed_build_log",
        "trt_build_heuristics_enable", "trt_sparsity_enable", "trt_builder_optimization_level",
        "trt_auxiliary_streams", "trt_tactic_sources", "trt_extra_plugin_lib_paths", "trt_profile_min_shapes",
        "trt_profile_max_shapes", "trt_profile_opt_shapes", "trt_cuda_graph_enable", "trt_dump_ep_context_model",
        "trt_ep_context_file_path", "trt_ep_context_embed_mode",
    )
}  # fmt: skip
_TENSORRT_PRECISION: Mapping[str, dict[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "BF16": {"trt_bf16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}


def wanted(config: pb.ModelConfig, place: Placement, defaults: Mapping[str, str], stream: int = 0) -> list[Provider]:
    """The providers of an instance on `place`, most preferred first, with their options; the CPU is always last.

    From `optimization.execution_accelerators` and, over them, the older model parameters of Triton; where neither says
    anything, from `defaults`. `stream` is the address of the CUDA stream that the instance shall compute on; 0 leaves
    it to ONNX Runtime. Raises ServingError(INVALID) for names and values that there are not.
    """
    accelerators = config.optimization.execution_accelerators
    providers: list[Provider] = []
    if place.device == "cpu":
        for accelerator in accelerators.cpu_execution_accelerator:
            if accelerator.name != "openvino":
                raise _unknown(accelerator.name)
            providers.append((OPENVINO, {"device_type": "CPU"}))
    else:
        given = {"device_id": str(place.device_id)} | ({STREAM: str(stream)} if stream else {})
        cuda: dict[str, str] = {}
        for accelerator in accelerators.gpu_execution_accelerator:
            if accelerator.name == "tensorrt":
                options = _tensorrt_options(accelerator.parameters)
                providers.append((TENSORRT, options | given))
            elif accelerator.name == "cuda":
                cuda = _checked(accelerator.parameters, config.name)
            else:
                raise _unknown(accelerator.name)
        cuda = cuda_options(Parameters("", defaults)) | cuda | cuda_options(Parameters.of(config))
        providers.append((CUDA, {**cuda, **given}))
    return [*providers, (CPU, {})]


def _checked(given: Mapping[str, str], model: str) -> dict[str, str]:
    """CUDA options as they stand under the accelerator, switches as 0 or 1."""
    options = dict(given)
    parameters = Parameters(f"model '{model}'", given)
    for key in given:
        if key in ("device_id", STREAM, "has_user_compute_stream"):
            raise ServingError(Kind.INVALID, f"model '{model}': parameter '{key}' of CUDA is the server's to set")
        if key not in _CUDA_NAMES:
            raise ServingError(Kind.INVALID, f"unknown parameter '{key}' is provided for CUDA Execution Accelerator")
    for key in _CUDA_BOOLEANS:
        if (on := parameters.boolean(key)) is not None:
            options[key] = str(int(on))
    return options


def _unknown(name: str) -> ServingError:
    return ServingError(Kind.INVALID, f"unknown Execution Accelerator '{name}' is requested")


def _tensorrt_options(parameters: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parameters.items():
        if key == "precision_mode":
            if value not in _TENSORRT_PRECISION:
                raise ServingError(Kind.INVALID, f"unsupported precision mode '{value}' is requested")
            options |= _TENSORRT_PRECISION[value]
        elif key in _TENSORRT_NAMES:
            options[_TENSORRT_NAMES[key]] = value
        else:
            raise ServingError(
                Kind.INVALID, f"unknown parameter '{key}' is provided for TensorRT Execution Accelerator"
            )
    return options


def cuda_options(parameters: Parameters) -> dict[str, str]:
    """The CUDA provider options among a model's parameters. Raises ServingError(INVALID) for a value there is not."""
    options: dict[str, str] = {}
    for key, values in _CUDA_VALUES.items():
        if key in parameters.values:
            value = parameters.text(key)
            if value not in values:
                raise ServingError(Kind.INVALID, f"unsupported {key} value '{value}' is requested")
            options[key] = values[value]
    if (limit_bytes := parameters.integer("gpu_mem_limit")) is not None:
        options["gpu_mem_limit"] = str(limit_bytes)
    for key, option in _CUDA_SWITCHES.items():
        if (on := parameters.boolean(key)) is not None:
            options[option] = str(int(on))
    return options


def asks_for_graphs(asked: Sequence[Provider]) -> bool:
    return any(name == CUDA and options.get(GRAPHS) == "1" for name, options in asked)


def missing(asked: Sequence[Provider], got: Sequence[str], available: Sequence[str]) -> str | None:
    """Why the first provider that was asked for is not among those that a session `got`; None if all are.

    ONNX Runtime builds a session without a provider that does not load, and says so on standard error at best.
    `available` are the providers that this build has.
    """
    for name, _ in asked:
        if name not in got:
            return f"{name} is not in use: {explain(name, available)}"
    return None


def explain(
    name: str,
    available: Sequence[str],
    library: Library = ctypes.CDLL,
    driver: Callable[[], Driver] = devices.driver,
    cuda_version: str | None = None,
) -> str:
    """What keeps a provider from loading, as far as it can be found out.

    `library` loads a shared library, `driver` looks at NVIDIA's, `cuda_version` is what ONNX Runtime was built for.

    Call it only after ONNX Runtime has tried to start the provider: its library, loaded before, starts without the host
    that ONNX Runtime gives it.
    """
    if name not in available:
        hint = "; for CUDA install penstock[gpu] instead of penstock[cpu]" if name in LIBRARIES else ""
        return f"this build of ONNX Runtime ({onnxruntime.__version__}) does not have it{hint}"
    faults = []
    if name in LIBRARIES:
        shown = driver()
        if fault := too_old(shown, built_for() if cuda_version is None else cuda_version) or shown.fault:
            faults.append(fault)
        fault = _fault(str(Path(onnxruntime.__file__).parent / "capi" / LIBRARIES[name]), library)
        # The provider leans on the driver itself, and on a symbol that only ONNX Runtime's own loader brings.
        if fault and not fault.startswith(devices.DRIVER) and "Provider_GetHost" not in fault:
            what = "is missing" if "cannot open" in fault else "does not fit"
            hint = "; penstock[gpu] brings those of CUDA" if name == CUDA else ""
            faults.append(f"a library {what} ({fault}){hint}")
    return " and ".join(faults) or UNEXPLAINED


def built_for() -> str:
    """The version of CUDA that this ONNX Runtime was built for, such as "13.0"; "" for none."""
    version: str = getattr(onnxruntime, "cuda_version", "") or ""
    return version


def too_old(driver: Driver, cuda_version: str) -> str:
    """Why a driver cannot run programs of this version of CUDA; "" where it can, or where there is none."""
    major = int(cuda_version.partition(".")[0] or 0)
    if not driver.cuda[0] or driver.cuda[0] >= major:
        return ""
    return (
        f"the NVIDIA driver{f' {driver.version}' if driver.version else ''} runs programs of CUDA "
        f"{driver.cuda[0]}.{driver.cuda[1]} and older, and this build of ONNX Runtime needs CUDA {major}: install "
        f"driver {OLDEST_DRIVERS.get(major, 'for it')} or newer, or the build for CUDA 12 that server/docs/gpu.md names"
    )


def _fault(path: str, library: Library) -> str:
    try:
        library(path)
    except OSError as error:
        return str(error)
    return ""


_CUFFT = {12: "11", 13: "12"}  # its own version in each of CUDA


def cuda_libraries(major: int) -> tuple[str, ...]:
    """Those of CUDA `major` and cuDNN 9 that the CUDA provider uses; each stands after those that it needs itself."""
    own = [f"lib{name}.so.{major}" for name in ("cudart", "cublasLt", "cublas", "nvrtc")]
    return (*own, f"libcufft.so.{_CUFFT.get(major, major)}", "libcurand.so.10", "libcudnn.so.9")


def load_packaged(major: int, packages: Iterable[str], library: Library = ctypes.CDLL) -> None:
    """Load CUDA's libraries from NVIDIA's Python packages, wherever on Python's path these lie.

    ONNX Runtime looks for them beside itself only. `packages` are the directories of the namespace `nvidia`.
    """
    places = [path for package in packages for path in sorted(Path(package).glob("*/lib"))]
    for name in cuda_libraries(major):
        for path in places:
            if (path / name).exists():
                with contextlib.suppress(OSError):  # the provider that needs it says so
                    library(str(path / name))


_preparing = threading.Lock()


def prepare() -> None:
    """Let ONNX Runtime find CUDA and cuDNN where pip put them. Harmless where it has no GPU support.

    What it would print of libraries that are not there, once per session and in four places, `explain` says once.
    """
    preload_dlls: Any = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload_dlls is not None and CUDA in onnxruntime.get_available_providers():
        with _preparing, contextlib.redirect_stdout(io.StringIO()):
            spec = importlib.util.find_spec("nvidia")
            places = spec.submodule_search_locations if spec else None
            load_packaged(int(built_for().partition(".")[0] or 0), places or ())
            preload_dlls()
        onnxruntime.set_default_logger_severity(4)


def installed_twice(folder: Path = Path(onnxruntime.__file__).parents[1]) -> str | None:
    """A warning where both packages of ONNX Runtime are installed in `folder`, the one it was imported from.

    None where one is.
    """
    found = []
    for package in ("onnxruntime", "onnxruntime_gpu"):
        for metadata in folder.glob(f"{package}-*.dist-info"):
            version = metadata.name.removeprefix(f"{package}-").removesuffix(".dist-info")
            found.append(f"{package.replace('_', '-')} {version}")
    if len(found) < 2:
        return None
    return (
        f"both {' and '.join(found)} are installed: they share one import name, and files of one have overwritten "
        "files of the other. Uninstall both, then install penstock[cpu] or penstock[gpu]"
    )
