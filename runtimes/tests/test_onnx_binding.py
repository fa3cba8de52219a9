"""Tensors that lie where the device reads and writes them give what arrays give, on the CPU as on any device."""

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from penstock import model_config, pb
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.messages import InferResponse
from penstock.runtime import Cancelled, ModelFiles, Placement
from penstock.tensor import DATATYPES, Array
from penstock_runtimes.onnx import OnnxRuntime, binding, session
from penstock_runtimes.onnx.binding import Binding, graph_sizes
from penstock_runtimes.onnx.instance import OnnxInstance
from penstock_runtimes.onnx.memory import CudaMemory, HostMemory, Memory
from penstock_runtimes.onnx.parameters import Parameters

from .fakes_cuda import FakeCudart
from .test_onnx_instance import arrays, load, request, run

PLAIN = [datatype for datatype in DATATYPES.values() if datatype.name != "BYTES"]
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}  # fmt: skip
W = np.array([[1, 2], [3, 4], [5, 6]], np.float32)


def save(path: Path, nodes: Sequence[Any], inputs: dict[str, Any], outputs: dict[str, Any], **weights: Any) -> Path:
    """A model file. Inputs and outputs are (element type, shape) by name."""
    graph = helper.make_graph(
        nodes,
        "m",
        [helper.make_tensor_value_info(name, *given) for name, given in inputs.items()],
        [helper.make_tensor_value_info(name, *given) for name, given in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path / "m.onnx")
    return path / "m.onnx"


def identity(path: Path, kind: int, shape: Sequence[int | str]) -> Path:
    nodes = [helper.make_node("Identity", ["X"], ["Y"])]
    return save(path, nodes, {"X": (kind, shape)}, {"Y": (kind, shape)})


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """Y = X · W, FP32 [batch,3] to [batch,2]; S its row sums."""
    return save(
        tmp_path,
        [helper.make_node("MatMul", ["X", "W"], ["Y"]), helper.make_node("ReduceSum", ["Y", "axis"], ["S"])],
        {"X": (TensorProto.FLOAT, ["batch", 3])},
        {"Y": (TensorProto.FLOAT, ["batch", 2]), "S": (TensorProto.FLOAT, ["batch", 1])},
        W=W,
        axis=np.array([1], np.int64),
    )


def bound(path: Path, memory: Memory, text: str = "") -> OnnxInstance:
    """An instance whose tensors lie in this memory, opened as a server opens it."""
    files = ModelFiles("m", 1, path.parent, path)
    config = pb.ModelConfig()
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    config = model_config.identify(config, "m", ["model.onnx"])
    runtime, place = OnnxRuntime({}, memory_on=lambda _: memory), Placement("cpu")
    config = model_config.normalise(runtime.complete(files, config, place))
    instance = runtime.open(files, config, place, None)
    assert isinstance(instance, OnnxInstance)
    return instance


def some(kind: str, shape: tuple[int, ...]) -> Array:
    random = np.random.default_rng(7)
    return random.integers(0, 2 if kind == "BOOL" else 100, shape).astype(DATATYPES[kind].dtype)


@pytest.mark.parametrize("kind", [datatype.name for datatype in PLAIN])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0, 3)], ids=str)
def test_every_datatype_and_rank_comes_back_as_it_went(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = identity(tmp_path, ONNX_TYPES.get(kind) or getattr(TensorProto, kind), shape)
    sent = some(kind, shape)
    for instance in (bound(path, HostMemory()), load(path)):
        got = run(instance, X=sent)["Y"]
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert got.tobytes() == sent.tobytes()


def test_requests_of_a_batch_are_assembled_where_the_device_reads_them(product: Path) -> None:
    memory = HostMemory()
    instance, plain = bound(product, memory), load(product)
    batch = [request({"X": np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)}) for rows in (1, 3, 2)]
    for mine, other in zip(instance.execute(batch), plain.execute(batch), strict=True):
        assert {name: array.tolist() for name, array in arrays(mine).items()} == {
            name: array.tolist() for name, array in arrays(other).items()
        }
    assert memory.in_use[0] == 1  # one buffer for one input; outputs are ONNX Runtime's own


def test_the_outputs_that_are_asked_for_come_in_their_order(product: Path) -> None:
    instance = bound(product, HostMemory())
    [answer] = instance.execute([request({"X": W.T}, ["S", "Y"])])
    assert isinstance(answer, InferResponse)
    assert [tensor.name for tensor in answer.outputs] == ["S", "Y"]
    assert arrays(answer)["S"].tolist() == (W.T @ W).sum(1, keepdims=True).tolist()


