"""ONNX Runtime sessions: options from a model's configuration, and proof of the device that really runs it."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnxruntime
from penstock import pb
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.runtime import ModelFiles, Placement

from penstock_runtimes.onnx import binding, faults, providers
from penstock_runtimes.onnx.idle import SHRINKAGE
from penstock_runtimes.onnx.parameters import Parameters
from penstock_runtimes.onnx.providers import Provider

logger = logging.getLogger(__name__)

Load: TypeAlias = Callable[[Path, Any, list[Provider]], Any]

# `optimization { graph { level } }`: -1 BASIC, 1 EXTENDED, 2 none; everything else is ALL, as in Triton.
_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
MOST_THREADS = 1024  # for one operation, or for one request
_INITIALIZERS = "session.use_device_allocator_for_initializers"
_ARENAS = re.compile(r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*")


def load(path: Path, options: Any, asked: list[Provider]) -> Any:
    """An InferenceSession on the providers that load among those asked for. Raises ServingError(INTERNAL)."""
    try:
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=[name for name, _ in asked],
            provider_options=[given for _, given in asked],
            enable_fallback=0,  # or a run that fails on a GPU moves the session to the CPU for good, and only prints it
        )
    except Exception as error:
        raise translate(error, loading=True, device="cpu" if len(asked) == 1 else "the GPU") from error


def build(
    files: ModelFiles,
    config: pb.ModelConfig,
    place: Placement,
    defaults: Mapping[str, str],
    available: Sequence[str] | None = None,
    load: Load = load,
    stream: int = 0,
) -> tuple[Any, str]:
    """A session on `place`, and the device that really runs it: "cpu", "cuda:0".

    `defaults` stand for parameters that the model does not have; `available` are the providers of this build, `load`
    makes a session, `stream` is what it computes on, on a GPU.

    Raises ServingError(UNAVAILABLE) naming what is missing where a provider that was asked for is not in use; if the
    placement may fall back, the session is on the CPU then, and a warning is logged. Raises ServingError(INTERNAL) for
    a model that ONNX Runtime cannot load.
    """
    if available is None:
        available = onnxruntime.get_available_providers()
    path = _model_path(files, config)
    asked = providers.wanted(config, place, defaults, stream)
    made = options(Parameters.of(config, defaults), config.optimization.graph.level, place.threads)
    if made.intra_op_num_threads != place.threads:
        files.note("threads", made.intra_op_num_threads, "the parameter intra_op_thread_count says so")
    reason = providers.missing(asked, available, available)
    if reason is None:
        if place.device == "cuda":
            providers.prepare()
        try:
            session = load(path, made, asked)
        except ServingError as error:
            if not place.may_fall_back:
                raise
            reason = error.message
        else:
            reason = providers.missing(asked, session.get_providers(), available)
            if reason is None:
                return session, str(place)
            session = None  # before the next one takes its memory
    if not place.may_fall_back:
        raise ServingError(Kind.UNAVAILABLE, f"model '{config.name}' was to run on {place}, but {reason}")
    session = load(path, made, [(providers.CPU, {})])
    files.note("device", "cpu", reason)
    logger.warning("MODEL '%s' RUNS ON THE CPU, NOT ON %s: %s", config.name, str(place).upper(), reason)
    return session, "cpu"


def _model_path(files: ModelFiles, config: pb.ModelConfig) -> Path:
    path = files.file(config.default_model_filename)
    if path.is_dir():
        path /= "model.onnx"
        if not path.exists():
            raise ServingError(Kind.UNAVAILABLE, f"unable to find '{path}' for model instance '{config.name}'")
    if not path.exists():
        raise ServingError(Kind.INTERNAL, f"failed to stat file {path}")
    return path


def options(parameters: Parameters, level: int, threads: int) -> Any:
    """SessionOptions: `level` of graph optimisation, `threads` for one operation where the parameters do not say.

    Raises ServingError(INVALID) for a value that is none of those the parameter has.
    """
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 4  # errors come as exceptions, and reach the client and our own log from there
    made.graph_optimization_level = _LEVELS.get(level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    mode = parameters.text("execution_mode", "0")
    if mode not in ("0", "1"):
        raise ServingError(
            Kind.INVALID,
            f"Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 but got {mode} .",
        )
    if mode == "1":
        made.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
    intra, inter = (_threads(parameters, f"{kind}_op_thread_count") for kind in ("intra", "inter"))
    made.intra_op_num_threads = intra if intra > 0 else threads
    made.inter_op_num_threads = max(inter, 0)  # 0 leaves it to ONNX Runtime
    if (arena := parameters.boolean("enable_mem_arena")) is not None:
        made.enable_cpu_mem_arena = arena
    if (pattern := parameters.boolean("enable_mem_pattern")) is not None:
        made.enable_mem_pattern = pattern
    if (by_device := parameters.boolean(_INITIALIZERS)) is not None:
        made.add_session_config_entry(_INITIALIZERS, str(int(by_device)))
    return made


def _threads(parameters: Parameters, key: str) -> int:
    threads = parameters.integer(key) or 0
    if threads > MOST_THREADS:
        raise parameters.refusal(key, f"a whole number up to {MOST_THREADS}")
    return threads


def run_options(parameters: Parameters, device: str, bound: bool = False) -> Callable[[], Any] | None:
    """What makes the RunOptions of an instance that runs on `device`; None where the defaults will do.

    One that is `bound` waits for the device itself, once its results are copied. Raises ServingError(INVALID) for a
    list of arenas that is none, such as ONNX Runtime would refuse with every run.
    """
    arenas = parameters.text(SHRINKAGE)
    if arenas and not _ARENAS.fullmatch(arenas):
        raise parameters.refusal(SHRINKAGE, "devices such as cpu:0;gpu:0")
    if device == "cpu":  # has no arenas on a GPU, and a list of nothing but those fails the run
        arenas = ";".join(arena for arena in arenas.split(";") if arena.startswith("cpu"))
    entries = {SHRINKAGE: arenas} if arenas else {}
    if bound:
        entries |= binding.RUN_OPTIONS
    if not entries:
        return None

    def make() -> Any:
        made = onnxruntime.RunOptions()
        for key, value in entries.items():
            made.add_run_config_entry(key, value)
        return made

    return make


# ONNX Runtime's exceptions have no common base. Their text begins with the code: `[ONNXRuntimeError] : 2 : INVALID_…`;
# with bound tensors there is none.
_CODED = re.compile(r"(?:\[ONNXRuntimeError\] : (\d+) : \w+ |Error in execution): (.*)", re.DOTALL)
_BY_INPUT = ("1", "2", "6")  # FAIL, INVALID_ARGUMENT, RUNTIME_EXCEPTION: a kernel says so of values it cannot take
_BY_DEVICE = re.compile(r"alloc|arena|cuda|cudnn|cublas|tensorrt", re.IGNORECASE)


def translate(error: Exception, loading: bool = False, device: str = "cpu") -> ServingError:
    """A failure of ONNX Runtime on `device` as one of ours: `onnx runtime error <code>: <message>`.

    A run that fails on values (an index out of range, shapes that do not multiply, text that is no number) is the
    client's mistake, INVALID; out of memory, a failing device, and everything while loading is INTERNAL. An error that
    the GPU does not recover from in this process is a DeviceLostError.
    """
    if isinstance(error, ServingError):
        return error
    text = str(error).strip()
    if device != "cpu" and faults.is_poison(text):
        return DeviceLostError(f"{device} is lost to this process: {text}")
    coded = _CODED.fullmatch(text)
    if not coded:
        return ServingError(Kind.INTERNAL, f"onnx runtime error: {type(error).__name__}: {text}")
    code, message = coded.groups()
    said = message.partition("Status Message: ")[2] or message  # without the node's name, which may say anything
    by_input = not loading and (code is None or code in _BY_INPUT) and not _BY_DEVICE.search(said)
    head = "onnx runtime error" if code is None else f"onnx runtime error {code}"
    return ServingError(Kind.INVALID if by_input else Kind.INTERNAL, f"{head}: {message}")
