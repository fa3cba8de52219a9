"""`penstock infer`: one request, to a server over HTTP or gRPC, or to a model in this process.

Importing it costs what `--help` may cost.
"""

from penstock.client.command import add_options, run

__all__ = ["add_options", "run"]
