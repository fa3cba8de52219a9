"""Memory comes from CUDA's own library, goes back to it, and its errors are told apart."""

import gc

import numpy as np
import pytest
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.runtime import Placement
from penstock_runtimes.onnx import memory
from penstock_runtimes.onnx.memory import KEPT_BLOCKS, CudaMemory, HostMemory, Memory, room

from .fakes_cuda import FakeCudart


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


def cuda(fake: FakeCudart) -> CudaMemory:
    def load(name: str) -> object:
        assert name == "libcudart.so.13"
        return fake

    return CudaMemory(0, load, "13.0")


@pytest.mark.parametrize(
    ("size", "block"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20), ((1 << 20) + 1, 1 << 21)]
)
def test_a_block_is_a_power_of_two(size: int, block: int) -> None:
    assert room(size) == block


@pytest.mark.parametrize("kind", ["cuda", "host"])
def test_what_is_copied_in_comes_out_again_once_it_was_waited_for(kind: str, cudart: FakeCudart) -> None:
    made: Memory = cuda(cudart) if kind == "cuda" else HostMemory()
    address = made.allocate(64)
    sent = np.arange(16, dtype=np.float32)
    got = made.pinned(64)
    made.copy_in(address, sent)
    made.copy_out(got, address)
    made.wait()
    assert got.view(np.float32).tolist() == sent.tolist()
    made.free(address)
    made.close()


def test_a_stream_of_its_own_lasts_as_long_as_the_memory(cudart: FakeCudart) -> None:
    first, second = cuda(cudart), cuda(cudart)
    assert cudart.streams == {first.stream, second.stream}
    first.close()
    assert cudart.streams == {second.stream}
    del second  # never closed: of a load that failed
    gc.collect()
    assert cudart.streams == set()


def test_pinned_memory_returns_with_the_last_view_and_is_used_again(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    whole = made.pinned(8192)
    view = whole.view(np.float32).reshape(2, 1024)[1]
    where = whole.ctypes.data
    del whole
    assert made.pinned(8192).ctypes.data != where
    view[:] = 1  # is there still
    del view
    assert where in {made.pinned(8000).ctypes.data, *(block.ctypes.data for block in [made.pinned(8192)] * 2)}
    assert cudart.calls.count("cudaHostAlloc") == 2
    made.close()


def test_no_more_than_a_few_idle_blocks_of_a_size_are_kept(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    blocks = [made.pinned(100) for _ in range(KEPT_BLOCKS + 3)]
    del blocks
    assert len(cudart.memory) == KEPT_BLOCKS
    made.close()
    assert cudart.memory == {}


def test_all_is_freed_when_it_is_closed_but_what_is_in_use_and_that_follows(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    made.allocate(10)
    made.pinned(10)
    used = made.pinned(10)
    made.close()
    assert set(cudart.memory) == {used.ctypes.data}
    del used
    assert cudart.memory == {}


def test_nothing_is_copied_of_nothing(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    made.copy_in(made.allocate(4096), np.zeros((0, 4), np.float32))
    assert "cudaMemcpyAsync" not in cudart.calls
    made.close()


def test_an_ordinary_error_of_cuda_is_internal(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    cudart.failing["cudaMalloc"] = 2
    with pytest.raises(ServingError) as caught:
        made.allocate(10)
    assert (type(caught.value), caught.value.kind, caught.value.message) == (
        ServingError,
        Kind.INTERNAL,
        "CUDA failure 2: out of memory (cudaMalloc on GPU 0)",
    )
    made.close()


def test_an_error_that_the_context_does_not_survive_is_a_lost_device(cudart: FakeCudart) -> None:
    made = cuda(cudart)
    cudart.failing["cudaStreamSynchronize"] = 700
    with pytest.raises(DeviceLostError) as caught:
        made.wait()
    assert caught.value.message == (
        "cuda:0 is lost to this process: CUDA failure 700: an illegal memory access (cudaStreamSynchronize on GPU 0)"
    )
    made.close()


def test_an_instance_on_the_cpu_has_none() -> None:
    assert memory.on(Placement("cpu")) is None
