"""The door for runtimes: all that the author of one needs, and how the server finds it.

A runtime is a class that takes its settings (`--backend-config NAME,KEY=VALUE`), named by an entry point in the group
`penstock.runtimes`; the entry point's name is what `backend:` says in a model configuration.
"""

import configparser
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from msgspec import Struct, field

from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.messages import InferRequest, InferResponse, RequestedOutput
from penstock.model_config import Choice, Signature
from penstock.statistics import NO_GPU, Padded
from penstock.tensor import Tensor

GROUP = "penstock.runtimes"
DOCTORS = "penstock.doctors"  # entry points that are Diagnose functions


class ModelFiles(Struct):
    """Where one version of a model lies on disk."""

    model: str
    version: int
    directory: Path  # of the model: labels, configuration
    path: Path  # the version's directory, or the model file itself where there is none
    kept: dict[Any, Any] = field(default_factory=dict)  # what a runtime keeps from `complete` to the last `open`
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of outputs, where the model file knows them
    choices: dict[str, Choice] = field(default_factory=dict)  # what the load decided by itself, by field

    def note(self, field: str, value: str | int, reason: str) -> None:
        """Remember why `field` got a value that nobody stated; the last word on a field counts."""
        self.choices[field] = Choice(field, value, reason)

    def file(self, name: str) -> Path:
        """The model file called `name` in the version's directory; a bare model file is itself."""
        return self.path if self.path.is_file() else self.path / name


class Placement(Struct, frozen=True):
    """Where an instance shall run."""

    device: Literal["cpu", "cuda"]
    device_id: int = 0
    threads: int = 1  # for one operation, where the configuration does not say
    may_fall_back: bool = False  # to the CPU, with one loud line; otherwise opening fails

    def __str__(self) -> str:
        return "cpu" if self.device == "cpu" else f"cuda:{self.device_id}"


def gpu_number(device: str) -> int:
    """CUDA's number of the GPU in an instance's `device`; NO_GPU where that is none."""
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else NO_GPU


