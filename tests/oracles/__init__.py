"""Adapters around implementations that we did not write, used as the truth in tests."""
