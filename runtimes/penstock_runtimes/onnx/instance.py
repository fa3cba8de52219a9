"""One instance of an ONNX model: requests in, one run, responses out."""

import ctypes
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from time import monotonic_ns
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
from penstock import pb
from penstock.errors import DeviceLostError, Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import signature, states
from penstock.runtime import Cancelled, Reply
from penstock.tensor import BF16, BYTES, Array, Tensor, join, objects

from penstock_runtimes.onnx.assembly import Assembly, Rows
from penstock_runtimes.onnx.binding import Binding
from penstock_runtimes.onnx.faults import Context
from penstock_runtimes.onnx.idle import SHRINKAGE, Rest
from penstock_runtimes.onnx.memory import Memory
from penstock_runtimes.onnx.session import translate
from penstock_runtimes.onnx.signature import Key, OnnxSignature, OnnxTensor

logger = logging.getLogger(__name__)

BFLOAT16 = 16  # TensorProto.DataType
INDIVISIBLE_RUNS = 3  # in a row, and requests are not joined any more

Convert: TypeAlias = Callable[[Any], Any]

_array = attrgetter("array")


class OnnxInstance:
    """A session and the conversions between what clients send and what it takes.

    Instances on the CPU share their session, which ONNX Runtime allows; each is used by one thread at a time.
    """

    max_in_flight = 1
    streams = False

    def __init__(
        self,
        session: Any,
        device: str,
        config: pb.ModelConfig,
        found: OnnxSignature,
        run_options: Callable[[], Any] | None = None,
        assembly: Assembly | None = None,
        binding: Binding | None = None,
        memory: Memory | None = None,
        context: Context | None = None,
        rest_ns: int = 0,
    ) -> None:
        """`config` is complete and agrees with what was `found` in the file; `run_options` makes those of a run.

        `assembly` is what makes a batch of requests; None where that is their rows.
        With a `binding`, tensors lie on the device. The instance owns it and the `memory` from now on.
        After `rest_ns` without a run it is to be asked to `shrink`; 0 for never.
        """
        self.device = device
        self.inputs_ready_ns = 0
        self.outputs_came_ns = 0
        self._make_options = run_options or onnxruntime.RunOptions
        self._run_options = None if run_options is None else run_options()  # of runs that are not to be ended
        self._unwanted = Cancelled()  # what ends the runs of the options beside it
        self._ending_options: Any = None
        self._model = config.name
        self._batched = config.max_batch_size > 0
        self._indivisible = 0  # batches in a row whose outputs could not be divided
        self._assembly = assembly or Rows(join if binding is None else binding.join)
        self.padded = self._assembly.padded
        divided = {target for entry in config.batch_output for target in entry.target_name}
        seen = signature(config)
        self._datatypes = {name: spec.datatype for name, spec in seen.outputs.items()}
        self._names = list(seen.outputs)
        # Only tensors that need one have a conversion, so that plain ones cost nothing.
        self._to_model: dict[str, Convert] = {}
        self._from_model: dict[str, Convert] = {}
        for entry in config.input:
            steps: list[Convert] = []
            spec = seen.inputs[entry.name]
            if entry.allow_ragged_batch:
                pass  # it is flat, whatever its shape was
            elif entry.HasField("reshape"):
                steps.append(_reshape(spec.dims, entry.reshape.shape, self._batched))
            elif len(_given(found, entry.name).shape) != len(spec.shape):
                steps.append(_to_shape(()))  # a scalar that the configuration calls [1]
            if spec.datatype is BYTES:
                steps.append(_decode_strings(entry.name, config.name))
            elif spec.datatype is BF16 and binding is None:
                steps.append(_to_value)
            if steps:
                self._to_model[entry.name] = _chain(steps)
        for output in config.output:
            steps = []
            spec, given = seen.outputs[output.name], found.outputs[output.name]
            if given.maps:
                steps.append(_columns(given, config.name))
            if spec.datatype is BYTES:
                steps.append(_encode_strings)
            if output.name in divided:
                pass  # it gets its shape when it is divided
            elif output.HasField("reshape"):
                steps.append(_reshape(output.reshape.shape, spec.dims, self._batched))
            elif len(given.shape) != len(spec.shape):
                steps.append(_to_shape((1,)))
            if steps:
                self._from_model[output.name] = _chain(steps)
        self._session = session if binding is None else binding
        self._binding = binding
        self._memory = memory
        self._context = context or Context()
        self.rest_ns = rest_ns
        self._rest = Rest(rest_ns, device) if rest_ns else None
        # Whether tensors go to the session and come from it as they are, at any time.
        is_changed = self._to_model or self._from_model or self._assembly.changes_one
        self._plain = not is_changed and self._rest is None
        if binding is None and BF16 in [*self._datatypes.values(), *(state.datatype for state in states(config))]:
            if any(spec.datatype is BYTES for spec in seen.inputs.values()):
                raise ServingError(
                    Kind.UNSUPPORTED,
                    f"model '{config.name}' takes BYTES and gives BF16, which ONNX Runtime's Python interface cannot "
                    "do in one run",
                )
            self._session = _ThroughValues(session)
        elif type(self._session) is onnxruntime.InferenceSession:
            self._session = _Unchecked(session)

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> Sequence[InferResponse | ServingError]:
        options = self._ending_options if unwanted is self._unwanted else self.options(unwanted)
        if len(batch) == 1:
            [request] = batch
            if not self._plain:
                return [self._run_one(request, options)]
            # As `_run_one`, in place: the calls would cost as much as many a model.
            names, inputs = list(request.outputs) or self._names, request.inputs
            feed = dict(zip(inputs, map(_array, inputs.values()), strict=True))
            self.inputs_ready_ns = monotonic_ns()
            try:
                arrays = self._session.run(names, feed, options)
            except Exception as error:
                raise self._failed(error) from error
            self.outputs_came_ns = monotonic_ns()
            outputs = list(map(Tensor, names, map(self._datatypes.__getitem__, names), arrays))
            return [InferResponse(request.model, request.version, request.id, outputs)]
        if self._batched:
            try:
                return self._run_joined(batch, options)
            except ServingError as error:
                if error.kind is not Kind.INVALID or unwanted:
                    raise
        # No batch axis, or the values of one request failed the run of all: alone, each gets its own answer.
        answers = [self._answer(batch[0], options)]
        ready_ns = self.inputs_ready_ns
        answers += [self._answer(request, options) for request in batch[1:]]
        self.inputs_ready_ns = ready_ns  # they count as one execution, which computes from the first run on
        return answers

    def options(self, unwanted: Cancelled | None) -> Any:
        """Options of a run that ends once it is `unwanted`. The flag stays set, so no others share them."""
        if unwanted is None:
            return self._run_options
        if unwanted is not self._unwanted:
            self._unwanted = unwanted
            self._ending_options = options = self._make_options()
            unwanted.watch(lambda: setattr(options, "terminate", True))
        return self._ending_options

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:  # noqa: ARG002 - the door's
        """Never called: an ONNX model answers once."""
        raise ServingError(Kind.UNSUPPORTED, f"model '{self._model}' answers once; use execute")

    def close(self) -> None:
        with self._rest.busy if self._rest is not None else nullcontext():
            self._close()

    def _close(self) -> None:
        session, binding, self._session, self._binding = self._session, self._binding, None, None
        if self._context.lost and self.device != "cpu":
            self._context.keep(session, binding, self._memory)
            return
        if binding is not None:
            binding.close()
        del session, binding
        if self._memory is not None:
            self._memory.close()  # and the stream with it, on which the session computed

    def shrink(self, now_ns: int) -> None:
        """Give memory back to the device, if nothing has run for `rest_ns`. May be called on any thread."""
        rest = self._rest
        if rest is None or not rest.is_due(self.outputs_came_ns, now_ns):
            return
        with rest.busy:
            if self._session is None or self._context.lost or not rest.is_due(self.outputs_came_ns, now_ns):
                return
            options = self._make_options()
            options.add_run_config_entry(SHRINKAGE, rest.arena)
            try:
                self._session.run(rest.names, rest.feed, options)
            except Exception as error:  # noqa: BLE001 - nobody waits for this run
                logger.warning("model %s cannot give memory back: %s", self._model, translate(error).message)
            rest.shrunk_ns = monotonic_ns()

    def _answer(self, request: InferRequest, options: Any) -> InferResponse | ServingError:
        try:
            return self._run_one(request, options)
        except ServingError as error:
            return error

    def _run_one(self, request: InferRequest, options: Any) -> InferResponse:
        if self._assembly.changes_one:
            [answer] = self._run_joined([request], options)
            return answer
        names = list(request.outputs) or self._names
        feed = {name: tensor.array for name, tensor in request.inputs.items()}
        return self._response(request, names, self.shown(names, self.compute(names, feed, options)))

    def _run_joined(self, batch: Sequence[InferRequest], options: Any) -> list[InferResponse]:
        assembly = self._assembly
        feed = assembly.gather(batch)
        names = self._names
        if all(request.outputs for request in batch):
            asked = {name for request in batch for name in request.outputs}
            names = [name for name in names if name in asked]
        arrays = self.shown(names, self.compute(names, feed, options))
        try:
            parts = {name: assembly.scatter(batch, name, array) for name, array in zip(names, arrays, strict=True)}
        except ServingError as error:
            if len(batch) == 1:
                raise
            self._note_indivisible(error)
            raise ServingError(Kind.INVALID, error.message) from error
        if len(batch) > 1:
            self._indivisible = 0
        answers = []
        for number, request in enumerate(batch):
            chosen = list(request.outputs) or names
            answers.append(self._response(request, chosen, [parts[name][number] for name in chosen]))
        return answers

    def _note_indivisible(self, error: ServingError) -> None:
        """The outputs of a batch do not say whose they are. Where that is the rule, to join requests is lost work."""
        self._indivisible += 1
        if self._indivisible == INDIVISIBLE_RUNS:
            self._batched = False
            logger.warning("model %s: %s; its requests run one by one from now on", self._model, error.message)

    def compute(self, names: Sequence[str], feed: dict[str, Array], options: Any) -> list[Array]:
        """Outputs as the model gives them. `feed` has inputs as clients send them; others, as the model takes them."""
        for name, convert in self._to_model.items():
            if name in feed:  # an optional input may be absent
                feed[name] = convert(feed[name])
        if self._rest is not None:
            with self._rest.busy:
                self._rest.saw(names, feed)
                return self._compute(names, feed, options)
        return self._compute(names, feed, options)

    def _compute(self, names: Sequence[str], feed: dict[str, Array], options: Any) -> list[Array]:
        self.inputs_ready_ns = monotonic_ns()
        try:
            arrays: list[Array] = self._session.run(names, feed, options)
        except Exception as error:
            # It has no name here: it holds its cause, which holds this frame. The feed would wait for a collection.
            raise self._failed(error) from error
        self.outputs_came_ns = monotonic_ns()
        return arrays

    def _failed(self, error: Exception) -> ServingError:
        failure = translate(error, device=self.device)
        if isinstance(failure, DeviceLostError):
            self._context.lost = True
        return failure

    def shown(self, names: Sequence[str], arrays: list[Array]) -> list[Array]:
        """Outputs as clients see them, of those that the model gave."""
        if not self._from_model:
            return arrays
        named = zip(names, arrays, strict=True)
        return [self._from_model[name](array) if name in self._from_model else array for name, array in named]

    def _response(self, request: InferRequest, names: Iterable[str], arrays: list[Array]) -> InferResponse:
        datatypes = self._datatypes
        outputs = [Tensor(name, datatypes[name], array) for name, array in zip(names, arrays, strict=True)]
        return InferResponse(request.model, request.version, request.id, outputs)


