"""What `sequence_batching` says: how sequences are scheduled, and what the model is told besides its inputs."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
from msgspec import Struct

from penstock import pb
from penstock.model_config.records import DATATYPE_OF
from penstock.tensor import BOOL, BY_CONFIG_NAME, BYTES, FP32, Datatype

INT32 = BY_CONFIG_NAME["TYPE_INT32"]

Told: TypeAlias = Literal["START", "END", "READY", "CORRID"]

_MESSAGE = pb.ModelSequenceBatching.Control
_FLAGS = (("int32_false_true", INT32), ("fp32_false_true", FP32), ("bool_false_true", BOOL))


class Control(Struct, frozen=True):
    """An input that the server makes for each request: a flag, or the correlation id. One element per row."""

    name: str
    told: Told
    datatype: Datatype
    false: float = 0  # how a flag says no
    true: float = 1

    def holds(self, id: int | str) -> int | str | None:
        """A correlation id as an element of this tensor; None if it is none.

        Integers are unsigned on the way in; those from 2^63 on are negative ones of a client that has signed ids.
        """
        if isinstance(id, str) or self.datatype is BYTES:
            return id if isinstance(id, str) and self.datatype is BYTES else None
        limits = np.iinfo(self.datatype.dtype)
        number = id - 2**64 if limits.min < 0 and id >= 2**63 else id
        return number if limits.min <= number <= limits.max else None


class State(Struct, frozen=True):
    """An output that the next request of the same sequence gets as an input."""

    input: str
    output: str
    datatype: Datatype
    dims: tuple[int, ...]  # of the first value, without the batch axis
    file: str = ""  # of the first value, below `initial_state/` in the model's directory; empty: zeros


class SequencePolicy(Struct, frozen=True):
    """How the sequences of a stateful model share its instances. Message `ModelSequenceBatching`."""

    model: str
    slots: int  # sequences that each instance has at a time
    max_rows: int  # of a batch
    direct: bool  # a sequence keeps its batch row; else rows of any of them make a batch
    idle_ns: int  # after which a sequence that nothing comes for is over
    delay_ns: int = 0  # that the oldest request waits for the batch to grow
    utilization: float = 0  # direct: the share of slots with a request that is worth no more waiting
    preferred_rows: tuple[int, ...] = ()  # oldest: sizes at which a batch leaves at once
    preserve_ordering: bool = False  # oldest: answers leave in the order of their requests
    varying: tuple[str, ...] = ()  # inputs that requests may have in different shapes, or leave out
    correlation: Control | None = None  # the input that bears the id


def sequence_policy(config: pb.ModelConfig) -> SequencePolicy | None:
    """How a complete and valid configuration schedules sequences; None where it has none."""
    if not config.HasField("sequence_batching"):
        return None
    batching = config.sequence_batching
    oldest = batching.HasField("oldest")
    strategy: pb.ModelSequenceBatching.StrategyOldest | pb.ModelSequenceBatching.StrategyDirect = (
        batching.oldest if oldest else batching.direct
    )
    max_rows = max(1, config.max_batch_size)
    return SequencePolicy(
        model=config.name,
        slots=batching.oldest.max_candidate_sequences if batching.oldest.max_candidate_sequences > 0 else max_rows,
        max_rows=max_rows,
        direct=not oldest,
        idle_ns=batching.max_sequence_idle_microseconds * 1000,
        delay_ns=strategy.max_queue_delay_microseconds * 1000,
        utilization=batching.direct.minimum_slot_utilization,
        preferred_rows=tuple(batching.oldest.preferred_batch_size),
        preserve_ordering=batching.oldest.preserve_ordering,
        varying=tuple(tensor.name for tensor in config.input if tensor.optional or any(dim < 0 for dim in tensor.dims)),
        correlation=next((control for control in controls(config) if control.told == "CORRID"), None),
    )


def controls(config: pb.ModelConfig) -> tuple[Control, ...]:
    """The control inputs of a valid configuration."""
    return tuple(_controls(config.sequence_batching))


def _controls(batching: pb.ModelSequenceBatching) -> Iterator[Control]:
    names: dict[int, Told] = {
        _MESSAGE.CONTROL_SEQUENCE_START: "START",
        _MESSAGE.CONTROL_SEQUENCE_END: "END",
        _MESSAGE.CONTROL_SEQUENCE_READY: "READY",
    }
    for entry in batching.control_input:
        for control in entry.control:
            if control.kind == _MESSAGE.CONTROL_SEQUENCE_CORRID:
                yield Control(entry.name, "CORRID", DATATYPE_OF[control.data_type])
                continue
            for field, datatype in _FLAGS:
                if values := getattr(control, field):
                    yield Control(entry.name, names[control.kind], datatype, *values)


def states(config: pb.ModelConfig) -> tuple[State, ...]:
    """The implicit state of a valid configuration."""
    return tuple(map(_state, config.sequence_batching.state))


def _state(state: pb.ModelSequenceBatching.State) -> State:
    datatype = DATATYPE_OF[state.data_type]
    for initial in state.initial_state:
        return State(state.input_name, state.output_name, datatype, tuple(initial.dims), initial.data_file)
    dims = tuple(1 if dim < 0 else dim for dim in state.dims)
    return State(state.input_name, state.output_name, datatype, dims)


def sequence_tensors(config: pb.ModelConfig) -> frozenset[str]:
    """Inputs and outputs of the model file that are the server's own: controls and state."""
    batching = config.sequence_batching
    carried = [name for state in batching.state for name in (state.input_name, state.output_name)]
    return frozenset([*(entry.name for entry in batching.control_input), *carried])
