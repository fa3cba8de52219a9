"""What crosses the core: plain data without socket, future, lock or callback, so that it can cross a process too."""

from typing import TypeAlias

from msgspec import Struct, field

from penstock.access import names
from penstock.tensor import Tensor

Parameter: TypeAlias = bool | int | float | str


class RequestedOutput(Struct):
    """An output that a request names, and what it wants done with it."""

    name: str
    classification: int = 0  # the top k classes instead of the tensor; 0: the tensor itself


class Sequence(Struct):
    """A request's place in a sequence of a stateful model."""

    id: int | str
    start: bool = False
    end: bool = False
    slot: int = 0  # of its instance, while the sequence lives: its batch row, where it keeps one. Set by the scheduler


class JobContext(Struct):
    """What a job brings to its model beside the input."""

    id: str
    passed: bytes  # a JSON object of what the submitter passes through: s3Config and the like. Never shown or logged
    request_id: str = ""  # of the request that handed it in; "" where that had none


class InferRequest(Struct):
    """One inference. Made by `admission`, so its tensors agree with the model's signature."""

    model: str
    version: str  # "" means: by the version policy
    id: str
    inputs: dict[str, Tensor]
    outputs: dict[str, RequestedOutput]  # empty means: all
    parameters: dict[str, Parameter] = field(default_factory=dict)
    priority: int = 0  # 0 means: the model's default
    deadline_ns: int = 0  # monotonic; 0 means: none
    timeout_us: int = 0  # in the queue, where the model's queue policy lets requests shorten it; 0 means: none
    sequence: Sequence | None = None
    rows: int = 1  # of the batch axis; 1 for a model without one
    job: JobContext | None = None  # None unless the request is a job
    empty_final: bool = False  # a stream shall be told that a request has ended without a last answer
    # What need not be looked for where others like it have been seen.
    size: int = -1  # bytes of all inputs; -1 where it is not known
    may_classify: bool = True  # False: no output is wanted as classes

    @property
    def names(self) -> dict[str, str]:
        """What a line of the log about it can be found by: `extra` of its record."""
        return names(self.job.request_id, self.job.id) if self.job else names(self.id)


class Phases(Struct):
    """How long it took to compute something, in nanoseconds."""

    input_ns: int  # gathering inputs
    infer_ns: int  # in the model
    output_ns: int  # scattering outputs

    def add(self, more: "Phases") -> None:
        self.input_ns += more.input_ns
        self.infer_ns += more.infer_ns
        self.output_ns += more.output_ns


class InferResponse(Struct):
    """What one execution gives back to one request; a decoupled model gives several."""

    model: str
    version: str
    id: str
    outputs: list[Tensor]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    # How the request was computed, all of it, with the last answer. None where the cache answered.
    computed: Phases | None = None
