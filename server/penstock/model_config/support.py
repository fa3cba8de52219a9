"""Which fields of a model configuration are honoured. One row each: documentation and refusals are read from it."""

from collections.abc import Iterator
from enum import Enum

from google.protobuf.message import Message
from msgspec import Struct

from penstock import pb
from penstock.errors import Kind, ServingError


class Support(Enum):
    DONE = "done"
    PLANNED = "planned"
    REFUSED = "refused"


class Field(Struct, frozen=True):
    """A field by its path from `ModelConfig`. A row that is not done stands for everything below it too."""

    path: str
    support: Support
    note: str = ""
    only_slower: bool = False  # without it answers stay the same: a load warns instead of failing
    presence: bool = False  # of a message: it means something even when it is empty
    refused_by: str = ""  # a backend that cannot honour it, though others can


def _done(path: str, note: str = "") -> Field:
    return Field(path, Support.DONE, note)


def _of_onnx(path: str, note: str = "") -> Field:
    return Field(path, Support.DONE, note, refused_by="handler")


def _planned(path: str, note: str = "", *, only_slower: bool = False, presence: bool = False) -> Field:
    return Field(path, Support.PLANNED, note, only_slower, presence)


def _refused(path: str, note: str) -> Field:
    return Field(path, Support.REFUSED, note)


