"""Copy what a report reads of finished runs, without weights and checkpoints, to where it is kept.

    python scripts/keep_runs.py runs/cpu_table docs/results/cpu_table

Times of runs that shared their machine with other work tell nothing: --without-times leaves them out, and says why.
Runs whose files name folders of this machine are refused: what is kept is for others to read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

FILES = ("config.yaml", "summary.json", "metrics.jsonl")
TIMES = ("train_time_s", "eval_time_s", "epoch_time_s", "images_per_s")


def main() -> int:
    """Copy; return the exit status, 2 where a run is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="folder of the runs")
    parser.add_argument("kept", type=Path, help="folder to keep them in")
    parser.add_argument("--without-times", metavar="REASON", help="leave out times and throughput, and say why")
    parser.add_argument(
        "--runs", default="*", metavar="PATTERN", help="which of them, such as '*,seed=2' (default: all)"
    )
    options = parser.parse_args()
    for run in sorted(path.parent for path in options.sweep.glob(f"{options.runs}/summary.json")):
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
        if options.without_times:
            leave_out_times(kept / "summary.json", options.without_times)
        print(f"{run.name}: kept in {kept}")
    return 0


def leave_out_times(file: Path, reason: str) -> None:
    """Put nothing in place of times in a summary, and the reason beside them."""
    summary = json.loads(file.read_text())
    summary |= {**dict.fromkeys(TIMES), "times_left_out": reason}
    file.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
