"""The runtime of handler files: completes configurations and opens instances."""

import os
import sys
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path

from penstock import pb
from penstock.errors import Kind, ServingError
from penstock.runtime import Host, Instance, ModelFiles, Placement

from penstock_runtimes.handler.instance import INPUT, OUTPUT, HandlerInstance
from penstock_runtimes.handler.options import Options
from penstock_runtimes.handler.process import Command

WORKER = Path(__file__).with_name("worker.py")
# What the platform's own workers are told by; with it, its package would look for the platform.
WITHHELD = ("RUNPOD_WEBHOOK_GET_JOB", "RUNPOD_WEBHOOK_POST_OUTPUT", "RUNPOD_WEBHOOK_POST_STREAM", "RUNPOD_WEBHOOK_PING")


class HandlerRuntime:
    """Settings (`--backend-config handler,KEY=VALUE`): defaults for the parameters of a model, which are the fields of
    `Options`. Raises ServingError(INVALID) for other keys and for values that they cannot have.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._defaults = Options().changed("the handler runtime", settings)

    def complete(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> pb.ModelConfig:
        """One input and one output, each a JSON text; decoupled where the handler is a generator."""
        done = pb.ModelConfig()
        done.CopyFrom(config)
        if not done.input:
            done.input.add(name=INPUT, data_type=pb.TYPE_STRING, dims=[1])
        if not done.output:
            done.output.add(name=OUTPUT, data_type=pb.TYPE_STRING, dims=[1])
        _check(done)
        opened = self._open(files, done, place)
        files.kept[place] = _Kept(opened)
        files.note("handler", opened.kind, "that is what the file gives to runpod.serverless.start")
        if opened.generator and not done.model_transaction_policy.decoupled:
            done.model_transaction_policy.decoupled = True
            files.note("model_transaction_policy.decoupled", "true", "the handler is a generator")
        return done

    def open(
        self,
        files: ModelFiles,
        config: pb.ModelConfig,
        place: Placement,
        host: Host | None,  # noqa: ARG002 - a handler calls no other models
    ) -> Instance:
        """A process that has called `start`; the first is the one that `complete` has asked."""
        _check(config)
        kept: _Kept | None = files.kept.pop(place, None)
        opened = kept.take() if kept else self._open(files, config, place)
        if opened.generator and not config.model_transaction_policy.decoupled:
            opened.close()
            raise ServingError(
                Kind.INVALID,
                f"model '{config.name}': its handler is a generator, "
                "so model_transaction_policy.decoupled must be true",
            )
        return opened

    def _open(self, files: ModelFiles, config: pb.ModelConfig, place: Placement) -> HandlerInstance:
        options = Options.of(config, self._defaults)
        return HandlerInstance(files, str(place), _command(files, config, place, options), options)


class _Kept:
    """An instance that nobody has opened yet; closes it when it is forgotten."""

    def __init__(self, instance: HandlerInstance) -> None:
        self._instance = instance
        self._close = weakref.finalize(self, instance.close)

    def take(self) -> HandlerInstance:
        self._close.detach()
        return self._instance


def _check(config: pb.ModelConfig) -> None:
    """Raises ServingError(INVALID) where a configuration asks for what no handler has."""
    inputs = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.input]
    outputs = [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.output]
    for kind, given in ((INPUT, inputs), (OUTPUT, outputs)):
        if given != [(kind, pb.TYPE_STRING, [1])]:
            raise ServingError(
                Kind.INVALID,
                f"model '{config.name}': a handler has one {kind}, '{kind}' of TYPE_STRING and dims [ 1 ], a JSON text",
            )
    if config.max_batch_size:
        raise ServingError(
            Kind.INVALID, f"model '{config.name}': a handler takes one job at a time, so max_batch_size must be 0"
        )


def _command(files: ModelFiles, config: pb.ModelConfig, place: Placement, options: Options) -> Command:
    """How to start the worker on a model's file."""
    directory = files.directory.absolute()
    file = files.file(config.default_model_filename).absolute()
    if not file.is_file():
        raise ServingError(Kind.INVALID, f"model '{config.name}' has no handler file '{file}'")
    python = options.python or sys.executable
    if os.sep in python:
        python = str(directory / python)
    arguments = [python, "-u", "-X", "faulthandler", str(WORKER), str(file)]
    arguments += [str(os.getpid()), str(options.max_output_bytes)]
    return Command(arguments, str(directory), _environment(files, place, file, options))


def _environment(files: ModelFiles, place: Placement, file: Path, options: Options) -> dict[str, str]:
    """What the worker's process sees: the server's environment without the server's own settings."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_") and key not in WITHHELD}
    directory = files.directory.absolute()
    paths = [str(directory / path) for path in options.python_path.split(os.pathsep) if path]
    paths += dict.fromkeys([str(file.parent), str(directory)])
    found["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [found.get("PYTHONPATH")])])
    found.setdefault("PYTHONDONTWRITEBYTECODE", "1")  # a model's directory changes only when its author changes it
    found.setdefault("OMP_NUM_THREADS", str(place.threads))
    found.setdefault("RUNPOD_ENDPOINT_ID", files.model)
    found.setdefault("RUNPOD_POD_ID", f"{files.model}-{files.version}-{uuid.uuid4().hex[:8]}")
    found["CUDA_VISIBLE_DEVICES"] = ""
    if place.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        found["CUDA_VISIBLE_DEVICES"] = visible[place.device_id] if visible != [""] else str(place.device_id)
    return found
