"""Penstock: ONNX models over the Open Inference Protocol, HTTP and gRPC, from one process and one core."""

__version__ = "0.1.0"
