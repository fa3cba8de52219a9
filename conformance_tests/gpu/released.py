"""Whether memory comes back when a model goes: `python -m conformance_tests.gpu.released REPOSITORY MODEL --device D`.

Loads a model in this process, asks it, and unloads it, several times; prints one JSON object: bytes in use after each
unloading. On a GPU those of the whole device, so nothing else may use it meanwhile; on the CPU those of this process.
"""

import argparse
import ctypes
import gc
import json
import threading
from pathlib import Path

from penstock.engine import Engine
from penstock.lifecycle import UNLOADED
from penstock.messages import InferRequest
from penstock.queueing import Pending
from penstock.runtime import PLENTY, Cancelled, Credit
from penstock.settings import Settings
from penstock.tensor import BY_DTYPE, Tensor
from penstock_runtimes.onnx import providers

from conformance_tests.gpu.models import TINY, Sizes, inputs

LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("model")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    settings = Settings(
        model_repository=(str(arguments.repository),), model_control_mode="explicit", device=arguments.device
    )
    engine = Engine(settings)
    engine.lifecycle.start()
    changed = threading.Condition()

    def notify() -> None:
        with changed:
            changed.notify_all()

    engine.lifecycle.watch(notify)
    loaded: list[int] = []
    released: list[int] = []
    for _ in range(arguments.times):
        engine.lifecycle.load(arguments.model)
        _ask(engine, arguments.model, TINY if arguments.tiny else Sizes())
        loaded.append(_in_use(arguments.device))
        engine.lifecycle.unload(arguments.model)
        with changed:
            assert changed.wait_for(lambda: _is_unloaded(engine, arguments.model), LIMIT_S), engine.lifecycle.index()
        gc.collect()
        released.append(_in_use(arguments.device))
    engine.lifecycle.stop(LIMIT_S)
    print(json.dumps({"loaded": loaded, "released": released}))


def _is_unloaded(engine: Engine, model: str) -> bool:
    return all(row[3] == UNLOADED for row in engine.lifecycle.index() if row[0] == model)


def _ask(engine: Engine, name: str, sizes: Sizes) -> None:
    model = engine.model(name)
    arrays = inputs(name.partition("_")[0], sizes, min(8, model.signature.max_batch_size))
    tensors = {key: Tensor(key, BY_DTYPE[array.dtype], array) for key, array in arrays.items()}
    rows = next(iter(arrays.values())).shape[0]
    answered = threading.Event()
    failures: list[BaseException] = []

    def reply(result: object, final: bool = True, partial: bool = False) -> Credit:
        if isinstance(result, BaseException):
            failures.append(result)
        answered.set()
        return PLENTY

    model.submit(Pending(InferRequest(name, "", "", tensors, {}, rows=rows), reply, Cancelled(), 0, 0))
    assert answered.wait(LIMIT_S), "no answer came"
    if failures:
        raise failures[0]


def _in_use(device: str) -> int:
    """Bytes."""
    if device == "cpu":
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) << 10
    cuda = ctypes.CDLL(f"libcudart.so.{providers.built_for().partition('.')[0]}")
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        raise SystemExit("cudaMemGetInfo failed")
    return total.value - free.value


if __name__ == "__main__":
    main()
