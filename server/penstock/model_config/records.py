"""What the hot path reads of a configuration: frozen, and looked up by name."""

from collections.abc import Mapping

from msgspec import Struct

from penstock import pb
from penstock.model_config.padding import TRUTHS, Padding, paddings
from penstock.tensor import BY_CONFIG_NAME, Datatype

# The datatype of a tensor by its number in a configuration.
DATATYPE_OF: dict[int, Datatype] = {pb.DataType.Value(name): row for name, row in BY_CONFIG_NAME.items()}
SPLIT_OVERSIZED = "split_oversized"  # the parameter


class TensorSpec(Struct, frozen=True):
    """An input or output of a model, as a client sees it."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]  # as configured, without the batch axis; -1 is any
    shape: tuple[int, ...]  # as on the wire and in the metadata: with a leading -1 where the model batches
    labels: tuple[str, ...] = ()  # of an output, by class index
    optional: bool = False  # an input that a request may leave out


class Signature(Struct, frozen=True):
    """All that a request must agree with. Inputs and outputs stand in the order of the configuration."""

    model: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    required: frozenset[str]  # the inputs that are not optional
    max_batch_size: int  # 0: the model has no batch axis
    row_limit: int  # rows that one request may have
    sequences: bool = False  # whether every request belongs to one


class QueuePolicy(Struct, frozen=True):
    """How requests of one priority level wait."""

    timeout_ns: int = 0  # in the queue; 0: none
    delays: bool = False  # what has timed out goes behind the others of its level, instead of being refused
    may_shorten: bool = False  # whether a request's own `timeout` counts, where it is the shorter one
    max_size: int = 0  # requests that wait; 0: any number


class BatchPolicy(Struct, frozen=True):
    """What may run together, and how long it waits for more. Message `ModelDynamicBatching`."""

    max_rows: int  # of a batch
    preferred_rows: tuple[int, ...] = ()  # sizes at which a batch leaves at once
    delay_ns: int = 0  # that the oldest request waits for the batch to grow
    preserve_ordering: bool = False  # answers leave in the order of their requests
    levels: tuple[QueuePolicy, ...] = (QueuePolicy(),)  # by priority, the most urgent first
    default_level: int = 0  # index into `levels`
    varying: tuple[str, ...] = ()  # inputs that requests may have in different shapes, or leave out
    ragged: tuple[str, ...] = ()  # those of them that share a batch whatever their shapes
    paddings: tuple[Padding, ...] = ()  # of those that share a batch though one axis differs


class Resource(Struct, frozen=True):
    """So much of something that an instance needs while it runs."""

    name: str
    count: int
    everywhere: bool = False  # there is one pool for the server, and not one for each device


class RateLimit(Struct, frozen=True):
    """When an instance may run, where rates are limited. Message `ModelRateLimiter`."""

    resources: tuple[Resource, ...] = ()
    priority: int = 1  # 2 runs half as often as 1


class InstanceGroup(Struct, frozen=True):
    """Instances on one kind of device."""

    name: str
    kind: str  # KIND_CPU, KIND_GPU or KIND_MODEL
    count: int  # on each GPU, or in total
    gpus: tuple[int, ...]
    passive: bool = False  # its instances are not opened
    rate_limit: RateLimit = RateLimit()


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
        sequences=config.HasField("sequence_batching"),
    )


def splits_oversized(config: pb.ModelConfig) -> bool:
    """Whether a valid configuration lets a request have more rows than a batch."""
    return SPLIT_OVERSIZED in config.parameters and TRUTHS[config.parameters[SPLIT_OVERSIZED].string_value.lower()]


def instance_groups(config: pb.ModelConfig) -> tuple[InstanceGroup, ...]:
    """The instance groups of a complete and valid configuration."""
    return tuple(
        InstanceGroup(
            group.name,
            pb.ModelInstanceGroup.Kind.Name(group.kind),
            group.count,
            tuple(group.gpus),
            group.passive,
            _rate_limit(group.rate_limiter),
        )
        for group in config.instance_group
    )


def batch_policy(config: pb.ModelConfig) -> BatchPolicy | None:
    """How a complete and valid configuration batches; None where requests run one by one, in their order."""
    if not config.HasField("dynamic_batching"):
        return None
    batching = config.dynamic_batching
    numbers = range(1, max(1, batching.priority_levels) + 1)
    stated = batching.priority_queue_policy
    return BatchPolicy(
        max_rows=max(1, config.max_batch_size),
        preferred_rows=tuple(batching.preferred_batch_size),
        delay_ns=batching.max_queue_delay_microseconds * 1000,
        preserve_ordering=batching.preserve_ordering,
        levels=tuple(_queue_policy(stated.get(number, batching.default_queue_policy)) for number in numbers),
        default_level=max(0, batching.default_priority_level - 1),
        varying=tuple(tensor.name for tensor in config.input if tensor.optional or any(dim < 0 for dim in tensor.dims)),
        ragged=tuple(tensor.name for tensor in config.input if tensor.allow_ragged_batch),
        paddings=paddings(config),
    )


def _queue_policy(policy: pb.ModelQueuePolicy) -> QueuePolicy:
    return QueuePolicy(
        timeout_ns=policy.default_timeout_microseconds * 1000,
        delays=policy.timeout_action == pb.ModelQueuePolicy.DELAY,
        may_shorten=policy.allow_timeout_override,
        max_size=policy.max_queue_size,
    )


def _rate_limit(limiter: pb.ModelRateLimiter) -> RateLimit:
    resources = [Resource(entry.name, entry.count, getattr(entry, "global")) for entry in limiter.resources]
    return RateLimit(tuple(resources), limiter.priority or 1)
