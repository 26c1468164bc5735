"""The benchmark suite: parity first, then interleaved times against reference PyTorch.

Run it with ``beit3-fast bench``. Everything here measures the library; nothing in the library depends on it.
"""
