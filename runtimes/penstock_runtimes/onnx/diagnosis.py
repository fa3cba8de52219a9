"""What `penstock doctor` asks of this runtime: which providers really load, and what keeps the others from it."""

import base64
import contextlib
import ctypes
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from penstock.runtime import Finding

from penstock_runtimes.onnx import providers
from penstock_runtimes.onnx.providers import CPU, CUDA, Library, Provider

SECTION = "ONNX Runtime"
DEVICES = {CPU: "cpu", CUDA: "cuda"}  # that cannot serve without the provider
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
# Y = X + X, FP32 [3]; IR version 8, opset 17.
_DOUBLE = base64.b64decode(
    "CAg6OgoOCgFYCgFYEgFZIgNBZGQSBmRvdWJsZVoPCgFYEgoKCAgBEgQKAggDYg8KAVkSCgoICAESBAoCCANCBAoAEBE="
)

Session: TypeAlias = Callable[[Sequence[Provider]], Any]  # an InferenceSession of _DOUBLE on these providers


def diagnose(gpus: Sequence[int]) -> Iterator[Finding]:
    """Packages, providers on the CPU and on each of `gpus`, and the libraries of CUDA that they found."""
    yield from _packages()
    cuda = providers.built_for()
    yield Finding(SECTION, "version", onnxruntime.__version__ + (f", built for CUDA {cuda}" if cuda else ""))
    providers.prepare()
    yield from try_providers(onnxruntime.get_available_providers(), gpus or [0])
    if cuda:
        yield from libraries(int(cuda.partition(".")[0]))


def _packages() -> Iterator[Finding]:
    fault = providers.installed_twice() or ""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield Finding(SECTION, "package", f"{package} {importlib.metadata.version(package)}", fault)
            fault = ""  # said once


def _session(asked: Sequence[Provider]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is found out from the providers it got
    names, settings = [name for name, _ in asked], [given for _, given in asked]
    return onnxruntime.InferenceSession(_DOUBLE, options, providers=names, provider_options=settings, enable_fallback=0)


def try_providers(
    available: Sequence[str],
    gpus: Sequence[int],
    session: Session = _session,
    explain: Callable[[str, Sequence[str]], str] = providers.explain,
) -> Iterator[Finding]:
    """Of each provider of this build, and of the two that serving needs, whether a session on it computes."""
    for name in dict.fromkeys([*available, CUDA, CPU]):
        stops = (DEVICES[name],) if name in DEVICES else ()
        for number in gpus if name in providers.LIBRARIES and name in available else [0]:
            shown = f"{name} on GPU {number}" if name in providers.LIBRARIES and len(gpus) > 1 else name
            fault = _NOT_THERE if name not in available else _fault(name, number, session)
            if fault and name in providers.LIBRARIES:
                explained = explain(name, available)
                fault = explained if fault == _NOT_THERE or explained != providers.UNEXPLAINED else fault
            elif fault == _NOT_THERE:
                fault = explain(name, available)
            yield Finding(SECTION, shown, "" if fault else "computes", fault, stops)


_NOT_THERE = "the session has not got it"


def _fault(name: str, number: int, session: Session) -> str:
    """What is wrong with a provider that this build has; "" where it computes."""
    settings = {"device_id": str(number)} if name in providers.LIBRARIES else {}
    try:
        made = session([(name, settings), (CPU, {})] if name != CPU else [(CPU, {})])
        if name not in made.get_providers():
            return _NOT_THERE
        [doubled] = made.run(["Y"], {"X": np.array([1, 2, 3], np.float32)})
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no common base
        return f"{type(error).__name__}: {error}"
    return "" if doubled.tolist() == [2, 4, 6] else f"it computes [1,2,3] + [1,2,3] = {doubled.tolist()}"


def libraries(major: int, library: Library = ctypes.CDLL, maps: Path = Path("/proc/self/maps")) -> Iterator[Finding]:
    """The libraries of CUDA `major` and cuDNN 9 that the CUDA provider uses, and the files they were loaded from.

    One that is missing stops nothing by itself: not every provider needs every one, and what it needs it says itself.
    """
    for name in providers.cuda_libraries(major):
        try:
            library(name)
        except OSError as error:
            hint = "penstock[gpu] brings it; with CUDA of the system, LD_LIBRARY_PATH must show where it is"
            yield Finding(SECTION, name, "", f"{error}; {hint}")
        else:
            found = re.search(rf"\S*/{re.escape(name)}\S*", maps.read_text())
            yield Finding(SECTION, name, found[0] if found else "loaded")
