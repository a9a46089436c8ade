"""Fused Triton kernels. No kernel is imported, nor Triton itself, until one is asked for."""