def test_a_run_that_nobody_wants_ends_and_the_next_is_not_touched(product: Path) -> None:
    instance, unwanted = bound(product, HostMemory()), Cancelled()
    unwanted.set(ServingError(Kind.CANCELLED, "gone"))
    with pytest.raises(ServingError, match="terminate"):
        instance.execute([request({"X": W.T})], unwanted)
    [answer] = instance.execute([request({"X": W.T})], Cancelled())
    assert arrays(answer)["Y"].tolist() == (W.T @ W).tolist()


def test_answers_stay_as_they_are_while_later_ones_are_computed(product: Path) -> None:
    instance = bound(product, HostMemory())
    answers: list[tuple[float, Array]] = []
    for number in range(20):
        x = np.full((1, 3), number, np.float32)
        answers.append((number, run(instance, X=x)["Y"]))
    assert all(array.tolist() == [[9 * number, 12 * number]] for number, array in answers)


def test_memory_is_used_again_and_all_of_it_freed_with_the_instance(product: Path) -> None:
    memory = HostMemory()
    instance = bound(product, memory)
    for rows in (1, 50, 2, 1000, 3):
        run(instance, X=np.zeros((rows, 3), np.float32))
    buffers, blocks = memory.in_use
    assert buffers == 1
    assert blocks <= 4  # two outputs, in two sizes
    held = run(instance, X=np.zeros((1, 3), np.float32))
    instance.close()
    assert memory.in_use == (0, 2)
    del held
    assert memory.in_use == (0, 0)


def test_arrays_of_any_layout_are_taken(product: Path) -> None:
    instance = bound(product, HostMemory())
    for x in (np.asfortranarray(W.T), np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]):
        assert run(instance, X=x)["Y"].tolist() == (x @ W).tolist()


def test_reshapes_of_the_configuration_hold(tmp_path: Path) -> None:
    path = identity(tmp_path, TensorProto.FLOAT, ("batch", 2, 3))
    text = """max_batch_size: 4
        input { name: "X" data_type: TYPE_FP32 dims: [ 6 ] reshape { shape: [ 2, 3 ] } }
        output { name: "Y" data_type: TYPE_FP32 dims: [ 6 ] reshape { shape: [ 2, 3 ] } }"""
    batch = [request({"X": np.arange(6 * rows, dtype=np.float32).reshape(rows, 6)}) for rows in (1, 2)]
    for answer, sent in zip(bound(path, HostMemory(), text).execute(batch), batch, strict=True):
        assert arrays(answer)["Y"].tolist() == sent.inputs["X"].array.tolist()


def test_an_optional_input_may_be_absent_after_it_was_there(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        [helper.make_node("Add", ["X", "B"], ["Y"])],
        {"X": (TensorProto.FLOAT, [1]), "B": (TensorProto.FLOAT, [1])},
        {"Y": (TensorProto.FLOAT, [1])},
        B=np.array([10], np.float32),
    )
    text = """input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
        input { name: "B" data_type: TYPE_FP32 dims: [ 1 ] optional: true }
        output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }"""
    instance = bound(path, HostMemory(), text)
    one = np.array([1], np.float32)
    assert [run(instance, X=one, B=one)["Y"].tolist(), run(instance, X=one)["Y"].tolist()] == [[2], [11]]


def test_strings_cannot_lie_on_a_device(tmp_path: Path) -> None:
    path = identity(tmp_path, TensorProto.STRING, ("rows",))
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert not binding.fits(plain)
    memory = HostMemory()
    instance = bound(path, memory)
    assert run(instance, X=np.array([b"a", b"b"], object))["Y"].tolist() == [b"a", b"b"]
    instance.close()
    assert memory.in_use == (0, 0)


class Reads:
    """Stands for a session on a GPU that reads its inputs in these memories."""

    def __init__(self, **memories: str) -> None:
        self._memories = memories

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self._memories]

    def get_input_memory_infos(self) -> list[Any]:
        return [SimpleNamespace(name=memory) for memory in self._memories.values()]


def test_inputs_that_a_gpu_session_reads_on_the_host_are_known() -> None:
    assert binding.on_host(Reads(X="Cuda", S="Cpu", T="CudaPinned")) == {"S", "T"}


def test_inputs_that_are_read_on_the_host_are_not_copied(product: Path) -> None:
    memory = HostMemory()
    made = Binding(onnxruntime.InferenceSession(product, providers=["CPUExecutionProvider"]), memory, on_host={"X"})
    for _ in range(2):
        assert made.run(["Y"], {"X": W.T}, options())[0].tolist() == (W.T @ W).tolist()
    assert memory.in_use[0] == 0


