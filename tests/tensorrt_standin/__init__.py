"""Strict stand-ins for TensorRT and CUDA."""
