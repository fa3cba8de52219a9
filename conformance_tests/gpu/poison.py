"""A GPU lost for real, in a process of its own. `python -m conformance_tests.gpu.poison REPOSITORY`

Loads `small` on the GPU and a copy of it on the CPU, runs a kernel that writes to address 0 in the context that ONNX
Runtime uses, asks both, and prints one JSON object about what became of them.
"""

import ctypes
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from penstock.engine import Engine
from penstock.errors import ServingError
from penstock.messages import InferRequest
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled, Credit
from penstock.settings import Settings
from penstock.tensor import FP32, Tensor

from conformance_tests.gpu.models import Sizes, inputs

LIMIT_S = 60.0
KERNEL = b"""
.version 6.3
.target sm_75
.address_size 64
.visible .entry stray()
{
    .reg .u64 %address;
    .reg .u32 %value;
    mov.u64 %address, 0;
    mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
\x00"""


def main() -> None:
    repository = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch)
        for name, kind in (("on_gpu", "KIND_GPU"), ("on_cpu", "KIND_CPU")):
            (models / name / "1").mkdir(parents=True)
            content = (repository / "small" / "1" / "model.onnx").read_bytes()
            (models / name / "1" / "model.onnx").write_bytes(content)
            (models / name / "config.pbtxt").write_text(f"instance_group {{ kind: {kind} }}\n")
        engine = Engine(Settings(model_repository=(scratch,), device="cuda"))
        engine.lifecycle.start()
        for name in ("on_gpu", "on_cpu"):
            before = ask(engine, name)
            assert not isinstance(before, ServingError), before
        write_astray()
        error = ask(engine, "on_gpu")
        [state] = [row[2] for row in engine.lifecycle.index() if row[0] == "on_gpu"]
        after = ask(engine, "on_cpu")
        found = {
            "kind": type(error).__name__,
            "message": str(error),
            "state": state.value if state else None,
            "cpu_answers": not isinstance(after, ServingError),
        }
        print(json.dumps(found), flush=True)
    os._exit(0)  # destructors of what lies on the GPU would end the process otherwise


def ask(engine: Engine, name: str) -> Any:
    """The answer, or the error."""
    answers: list[Any] = []
    answered = threading.Event()

    def reply(result: object, final: bool = True, partial: bool = False) -> Credit:
        answers.append(result)
        answered.set()
        return PLENTY

    [(key, array)] = inputs("small", Sizes(), 1).items()
    request = InferRequest(name, "", "", {key: Tensor(key, FP32, array)}, {}, rows=1)
    engine.model(name).submit(Pending(request, reply, Cancelled(), 0, 0))
    assert answered.wait(LIMIT_S), "no answer came"
    return answers[0]


def write_astray() -> None:
    """In the device's primary context, which the runtime interface of CUDA, and so ONNX Runtime, uses."""
    cuda = ctypes.CDLL("libcuda.so.1")
    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    calls = (
        cuda.cuInit(0),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        cuda.cuCtxSetCurrent(context),
        cuda.cuModuleLoadData(ctypes.byref(module), KERNEL),
        cuda.cuModuleGetFunction(ctypes.byref(function), module, b"stray"),
        cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, None, None, None),
    )
    if any(calls):
        raise SystemExit(f"the kernel could not be started: {calls}")
    cuda.cuCtxSynchronize()  # its status is the error that is wanted


if __name__ == "__main__":
    main()
