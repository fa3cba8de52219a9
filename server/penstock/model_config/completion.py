"""What a configuration leaves open and the server fills in, without a look at the model file."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from msgspec import Struct

from penstock import pb
from penstock.errors import Kind, ServingError

ENSEMBLE = "ensemble"  # the platform of a graph of models, which has no backend


class Choice(Struct, frozen=True):
    """A value that nobody stated, and why it was taken."""

    field: str  # its path in the configuration, such as `instance_group[0].count`, or a name of its own
    value: str | int
    reason: str  # goes on after "because"


Note: TypeAlias = Callable[[str, str | int, str], None]  # is told the parts of a Choice where one is made


def unheard(_field: str, _value: str | int, _reason: str) -> None:
    """The Note for those who need no reasons."""


class Backend(Struct, frozen=True):
    """What the protocol says of a backend by its name."""

    platform: str
    filenames: tuple[str, ...]  # the one that is there is the model file; the first where none is
    instances_on_cpu: int  # of a group that does not say how many
    suffix: str = ""  # by which files of this backend alone are known
    pads: bool = False  # whether the parameters `pad.` and `cut.` are for it

    def filename(self, files: Collection[str]) -> str:
        return next((name for name in self.filenames if name in files), self.filenames[0])


BACKENDS = {
    "onnxruntime": Backend("onnxruntime_onnx", ("model.onnx",), instances_on_cpu=2, suffix=".onnx", pads=True),
    "handler": Backend("handler", ("handler.py", "rp_handler.py"), instances_on_cpu=1),
}


def identify(config: pb.ModelConfig, directory: str, files: Collection[str], note: Note = unheard) -> pb.ModelConfig:
    """Fill in name, backend, platform and file name: auto-complete, step A.

    `directory` is the name of the model's directory, `files` are the names in its first version's directory.
    Raises ServingError(INVALID) if the names differ, or if nothing says which backend the model is for.
    """
    config = _copy(config)
    if config.name and config.name != directory:
        raise ServingError(
            Kind.INVALID,
            f"unexpected directory name '{directory}' for model '{config.name}', directory name must equal model name",
        )
    if not config.name:
        config.name = directory
        note("name", directory, "its directory or file is called so")
    if config.platform == ENSEMBLE:
        return config
    if not config.backend:
        for name, row in BACKENDS.items():
            if reason := _belonging(config, row, files):
                config.backend = name
                note("backend", name, reason)
                break
    # A platform without a backend is for `validate` to refuse: it names the platform.
    if not config.backend and not config.platform:
        raise ServingError(
            Kind.INVALID,
            f"Invalid model name: Could not determine backend for model '{directory}' with no backend in model "
            "configuration. Expected model name of the form 'model.<backend_name>'.",
        )
    if backend := BACKENDS.get(config.backend):
        for field, value in (("platform", backend.platform), ("default_model_filename", backend.filename(files))):
            if not getattr(config, field):
                setattr(config, field, value)
                note(field, value, f"it is that of backend {config.backend}")
    return config


def _belonging(config: pb.ModelConfig, backend: Backend, files: Collection[str]) -> str:
    """Why a model is for `backend`; "" where nothing says that it is."""
    if config.platform == backend.platform:
        return f"the platform is {backend.platform}"
    named = config.default_model_filename
    if named in backend.filenames or (backend.suffix and named.endswith(backend.suffix)):
        return f"the model file is called {config.default_model_filename}"
    filename = backend.filename(files)
    if not config.platform and not config.default_model_filename and filename in files:
        return f"there is a model file {filename}"
    return ""


def normalise(config: pb.ModelConfig, gpus: Sequence[int] = (), note: Note = unheard) -> pb.ModelConfig:
    """Write out the defaults that a client shall see: auto-complete, step C.

    `gpus` are the devices that can be used.
    """
    config = _copy(config)
    if config.version_policy.WhichOneof("policy_choice") is None:
        config.version_policy.latest.num_versions = 1
        note("version_policy", "latest 1", "no policy is stated")
    _fill_batching(config, note)
    if config.platform != ENSEMBLE:
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            if not config.optimization.HasField(memory):
                getattr(config.optimization, memory).enable = True
                note(f"optimization.{memory}.enable", "true", "that is the protocol's default")
        _fill_groups(config, gpus, note)
    return config


def _fill_batching(config: pb.ModelConfig, note: Note) -> None:
    scheduling = config.WhichOneof("scheduling_choice")
    if scheduling == "dynamic_batching":
        _fill_preferred(config, "dynamic_batching", config.dynamic_batching, note)
    elif scheduling == "sequence_batching":
        batching = config.sequence_batching
        if not batching.max_sequence_idle_microseconds:
            batching.max_sequence_idle_microseconds = 1_000_000
            field = "sequence_batching.max_sequence_idle_microseconds"
            note(field, 1_000_000, "that is the protocol's default")
        if batching.HasField("oldest"):
            _fill_preferred(config, "sequence_batching.oldest", batching.oldest, note)


def _fill_preferred(
    config: pb.ModelConfig,
    field: str,
    batching: pb.ModelDynamicBatching | pb.ModelSequenceBatching.StrategyOldest,
    note: Note,
) -> None:
    if config.max_batch_size > 0 and not batching.preferred_batch_size:
        batching.preferred_batch_size.append(config.max_batch_size)
        note(f"{field}.preferred_batch_size", config.max_batch_size, "it is max_batch_size")


def _fill_groups(config: pb.ModelConfig, gpus: Sequence[int], note: Note) -> None:
    groups = config.instance_group
    if not groups:
        groups.add(name=config.name)
        note("instance_group[0].name", config.name, "no group is stated, so there is one with the model's name")
    backend = BACKENDS.get(config.backend)
    for index, group in enumerate(groups):
        field = f"instance_group[{index}]"
        if not group.name:
            group.name = f"{config.name}_{index}"
            note(f"{field}.name", group.name, "the group has no name")
        if group.kind == pb.ModelInstanceGroup.KIND_AUTO:
            on_gpu = bool(gpus) and set(group.gpus) <= set(gpus)
            group.kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
            refused = "it names GPUs that cannot be used" if gpus else "no GPU is to be used"
            reason = "its GPUs can be used" if on_gpu else refused
            note(f"{field}.kind", pb.ModelInstanceGroup.Kind.Name(group.kind), reason)
        if group.count < 1:
            on_cpu = group.kind == pb.ModelInstanceGroup.KIND_CPU
            group.count = backend.instances_on_cpu if backend and on_cpu else 1
            where = f"on CPUs of backend {config.backend}" if on_cpu else "on each GPU"
            note(f"{field}.count", group.count, f"it is the protocol's default {where}")
        if group.kind == pb.ModelInstanceGroup.KIND_GPU and not group.gpus:
            group.gpus.extend(gpus)
            note(f"{field}.gpus", ", ".join(map(str, gpus)), "these are the GPUs to use")


def _copy(config: pb.ModelConfig) -> pb.ModelConfig:
    copy = pb.ModelConfig()
    copy.CopyFrom(config)
    return copy
