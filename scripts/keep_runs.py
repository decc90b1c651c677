"""Copy what a report reads of finished runs, without weights and checkpoints, to where it is kept.

    python scripts/keep_runs.py runs/cpu_table docs/results/cpu_table

Runs whose files name folders of this machine are refused: what is kept is for others to read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

FILES = ("config.yaml", "summary.json", "metrics.jsonl")


def main() -> int:
    """Copy; return the exit status, 2 where a run is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the runs")
    parser.add_argument("kept", type=Path, help="folder to keep them in")
    options = parser.parse_args()
    for run in sorted(path.parent for path in options.sweep.glob("*/summary.json")):
        if json.loads((run / "summary.json").read_text())["status"] != "finished":
            print(f"{run.name}: not finished")
            continue
        private = [
            name
            for name in FILES
            if str(Path.cwd()) in (run / name).read_text() or "/home/" in (run / name).read_text()
        ]
        if private:
            print(f"error: {', '.join(private)} of {run} name folders of this machine; train with relative paths")
            return 2
        kept = options.kept / run.name
        kept.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(run / name, kept / name)
        print(f"{run.name}: kept in {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
