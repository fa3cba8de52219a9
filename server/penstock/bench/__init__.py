"""Load generator: closed or open loop, over HTTP, gRPC or in process. Importing it costs what `--help` may cost."""

from penstock.bench.command import add_options, run

__all__ = ["add_options", "run"]