class Cancelled(Struct, eq=False, weakref=True):
    """Whether a request is still wanted. Set at most once, by any thread; true from then on."""

    reason: ServingError | None = None
    watchers: list[Callable[[], None]] | None = None  # to be called; written here alone
    _lock: ClassVar = threading.Lock()  # one for all: it is held for few instructions, one per request costs more

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, reason: ServingError) -> bool:
        """Say that nobody waits any more, and why. False if that was said before."""
        with self._lock:
            if self.reason is not None:
                return False
            self.reason = reason
            watchers, self.watchers = self.watchers, None
        for watcher in watchers or ():
            watcher()
        return True

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` once when this is set, on the setting thread; now, if it is set already."""
        with self._lock:
            if self.reason is None:
                if self.watchers is None:
                    self.watchers = []
                self.watchers.append(watcher)
                return
        watcher()


class Credit(Protocol):
    """How many more replies the receiver has room for. A producer with none left waits."""

    @property
    def left(self) -> int: ...
    def wait(self) -> None:
        """Block this worker thread until there is room."""

    def __await__(self) -> Generator[Any, None, None]:
        """Await room, in a coroutine."""


class Reply(Protocol):
    """Takes an answer to one request, on any thread.

    `final` ends the request: nothing may follow. `partial` marks progress, which is no answer of its own. A final
    response without outputs ends a decoupled model's answers, and is none itself.
    """

    def __call__(self, result: InferResponse | ServingError, final: bool = True, partial: bool = False) -> Credit: ...


class Plenty:
    """Credit of a receiver that always has room, such as one that takes a single answer."""

    left = 2**31

    def wait(self) -> None:
        """There is room."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


PLENTY = Plenty()


class Running(Protocol):
    """A request to another model that was accepted."""

    def cancel(self, reason: ServingError) -> None:
        """Nobody waits for it any more. Its final reply comes all the same. Any thread."""


class Member(Protocol):
    """A model that another one calls: a version that stays until the one that calls it is closed."""

    @property
    def name(self) -> str: ...

    @property
    def signature(self) -> Signature: ...

    @property
    def decoupled(self) -> bool:
        """Whether it may answer any number of times."""

    @property
    def sums_up(self) -> bool:
        """Whether its last answer, after others, only sums those up."""

    def infer(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, RequestedOutput],
        asked: InferRequest,
        reply: Reply,
    ) -> Running:
        """Run the model on `inputs`, whatever their tensors are called, for the sake of the request `asked`.

        It takes over that request's id, parameters, priority, times, sequence and job. `reply` is called on whatever
        thread has the answer, perhaps before this returns. Never blocks. Raises ServingError where the inputs do not
        agree with the signature, or the model cannot take the request; then `reply` is never called.
        """


class Host(Protocol):
    """What a model may ask of the server that holds it, while it is opened."""

    def member(self, name: str, version: int) -> Member:
        """The version of another model that serves now; the highest for 0 and below.

        Raises ServingError(INVALID) with the reason why there is none. Where what serves changes, the model that asked
        is opened anew.
        """


class Instance(Protocol):
    """A model on a device. Calls never overlap beyond `max_in_flight`."""

    device: str  # that really runs it: "cpu", "cuda:0"
    inputs_ready_ns: int  # monotonic, of the last `execute`: when its inputs lay where the model reads them
    outputs_came_ns: int  # monotonic, of the last `execute`: when the model was done

    def execute(
        self, batch: Sequence[InferRequest], unwanted: Cancelled | None = None
    ) -> Sequence[InferResponse | ServingError]:
        """One answer per request, in order. Raising fails the whole batch.

        `unwanted` is set once nobody waits for any of them: then the run may end early, by raising. It may be that of
        the run before, if that was not ended. None for runs that are known to be short.
        """

    def start(self, request: InferRequest, reply: Reply, cancelled: Cancelled) -> None:
        """Answer later, or more than once. Returns soon; only called where `streams` is true.

        The last answer may say in `computed` how the request was; else all its time counts as the model's.
        """

    @property
    def max_in_flight(self) -> int:
        """1 for most; more for concurrent async handlers and ensembles; 0 while it can run nothing."""

    @property
    def streams(self) -> bool:
        """Whether requests come through `start`, one by one, instead of `execute`."""

    def close(self) -> None: ...


@runtime_checkable
class Measured(Protocol):
    """An instance that knows what memory is its own, such as one with a process of its own."""

    def memory_bytes(self) -> int:
        """Bytes of main memory; 0 where there is none at the moment."""


@runtime_checkable
class Pads(Protocol):
    """An instance that may fill inputs up, so that more requests share a batch."""

    padded: Padded | None  # what it filled up; None where its model is not padded


class Runtime(Protocol):
    """Makes instances out of files."""

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        """Fill in what the model file itself knows: names, datatypes, shapes. Returns a new configuration.

        `place` is where the first instance will be opened, so that the file need not be read twice. Raises ServingError
        where file and configuration disagree.
        """

    def open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement, host: Host | None) -> Instance:
        """An instance on `place`, ready to execute. `host` is None where the model cannot call others."""


Find: TypeAlias = Callable[[str, Mapping[str, str]], Runtime]


def find(name: str, settings: Mapping[str, str]) -> Runtime:
    """The runtime whose entry point is called `name`, with its settings.

    Raises ServingError(INVALID) naming the runtimes there are; whatever the runtime raises on a setting it lacks.
    """
    made: Callable[[Mapping[str, str]], Runtime]
    if path := _own(GROUP).get(name):
        module, _, attribute = path.partition(":")
        made = getattr(import_module(module), attribute)
        return made(settings)
    import importlib.metadata  # which takes 5 ms, and as much again to read what 70 distributions say

    points = importlib.metadata.entry_points(group=GROUP)
    for point in points:
        if point.name == name:
            made = point.load()
            return made(settings)
    known = ", ".join(sorted(point.name for point in points)) or "none"
    raise ServingError(Kind.INVALID, f"no runtime for backend '{name}' is installed; there are: {known}")


def _own(group: str) -> Mapping[str, str]:
    """The entry points of the server's own distribution, `module:name` by name, where it is installed as files."""
    entries = configparser.RawConfigParser(delimiters=("=",))
    entries.optionxform = str  # type: ignore[assignment,method-assign] # names as they are
    for folder in sys.path:
        for file in Path(folder).glob("penstock-*.dist-info/entry_points.txt"):
            entries.read(file, "utf-8")
            return dict(entries.items(group)) if entries.has_section(group) else {}
    return {}


class Finding(Struct, frozen=True):
    """Something that was looked at on this machine, for `penstock doctor`."""

    section: str
    name: str
    value: str  # what was found; "" where that says less than the fault
    fault: str = ""  # what is wrong, and what helps
    stops: tuple[str, ...] = ()  # the devices, "cpu" or "cuda", that cannot serve while it has a fault


Diagnose: TypeAlias = Callable[
    [Sequence[int]], Iterable[Finding]
]  # takes the numbers of the GPUs that the driver shows


def doctors() -> list[Diagnose]:
    """Of every runtime that can tell what it needs from a machine, the function that looks for it."""
    import importlib.metadata  # as above

    return [point.load() for point in importlib.metadata.entry_points(group=DOCTORS)]
