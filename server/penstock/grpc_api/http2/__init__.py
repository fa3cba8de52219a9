"""gRPC on our own HTTP/2, in an asyncio Protocol: DESIGN.md, "The wire"."""

from penstock.grpc_api.http2.server import NativeServer

__all__ = ["NativeServer"]
