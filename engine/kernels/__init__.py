"""Triton kernels for NVIDIA GPUs. Only this folder imports Triton, and nothing on a CPU-only path comes here.

Every function may be captured in a CUDA graph: what is launched depends on tensor shapes and host integers alone, and
nothing waits for the device. With TRITON_INTERPRET=1 in the environment before Triton is imported, all of them also run
on CPU tensors, slowly: that is how the tests reach them on machines without a GPU.
"""
