"""Models that other models call: how they are called, and in which order they load."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from time import monotonic_ns
from typing import TypeAlias

from penstock import pb
from penstock.admission import Given, admit
from penstock.messages import InferRequest, RequestedOutput
from penstock.model import Model
from penstock.model_config import Signature
from penstock.queueing import Pending
from penstock.runtime import Cancelled, Reply
from penstock.tensor import Tensor

Needs: TypeAlias = Callable[[str], Collection[str]]  # the models that one calls, by name
Lend: TypeAlias = Callable[[str, str], Model]  # by name and version, which is "" for the highest

HANDLER = "handler"  # the backend whose models end with a summary of what they have yielded


class Called:
    """A version of a model, as another model sees it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name = model.name
        self.decoupled = model.decoupled
        self.sums_up = model.config.backend == HANDLER

    @property
    def signature(self) -> Signature:
        return self._model.signature

    def infer(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, RequestedOutput], asked: InferRequest, reply: Reply
    ) -> Pending:
        """As `runtime.Member.infer`. The tensors' memory is used as it is."""
        given = [Given(name, tensor.datatype.name, tensor.array.shape, tensor.array) for name, tensor in inputs.items()]
        admitted = admit(self.signature, asked.id, given, outputs)
        request = InferRequest(
            model=self._model.name,
            version=self._model.version,
            id=asked.id,
            inputs=admitted.inputs,
            outputs=dict(outputs),
            parameters=asked.parameters,
            priority=asked.priority,
            deadline_ns=asked.deadline_ns,
            timeout_us=asked.timeout_us,
            sequence=asked.sequence,
            rows=admitted.rows,
            job=asked.job,
        )
        pending = Pending(request, reply, Cancelled(), monotonic_ns(), request.deadline_ns)
        self._model.submit(pending)
        return pending


class Members:
    """The Host of one version: remembers which models it was lent, for these are to be given back."""

    def __init__(self, lend: Lend) -> None:
        self._lend = lend
        self.models: list[Model] = []

    def member(self, name: str, version: int) -> Called:
        """As `runtime.Host.member`. Raises what `lend` raises."""
        model = self._lend(name, _version(version))
        self.models.append(model)
        return Called(model)


def called(config: pb.ModelConfig) -> list[tuple[str, str]]:
    """The models that a configuration says are called: name, and version, which is "" for the highest."""
    return [(step.model_name, _version(step.model_version)) for step in config.ensemble_scheduling.step]


def _version(number: int) -> str:
    return str(number) if number > 0 else ""


def named(config: pb.ModelConfig) -> list[str]:
    """As `called`, each name once."""
    return list(dict.fromkeys(name for name, _ in called(config)))


def levels(names: Iterable[str], needs: Needs) -> list[list[str]]:
    """These models and all that they need, in groups: each group needs only those before it. Circles are cut."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 0  # of one that is met again on the way
            heights[name] = max((height(needed) + 1 for needed in needs(name)), default=0)
        return heights[name]

    for name in names:
        height(name)
    found: list[list[str]] = [[] for _ in range(max(heights.values(), default=-1) + 1)]
    for name, number in heights.items():
        found[number].append(name)
    return [group for group in found if group]


def circle(name: str, needs: Needs) -> list[str] | None:
    """The way from a model back to itself, through models each of which needs the next; None where there is none."""
    seen = {name}
    paths = [[name]]
    while paths:
        path = paths.pop()
        for needed in needs(path[-1]):
            if needed == name:
                return [*path, name]
            if needed not in seen:
                seen.add(needed)
                paths.append([*path, needed])
    return None


def dependents(changed: Iterable[str], needs: Mapping[str, Collection[str]]) -> list[str]:
    """Those that need one of the changed models, directly or not; each after those that it needs."""
    reached, found = set(changed), []
    for group in levels(needs, lambda name: needs.get(name, ())):
        for name in group:
            if not reached.isdisjoint(needs.get(name, ())):
                reached.add(name)
                found.append(name)
    return found


def last_first(models: Sequence[Model]) -> list[Model]:
    """Models so that each stands before those that it calls."""
    return sorted(models, key=lambda model: model.depth, reverse=True)