_ENGINE = "a setting of TensorRT engine files, which Penstock does not serve"

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
        _of_onnx("input.allow_ragged_batch", "the model's input has the shape [-1]"),
        _done("input.optional", "an initialiser of the file that is a graph input too"),
        _refused("input.is_non_linear_format_io", _ENGINE),
        _done("output.name"),
        _done("output.data_type"),
        _done("output.dims"),
        _done("output.reshape.shape"),
        _done("output.label_filename", "labels of the classification extension"),
        _refused("output.is_shape_tensor", _ENGINE),
        _refused("output.is_non_linear_format_io", _ENGINE),
        _of_onnx("batch_input.kind", "every kind"),
        _of_onnx("batch_input.target_name"),
        _of_onnx("batch_input.data_type"),
        _of_onnx("batch_input.source_input"),
        _of_onnx("batch_output.target_name"),
        _of_onnx("batch_output.kind"),
        _of_onnx("batch_output.source_input"),
        _done("optimization.graph.level", "-1 basic, 0 all, 1 extended, 2 none"),
        _refused("optimization.priority", _ENGINE),
        _refused("optimization.cuda.graphs", "TensorRT engines only in Triton too; the parameter cuda_graph does it"),
        _refused("optimization.cuda.busy_wait_events", _ENGINE),
        _refused("optimization.cuda.graph_spec", _ENGINE),
        _refused("optimization.cuda.output_copy_stream", _ENGINE),
        _done("optimization.execution_accelerators.gpu_execution_accelerator.name"),
        _done("optimization.execution_accelerators.gpu_execution_accelerator.parameters"),
        _done("optimization.execution_accelerators.cpu_execution_accelerator.name"),
        _done("optimization.execution_accelerators.cpu_execution_accelerator.parameters"),
        _done("optimization.input_pinned_memory.enable", "a hint: on a GPU tensors always pass through pinned memory"),
        _done("optimization.output_pinned_memory.enable", "a hint: on a GPU tensors always pass through pinned memory"),
        _refused("optimization.gather_kernel_buffer_threshold", "tunes a CUDA kernel that only Triton has"),
        _planned("optimization.eager_batching", "batches are joined once their instance is free", only_slower=True),
        _done("dynamic_batching.preferred_batch_size"),
        _done("dynamic_batching.max_queue_delay_microseconds"),
        _done("dynamic_batching.preserve_ordering"),
        _done("dynamic_batching.priority_levels"),
        _done("dynamic_batching.default_priority_level"),
        *(
            _done(f"dynamic_batching.{policy}.{name}", note)
            for policy in ("default_queue_policy", "priority_queue_policy")
            for name, note in (
                ("timeout_action", ""),
                ("default_timeout_microseconds", "exact, also while all instances are busy"),
                ("allow_timeout_override", "a request may shorten the timeout"),
                ("max_queue_size", "exact"),
            )
        ),
        _done("sequence_batching.max_sequence_idle_microseconds", "counts from the last answer, too"),
        _done("sequence_batching.control_input.name"),
        *(
            _done(f"sequence_batching.control_input.control.{name}")
            for name in ("kind", "int32_false_true", "fp32_false_true", "bool_false_true", "data_type")
        ),
        _done("sequence_batching.direct.max_queue_delay_microseconds"),
        _done("sequence_batching.direct.minimum_slot_utilization"),
        _done("sequence_batching.oldest.max_candidate_sequences", "of each instance; 0 means `max_batch_size`"),
        _done("sequence_batching.oldest.preferred_batch_size"),
        _done("sequence_batching.oldest.max_queue_delay_microseconds"),
        _done("sequence_batching.oldest.preserve_ordering"),
        _done("sequence_batching.state.input_name"),
        _done("sequence_batching.state.output_name"),
        _done("sequence_batching.state.data_type"),
        _done("sequence_batching.state.dims"),
        _done("sequence_batching.state.initial_state.data_type"),
        _done("sequence_batching.state.initial_state.dims"),
        _done("sequence_batching.state.initial_state.zero_data", "what a state without `initial_state` begins as, too"),
        _done("sequence_batching.state.initial_state.data_file", "one row, below `initial_state/` in the directory"),
        _done("sequence_batching.state.initial_state.name"),
        _planned(
            "sequence_batching.state.use_same_buffer_for_input_output",
            "state goes from run to run as new arrays",
            only_slower=True,
        ),
        _planned(
            "sequence_batching.state.use_growable_memory", "state goes from run to run as new arrays", only_slower=True
        ),
        _refused("sequence_batching.iterative_sequence", "needs a model that says when a request is done"),
        _done("ensemble_scheduling.step.model_name"),
        _done("ensemble_scheduling.step.model_version", "the highest that serves for -1, and where none is stated"),
        _done("ensemble_scheduling.step.input_map"),
        _done("ensemble_scheduling.step.output_map"),
        _refused("ensemble_scheduling.step.model_namespace", "models have no namespaces"),
        _done("ensemble_scheduling.max_inflight_requests", "of each step, for one request to the ensemble"),
        _done("instance_group.name"),
        _done("instance_group.kind"),
        _done("instance_group.count"),
        _done("instance_group.rate_limiter.resources.name", "with `--rate-limit execution_count`"),
        _done("instance_group.rate_limiter.resources.global"),
        _done("instance_group.rate_limiter.resources.count"),
        _done("instance_group.rate_limiter.priority"),
        _done("instance_group.gpus"),
        _refused("instance_group.secondary_devices", _ENGINE),
        _refused("instance_group.profile", _ENGINE),
        _done("instance_group.passive", "its instances are not opened"),
        _planned("instance_group.host_policy"),
        _done("default_model_filename"),
        _planned("cc_model_filenames"),
        _done("metric_tags", "labels `_KEY` on every series of the model"),
        _done("parameters.string_value", "settings of the runtime, by key; keys it does not know are information"),
        _done("parameters[split_oversized]", "a request over `max_batch_size` runs in parts instead of being refused"),
        _done("parameters[pad.INPUT.axis]", "with `.value`, `.buckets`: requests of different lengths share a batch"),
        _done("parameters[cut.OUTPUT.axis]", "with `.input`: the output's axis that is as long as the padded one"),
        _done("model_warmup.name"),
        _done("model_warmup.batch_size", "0 skips the sample"),
        _done("model_warmup.inputs.data_type"),
        _done("model_warmup.inputs.dims"),
        _done("model_warmup.inputs.zero_data"),
        _done("model_warmup.inputs.random_data", "numbers from 0 to 1, any integers; of BYTES, empty elements"),
        _done("model_warmup.inputs.input_data_file", "one row, below `warmup/` in the model's directory"),
        _done("model_warmup.count"),
        _planned("model_operations"),
        Field(
            "model_transaction_policy.decoupled",
            Support.DONE,
            "of handler models, where it is completed for generators; ONNX models answer once",
            refused_by="onnxruntime",
        ),
        _refused("model_repository_agents", "agents are shared libraries of Triton"),
        _done("response_cache.enable", "needs `--cache-config`"),
        _done(
            "model_metrics.metric_control.metric_identifier.family",
            "`nv_inference_first_response_histogram_ms`; others change nothing, with a warning",
        ),
        _done("model_metrics.metric_control.histogram_options.buckets"),
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
        if field.message_type and (row is None or row.only_slower):
            keyed = field.message_type.GetOptions().map_entry
            for item in value.values() if keyed else value if field.is_repeated else [value]:
                yield from _unsupported(item, f"{prefix}{field.name}.", backend)


def markdown() -> str:
    """`FIELDS` as a Markdown table."""
    rows = [f"| `{row.path}` | {row.support.value} | {row.note} |" for row in FIELDS.values()]
    return "\n".join(("| Field | Support | Note |", "|---|---|---|", *rows, ""))
