"""What a configuration can be wrong in, by itself. The texts are Triton's, which clients compare.

Each check yields its complaints in the protocol's order and only the first is raised, so a check may rely on those
before it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.model_config import padding
from penstock.model_config.completion import BACKENDS, ENSEMBLE
from penstock.model_config.records import DATATYPE_OF, SPLIT_OVERSIZED

MOST_LEVELS = 1000  # of priority, each of which has a queue
MIN_COMPUTE_CAPABILITY = "6.0"

Control = pb.ModelSequenceBatching.Control


def validate(config: pb.ModelConfig, gpus: Sequence[int] = (), *, complete: bool = False) -> None:
    """Raise ServingError(INVALID) for the first mistake that can be seen without a model file or another model.

    `gpus` are the devices that can be used. A `complete` configuration has its instance groups, and its tensors are
    those of the model file: one without dims is a scalar, where a user who states none has forgotten them.
    """
    for complaint in _complaints(config, gpus, complete):
        raise ServingError(Kind.INVALID, complaint)


def _complaints(config: pb.ModelConfig, gpus: Sequence[int], complete: bool) -> Iterator[str]:
    yield from _identity(config)
    for kind, tensors in (("input", config.input), ("output", config.output)):
        yield from _tensors(config, kind, tensors, complete)
    if complete:
        yield from _batch_tensors(config)
        yield from padding.complaints(config)
    yield from _dynamic_batching(config)
    yield from _split_oversized(config)
    yield from _sequence_batching(config)
    yield from _ensemble(config)
    yield from _response_cache(config)
    yield from _metrics(config)
    if config.platform != ENSEMBLE:
        yield from _instance_groups(config, gpus, complete)


def _identity(config: pb.ModelConfig) -> Iterator[str]:
    if not config.name:
        yield "model configuration must specify 'name'"
    if not config.backend and config.platform != ENSEMBLE:
        yield f"unexpected platform type '{config.platform}' for {config.name}"
    wanted = {ENSEMBLE: ""} | {row.platform: name for name, row in BACKENDS.items()}
    named = config.platform in wanted or config.backend in BACKENDS
    if config.platform and named and wanted.get(config.platform) != config.backend:
        yield f"unexpected 'platform' and 'backend' pair, got:{config.platform}, {config.backend}"
    if config.max_batch_size < 0:
        yield f"'max_batch_size' must be non-negative value for {config.name}"


def _tensors(
    config: pb.ModelConfig, kind: str, tensors: Iterable[pb.ModelInput | pb.ModelOutput], complete: bool
) -> Iterator[str]:
    seen = set()
    for tensor in tensors:
        if not tensor.name:
            yield f"model {kind} must specify 'name' for {config.name}"
        what = f"model {kind} '{tensor.name}'"
        if tensor.name in seen:
            yield f"{what} is specified more than once for {config.name}"
        seen.add(tensor.name)
        if tensor.data_type not in DATATYPE_OF:
            yield f"{what} must specify 'data_type' for {config.name}"
        if not tensor.dims and not complete:
            yield f"{what} must specify 'dims' for {config.name}"
        # A dimension of 0 is not refused as Triton refuses it: ONNX Runtime runs it.
        if any(dim < -1 for dim in tensor.dims):
            yield (
                f"{what} dimension must be integer >= 1, or -1 to indicate a variable-size dimension for {config.name}"
            )
        if isinstance(tensor, pb.ModelInput):
            if tensor.format != pb.ModelInput.FORMAT_NONE and len(tensor.dims) != 3:
                yield f"{what} has a 'format', which needs 3 dims, but has {len(tensor.dims)} for {config.name}"
            if tensor.allow_ragged_batch and tensor.optional:
                yield f"{what} can not be both 'optional' and 'allow_ragged_batch' for {config.name}"
        if tensor.HasField("reshape"):
            yield from _reshape(config, what, list(tensor.dims), list(tensor.reshape.shape))


def _reshape(config: pb.ModelConfig, what: str, dims: list[int], shape: list[int]) -> Iterator[str]:
    if not shape and not config.max_batch_size:
        yield (
            f"{what} cannot have empty reshape for non-batching model as scalar tensors are not supported "
            f"for {config.name}"
        )
    if any(dim < 1 and dim != -1 for dim in shape):
        yield (
            f"{what} reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension "
            f"for {config.name}"
        )
    fixed, reshaped = _fixed_parts(dims), _fixed_parts(shape)
    if (len(fixed) == 1) != (len(reshaped) == 1):
        yield f"{what} has different size for dims and reshape for {config.name}"
    if len(fixed) != len(reshaped):
        yield f"{what} has different number of variable-size dimensions for dims and reshape for {config.name}"
    if fixed != reshaped:
        yield f"{what} has different size for dims and reshape for {config.name}"


def _fixed_parts(dims: list[int]) -> list[int]:
    """How many elements lie between one -1 and the next: [2, 4, -1, 6] gives [8, 6]."""
    stops = [-1, *(index for index, dim in enumerate(dims) if dim == -1), len(dims)]
    return [math.prod(dims[start + 1 : stop]) for start, stop in pairwise(stops)]


def _batch_tensors(config: pb.ModelConfig) -> Iterator[str]:
    """What is computed from a batch's composition, and what is divided by it. Triton adds no model's name here."""
    inputs, outputs = {tensor.name: tensor for tensor in config.input}, {tensor.name for tensor in config.output}
    for what, entries in (("input", config.batch_input), ("output", config.batch_output)):
        for entry in entries:
            if entry.kind not in type(entry).Kind.values():
                yield f"unknown batch {what} kind '{entry.kind}'"
            if len(entry.source_input) != 1:
                yield (
                    f"batch {what} kind '{type(entry).Kind.Name(entry.kind)}' expects 1 source input, "
                    f"got {len(entry.source_input)}"
                )
            if isinstance(entry, pb.BatchInput) and entry.data_type not in (pb.TYPE_INT32, pb.TYPE_FP32):
                yield "batch input data type must be TYPE_INT32 or TYPE_FP32"
            [source] = entry.source_input
            if source not in inputs:
                yield f"unknown source input name '{source}'"
            if inputs[source].optional:
                yield f"batch {what} kind '{type(entry).Kind.Name(entry.kind)}' needs '{source}', which is optional"
            seen = set()
            for target in entry.target_name:
                if what == "output" and target not in outputs:
                    yield f"unknown target output name '{target}'"
                if target in seen:
                    yield f"target {what} name '{target}' can only be specified once"
                seen.add(target)


def _dynamic_batching(config: pb.ModelConfig) -> Iterator[str]:
    if not config.HasField("dynamic_batching"):
        return
    batching, levels = config.dynamic_batching, config.dynamic_batching.priority_levels
    yield from _preferred_sizes(config, "dynamic", batching.preferred_batch_size)
    if levels:
        if levels > MOST_LEVELS:
            yield f"priority levels must be <= {MOST_LEVELS}, got {levels} for {config.name}"
        if not 1 <= batching.default_priority_level <= levels:
            yield f"default priority level must be in range [1, {levels}] for {config.name}"
        if not all(1 <= level <= levels for level in batching.priority_queue_policy):
            yield f"priority queue policy must have priority level in range [1, {levels}] for {config.name}"
    if batching.preserve_ordering:
        if levels > 1:
            yield f"Only one priority level is allowed when 'preserve_ordering' is true for {config.name}"
        for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
            if policy.default_timeout_microseconds and policy.timeout_action == pb.ModelQueuePolicy.DELAY:
                yield (
                    "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true "
                    f"for {config.name}"
                )


def _preferred_sizes(config: pb.ModelConfig, batcher: str, sizes: Iterable[int]) -> Iterator[str]:
    word = "batch size" if batcher == "sequence" else "size"
    for size in sizes:
        if size <= 0:
            yield f"{batcher} batching preferred {word} must be positive for {config.name}"
        if size > config.max_batch_size:
            yield f"{batcher} batching preferred {word} must be <= max batch size for {config.name}"


def _split_oversized(config: pb.ModelConfig) -> Iterator[str]:
    if SPLIT_OVERSIZED in config.parameters:
        said = config.parameters[SPLIT_OVERSIZED].string_value
        if said.lower() not in padding.TRUTHS:
            yield f"parameter '{SPLIT_OVERSIZED}' expects true or false, got '{said}' for {config.name}"


def _sequence_batching(config: pb.ModelConfig) -> Iterator[str]:
    if not config.HasField("sequence_batching"):
        return
    batching = config.sequence_batching
    if not 0 <= batching.direct.minimum_slot_utilization <= 1:
        yield f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {config.name}"
    yield from _preferred_sizes(config, "sequence", batching.oldest.preferred_batch_size)
    tensors, kinds = set(), set()
    for control_input in batching.control_input:
        if not control_input.name:
            yield f"sequence batching control tensor must have a name for {config.name}"
        if control_input.name in tensors:
            yield (
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control kinds "
                f"for {config.name}"
            )
        tensors.add(control_input.name)
        for control in control_input.control:
            kind = Control.Kind.Name(control.kind)
            if kind in kinds:
                yield f"sequence batching specifies multiple {kind} tensors for {config.name}"
            kinds.add(kind)
            yield from _control(config, kind, control)
        if len(control_input.control) > 1:
            yield (
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control kinds "
                f"for {config.name}"
            )
    for state in batching.state:
        yield from _state(state)


CORRELATION_ID_TYPES = (pb.TYPE_UINT64, pb.TYPE_INT64, pb.TYPE_UINT32, pb.TYPE_INT32, pb.TYPE_STRING)


def _control(config: pb.ModelConfig, kind: str, control: Control) -> Iterator[str]:
    values = {
        "int32_false_true": len(control.int32_false_true),
        "fp32_false_true": len(control.fp32_false_true),
        "bool_false_true": len(control.bool_false_true),
    }
    given = [name for name, length in values.items() if length]
    names, last = "'int32_false_true', 'fp32_false_true'", "'bool_false_true'"
    if control.kind == Control.CONTROL_SEQUENCE_CORRID:
        if given:
            yield f"sequence batching must not specify {names} or {last} for {kind} for {config.name}"
        if control.data_type not in CORRELATION_ID_TYPES:
            yield (
                f"unexpected data type for control {kind} for {config.name}. Allowed data types are TYPE_UINT64, "
                "TYPE_INT64, TYPE_UINT32, TYPE_INT32 and TYPE_STRING"
            )
        return
    if not given:
        yield f"sequence batching must specify either {names} or {last} for {kind} for {config.name}"
    if len(given) > 1:
        yield f"sequence batching specifies more than one from {names} and {last} for {kind} for {config.name}"
    for name in given:
        if values[name] != 2:
            yield f"sequence batching control '{name}' must have exactly 2 entries for {kind} for {config.name}"


def _state(state: pb.ModelSequenceBatching.State) -> Iterator[str]:
    name = state.input_name
    if state.data_type not in DATATYPE_OF:
        yield f"sequence batching state '{name}' must specify 'data_type'"
    if len(state.initial_state) > 1:
        yield (
            f"initial_state field for state input '{name}' must contain exactly one or zero element. "
            f"Found '{len(state.initial_state)}' elements."
        )
    for initial in state.initial_state:
        if initial.data_type != state.data_type:
            yield f"The data type used for 'initial_state' field of state '{name}' does not match the state data type."
        if not initial.name:
            yield f"Field 'name' must be set when using initial_state for state input '{name}'."
        if len(initial.dims) != len(state.dims):
            yield (
                f"Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state "
                f"input '{name}'. {len(initial.dims)} != {len(state.dims)}"
            )
        for got, expected in zip(initial.dims, state.dims, strict=True):
            if got == -1:
                yield f"'initial_state' field for state input name '{name}' contains variable dimensions."
            if expected not in (-1, got):
                yield (
                    f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. "
                    f"{got} != {expected}"
                )
        if initial.WhichOneof("state_data") is None:
            yield f"initial_state setting expects state'{name}' to have state_data set"


def _ensemble(config: pb.ModelConfig) -> Iterator[str]:
    if config.platform != ENSEMBLE:
        if config.HasField("ensemble_scheduling"):
            yield f"ensemble scheduling cannot be set for model '{config.name}' whose platform is not ensemble"
        return
    if not config.HasField("ensemble_scheduling"):
        yield f"ensemble scheduling must be set for ensemble {config.name} whose platform is ensemble"
    if config.instance_group:
        yield f"instance group should not be specified for ensemble '{config.name}'"
    if config.HasField("optimization"):
        yield f"optimization should not be specified for ensemble '{config.name}'"
    if config.model_warmup:
        yield f"model_warmup can not be specified for ensemble '{config.name}'"
    steps = config.ensemble_scheduling.step
    if not steps:
        yield f"must specify 'step' for ensemble '{config.name}'"
    written: set[str] = set()
    for index, step in enumerate(steps):
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield f"must specify '{field}' in step {index} of ensemble '{config.name}'"
        for tensor in step.output_map.values():
            if tensor in written:
                yield (
                    f"ensemble tensor '{tensor}' can appear in an output map only once "
                    f"for ensemble '{config.name}' step {index}"
                )
            written.add(tensor)
    yield from _data_flow(config, written)


def _data_flow(config: pb.ModelConfig, written: set[str]) -> Iterator[str]:
    """Whether every tensor of an ensemble is used, and every step can run once those before it have."""
    steps = config.ensemble_scheduling.step
    read = {tensor for step in steps for tensor in step.input_map.values()}
    outputs = {output.name for output in config.output}
    for source in config.input:
        if source.name not in read:
            yield f"ensemble input '{source.name}' for ensemble {config.name}' is not used"  # the quote is Triton's
    for output in config.output:
        if output.name not in written | read:
            yield f"ensemble output '{output.name}' for ensemble {config.name}' is not used"
    ready, waiting = {tensor.name for tensor in config.input}, list(steps)
    while runnable := [step for step in waiting if ready.issuperset(step.input_map.values())]:
        waiting = [step for step in waiting if step not in runnable]
        ready.update(tensor for step in runnable for tensor in step.output_map.values())
    missing = sorted({tensor for step in waiting for tensor in step.input_map.values()} - ready)
    reason = f", because nothing provides {', '.join(map(repr, missing))} to the steps that need it" if missing else ""
    for output in config.output:
        if output.name not in ready:
            yield f"output '{output.name}' for ensemble '{config.name}' is not written{reason}"
    if waiting:
        yield f"step of model '{waiting[0].model_name}' in ensemble '{config.name}' never runs{reason}"
    for step in steps:
        for tensor in step.output_map.values():
            if tensor not in read | outputs:
                yield f"ensemble tensor '{tensor}' is unused in ensemble '{config.name}'"


def _response_cache(config: pb.ModelConfig) -> Iterator[str]:
    if not config.response_cache.enable:
        return
    refusal = f"Response Cache does not currently support model {config.name} with"
    if config.HasField("sequence_batching"):
        yield f"{refusal} sequence batching scheduler. Please disable the response cache."
    if config.model_transaction_policy.decoupled:
        yield f"{refusal} 'decoupled' transaction policy. Please disable the response cache."


def _metrics(config: pb.ModelConfig) -> Iterator[str]:
    for control in config.model_metrics.metric_control:
        if not control.HasField("metric_identifier"):
            yield "metric control must specify 'metric_identifier'"
        if not control.metric_identifier.family:
            yield "metric identifier must specify non-empty 'family'"
        if not control.HasField("histogram_options"):
            yield "metric control must specify 'histogram_options'"
        if not control.histogram_options.buckets:
            yield "histogram options must specify non-empty 'buckets'"


def _instance_groups(config: pb.ModelConfig, gpus: Sequence[int], complete: bool) -> Iterator[str]:
    if complete and not config.instance_group:
        yield f"must specify one or more 'instance group's for {config.name}"
    for group in config.instance_group:
        what = f"instance group {group.name} of model {config.name}"
        if group.kind not in pb.ModelInstanceGroup.Kind.values():
            yield f"{what} has unknown kind {group.kind}"
        kind = pb.ModelInstanceGroup.Kind.Name(group.kind)
        if group.kind in (pb.ModelInstanceGroup.KIND_CPU, pb.ModelInstanceGroup.KIND_MODEL) and group.gpus:
            yield f"{what} has kind {kind} but specifies one or more GPUs"
        if group.kind != pb.ModelInstanceGroup.KIND_GPU:
            continue
        if not gpus:
            yield f"{what} has kind {kind} but no GPUs are available"
        if complete and not group.gpus:
            yield f"{what} has kind {kind} but specifies no GPUs"
        for gpu in group.gpus:
            if gpu not in gpus:
                yield (
                    f"{what} specifies invalid or unsupported gpu id {gpu}. GPUs with at least the minimum required "
                    f"CUDA compute compatibility of {MIN_COMPUTE_CAPABILITY} are: {', '.join(map(str, gpus))}"
                )