class _Unchecked:
    """A session without InferenceSession's own checks of what has been checked: a quarter of a short run's time."""

    __slots__ = ("_session", "run")

    def __init__(self, session: Any) -> None:
        self._session = session
        self.run = session._sess.run


class _ThroughValues:
    """A session whose outputs may be bfloat16: `run` cannot give it as an array, so all goes by way of OrtValue."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, names: list[str], feed: dict[str, Any], run_options: Any) -> list[Array]:
        values = {name: _to_value(given) if isinstance(given, np.ndarray) else given for name, given in feed.items()}
        return [_from_value(value) for value in self._session.run_with_ort_values(names, values, run_options)]


def _to_value(array: Array) -> Any:
    array = np.ascontiguousarray(array).reshape(array.shape)  # which makes a scalar [1]
    if array.dtype == BF16.dtype:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: Any) -> Array:
    if value.data_type() != BF16.onnx:
        array: Array = value.numpy()
        return array
    size = value.tensor_size_in_bytes()
    content = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(content, BF16.dtype).reshape(value.shape())


def _given(found: OnnxSignature, name: str) -> OnnxTensor:
    return found.inputs.get(name) or found.overridable[name]


def _chain(steps: Sequence[Convert]) -> Convert:
    if len(steps) == 1:
        return steps[0]

    def convert(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return convert


def _to_shape(shape: tuple[int, ...]) -> Convert:
    return lambda array: array.reshape(shape)


def _reshape(dims: Sequence[int], wanted: Sequence[int], batched: bool) -> Convert:
    """From `dims` to `wanted`, both without the batch axis; open axes keep their sizes, in order."""
    first = 1 if batched else 0
    open_axes = [first + axis for axis, dim in enumerate(dims) if dim < 0]
    wanted = tuple(wanted)

    def convert(array: Array) -> Array:
        sizes = iter([array.shape[axis] for axis in open_axes])
        return array.reshape([*array.shape[:first], *(next(sizes) if dim < 0 else dim for dim in wanted)])

    return convert


def _decode_strings(name: str, model: str) -> Convert:
    """BYTES to `str`: ONNX Runtime garbles `bytes` objects, and its strings are UTF-8 by definition."""

    def convert(array: Array) -> Array:
        decoded: list[str] = []
        try:
            for element in array.reshape(-1).tolist():
                decoded.append(element.decode())  # noqa: PERF401 - its length tells which element failed
        except UnicodeDecodeError as error:
            raise ServingError(
                Kind.INVALID,
                f"input '{name}' for model '{model}': element {len(decoded)} is not UTF-8, as strings of ONNX are: "
                f"{error}",
            ) from None
        result = np.empty(len(decoded), object)
        result[:] = decoded
        return result.reshape(array.shape)

    return convert


def _encode_strings(array: Array) -> Array:
    return objects([element.encode() for element in array.reshape(-1).tolist()], array.shape)


def _columns(output: OnnxTensor, model: str) -> Convert:
    """A sequence of maps {label: value} as the tensor [rows, labels].

    The columns stand in the order that the file's signature has, else in that of the first row that ever comes.
    """
    assert output.datatype is not None
    dtype, keys = output.datatype.dtype, output.keys

    def convert(maps: list[dict[Key, Any]]) -> Array:
        nonlocal keys
        if maps and not keys:
            keys = tuple(maps[0])
        for number, row in enumerate(maps):
            if len(row) != len(keys) or any(key not in row for key in keys):
                raise ServingError(
                    Kind.INTERNAL,
                    f"output '{output.name}' of model '{model}': row {number} has the labels {list(row)}, "
                    f"expected {list(keys)}",
                )
        return np.array([[row[key] for key in keys] for row in maps], dtype).reshape(len(maps), len(keys))

    return convert
