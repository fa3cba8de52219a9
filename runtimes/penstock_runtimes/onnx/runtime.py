"""The runtime of ONNX models: completes configurations from the file and opens instances."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.runtime import Host, Instance, ModelFiles, Placement

from penstock_runtimes.onnx import parameters, providers, session, signature
from penstock_runtimes.onnx.instance import OnnxInstance
from penstock_runtimes.onnx.parameters import Parameters
from penstock_runtimes.onnx.signature import OnnxSignature

logger = logging.getLogger(__name__)

BATCH_SETTING = "default-max-batch-size"
SETTINGS = (BATCH_SETTING, *parameters.SESSION, *parameters.CUDA)

Build: TypeAlias = Callable[[ModelFiles, pb.ModelConfig, Placement, Mapping[str, str]], tuple[Any, str]]


@dataclass(frozen=True, slots=True)
class Opened:
    """A session, the device that runs it, and what it found in the file."""

    session: Any
    device: str
    found: OnnxSignature


class OnnxRuntime:
    """Settings (`--backend-config onnxruntime,KEY=VALUE`): `default-max-batch-size`, and defaults for the parameters
    that a model's configuration may have, such as `intra_op_thread_count`.

    Raises ServingError(INVALID) for other keys and for values that they cannot have. `build` makes sessions.
    """

    def __init__(self, settings: Mapping[str, str], build: Build = session.build) -> None:
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
        self._build = build
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
            files.kept[place] = opened
        signature.check(config, opened.found)
        options = session.run_options(Parameters.of(config, self._defaults), opened.device)
        return OnnxInstance(opened.session, opened.device, config, opened.found, options)

    def _open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> Opened:
        made, device = self._build(files, config, place, self._defaults)
        found = signature.read(made, config.name)
        files.labels.update(found.labels)
        return Opened(made, device, found)
