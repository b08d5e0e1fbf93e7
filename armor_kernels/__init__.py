"""Triton kernels behind `torch.ops.armor`, for GPUs where the CUDA module is not built: no toolkit, or not NVIDIA.

One file per operator family; every function that a file exports has the signature of its operator.
"""
