"""The sections of the report: one module each, with ``run(record, setting)``."""
