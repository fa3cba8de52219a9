"""Errors of CUDA after which no call of this process can use a GPU again.

CUDA documents each as one that "leaves the process in an inconsistent state": the context is lost with all memory in
it, every later call fails with the same error, and only a new process can use the GPU.
"""

import re
from typing import Any

# cudaError and CUresult share these numbers. By number, the name that the runtime interface gives it, and its text.
POISON = {
    214: ("cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"),
    220: ("cudaErrorNvlinkUncorrectable", "uncorrectable NVLink error detected during the execution"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    702: ("cudaErrorLaunchTimeout", "the launch timed out and was terminated"),
    709: ("cudaErrorContextIsDestroyed", "context is destroyed"),
    710: ("cudaErrorAssert", "device-side assert triggered"),
    714: ("cudaErrorHardwareStackError", "hardware stack error"),
    715: ("cudaErrorIllegalInstruction", "an illegal instruction was encountered"),
    716: ("cudaErrorMisalignedAddress", "misaligned address"),
    717: ("cudaErrorInvalidAddressSpace", "operation not supported on global/shared address space"),
    718: ("cudaErrorInvalidPc", "invalid program counter"),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
}
# ONNX Runtime writes `CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; …`, libraries below it also
# `CUDA error 700` and `CUDA error: an illegal memory access was encountered`. Names stand in messages of extensions.
_POISON = "|".join([
    rf"CUDA (?:failure|error) (?:{'|'.join(map(str, POISON))})\b",
    *(name for name, _ in POISON.values()),
    *(rf"CUDA (?:failure|error): {re.escape(text)}" for _, text in POISON.values()),
])  # fmt: skip


def is_poison(text: str) -> bool:
    """Whether an error's text, of a run on a GPU, names one of these."""
    return bool(re.search(_POISON, text, re.IGNORECASE))  # compiled when it is needed: that takes a millisecond


class Context:
    """What the instances of this process have in common: whether a GPU is lost to it. Owned by none of them.

    ONNX Runtime's destructors end the process where CUDA fails in them. So what lies on a lost GPU is kept, whose
    memory nobody can use anyway, and the server ends without destructors.
    """

    def __init__(self) -> None:
        self.lost = False
        self._kept: list[Any] = []

    def keep(self, *things: Any) -> None:
        """Hold them until the process ends."""
        self._kept += things
