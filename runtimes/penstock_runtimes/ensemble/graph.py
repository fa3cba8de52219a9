"""Which step runs when: an ensemble as a graph of steps and tensors, and one request on its way through it.

Neither knows models, threads or time: values in, calls and results out.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from msgspec import Struct

Value = TypeVar("Value")  # of a tensor; a graph moves them and never looks inside

SINK = -1  # in the place of a step's number: whoever takes the outputs of the ensemble


class Step(Struct, frozen=True):
    """One model of an ensemble, and which ensemble tensors it reads and writes."""

    number: int
    inputs: Mapping[str, str]  # the model's input → tensor
    outputs: Mapping[str, str]  # the model's output → tensor
    optional: frozenset[str] = frozenset()  # inputs that the model can do without
    decoupled: bool = False  # it may answer any number of times


class ForkError(ValueError):
    """Two decoupled steps meet, neither of which runs for the answers of the other: their answers form no pairs."""

    def __init__(self, reader: int, steps: tuple[int, int]) -> None:
        super().__init__(f"decoupled steps {steps[0]} and {steps[1]} meet")
        self.reader = reader  # where they meet: a step, or SINK
        self.steps = steps


class Graph:
    """Steps without cycles, each of which some output needs.

    Everything that follows a decoupled step runs once for each of its answers, on a *level* of its own: level 0 is
    before the first such step, and tensors of lower levels are the same for all runs of the higher ones.
    """

    def __init__(self, steps: Sequence[Step], inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """`outputs` are tensors that `inputs` or steps provide. Raises ForkError where a step has no level."""
        self.inputs = frozenset(inputs)
        self.outputs = tuple(outputs)
        self.steps = {step.number: step for step in _needed(steps, self.outputs)}
        self.readers: dict[str, list[int]] = {}
        for step in self.steps.values():
            for tensor in dict.fromkeys(step.inputs.values()):
                self.readers.setdefault(tensor, []).append(step.number)
        for tensor in dict.fromkeys(self.outputs):
            self.readers.setdefault(tensor, []).append(SINK)
        self.levels = self._measure()  # of steps by number, and of the sink, which has the highest
        self.on_level = [[number for number in self.levels if self.levels[number] == level] for level in self._all()]
        self.top = self.levels[SINK]

    def _all(self) -> range:
        return range(self.levels[SINK] + 1)

    def _measure(self) -> dict[int, int]:
        """Levels by number: how many decoupled steps lie before."""
        behind: dict[str, tuple[int, ...]] = dict.fromkeys(self.inputs, ())  # the decoupled steps that a tensor follows
        levels = {}
        waiting = list(self.steps.values())
        while waiting:
            step = next(step for step in waiting if behind.keys() >= set(step.inputs.values()))
            waiting.remove(step)
            before = _longest(step.number, [behind[tensor] for tensor in step.inputs.values()])
            levels[step.number] = len(before)
            after = (*before, step.number) if step.decoupled else before
            behind.update(dict.fromkeys(step.outputs.values(), after))
        levels[SINK] = len(_longest(SINK, [behind[tensor] for tensor in self.outputs]))
        return levels

    def only(self, outputs: Collection[str]) -> "Graph":
        """The part that these outputs need."""
        return Graph(list(self.steps.values()), self.inputs, outputs)


def _needed(steps: Sequence[Step], outputs: Iterable[str]) -> list[Step]:
    """The steps that lead to `outputs`, with the outputs of theirs that do."""
    writers = {tensor: step for step in steps for tensor in step.outputs.values()}
    wanted: set[str] = set()
    unseen = list(outputs)
    while unseen:
        tensor = unseen.pop()
        if tensor not in wanted:
            wanted.add(tensor)
            unseen += writers[tensor].inputs.values() if tensor in writers else ()
    return [
        Step(step.number, step.inputs, written, step.optional, step.decoupled)
        for step in steps
        if (written := {output: tensor for output, tensor in step.outputs.items() if tensor in wanted})
    ]


def _longest(reader: int, paths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest of paths that all begin alike."""
    longest = max(paths, key=len, default=())
    for path in paths:
        for one, other in zip(path, longest, strict=False):
            if one != other:
                raise ForkError(reader, (min(one, other), max(one, other)))
    return longest


class Call(Struct, Generic[Value], eq=False):
    """A step that is to run, or runs. Compared by identity."""

    step: Step
    inputs: dict[str, Value]  # by the model's names
    place: "_Place[Value]"
    answers: int = 0  # that it has given so far


class _Place(Generic[Value]):
    """The tensors of one level for one answer of the decoupled step before it."""

    __slots__ = ("above", "below", "lacking", "level", "tensors", "unended")

    def __init__(self, level: int, below: "_Place[Value] | None", unended: int) -> None:
        self.level = level
        self.below = below
        self.above: list[_Place[Value]] = []
        self.tensors: dict[str, Value] = {}
        self.lacking: dict[int, set[str]] = {}  # what each reader on this level waits for
        self.unended = unended  # steps of this level that have not run to their end, and the sink

    def find(self, tensor: str) -> Value | None:
        place: _Place[Value] | None = self
        while place is not None:
            if tensor in place.tensors:
                return place.tensors[tensor]
            place = place.below
        return None


