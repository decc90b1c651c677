"""Train for hours and see that nothing grows: memory, time per image, open files, processes.

    python scripts/soak.py --hours 2 --out runs/soak -- model=vim_micro data=cifar100 recipe=light

What follows -- goes to train.py. The run is sampled from outside while it trains, into soak.csv of the output folder,
and stopped by SIGTERM after the time; then a verdict is printed. The exit status is 1 where something grew.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_LIMIT = 0.02
_COLUMNS = ("seconds", "step", "epoch", "resident_mib", "threads", "files", "processes")
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> int:
    """Run, sample and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the samples")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between samples")
    parser.add_argument("arguments", nargs="*", metavar="OVERRIDE", help="for train.py")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run_dir = options.out / "run"
    with open(options.out / "output.log", "w") as output:
        training = subprocess.Popen(  # noqa: S603 - the interpreter that runs this, on the project's own script
            [sys.executable, str(TRAIN), *options.arguments, f"run_dir={run_dir}"], stdout=output, stderr=output
        )
        samples = list(_sample(training, run_dir, options))
        family = _family(training.pid)
        training.send_signal(signal.SIGTERM)
        status = training.wait(timeout=300)
    if not samples:
        print(f"ended with status {status} before it began to train; see {options.out / 'output.log'}")
        return 1
    print(f"ended with status {status} after {samples[-1]['seconds'] / 3600:.2f} h, {samples[-1]['step']} steps")
    left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
    return 0 if _judge(samples, _epochs(run_dir), left) and status == 128 + signal.SIGTERM else 1


def _sample(training: subprocess.Popen[bytes], run_dir: Path, options: argparse.Namespace) -> Any:
    began = time.monotonic()
    with open(options.out / "soak.csv", "w", newline="") as file:
        table = csv.DictWriter(file, _COLUMNS)
        table.writeheader()
        while training.poll() is None and time.monotonic() - began < 3600 * options.hours:
            time.sleep(options.every)
            line = _last_line(run_dir)
            if line is None:
                continue
            seconds = round(time.monotonic() - began, 1)
            row = {"seconds": seconds, "step": line["step"], "epoch": line["epoch"], **_resources(training.pid)}
            table.writerow(row)
            file.flush()
            yield row


def _resources(pid: int) -> dict[str, float]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "resident_mib": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "processes": len(_family(pid)),
    }


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for known in found:
        for children in Path(f"/proc/{known}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


def _last_line(run_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError):
        return None


def _epochs(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def _judge(samples: list[dict[str, Any]], epochs: list[dict[str, Any]], left: list[int]) -> bool:
    """Compare the second epoch with the last ones."""
    steady = [row for row in samples if row["epoch"] >= 1]
    if not steady or len(epochs) < 3:
        print("too short: it takes three epochs to tell")
        return False
    part = max(1, len(steady) // 5)
    verdicts = []
    for name in ("resident_mib", "threads", "files", "processes"):
        first, last = (statistics.median(row[name] for row in rows) for rows in (steady[:part], steady[-part:]))
        limit = _LIMIT if name == "resident_mib" else 0.0
        verdicts.append(last <= first * (1 + limit))
        values = [row[name] for row in steady]
        change, least, most = last / first - 1, min(values), max(values)
        print(f"{name}: {first:g} at first, {last:g} at last ({change:+.2%}), {least:g} to {most:g}")
    speeds = [line["images_per_s"] for line in epochs[1:]]
    part = max(1, len(speeds) // 5)
    first, last = statistics.median(speeds[:part]), statistics.median(speeds[-part:])
    print(f"images/s: {first:.1f} at first, {last:.1f} at last ({last / first - 1:+.2%}), {len(epochs)} epochs")
    print(f"processes left behind: {len(left)}")
    return all(verdicts) and not left


if __name__ == "__main__":
    sys.exit(main())
