"""What the hot path reads of a configuration: frozen, and looked up by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from penstock import pb
from penstock.tensor import BY_CONFIG_NAME, Datatype

# The datatype of a tensor by its number in a configuration.
DATATYPE_OF: dict[int, Datatype] = {pb.DataType.Value(name): row for name, row in BY_CONFIG_NAME.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model, as a client sees it."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]  # as configured, without the batch axis; -1 is any
    shape: tuple[int, ...]  # as on the wire and in the metadata: with a leading -1 where the model batches
    labels: tuple[str, ...] = ()  # of an output, by class index
    optional: bool = False  # an input that a request may leave out


@dataclass(frozen=True, slots=True)
class Signature:
    """All that a request must agree with. Inputs and outputs stand in the order of the configuration."""

    model: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    required: frozenset[str]  # the inputs that are not optional
    max_batch_size: int  # 0: the model has no batch axis
    row_limit: int  # rows that one request may have


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """Instances on one kind of device."""

    name: str
    kind: str  # KIND_CPU, KIND_GPU or KIND_MODEL
    count: int  # on each GPU, or in total
    gpus: tuple[int, ...]


def signature(config: pb.ModelConfig, labels: Mapping[str, tuple[str, ...]] | None = None) -> Signature:
    """The signature of a complete and valid configuration. `labels` are the lines of label files, by output."""
    leading = (-1,) if config.max_batch_size else ()

    def spec(tensor: pb.ModelInput | pb.ModelOutput) -> TensorSpec:
        dims = tuple(tensor.dims)
        datatype = DATATYPE_OF[tensor.data_type]
        if isinstance(tensor, pb.ModelInput):
            return TensorSpec(tensor.name, datatype, dims, leading + dims, optional=tensor.optional)
        return TensorSpec(tensor.name, datatype, dims, leading + dims, (labels or {}).get(tensor.name, ()))

    return Signature(
        model=config.name,
        inputs={tensor.name: spec(tensor) for tensor in config.input},
        outputs={tensor.name: spec(tensor) for tensor in config.output},
        required=frozenset(tensor.name for tensor in config.input if not tensor.optional),
        max_batch_size=config.max_batch_size,
        row_limit=config.max_batch_size,
    )


def instance_groups(config: pb.ModelConfig) -> tuple[InstanceGroup, ...]:
    """The instance groups of a complete and valid configuration."""
    return tuple(
        InstanceGroup(group.name, pb.ModelInstanceGroup.Kind.Name(group.kind), group.count, tuple(group.gpus))
        for group in config.instance_group
    )