class Flow(Generic[Value]):
    """One request on its way: tells what to run next, and collects results. Owned by one thread at a time."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Value], limit: int = 0) -> None:
        """At most `limit` calls of each step are taken at the same time; 0 is no limit."""
        self._graph = graph
        self._limit = limit
        self._absent = graph.inputs - inputs.keys()
        self._waiting: deque[Call[Value]] = deque()
        self._running: dict[int, int] = {}  # calls that were taken and have not ended, by step
        self._under_way = 0
        self._results: deque[dict[str, Value]] = deque()
        self._root: _Place[Value] = self._open(None, inputs)

    @property
    def ended(self) -> bool:
        """Whether nothing runs and nothing is left to run."""
        return not self._under_way and not self._waiting

    @property
    def stuck(self) -> bool:
        """Whether something that was to come can come no more, now that the flow has ended."""
        return not _is_done(self._root)

    @property
    def held(self) -> int:
        """How many calls wait for others of their step to end."""
        return len(self._waiting)

    def take(self) -> list[Call[Value]]:
        """The calls to make now. Those of one step leave in order."""
        if not self._limit:
            taken = list(self._waiting)
            self._waiting.clear()
            for call in taken:
                self._began(call)
            return taken
        taken, kept = [], deque[Call[Value]]()
        for call in self._waiting:
            if self._running.get(call.step.number, 0) < self._limit:
                self._began(call)
                taken.append(call)
            else:
                kept.append(call)
        self._waiting = kept
        return taken

    def _began(self, call: Call[Value]) -> None:
        self._running[call.step.number] = self._running.get(call.step.number, 0) + 1
        self._under_way += 1

    def answered(self, call: Call[Value], outputs: Mapping[str, Value]) -> None:
        """A call has given `outputs`, by the model's names. Of a step that is not decoupled, once."""
        call.answers += 1
        tensors = {tensor: outputs[name] for name, tensor in call.step.outputs.items() if name in outputs}
        if call.step.decoupled:
            self._open(call.place, tensors)
        else:
            self._put(call.place, tensors)

    def finished(self, call: Call[Value]) -> None:
        """Nothing more comes of a call."""
        self._running[call.step.number] -= 1
        self._under_way -= 1
        self._close(call.place)

    def results(self) -> list[dict[str, Value]]:
        """What has become complete since this was asked last: the outputs of the ensemble, by tensor."""
        results = list(self._results)
        self._results.clear()
        return results

    def _open(self, below: "_Place[Value] | None", tensors: Mapping[str, Value]) -> "_Place[Value]":
        """A place above `below`, with the tensors that it begins with."""
        graph, level = self._graph, below.level + 1 if below else 0
        numbers = graph.on_level[level]
        place = _Place(level, below, len(numbers))
        if below is not None:
            below.above.append(place)
        place.tensors.update(tensors)
        for number in numbers:
            needed = set(graph.outputs) if number == SINK else self._needed(graph.steps[number])
            place.lacking[number] = {tensor for tensor in needed if place.find(tensor) is None}
        for number in numbers:
            if not place.lacking[number]:
                self._ready(place, number)
        return place

    def _needed(self, step: Step) -> set[str]:
        return {
            tensor for name, tensor in step.inputs.items() if tensor not in self._absent or name not in step.optional
        }

    def _put(self, place: "_Place[Value]", tensors: Mapping[str, Value]) -> None:
        place.tensors.update(tensors)
        for tensor in tensors:
            for number in self._graph.readers.get(tensor, ()):
                for reached in _reach(place, self._graph.levels[number]):
                    lacking = reached.lacking[number]
                    if tensor in lacking:
                        lacking.remove(tensor)
                        if not lacking:
                            self._ready(reached, number)

    def _ready(self, place: "_Place[Value]", number: int) -> None:
        if number == SINK:
            found = ((tensor, place.find(tensor)) for tensor in self._graph.outputs)
            self._results.append({tensor: value for tensor, value in found if value is not None})
            self._close(place)
            return
        step = self._graph.steps[number]
        given = ((name, place.find(tensor)) for name, tensor in step.inputs.items())
        self._waiting.append(Call(step, {name: value for name, value in given if value is not None}, place))

    def _close(self, place: "_Place[Value]") -> None:
        """One more of a place's steps has ended. What is done there is forgotten, and its tensors with it."""
        place.unended -= 1
        while place.below is not None and _is_done(place):
            place.below.above.remove(place)
            place = place.below


def _is_done(place: _Place[Value]) -> bool:
    return not place.unended and not place.above


def _reach(place: _Place[Value], level: int) -> list[_Place[Value]]:
    """The places of a level that see the tensors of `place`."""
    reached = [place]
    for _ in range(level - place.level):
        reached = [above for below in reached for above in below.above]
    return reached
