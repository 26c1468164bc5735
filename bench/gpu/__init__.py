"""The GPU report: one command that asks a GPU everything, within a time that is given.

``beit3-fast bench gpu --out DIR --budget SECONDS`` or, from a checkout and with nothing installed but PyTorch, ``make
gpu-report OUT=DIR BUDGET=SECONDS``. A driver (:mod:`.driver`) runs the sections of :mod:`.plan` in order of value, each
in a process of its own with a deadline of its own: one that crashes or hangs costs the others nothing. Every figure is
a line of ``results.jsonl`` as soon as it is known (:mod:`.record`). :mod:`.summary` prints the tables, :mod:`.page`
makes the README's from a result that was kept.
"""
