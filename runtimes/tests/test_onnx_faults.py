"""Errors that cost a process its GPU are told from those that cost a request its answer."""

import pytest
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock_runtimes.onnx.faults import POISON, is_poison
from penstock_runtimes.onnx.session import translate

RUN = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gather node. Name:'g' Status Message: "
)
SEEN = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:129 std::conditional_t<THRW, void, Status> "
    "CudaCall(ERRTYPE, const char*, const char*, ERRTYPE, const char*, const char*, int) [with ERRTYPE = cudaError] "
    "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h ; file=f.cc ; line=390 ; expr=e;"
)


@pytest.mark.parametrize("number", POISON)
def test_each_error_is_known_by_number_by_name_and_by_text(number: int) -> None:
    name, text = POISON[number]
    assert is_poison(f"CUDA failure {number}: whatever it says")
    assert is_poison(f"CUDA error {number}")
    assert is_poison(f"kernel launch: {name}")
    assert is_poison(f"RuntimeError: CUDA error: {text}")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 2: out of memory ; GPU=0",
        "CUDA failure 7001: an invented error",
        "CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED",
        "indices element out of data bounds, idx=700 must be within [-4,3]",
        "the text 'an illegal memory access was encountered' is no number",
        "",
    ],
)
def test_other_errors_are_not(text: str) -> None:
    assert not is_poison(text)


def test_a_run_on_a_gpu_that_fails_so_has_lost_it() -> None:
    error = translate(RuntimeError(RUN + SEEN), device="cuda:0")
    assert isinstance(error, DeviceLostError)
    assert error.message.startswith("cuda:0 is lost to this process: [ONNXRuntimeError] : 1 : FAIL : ")


def test_the_same_words_of_a_run_on_the_cpu_are_an_ordinary_failure() -> None:
    error = translate(RuntimeError(RUN + SEEN), device="cpu")
    assert type(error) is ServingError
    assert error.kind is Kind.INTERNAL
