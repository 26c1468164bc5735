"""``python -m beit3_fast.bench.gpu``: the report where nothing is installed; ``beit3-fast bench gpu`` where it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .command import report
from .plan import BUDGET


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description="Measure everything on this machine's GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all of it")
    parser.add_argument("--section", action="append", default=[], dest="sections", help="this section only; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU with tiny shapes")
    options = parser.parse_args()
    try:
        return 0 if report(options.out, options.budget, sections=options.sections, dry=options.dry_run) else 1
    except (ValueError, OSError) as error:
        print(f"gpu-report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