def test_a_run_that_fails_leaves_the_instance_as_it_was(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        [helper.make_node("Gather", ["W", "X"], ["Y"])],
        {"X": (TensorProto.INT64, ["n"])},
        {"Y": (TensorProto.FLOAT, ["n", 2])},
        W=W,
    )
    instance = bound(path, HostMemory())
    with pytest.raises(ServingError) as caught:
        run(instance, X=np.array([7]))
    assert caught.value.kind is Kind.INVALID
    assert run(instance, X=np.array([2]))["Y"].tolist() == [[5, 6]]


def test_the_session_goes_with_the_instance(product: Path) -> None:
    instance = bound(product, HostMemory())
    held = weakref.ref(instance._session._session)
    run(instance, X=W.T)
    instance.close()
    gc.collect()
    assert held() is None


class OnTheCpu(CudaMemory):
    """CUDA's, for a session on the CPU: the fake's device memory is the host's."""

    device = "cpu"


def test_all_that_an_instance_takes_from_cuda_it_gives_back(product: Path) -> None:
    cudart = FakeCudart(eager=True)
    made = OnTheCpu(0, lambda name: cudart, "13.0")
    instance = bound(product, made)
    for rows in (1, 2000, 3):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        assert run(instance, X=x)["Y"].tolist() == (x @ W).tolist()
    batch = [request({"X": np.ones((rows, 3), np.float32)}) for rows in (1, 2)]
    assert [arrays(answer)["Y"].shape for answer in instance.execute(batch)] == [(1, 2), (2, 2)]
    assert (len(cudart.streams), cudart.calls.count("cudaMalloc")) == (1, 2)
    instance.close()
    gc.collect()
    assert (cudart.memory, cudart.streams) == ({}, set())


def test_an_error_of_cuda_between_runs_is_known_as_a_lost_device(product: Path) -> None:
    cudart = FakeCudart(eager=True)
    instance = bound(product, OnTheCpu(0, lambda name: cudart, "13.0"))
    run(instance, X=W.T)
    cudart.failing = dict.fromkeys(("cudaMemcpyAsync", "cudaStreamSynchronize"), 700)
    with pytest.raises(DeviceLostError):
        run(instance, X=W.T)


def test_a_copy_that_cannot_be_begun_fails_its_batch_alone(product: Path) -> None:
    cudart = FakeCudart(eager=True)
    instance = bound(product, OnTheCpu(0, lambda name: cudart, "13.0"))
    cudart.failing = {"cudaMalloc": 2}
    with pytest.raises(ServingError, match="out of memory") as caught:
        run(instance, X=W.T)
    assert type(caught.value) is ServingError
    cudart.failing = {}
    assert run(instance, X=W.T)["Y"].tolist() == (W.T @ W).tolist()


# -- graphs


def options() -> Any:
    make = session.run_options(Parameters("m", {}), "cpu", bound=True)
    assert make is not None
    return make()


def graphed(path: Path, sizes: Sequence[int], batched: bool = True) -> tuple[Binding, HostMemory]:
    memory = HostMemory()
    made = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return Binding(made, memory, sizes, batched), memory


def test_a_batch_runs_on_the_smallest_graph_that_holds_it_and_gets_its_own_rows_alone(product: Path) -> None:
    made, memory = graphed(product, (2, 4))
    for rows, buffers in ((3, 3), (1, 6), (4, 6), (2, 6), (5, 7), (3, 7)):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3) + rows
        y, s = made.run(["Y", "S"], {"X": x}, options())
        assert y.tolist() == (x @ W).tolist()
        assert s.tolist() == (x @ W).sum(1, keepdims=True).tolist()
        # Of each graph, X, Y and S; of the batch that is too large for one, X.
        assert memory.in_use[0] == buffers


def test_a_model_without_a_batch_axis_has_one_graph(tmp_path: Path) -> None:
    made, _ = graphed(identity(tmp_path, TensorProto.FLOAT, (2, 3)), (1,), batched=False)
    for number in range(3):
        x = np.full((2, 3), number, np.float32)
        assert made.run(["Y"], {"X": x}, options())[0].tolist() == x.tolist()


def test_a_run_on_a_graph_heeds_its_options(product: Path) -> None:
    made, _ = graphed(product, (2,))
    made.run(["Y"], {"X": W.T}, options())
    ended = options()
    ended.terminate = True
    with pytest.raises(Exception, match="terminate"):
        made.run(["Y"], {"X": W.T}, ended)
    assert made.run(["Y"], {"X": W.T}, options())[0].tolist() == (W.T @ W).tolist()


