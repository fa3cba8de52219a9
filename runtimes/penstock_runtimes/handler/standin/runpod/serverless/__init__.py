"""The worker's side. `start` and `progress_update` are put here by the process that runs the handler file."""

from __future__ import annotations

from typing import Any

from ..version import __version__ as runpod_version  # noqa: TID252 - it is called runpod only where it is imported
from .modules.rp_fitness import register_fitness_check
from .modules.rp_logger import RunPodLogger
from .modules.rp_progress import progress_update
from .utils import VolumeCache

log = RunPodLogger()


def start(config: dict[str, Any]) -> None:  # noqa: ARG001 - called by name
    """Replaced before the handler file runs."""
    raise RuntimeError("the stand-in's start works in a handler process of Penstock only")


__all__ = ["RunPodLogger", "VolumeCache", "log", "progress_update", "register_fitness_check", "runpod_version", "start"]
