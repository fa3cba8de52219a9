"""The runtime of ensembles: checks a graph against the models that it names, and opens it."""

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.model_config import TensorSpec, signature
from penstock.runtime import Host, Instance, Member, ModelFiles, Placement
from penstock.tensor import show

from penstock_runtimes.ensemble.graph import SINK, ForkError, Graph, Step
from penstock_runtimes.ensemble.instance import EnsembleInstance


class EnsembleRuntime:
    """It has no settings. Raises ServingError(INVALID) where it is given some."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        for key in settings:
            raise ServingError(Kind.INVALID, f"the ensemble runtime has no setting '{key}'")

    def complete(
        self,
        files: ModelFiles,  # noqa: ARG002
        config: pb.ModelConfig,
        place: Placement,  # noqa: ARG002
    ) -> pb.ModelConfig:
        """There is no file that could know more than the configuration, which states inputs and outputs."""
        return config

    def open(
        self,
        files: ModelFiles,
        config: pb.ModelConfig,
        place: Placement,  # noqa: ARG002 - its members have places of their own
        host: Host | None,
    ) -> Instance:
        """Raises ServingError(INVALID) where a member is not served, or does not fit."""
        assert host is not None, "an ensemble calls other models"
        steps = config.ensemble_scheduling.step
        members = [host.member(step.model_name, step.model_version) for step in steps]
        for complaint in complaints(config, members):
            raise ServingError(Kind.INVALID, complaint)
        graph = _graph(config, members)
        limit = config.ensemble_scheduling.max_inflight_requests
        if limit and (name := _waits_for_itself(config, graph)):
            raise ServingError(
                Kind.INVALID,
                f"in ensemble {config.name}, model {name} is decoupled and also runs for its own answers: "
                "with max_inflight_requests it could wait for itself",
            )
        for step, member in zip(steps, members, strict=True):
            for output, tensor in step.output_map.items():
                files.labels[tensor] = member.signature.outputs[output].labels
        return EnsembleInstance(config.name, files.version, graph, members, limit)


class _End(Struct, frozen=True):
    """Where an ensemble tensor begins or ends: what a model says of it."""

    model: str
    tensor: str
    spec: TensorSpec


def complaints(config: pb.ModelConfig, members: Sequence[Member]) -> Iterator[str]:
    """What a valid configuration and its members, by step, disagree about. The texts are Triton's."""
    where = f"in ensemble {config.name}"
    ends: list[_End] = []
    for step, member in zip(config.ensemble_scheduling.step, members, strict=True):
        takes, gives = member.signature.inputs, member.signature.outputs
        for name, tensor in step.input_map.items():
            if name not in takes:
                yield (
                    f"{where}, ensemble tensor {tensor} is mapping to non-existing input {name} in model {member.name}"
                )
            ends.append(_End(member.name, tensor, takes[name]))
        for name, tensor in step.output_map.items():
            if name not in gives:
                yield (
                    f"{where}, ensemble tensor {tensor} is mapped from non-existing output {name} "
                    f"in model {member.name}"
                )
            ends.append(_End(member.name, tensor, gives[name]))
        for name in takes:
            if name in member.signature.required and name not in step.input_map:
                yield f"{where}, input {name} in model {member.name} is not mapped to any ensemble tensors"
        most = member.signature.row_limit if member.signature.max_batch_size else 0
        if config.max_batch_size > most:
            yield (
                f"ensemble {config.name} allows maximum batch size {config.max_batch_size}, but it contains model "
                f"{member.name} which only allows maximum batch size to be {most}"
            )
    seen = signature(config)
    own = [_End(config.name, name, spec) for name, spec in (seen.inputs | seen.outputs).items()]
    first: dict[str, _End] = {end.tensor: end for end in reversed(own)}
    for end in ends:
        yield from _disagreement(where, first.setdefault(end.tensor, end), end)
    yield from _decoupling(config, members)


def _disagreement(where: str, one: _End, other: _End) -> Iterator[str]:
    """A size that either leaves open is compared with every request."""
    what = f"{where}, ensemble tensor {one.tensor}: inconsistent"
    left, right = one.spec, other.spec
    if left.datatype is not right.datatype:
        yield (
            f"{what} data type: {left.datatype.config_name} is inferred from model {one.model} while "
            f"{right.datatype.config_name} is inferred from model {other.model}"
        )
    if not _agree(left.shape, right.shape):
        yield (
            f"{what} shape: {show(left.shape)} is inferred from model {one.model} while {show(right.shape)} is "
            f"inferred from model {other.model}"
        )


def _agree(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    if len(left) != len(right):
        return not (left and right) and max(left, right) in ((1,), (-1,))  # a scalar, as [] or as [1]
    return all(-1 in (one, other) or one == other for one, other in zip(left, right, strict=True))


def _decoupling(config: pb.ModelConfig, members: Sequence[Member]) -> Iterator[str]:
    decoupled = sorted({member.name for member in members if member.decoupled})
    if decoupled and not config.model_transaction_policy.decoupled:
        yield (
            f"in ensemble {config.name}, model {decoupled[0]} is decoupled, so model_transaction_policy.decoupled of "
            "the ensemble must be true"
        )


def _graph(config: pb.ModelConfig, members: Sequence[Member]) -> Graph:
    steps = [
        Step(
            number,
            dict(step.input_map),
            dict(step.output_map),
            frozenset(member.signature.inputs.keys() - member.signature.required),
            member.decoupled,
        )
        for number, (step, member) in enumerate(zip(config.ensemble_scheduling.step, members, strict=True))
    ]
    try:
        return Graph(steps, [tensor.name for tensor in config.input], [tensor.name for tensor in config.output])
    except ForkError as fork:
        names = [config.ensemble_scheduling.step[number].model_name for number in fork.steps]
        reader = "the ensemble's answer" if fork.reader == SINK else f"step {fork.reader}"
        raise ServingError(
            Kind.INVALID,
            f"in ensemble {config.name}, {reader} takes tensors of two decoupled models, {names[0]} and {names[1]}, "
            "whose answers do not belong to each other",
        ) from fork


def _waits_for_itself(config: pb.ModelConfig, graph: Graph) -> str | None:
    """A decoupled model that runs again behind itself."""
    names = [step.model_name for step in config.ensemble_scheduling.step]
    for first in graph.steps.values():
        behind = [number for number in graph.steps if graph.levels[number] > graph.levels[first.number]]
        if first.decoupled and names[first.number] in [names[number] for number in behind]:
            return names[first.number]
    return None
