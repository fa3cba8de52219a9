"""Ensembles: graphs of models that the server runs as one."""

from penstock_runtimes.ensemble.runtime import EnsembleRuntime

__all__ = ["EnsembleRuntime"]
