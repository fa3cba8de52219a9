"""The Open Inference Protocol over gRPC: one table of methods, and the transports that serve it."""

from penstock.grpc_api.calls import STATUS, Call, Door, Status, Stream, Unary
from penstock.grpc_api.methods import METHODS

__all__ = ["METHODS", "STATUS", "Call", "Door", "Status", "Stream", "Unary"]
