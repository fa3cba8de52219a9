"""CUDA's runtime library over the host's memory: what it was asked for, in order, and errors on demand."""

import ctypes
from typing import Any

import numpy as np
from penstock.tensor import Array


class FakeCudart:
    """Copies are made when the stream is waited for, as late as a real device may make them.

    With `eager` they are made at once, for sessions that compute on no stream.
    """

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}  # the status of each call that fails
        self.memory: dict[int, Array] = {}  # by address, the device's and the pinned
        self.streams: set[int] = set()
        self.pending: list[tuple[int, int, int]] = []
        # Functions of a library may be told their result's type; methods may not.
        self.cudaGetErrorString = lambda status: {2: b"out of memory", 700: b"an illegal memory access"}.get(status)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if status := self.failing.get(name, 0):
                return status
            getattr(self, f"_{name}")(*arguments)
            return 0

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def _cudaSetDevice(self, number: int) -> None:  # noqa: N802 - the real ones' names
        """There is one."""

    def _cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> None:  # noqa: N802
        stream._obj.value = 4096 + len(self.streams)
        self.streams.add(stream._obj.value)

    def _cudaStreamDestroy(self, stream: Any) -> None:  # noqa: N802
        self.streams.remove(stream.value)

    def _cudaMalloc(self, address: Any, size: Any) -> None:  # noqa: N802
        array = np.zeros(size.value, np.uint8)
        self.memory[array.ctypes.data] = array
        address._obj.value = array.ctypes.data

    def _cudaHostAlloc(self, address: Any, size: Any, flags: int) -> None:  # noqa: N802
        self._cudaMalloc(address, size)

    def _cudaFree(self, address: Any) -> None:  # noqa: N802
        del self.memory[address.value]

    _cudaFreeHost = _cudaFree  # noqa: N815

    def _cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: int, stream: Any) -> None:  # noqa: N802
        assert stream.value in self.streams
        self.pending.append((to.value, source.value, size.value))
        if self.eager:
            self._cudaStreamSynchronize(stream)

    def _cudaStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        for to, source, size in self.pending:
            ctypes.memmove(to, source, size)
        self.pending.clear()
