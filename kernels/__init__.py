"""Triton kernels, one file an op. Installed as ``beit3_fast.kernels``."""
