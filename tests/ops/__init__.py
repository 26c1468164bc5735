"""Tests of beit3_fast.ops: one file per op, the helpers they share in parity.py."""
