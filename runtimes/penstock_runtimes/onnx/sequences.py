"""Stateful ONNX models: control inputs made for each request, and state carried from one request to the next."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse
from penstock.model_config import Control, State, controls, paddings, sequence_policy, signature, states
from penstock.runtime import Cancelled, Reply
from penstock.tensor import BYTES, Array, Tensor, count, join, show, split, unpack_bytes

from penstock_runtimes.onnx.instance import OnnxInstance
from penstock_runtimes.onnx.signature import OnnxSignature, check_state

FILES = "initial_state"  # the directory of first values, in the model's


class SequenceInstance:
    """An instance that tells its model about sequences, and keeps their state by slot.

    A request without a sequence, as warm-up has them, is one of its own: its first and its last, in slot 0.
    """

    max_in_flight = 1
    streams = False

    def __init__(self, model: OnnxInstance, config: pb.ModelConfig, directory: Path) -> None:
        """`directory` is the model's. Raises ServingError(INVALID) where a first value of a state cannot be had."""
        policy = sequence_policy(config)
        assert policy is not None
        self.device = model.device
        self.inputs_ready_ns = 0
        self.outputs_came_ns = 0
        self._model = model
        self._batched = config.max_batch_size > 0
        self._direct = policy.direct and self._batched
        self._controls = controls(config)
        self._states = states(config)
        self._first = {state.input: _first(config.name, state, directory, self._batched) for state in self._states}
        self._kept: dict[int, dict[str, Array]] = {}  # what each state's input is next, by slot
        self._outputs = signature(config).outputs

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> Sequence[InferResponse | ServingError]:
        """Requests whose states differ in shape run apart; of a run that fails for its values, each runs alone."""
        for request in batch:
            if request.sequence is not None and request.sequence.start:
                self._kept.pop(request.sequence.slot, None)
        answers: dict[int, InferResponse | ServingError] = {}
        self.inputs_ready_ns = 0
        for together in self._together(batch):
            answers.update(zip(map(id, together), self._answers(together, unwanted), strict=True))
        for request in batch:
            if request.sequence is not None and request.sequence.end:
                self._kept.pop(request.sequence.slot, None)
        return [answers[id(request)] for request in batch]

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        """Never called: see `streams`."""
        self._model.start(request, reply, cancelled)

    def close(self) -> None:
        self._kept.clear()
        self._model.close()

    def _together(self, batch: Sequence[InferRequest]) -> Iterable[list[InferRequest]]:
        """The requests of each run, in the order of their rows."""
        groups: dict[object, list[InferRequest]] = {}
        for request in sorted(batch, key=_slot) if self._direct else batch:
            shapes = tuple([self._state(request, state).shape for state in self._states])
            shares = self._batched and request.sequence is not None
            groups.setdefault(shapes if shares else id(request), []).append(request)
        return groups.values()

    def _state(self, request: InferRequest, state: State) -> Array:
        """What the model gets as its state: [1, ...], or [...] for a model without a batch axis."""
        kept = None if request.sequence is None else self._kept.get(request.sequence.slot)
        return self._first[state.input] if kept is None else kept[state.input]

    def _answers(self, batch: list[InferRequest], unwanted: Cancelled | None) -> Sequence[InferResponse | ServingError]:
        try:
            return self._run(batch, self._model.options(unwanted))
        except ServingError as error:
            if unwanted:
                raise
            if error.kind is not Kind.INVALID or len(batch) == 1:
                return [error] * len(batch)
        return [answer for request in batch for answer in self._answers([request], unwanted)]

    def _run(self, batch: list[InferRequest], options: Any) -> list[InferResponse]:
        """One run. Keeps the states that it leads to, once nothing can fail any more."""
        rows = _rows(batch, self._direct)
        feed = {name: _fill(rows, [request.inputs[name].array for request in batch]) for name in batch[0].inputs}
        for control in self._controls:
            feed[control.name] = self._told(control, rows)
        for state in self._states:
            feed[state.input] = _fill(rows, [self._state(request, state) for request in rows if request is not None])
        # In the order of the first that asks.
        asked = list(dict.fromkeys(name for request in batch for name in (request.outputs or self._outputs)))
        names = list(dict.fromkeys([*asked, *(state.output for state in self._states)]))
        arrays = self._model.compute(names, feed, options)
        # Several runs count as one execution, which computes from the first of them on.
        self.inputs_ready_ns = self.inputs_ready_ns or self._model.inputs_ready_ns
        self.outputs_came_ns = self._model.outputs_came_ns
        shown = self._model.shown(asked, arrays[: len(asked)])
        parts = {name: self._cut(array, batch, rows) for name, array in zip(asked, shown, strict=True)}
        self._keep(batch, rows, dict(zip(names, arrays, strict=True)))
        return [
            InferResponse(
                request.model,
                request.version,
                request.id,
                [
                    Tensor(name, self._outputs[name].datatype, parts[name][number])
                    for name in (request.outputs or self._outputs)
                ],
            )
            for number, request in enumerate(batch)
        ]

    def _told(self, control: Control, rows: Sequence[InferRequest | None]) -> Array:
        """What the model is told of each row: [rows, 1], or [1] for a model without a batch axis."""
        elements: list[object] = []
        for request in rows:
            sequence = None if request is None else request.sequence
            if control.told == "CORRID":
                nobody: int | str = "" if control.datatype is BYTES else 0
                elements.append(nobody if sequence is None else control.holds(sequence.id))
            elif request is None:
                elements.append(control.false)
            else:
                flags = {"START": sequence is None or sequence.start, "END": sequence is None or sequence.end}
                elements.append(control.true if flags.get(control.told, True) else control.false)
        array = np.array(elements, control.datatype.dtype)
        return array.reshape(-1, 1) if self._batched else array

    def _keep(self, batch: list[InferRequest], rows: Sequence[InferRequest | None], outputs: dict[str, Array]) -> None:
        """Let the states of this run be those that the next requests of the same sequences get."""
        kept = {state.input: self._cut(outputs[state.output], batch, rows) for state in self._states}
        for number, request in enumerate(batch):
            if kept and request.sequence is not None:
                # Copies: a view would keep the rows of all others.
                self._kept[request.sequence.slot] = {
                    name: parts[number].copy() if len(rows) > 1 else parts[number] for name, parts in kept.items()
                }

    def _cut(self, array: Array, batch: Sequence[InferRequest], rows: Sequence[InferRequest | None]) -> list[Array]:
        """What of an output belongs to each request of the batch."""
        if len(batch) == 1 and None not in rows:
            return [array]
        return [part for part, row in zip(split(array, [1] * len(rows)), rows, strict=True) if row is not None]


