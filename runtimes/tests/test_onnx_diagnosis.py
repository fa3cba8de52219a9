"""What a machine can run is found out by running it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from penstock.runtime import Finding, doctors
from penstock_runtimes.onnx import diagnosis, providers
from penstock_runtimes.onnx.diagnosis import SECTION, libraries, try_providers
from penstock_runtimes.onnx.providers import CPU, CUDA, TENSORRT, Provider


class Session:
    """Stands for a session that got some of the providers it asked for."""

    def __init__(self, got: Sequence[str], factor: float = 2) -> None:
        self.got, self.factor = got, factor

    def get_providers(self) -> list[str]:
        return list(self.got)

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        return [feed["X"] * np.float32(self.factor)]


def working(*names: str) -> Callable[[Sequence[Provider]], Any]:
    """Makes sessions in which only these providers load."""
    return lambda asked: Session([name for name, _ in asked if name in names])


def explain(name: str, available: Sequence[str]) -> str:
    return f"{name} is missing a library" if name in available else f"{name} is not in this build"


def test_this_runtime_can_be_asked_by_the_doctor_and_computes_on_the_cpu() -> None:
    [diagnose] = [diagnose for diagnose in doctors() if diagnose is diagnosis.diagnose]
    found = {finding.name: finding for finding in diagnose([])}
    assert found[CPU] == Finding(SECTION, CPU, "computes", "", ("cpu",))
    assert (found[CUDA].value == "computes") is (found[CUDA].fault == "")
    assert found["package"].value.startswith("onnxruntime")


def test_a_provider_works_where_its_session_computes() -> None:
    assert list(try_providers([CUDA, CPU], [0], working(CUDA, CPU), explain)) == [
        Finding(SECTION, CUDA, "computes", "", ("cuda",)),
        Finding(SECTION, CPU, "computes", "", ("cpu",)),
    ]


def test_a_provider_that_a_session_does_not_get_is_explained_and_stops_its_device_alone() -> None:
    assert list(try_providers([TENSORRT, CUDA, CPU], [0], working(CPU), explain)) == [
        Finding(SECTION, TENSORRT, "", f"{TENSORRT} is missing a library"),
        Finding(SECTION, CUDA, "", f"{CUDA} is missing a library", ("cuda",)),
        Finding(SECTION, CPU, "computes", "", ("cpu",)),
    ]


def test_a_build_without_cuda_has_a_row_that_says_so() -> None:
    assert list(try_providers([CPU], [], working(CPU), explain)) == [
        Finding(SECTION, CPU, "computes", "", ("cpu",)),
        Finding(SECTION, CUDA, "", f"{CUDA} is not in this build", ("cuda",)),
    ]


def test_each_gpu_is_tried() -> None:
    def session(asked: Sequence[Provider]) -> Any:
        if asked[0][1].get("device_id") == "1":
            raise RuntimeError("CUDA failure 2: out of memory")
        return Session([name for name, _ in asked])

    unexplained = lambda name, available: providers.UNEXPLAINED  # noqa: E731
    assert list(try_providers([CUDA, CPU], [0, 1], session, unexplained)) == [
        Finding(SECTION, f"{CUDA} on GPU 0", "computes", "", ("cuda",)),
        Finding(SECTION, f"{CUDA} on GPU 1", "", "RuntimeError: CUDA failure 2: out of memory", ("cuda",)),
        Finding(SECTION, CPU, "computes", "", ("cpu",)),
    ]


def test_a_provider_that_computes_wrongly_is_no_provider() -> None:
    [found, _] = try_providers([CPU], [], lambda asked: Session([CPU], factor=3), explain)
    assert found.fault == "it computes [1,2,3] + [1,2,3] = [3.0, 6.0, 9.0]"


def test_libraries_are_told_with_the_files_that_they_were_loaded_from(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f00 r-xp 0 0 12 /opt/nvidia/cu13/lib/libcudart.so.13.0.96\n7f10 r-xp 0 0 12 /usr/lib/libc.so.6\n")

    def load(name: str) -> None:
        if name == "libcudnn.so.9":
            raise OSError(f"{name}: cannot open shared object file")

    found = {finding.name: finding for finding in libraries(13, load, maps)}
    assert list(found) == [
        *("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libnvrtc.so.13", "libcufft.so.12"),
        *("libcurand.so.10", "libcudnn.so.9"),
    ]
    assert found["libcudart.so.13"].value == "/opt/nvidia/cu13/lib/libcudart.so.13.0.96"
    assert found["libcublas.so.13"].value == "loaded"
    assert found["libcudnn.so.9"].stops == ()  # what the provider cannot do without, its own row tells
    assert found["libcudnn.so.9"].fault.startswith("libcudnn.so.9: cannot open shared object file; penstock[gpu] ")
