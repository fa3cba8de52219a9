"""`penstock inspect`: what the server would make of a model, and why. Importing it costs what `--help` may cost."""

from penstock.inspection.command import add_options, run

__all__ = ["add_options", "run"]