def test_a_graph_reads_and_writes_where_it_did_when_it_was_captured(product: Path) -> None:
    made, memory = graphed(product, (4,))
    made.run(["Y"], {"X": W.T}, options())
    graph = made._graphs[4]
    before = dict(graph.inputs), dict(graph.outputs)
    for _ in range(3):
        made.run(["S"], {"X": W.T}, options())
    assert (made._graphs[4].inputs, made._graphs[4].outputs) == before
    assert memory.in_use[0] == 3


def configured(text: str) -> pb.ModelConfig:
    config = pb.ModelConfig(name="m")
    text_format.Parse(text, config, descriptor_pool=pb.POOL)
    return config


X3 = 'input { name: "X" data_type: TYPE_FP32 dims: [ 3 ] } '
SIZES = 'parameters { key: "cuda_graph_batch_sizes" value { string_value: "%s" } } '


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (X3, (1,)),
        (X3 + "max_batch_size: 8", (8,)),
        (X3 + "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 8, 4 ] }", (4, 8)),
        (X3 + "max_batch_size: 8 " + SIZES % "8,1, 4", (1, 4, 8)),
    ],
)
def test_graphs_are_captured_for_the_listed_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(configured(text), {}) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'input { name: "X" data_type: TYPE_FP32 dims: [ -1, 3 ] }',
            "model 'm': a CUDA graph has fixed shapes, and input 'X' has the shape [-1,3]; state its dims in the "
            "configuration, or leave cuda_graph out",
        ),
        (
            X3 + 'max_batch_size: 8 sequence_batching { state { input_name: "S" dims: [ 2, -1 ] } }',
            "model 'm': a CUDA graph has fixed shapes, and input 'S' has the shape [2,-1]; state its dims in the "
            "configuration, or leave cuda_graph out",
        ),
        (
            X3 + "max_batch_size: 8 " + SIZES % "4,16",
            "model 'm': parameter 'cuda_graph_batch_sizes' expects batch sizes from 1 to 8, such as 1,4, got '4,16'",
        ),
        (
            X3 + "max_batch_size: 8 " + SIZES % "all",
            "model 'm': parameter 'cuda_graph_batch_sizes' expects batch sizes from 1 to 8, such as 1,4, got 'all'",
        ),
    ],
)
def test_what_cannot_be_a_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(ServingError) as caught:
        graph_sizes(configured(text), {})
    assert (caught.value.kind, caught.value.message) == (Kind.INVALID, message)


# -- lost devices


class Failing:
    """A session that fails as one on a GPU does."""

    def __init__(self, session: Any, text: str) -> None:
        self._session = session
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *arguments: Any) -> Any:
        raise RuntimeError(self._text)


def on_gpu(path: Path, text: str) -> tuple[OnnxRuntime, Callable[[], OnnxInstance]]:
    """A runtime, and what opens instances on a GPU whose runs fail with this text."""

    def build(files: ModelFiles, config: pb.ModelConfig, place: Placement, defaults: Any, *, stream: int) -> Any:
        made = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return Failing(made, text), str(place)

    files = ModelFiles("m", 1, path.parent, path)
    runtime = OnnxRuntime({}, build, lambda _: None)
    config = model_config.identify(pb.ModelConfig(), "m", ["model.onnx"])
    config = model_config.normalise(runtime.complete(files, config, Placement("cuda")))

    def open_() -> OnnxInstance:
        instance = runtime.open(files, config, Placement("cuda"), None)
        assert isinstance(instance, OnnxInstance)
        return instance

    return runtime, open_


def test_a_run_that_costs_the_process_its_gpu_says_so_and_what_lies_there_is_not_released(product: Path) -> None:
    runtime, open_ = on_gpu(product, "CUDA failure 700: an illegal memory access was encountered ; GPU=0")
    instances = [open_(), open_()]
    sessions = [weakref.ref(instance._session) for instance in instances]
    with pytest.raises(DeviceLostError):
        run(instances[0], X=W.T)
    for instance in instances:
        instance.close()
    gc.collect()
    assert all(session() is not None for session in sessions)  # destructors would end the process
    assert runtime._context.lost


def test_a_run_that_fails_for_want_of_memory_costs_nothing_else(product: Path) -> None:
    runtime, open_ = on_gpu(product, "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0")
    with pytest.raises(ServingError) as caught:
        run(open_(), X=W.T)
    assert (type(caught.value), caught.value.kind) == (ServingError, Kind.INTERNAL)
    assert not runtime._context.lost


def test_an_answer_is_an_inference_response(product: Path) -> None:
    [answer] = bound(product, HostMemory()).execute([request({"X": W.T}, id="7")])
    assert isinstance(answer, InferResponse)
    assert answer.id == "7"
