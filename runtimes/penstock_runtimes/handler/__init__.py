"""Runs handler files written for a job platform, unchanged, each instance in a process of its own."""

from penstock_runtimes.handler.runtime import HandlerRuntime

__all__ = ["HandlerRuntime"]
