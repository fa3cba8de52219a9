"""NVIDIA's libraries, as functions over ctypes that behave as the real ones do."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any


class FakeDriver:
    """libcuda.so.1, and libnvidia-ml.so.1 as far as it tells the version."""

    def __init__(
        self,
        cuda: int,
        gpus: Sequence[tuple[str, int, tuple[int, int]]] = (),
        init_status: int = 0,
        uuids: Sequence[str] = (),
    ) -> None:
        self.cuda = cuda  # as 12040 for 12.4
        self.gpus = gpus  # name, bytes, compute capability
        self.init_status = init_status
        self.uuids = dict(enumerate(uuids))

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802 - the real one's name
        number._obj.value = self.cuda
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init_status

    def cuGetErrorName(self, status: int, text: Any) -> int:  # noqa: N802
        if status != 100:
            return 1
        text._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:  # noqa: N802
        number._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = self.gpus[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = self.gpus[device.value][1]
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:  # noqa: N802
        number._obj.value = self.gpus[device.value][2][attribute - 75]
        return 0

    def cuDeviceGetUuid(self, octets: Any, device: Any) -> int:  # noqa: N802
        name = self.uuids.get(device.value)
        if name is None:
            return 1
        octets.raw = uuid.UUID(name.removeprefix("GPU-")).bytes
        return 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.159.03"
        return 0


def loader(libraries: dict[str, object]) -> Callable[[str], Any]:
    """Loads what is there, and fails as the dynamic linker does."""

    def load(name: str) -> Any:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return libraries[name]

    return load
