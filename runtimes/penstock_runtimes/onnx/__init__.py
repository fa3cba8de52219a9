"""ONNX models on ONNX Runtime, on CPU, CUDA or TensorRT."""

from penstock_runtimes.onnx.runtime import OnnxRuntime

__all__ = ["OnnxRuntime"]
