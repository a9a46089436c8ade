"""Fused Triton kernels. Nothing here is imported, Triton least of all, until a kernel is asked for."""
