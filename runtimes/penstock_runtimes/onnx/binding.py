"""A session whose tensors lie on its device: one copy in, one copy out, on the instance's own stream; CUDA graphs."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from msgspec import Struct, field
from penstock import pb, tensor
from penstock.errors import Kind, ServingError
from penstock.tensor import BY_ONNX_NAME, BYTES, Array, Datatype

from penstock_runtimes.onnx.memory import Memory, room
from penstock_runtimes.onnx.parameters import Parameters

SIZES = "cuda_graph_batch_sizes"
_GRAPH = "gpu_graph_id"  # run option: which graph to capture or replay
_NO_GRAPH = "-1"
# Run options of bound tensors. ONNX Runtime looks for the graph with every run, and not to find it takes it 40 us.
# It need not wait for the device: `Memory.wait` does, once the copies out are under way.
RUN_OPTIONS = {_GRAPH: _NO_GRAPH, "disable_synchronize_execution_providers": "1"}

# TensorProto.DataType, by which bindings name an element's type.
_ELEMENT_TYPES = {
    "FP32": 1, "UINT8": 2, "INT8": 3, "UINT16": 4, "INT16": 5, "INT32": 6, "INT64": 7, "BOOL": 9, "FP16": 10,
    "FP64": 11, "UINT32": 12, "UINT64": 13, "BF16": 16,
}  # fmt: skip


def fits(session: Any) -> bool:
    """Whether all that a session takes and gives can lie on a device: plain tensors, and no strings."""
    nodes = [*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers()]
    return all(BY_ONNX_NAME.get(node.type, BYTES) is not BYTES for node in nodes)


def on_host(session: Any) -> frozenset[str]:
    """The inputs that a session on a GPU reads on the host, such as a shape: copied there, they would only come back.

    And they would come back on another stream than they went, before they are there.
    """
    infos = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
    return frozenset(node.name for node, info in infos if info.name.lower() != "cuda")


def graph_sizes(config: pb.ModelConfig, defaults: Mapping[str, str]) -> tuple[int, ...]:
    """The batch sizes that get a CUDA graph of their own, ascending; (1,) for a model without a batch axis.

    The parameter `cuda_graph_batch_sizes` lists them, such as "1,4,16"; without it, the preferred batch sizes. Raises
    ServingError(INVALID) for a list of anything else, and where an input's shape is open, which no graph can have.
    """
    parameters = Parameters.of(config, defaults)
    given = [(entry.name, entry.dims) for entry in config.input]
    given += [(state.input_name, state.dims) for state in config.sequence_batching.state]
    for name, dims in given:
        if any(dim < 0 for dim in dims):
            raise ServingError(
                Kind.INVALID,
                f"model '{config.name}': a CUDA graph has fixed shapes, and input '{name}' has the shape "
                f"{tensor.show(dims)}; state its dims in the configuration, or leave cuda_graph out",
            )
    if not config.max_batch_size:
        return (1,)
    listed = parameters.text(SIZES)
    if not listed:
        return tuple(sorted({*config.dynamic_batching.preferred_batch_size} or {config.max_batch_size}))
    try:
        sizes = sorted({int(size) for size in listed.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1 or sizes[-1] > config.max_batch_size:
        raise parameters.refusal(SIZES, f"batch sizes from 1 to {config.max_batch_size}, such as 1,4")
    return tuple(sizes)


class _Graph(Struct):
    """What a captured graph knows by its address: it reads and writes where it did when it was captured."""

    bound: Any  # IOBinding
    inputs: dict[str, int]
    outputs: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)  # address and shape


class Binding:
    """Takes the place of its session in an instance, whose calls never overlap.

    A batch of as many rows as `sizes` names, or fewer, runs on the smallest CUDA graph that holds it; its further rows
    hold what earlier batches left there, and nobody sees what comes of them.
    """

    def __init__(
        self,
        session: Any,
        memory: Memory,
        sizes: Sequence[int] = (),
        batched: bool = True,
        on_host: Collection[str] = (),
    ) -> None:
        """`on_host` names the inputs that are read there; no graph can have any."""
        self._on_host = on_host
        self._session = session
        self._memory = memory
        self._sizes = sizes
        self._batched = batched
        nodes = [*session.get_inputs(), *session.get_outputs(), *session.get_overridable_initializers()]
        self._types: dict[str, Datatype] = {node.name: BY_ONNX_NAME[node.type] for node in nodes}
        self._inputs = {node.name for node in session.get_inputs()}
        self._outputs = [node.name for node in session.get_outputs()]
        self._bound = session.io_binding()
        self._buffers: dict[str, tuple[int, int]] = {}  # of each input: address, bytes
        self._graphs: dict[int, _Graph] = {}

    def join(self, arrays: Sequence[Array]) -> Array:
        """As `tensor.join`, into memory that the device copies from."""
        first = arrays[0]
        shape = (sum(array.shape[0] for array in arrays), *first.shape[1:])
        size_bytes = tensor.count(shape) * first.itemsize
        return tensor.join(arrays, self._memory.pinned(size_bytes).view(first.dtype).reshape(shape))

    def run(self, names: Sequence[str], feed: Mapping[str, Array], options: Any) -> list[Array]:
        """As an InferenceSession's; arrays of BF16 are `ml_dtypes.bfloat16`.

        `options` hold RUN_OPTIONS; a graph's number takes the place of the one that is there.
        """
        feed = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in feed.items()}
        rows = next(iter(feed.values())).shape[0] if self._batched and feed else 1
        size = next((size for size in self._sizes if rows <= size), 0)
        try:
            if size and rows and feed.keys() == self._inputs:
                return self._replay(size, rows, names, feed, options)
            if self._sizes:
                options.add_run_config_entry(_GRAPH, _NO_GRAPH)
            return self._compute(names, feed, options)
        except BaseException:
            # Nothing may still be copied into memory that others get; and this tells whether the device is lost.
            self._memory.wait()
            raise
        finally:
            self._bound.clear_binding_inputs()
            self._bound.clear_binding_outputs()

    def close(self) -> None:
        """Let go of the session. The memory, on whose stream it computes, is to be closed after it."""
        self._graphs.clear()
        del self._bound, self._session

    def _compute(self, names: Sequence[str], feed: Mapping[str, Array], options: Any) -> list[Array]:
        memory = self._memory
        for name, array in feed.items():
            if name in self._on_host:
                kind = self._element_type(name)
                self._bound.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
                continue
            address = self._buffer(name, array.nbytes)
            memory.copy_in(address, array)
            self._bind_input(self._bound, name, address, array.shape)
        for name in names:
            self._bound.bind_output(name, memory.device, memory.device_id)
        self._session.run_with_iobinding(self._bound, options)
        values = self._bound.get_outputs()
        arrays = [self._fetch(name, value.data_ptr(), value.shape()) for name, value in zip(names, values, strict=True)]
        memory.wait()
        return arrays

    def _replay(
        self, size: int, rows: int, names: Sequence[str], feed: Mapping[str, Array], options: Any
    ) -> list[Array]:
        graph = self._graphs.get(size) or self._prepare(size, feed)
        for name, array in feed.items():
            self._memory.copy_in(graph.inputs[name], array)
        options.add_run_config_entry(_GRAPH, str(size))
        self._session.run_with_iobinding(graph.bound, options)
        arrays = []
        for name in names:
            address, shape = graph.outputs[name]
            if self._batched:
                shape = (rows, *shape[1:])
            arrays.append(self._fetch(name, address, shape))
        self._memory.wait()
        return arrays

    def _prepare(self, size: int, feed: Mapping[str, Array]) -> _Graph:
        """Lay out a graph's tensors. A first run without one tells what shapes its outputs have."""
        graph = _Graph(self._session.io_binding(), {})
        shapes = {name: (size, *array.shape[1:]) if self._batched else array.shape for name, array in feed.items()}
        for name, shape in shapes.items():
            zeros = np.zeros(shape, self._types[name].dtype)
            graph.inputs[name] = self._memory.allocate(room(zeros.nbytes))
            self._memory.copy_in(graph.inputs[name], zeros)
            self._memory.wait()  # while `zeros` is there
            self._bind_input(graph.bound, name, graph.inputs[name], shape)
        for name in self._outputs:
            graph.bound.bind_output(name, self._memory.device, self._memory.device_id)
        options = onnxruntime.RunOptions()
        options.add_run_config_entry(_GRAPH, _NO_GRAPH)
        self._session.run_with_iobinding(graph.bound, options)
        for name, value in zip(self._outputs, graph.bound.get_outputs(), strict=True):
            shape = tuple(value.shape())
            address = self._memory.allocate(room(value.tensor_size_in_bytes()))
            graph.outputs[name] = (address, shape)
        graph.bound.clear_binding_outputs()
        for name, (address, shape) in graph.outputs.items():
            graph.bound.bind_output(
                name, self._memory.device, self._memory.device_id, self._element_type(name), shape, address
            )
        self._graphs[size] = graph
        return graph

    def _bind_input(self, bound: Any, name: str, address: int, shape: Sequence[int]) -> None:
        memory = self._memory
        bound.bind_input(name, memory.device, memory.device_id, self._element_type(name), shape, address)

    def _element_type(self, name: str) -> int:
        return _ELEMENT_TYPES[self._types[name].name]

    def _buffer(self, name: str, size_bytes: int) -> int:
        """Where an input of so many bytes goes; nothing is under way there."""
        address, held_bytes = self._buffers.get(name, (0, -1))
        if held_bytes < size_bytes:
            if address:
                del self._buffers[name]
                self._memory.free(address)
            held_bytes = room(size_bytes)
            address = self._memory.allocate(held_bytes)
            self._buffers[name] = address, held_bytes
        return address

    def _fetch(self, name: str, address: int, shape: Sequence[int]) -> Array:
        dtype = self._types[name].dtype
        size_bytes = tensor.count(shape) * dtype.itemsize
        target = self._memory.pinned(size_bytes)
        self._memory.copy_out(target, address)
        return target.view(dtype).reshape(shape)
