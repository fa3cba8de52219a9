"""Which fields of a model configuration are honoured. One row each: documentation and refusals are read from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from google.protobuf.message import Message

from penstock import pb
from penstock.errors import Kind, ServingError


class Support(Enum):
    DONE = "done"
    PLANNED = "planned"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """A field by its path from `ModelConfig`. A row that is not done stands for everything below it too."""

    path: str
    support: Support
    note: str = ""
    only_slower: bool = False  # without it answers stay the same: a load warns instead of failing
    presence: bool = False  # of a message: it means something even when it is empty
    refused_by: str = ""  # a backend that cannot honour it, though others can


def _done(path: str, note: str = "") -> Field:
    return Field(path, Support.DONE, note)


def _planned(path: str, note: str = "", *, only_slower: bool = False, presence: bool = False) -> Field:
    return Field(path, Support.PLANNED, note, only_slower, presence)


def _refused(path: str, note: str) -> Field:
    return Field(path, Support.REFUSED, note)


_ENGINE = "a setting of TensorRT engine files, which Penstock does not serve"
_ONE_BY_ONE = "until then requests run one by one, with the same answers"

FIELDS: dict[str, Field] = {
    row.path: row
    for row in (
        _done("name", "equal to the directory's name, or left out"),
        _done("platform", "shown in the metadata"),
        _done("backend", "the name of a runtime"),
        _refused("runtime", "names a shared library of Triton; a runtime is found by `backend`"),
        _done("version_policy.latest.num_versions"),
        _done("version_policy.all"),
        _done("version_policy.specific.versions"),
        _done("max_batch_size"),
        _done("input.name"),
        _done("input.data_type"),
        _done("input.format", "information for clients"),
        _done("input.dims"),
        _done("input.reshape.shape"),
        _refused("input.is_shape_tensor", _ENGINE),
        _planned("input.allow_ragged_batch"),
        _done("input.optional", "of models without a batch axis"),
        _refused("input.is_non_linear_format_io", _ENGINE),
        _done("output.name"),
        _done("output.data_type"),
        _done("output.dims"),
        _done("output.reshape.shape"),
        _done("output.label_filename", "labels of the classification extension"),
        _refused("output.is_shape_tensor", _ENGINE),
        _refused("output.is_non_linear_format_io", _ENGINE),
        _planned("batch_input"),
        _planned("batch_output"),
        _done("optimization.graph.level", "-1 basic, 0 all, 1 extended, 2 none"),
        _refused("optimization.priority", _ENGINE),
        _refused("optimization.cuda.graphs", _ENGINE),
        _refused("optimization.cuda.busy_wait_events", _ENGINE),
        _refused("optimization.cuda.graph_spec", _ENGINE),
        _refused("optimization.cuda.output_copy_stream", _ENGINE),
        _done("optimization.execution_accelerators.gpu_execution_accelerator.name"),
        _done("optimization.execution_accelerators.gpu_execution_accelerator.parameters"),
        _done("optimization.execution_accelerators.cpu_execution_accelerator.name"),
        _done("optimization.execution_accelerators.cpu_execution_accelerator.parameters"),
        _done("optimization.input_pinned_memory.enable", "a hint: ONNX Runtime stages copies by itself"),
        _done("optimization.output_pinned_memory.enable", "a hint: ONNX Runtime stages copies by itself"),
        _refused("optimization.gather_kernel_buffer_threshold", "tunes a CUDA kernel that only Triton has"),
        _planned("optimization.eager_batching", _ONE_BY_ONE, only_slower=True),
        _planned("dynamic_batching", _ONE_BY_ONE, only_slower=True, presence=True),
        _planned("dynamic_batching.preferred_batch_size", _ONE_BY_ONE, only_slower=True),
        _planned("dynamic_batching.max_queue_delay_microseconds", _ONE_BY_ONE, only_slower=True),
        _planned("dynamic_batching.preserve_ordering"),
        _planned("dynamic_batching.priority_levels"),
        _planned("dynamic_batching.default_priority_level"),
        _planned("dynamic_batching.default_queue_policy"),
        _planned("dynamic_batching.priority_queue_policy"),
        _planned("sequence_batching", presence=True),
        _planned("ensemble_scheduling", presence=True),
        _done("instance_group.name"),
        _done("instance_group.kind"),
        _done("instance_group.count"),
        _planned("instance_group.rate_limiter"),
        _done("instance_group.gpus"),
        _refused("instance_group.secondary_devices", _ENGINE),
        _refused("instance_group.profile", _ENGINE),
        _planned("instance_group.passive"),
        _planned("instance_group.host_policy"),
        _done("default_model_filename"),
        _planned("cc_model_filenames"),
        _planned("metric_tags"),
        _done("parameters.string_value", "settings of the runtime, by key; keys it does not know are information"),
        _planned("parameters[split_oversized]", "a request over `max_batch_size` is refused until then"),
        _planned("model_warmup"),
        _planned("model_operations"),
        Field(
            "model_transaction_policy.decoupled",
            Support.DONE,
            "of handler models, where it is completed for generators; ONNX models answer once",
            refused_by="onnxruntime",
        ),
        _refused("model_repository_agents", "agents are shared libraries of Triton"),
        _planned("response_cache.enable"),
        _planned("model_metrics"),
    )
}


def refuse_unsupported(config: pb.ModelConfig) -> list[str]:
    """Check a configuration, as its author states it, against `FIELDS`; a field at its default is never refused.

    Returns one warning for each field that is planned and without which answers are the same, only slower.
    Raises ServingError(UNSUPPORTED) that names every other field that is not honoured.
    """
    found = list(dict.fromkeys(_unsupported(config, "", config.backend)))
    refusals = [_refusal(field) for field in found if not field.only_slower]
    if refusals:
        raise ServingError(Kind.UNSUPPORTED, f"model '{config.name}': {'; '.join(refusals)}")
    return [f"model '{config.name}': config field '{field.path}' has no effect yet: {field.note}" for field in found]


def _refusal(field: Field) -> str:
    yet = " yet" if field.support is Support.PLANNED else ""
    note = f": {field.note}" if field.note else ""
    return f"config field '{field.path}' is not supported{yet}{note}"


def _unsupported(message: Message, prefix: str, backend: str) -> Iterator[Field]:
    """The rows, in declaration order, of fields that are set to something with an effect and not done for `backend`."""
    present = {field.name: value for field, value in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.name not in present:
            continue
        value = present[field.name]
        row = FIELDS.get(prefix + field.name)
        effective = not isinstance(value, Message) or value.ByteSize() > 0
        is_done = row is None or (row.support is Support.DONE and not (backend and row.refused_by == backend))
        if row and not is_done and (effective or row.presence):
            yield row
        if field.name == "parameters" and not prefix:
            yield from (row for key, parameter in value.items() if (row := _parameter(key, parameter.string_value)))
        elif field.message_type and (row is None or row.only_slower):
            for item in value if field.is_repeated else [value]:
                yield from _unsupported(item, f"{prefix}{field.name}.", backend)


def _parameter(key: str, value: str) -> Field | None:
    return FIELDS.get(f"parameters[{key}]") if value.lower() in ("1", "true") else None


def markdown() -> str:
    """`FIELDS` as a Markdown table."""
    rows = [f"| `{row.path}` | {row.support.value} | {row.note} |" for row in FIELDS.values()]
    return "\n".join(("| Field | Support | Note |", "|---|---|---|", *rows, ""))
