"""Memory of a device, and memory of the host that it copies from and to without a detour: CUDA's, and a stand-in.

CUDA is called by its runtime library itself, which ONNX Runtime has loaded already: its Python interface allocates no
pinned memory, and copies on no stream but its own.
"""

import contextlib
import ctypes
import logging
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.runtime import Placement
from penstock.tensor import Array

from penstock_runtimes.onnx import faults, providers
from penstock_runtimes.onnx.providers import Library

logger = logging.getLogger(__name__)

LEAST_BYTES = 4096  # of a block
KEPT_BLOCKS = 8  # of pinned memory, of one size, that wait to be used again

_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the default stream, as ONNX Runtime's own
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind


class Memory(Protocol):
    """What an instance has on its device. Its calls never overlap, but pinned memory may be let go of on any thread."""

    device: str  # as ONNX Runtime's bindings name it, "cpu" or "cuda"
    device_id: int
    stream: int  # the address of the stream that copies and computes; 0 for none

    def allocate(self, size_bytes: int) -> int:
        """The address of memory on the device. Raises ServingError."""

    def free(self, address: int) -> None: ...

    def pinned(self, size_bytes: int) -> Array:
        """Bytes of the host, of any content, that are used again once the last view of them is gone."""

    def copy_in(self, address: int, source: Array) -> None:
        """Begin to copy a contiguous array to the device; it must live until `wait` returns."""

    def copy_out(self, target: Array, address: int) -> None:
        """Begin to copy from the device into a contiguous array."""

    def wait(self) -> None:
        """Until all that was begun on the stream is done. Raises what failed meanwhile."""

    def close(self) -> None:
        """Let go of all but pinned memory that is still in use. Call it once nothing computes on the stream."""


def on(place: Placement) -> Memory | None:
    """That of a new instance on a GPU; None on the CPU, or with a warning where CUDA does not give it."""
    if place.device == "cpu" or not providers.built_for():
        return None
    providers.prepare()
    try:
        return CudaMemory(place.device_id)
    except (OSError, ServingError) as error:
        logger.warning("tensors of an instance on %s go through ONNX Runtime's own copies: %s", place, error)
        return None


def room(size_bytes: int) -> int:
    """The size of the block that holds so many bytes: a power of two, so that blocks fit each other's contents."""
    return max(LEAST_BYTES, 1 << (size_bytes - 1).bit_length()) if size_bytes else LEAST_BYTES


class Blocks:
    """Host memory in blocks that one thread takes, and that return by themselves on any.

    Without a lock: a block may return in the middle of anything that allocates an object, on the very thread that would
    hold it. What is done to a deque is one step each.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate = allocate
        self._free = free
        self._idle: defaultdict[int, deque[int]] = defaultdict(deque)  # addresses by size
        self._closed = threading.Event()

    def take(self, size_bytes: int) -> Array:
        size = room(size_bytes)
        idle = self._idle[size]
        address = idle.pop() if idle else self._allocate(size)
        block = (ctypes.c_uint8 * size).from_address(address)
        # Every view of the array keeps `block`.
        weakref.finalize(block, self._give_back, address, size).atexit = False
        return np.frombuffer(memoryview(block), np.uint8)[:size_bytes]

    def _give_back(self, address: int, size: int) -> None:
        if self._closed.is_set() or len(self._idle[size]) >= KEPT_BLOCKS:
            self._free(address)
            return
        self._idle[size].append(address)
        if self._closed.is_set():  # meanwhile
            self._free_idle()

    def close(self) -> None:
        """Free what is idle; what is in use follows as it is let go of."""
        self._closed.set()
        self._free_idle()

    def _free_idle(self) -> None:
        for addresses in list(self._idle.values()):
            with contextlib.suppress(IndexError):
                while True:
                    self._free(addresses.pop())


class CudaMemory:
    """A GPU's memory, and a stream of its own. Raises OSError without CUDA's library, ServingError where that fails."""

    device = "cuda"

    def __init__(self, device_id: int, library: Library = ctypes.CDLL, cuda_version: str | None = None) -> None:
        version = providers.built_for() if cuda_version is None else cuda_version
        cuda: Any = library(f"libcudart.so.{version.partition('.')[0]}")
        self._cuda = cuda
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self.device_id = device_id
        self._buffers: set[int] = set()
        self._blocks = Blocks(self._allocate_host, self._free_host)
        stream = ctypes.c_void_p()
        self._call("cudaSetDevice", device_id)
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = stream.value or 0

    def allocate(self, size_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaSetDevice", self.device_id)
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        assert address.value
        self._buffers.add(address.value)
        return address.value

    def free(self, address: int) -> None:
        self._buffers.discard(address)
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, size_bytes: int) -> Array:
        return self._blocks.take(size_bytes)

    def copy_in(self, address: int, source: Array) -> None:
        self._copy(address, source.ctypes.data, source.nbytes, _TO_DEVICE)

    def copy_out(self, target: Array, address: int) -> None:
        self._copy(target.ctypes.data, address, target.nbytes, _TO_HOST)

    def _copy(self, to: int, source: int, size_bytes: int, kind: int) -> None:
        if size_bytes:
            self._call(
                "cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes), kind,
                ctypes.c_void_p(self.stream),
            )  # fmt: skip

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def close(self) -> None:
        self._blocks.close()
        for address in list(self._buffers):
            self.free(address)
        stream, self.stream = self.stream, 0
        if stream:
            self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def __del__(self) -> None:
        """Of a load that failed: nothing but the stream has been made."""
        if getattr(self, "stream", 0):
            self._cuda.cudaStreamDestroy(ctypes.c_void_p(self.stream))

    def _allocate_host(self, size_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaSetDevice", self.device_id)
        self._call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(size_bytes), 0)
        assert address.value
        return address.value

    def _free_host(self, address: int) -> None:
        """Without a complaint: it runs where a view of the memory is let go of, which cannot fail."""
        self._cuda.cudaFreeHost(ctypes.c_void_p(address))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = (self._cuda.cudaGetErrorString(status) or b"unknown error").decode()
            message = f"CUDA failure {status}: {text} ({name} on GPU {self.device_id})"
            if status in faults.POISON:
                raise DeviceLostError(f"cuda:{self.device_id} is lost to this process: {message}")
            raise ServingError(Kind.INTERNAL, message)


class HostMemory:
    """The host's own, for sessions on the CPU: what a binding does can be looked at without a GPU."""

    device = "cpu"
    device_id = 0
    stream = 0

    def __init__(self) -> None:
        self._buffers: dict[int, Array] = {}
        self._pinned: dict[int, Array] = {}
        self._blocks = Blocks(self._allocate_pinned, self._pinned.__delitem__)

    @property
    def in_use(self) -> tuple[int, int]:
        """How many buffers and blocks are allocated."""
        return len(self._buffers), len(self._pinned)

    def allocate(self, size_bytes: int) -> int:
        return _keep(self._buffers, size_bytes)

    def free(self, address: int) -> None:
        del self._buffers[address]

    def pinned(self, size_bytes: int) -> Array:
        return self._blocks.take(size_bytes)

    def _allocate_pinned(self, size_bytes: int) -> int:
        return _keep(self._pinned, size_bytes)

    def copy_in(self, address: int, source: Array) -> None:
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def copy_out(self, target: Array, address: int) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def wait(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        self._blocks.close()
        self._buffers.clear()


def _keep(arrays: dict[int, Array], size_bytes: int) -> int:
    array = np.full(size_bytes, 0xA5, np.uint8)  # what a device's memory holds that nobody wrote
    arrays[array.ctypes.data] = array
    return array.ctypes.data
