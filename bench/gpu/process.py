"""The process of one section: ``python -m beit3_fast.bench.gpu.process NAME MODULE --out DIR ...``, which the driver
starts."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .record import Recorder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("module")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--current", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    from .setting import REAL, TINY, Setting

    setting = Setting(options.out, options.dry_run, TINY if options.dry_run else REAL)
    record = Recorder(options.results, options.name, options.current)
    importlib.import_module(options.module).run(record, setting)


if __name__ == "__main__":
    main()
