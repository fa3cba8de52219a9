"""The runtime of ONNX models: completes configurations from the file and opens instances."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace
from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.runtime import Host, Instance, ModelFiles, Placement

from penstock_runtimes.onnx import assembly, binding, idle, memory, parameters, providers, sequences, session, signature
from penstock_runtimes.onnx.binding import Binding
from penstock_runtimes.onnx.faults import Context
from penstock_runtimes.onnx.idle import Shrinker
from penstock_runtimes.onnx.instance import OnnxInstance
from penstock_runtimes.onnx.memory import Memory
from penstock_runtimes.onnx.parameters import Parameters
from penstock_runtimes.onnx.sequences import SequenceInstance
from penstock_runtimes.onnx.signature import OnnxSignature

logger = logging.getLogger(__name__)

BATCH_SETTING = "default-max-batch-size"
SETTINGS = (BATCH_SETTING, *parameters.SESSION, *parameters.CUDA, *parameters.BINDING)

On: TypeAlias = Callable[[Placement], Memory | None]


class Build(Protocol):
    """Makes a session and says which device runs it, as `session.build`."""

    def __call__(
        self, files: ModelFiles, config: pb.ModelConfig, place: Placement, defaults: Mapping[str, str], *, stream: int
    ) -> tuple[Any, str]: ...


class Opened(Struct, frozen=True):
    """A session, the device that runs it, what it found in the file, and on a GPU its memory there."""

    session: Any
    device: str
    found: OnnxSignature
    memory: Memory | None


class OnnxRuntime:
    """Settings (`--backend-config onnxruntime,KEY=VALUE`): `default-max-batch-size`, and defaults for the parameters
    that a model's configuration may have, such as `intra_op_thread_count`.

    Raises ServingError(INVALID) for other keys and for values that they cannot have. `build` makes sessions,
    `memory_on` the memory that a new instance has on its device.
    """

    def __init__(self, settings: Mapping[str, str], build: Build = session.build, memory_on: On = memory.on) -> None:
        for key in settings:
            if key not in SETTINGS:
                raise ServingError(
                    Kind.INVALID, f"the onnxruntime runtime has no setting '{key}'; there are: {', '.join(SETTINGS)}"
                )
        own = Parameters("the onnxruntime runtime", settings)
        self._batch_size = own.integer(BATCH_SETTING) or 0
        self._defaults = {key: value for key, value in settings.items() if key != BATCH_SETTING}
        # Read once without a model, so that a wrong value is refused here and not with every model.
        session.options(own, level=0, threads=1)
        session.run_options(own, "cpu")
        providers.cuda_options(own)
        own.boolean("io_binding")
        idle.after_ns(own)
        self._build = build
        self._memory_on = memory_on
        self._context = Context()
        self._shrinker = Shrinker()
        if warning := providers.installed_twice():
            logger.warning("%s", warning)

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        opened = files.kept[place] = self._open(files, config, place)
        return signature.complete(config, opened.found, self._batch_size, files.note)

    def open(
        self,
        files: ModelFiles,
        config: pb.ModelConfig,
        place: Placement,
        host: Host | None,  # noqa: ARG002 - an ONNX model calls no others
    ) -> Instance:
        """The first to be opened gets the session that `complete` built; those on the CPU share one."""
        opened = files.kept.pop(place, None) or self._open(files, config, place)
        if opened.device == "cpu":
            files.kept[place] = replace(opened, memory=None)  # which cannot be shared
        sequences.check(config, opened.found)
        signature.check(config, opened.found)
        given = Parameters.of(config, self._defaults)
        rest_ns = idle.after_ns(given)
        bound = self._bind(config, opened)
        options = session.run_options(given, opened.device, bound is not None)
        made = assembly.of(config, opened.found, files.note)
        instance = OnnxInstance(
            opened.session,
            opened.device,
            config,
            opened.found,
            options,
            made,
            bound,
            opened.memory,
            self._context,
            rest_ns,
        )
        if rest_ns:
            self._shrinker.add(instance)
        return SequenceInstance(instance, config, files.directory) if config.HasField("sequence_batching") else instance

    def _open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> Opened:
        own = None
        if Parameters.of(config, self._defaults).boolean("io_binding") is not False:
            own = self._memory_on(place)
        try:
            made, device = self._build(files, config, place, self._defaults, stream=own.stream if own else 0)
            found = signature.read(made, config.name)
        except BaseException:
            if own is not None:
                own.close()
            raise
        if own is not None and (device == "cpu") is not (place.device == "cpu"):
            own.close()  # of a GPU that the session has not got
            own = None
        files.labels.update(found.labels)
        return Opened(made, device, found, own)

    def _bind(self, config: pb.ModelConfig, opened: Opened) -> Binding | None:
        """Tensors of the instance lie on its device, where they can. Raises ServingError(INVALID)."""
        graphs = opened.device != "cpu" and providers.asks_for_graphs(
            providers.wanted(config, Placement("cuda"), self._defaults)
        )
        sizes = binding.graph_sizes(config, self._defaults) if graphs else ()
        if opened.memory is None or not binding.fits(opened.session):
            if graphs:
                raise ServingError(
                    Kind.INVALID, f"model '{config.name}': a CUDA graph needs io_binding, and tensors that are no BYTES"
                )
            return None
        on_host = binding.on_host(opened.session) if opened.memory.device == "cuda" else frozenset()
        if on_host and graphs:
            raise ServingError(
                Kind.INVALID,
                f"model '{config.name}': a CUDA graph cannot read inputs on the host, as it does {', '.join(on_host)}",
            )
        return Binding(opened.session, opened.memory, sizes, config.max_batch_size > 0, on_host)