def check(config: pb.ModelConfig, found: OnnxSignature) -> None:
    """Raise ServingError where controls or state of a complete configuration and the file disagree.

    UNSUPPORTED for what makes a batch anything but the rows of its requests: their slots are its rows.
    """
    if config.HasField("sequence_batching"):
        for field in ("batch_input", "batch_output"):
            if getattr(config, field):
                raise ServingError(Kind.UNSUPPORTED, f"model '{config.name}': {field} with sequence_batching")
        for entry in config.input:
            if entry.allow_ragged_batch:
                raise ServingError(
                    Kind.UNSUPPORTED, f"model '{config.name}': ragged input '{entry.name}' with sequence_batching"
                )
        if padded := paddings(config):
            raise ServingError(
                Kind.UNSUPPORTED, f"model '{config.name}': padded input '{padded[0].input}' with sequence_batching"
            )
    for control in controls(config):
        given = found.inputs.get(control.name)
        if given is None:
            raise ServingError(
                Kind.INTERNAL,
                f"configuration specified sequence control '{control.name}', but model does not provide that input",
            )
        what = f"unable to load model '{config.name}', sequence control '{control.name}'"
        dims = given.shape[1:] if config.max_batch_size else given.shape
        if dims != (1,):
            raise ServingError(Kind.INVALID, f"{what} in model has dims {show(dims)} but dims [1] is expected")
        if given.datatype is not control.datatype:
            onnx_type = given.onnx_type.removeprefix("tensor(").removesuffix(")").upper()
            raise ServingError(
                Kind.INVALID,
                f"{what}, the model expects data-type {onnx_type} but the model configuration specifies data-type "
                f"{control.datatype.config_name}",
            )
    check_state(config, found)


def _slot(request: InferRequest) -> int:
    return 0 if request.sequence is None else request.sequence.slot


def _rows(batch: Sequence[InferRequest], direct: bool) -> list[InferRequest | None]:
    """The request of each row of a run. Direct: every slot has its row, and those between requests are empty."""
    if batch[0].sequence is None:
        return [batch[0]] * batch[0].rows
    if not direct:
        return list(batch)
    by_slot = {_slot(request): request for request in batch}
    return [by_slot.get(slot) for slot in range(max(by_slot) + 1)]


def _fill(rows: Sequence[InferRequest | None], arrays: Sequence[Array]) -> Array:
    """Lay what there is of each request where it belongs; rows without one are zeros, or empty text."""
    if None not in rows:
        return join(arrays)
    first = arrays[0]
    empty: object = type(first.flat[0])() if first.dtype == object and first.size else 0
    filled = np.full((len(rows), *first.shape[1:]), empty, first.dtype)
    for place, array in zip((number for number, row in enumerate(rows) if row is not None), arrays, strict=True):
        filled[place] = array[0]
    return filled


def _first(model: str, state: State, directory: Path, batched: bool) -> Array:
    """The first value of a state: [1, ...], or [...] for a model without a batch axis."""
    shape = (1, *state.dims) if batched else state.dims
    if state.file:
        return _read(model, state, directory / FILES).reshape(shape)
    return np.full(shape, "", object) if state.datatype is BYTES else np.zeros(shape, state.datatype.dtype)


def _read(model: str, state: State, directory: Path) -> Array:
    """The elements in the file of a first value."""
    path, datatype, elements = directory / state.file, state.datatype, count(state.dims)
    what = f"model '{model}': initial state of '{state.input}'"
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ServingError(Kind.INVALID, f"{what}: file path '{state.file}' is outside {directory}")
    try:
        data = path.read_bytes()
        if datatype is BYTES:
            texts, end = unpack_bytes(data, elements)
            if len(texts) != elements or end != len(data):
                raise ServingError(Kind.INVALID, f"{what}: {state.file} does not hold exactly {elements} elements")
            return np.array([text.decode() for text in texts], object)
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(Kind.INVALID, f"{what}: failed to read its file: {error}") from error
    if len(data) != elements * datatype.itemsize:
        raise ServingError(
            Kind.INVALID, f"{what}: expected {elements * datatype.itemsize} bytes in {state.file}, got {len(data)}"
        )
    return np.frombuffer(data, datatype.dtype)
