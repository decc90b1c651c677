"""Pre-empt a run in Slurm twice, and see that it ends as the same run without: bit for bit on a CPU.

    eval "$(scripts/local_slurm.sh start /tmp/slurm)"
    python scripts/preempt_run.py --out runs/preempted -- model=vim_micro recipe=light data.subset=3200 trainer.epochs=2

What follows -- goes to train.py. Both runs are jobs. After a third of its steps the first is requeued from outside,
as Slurm does when it pre-empts (SIGTERM, then the queue); after two thirds it gets SIGUSR2, as before a time limit. The
exit status is 1 where the two differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_VARYING = ("images_per_s", "peak_memory_mib")


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs")
    parser.add_argument("arguments", nargs="*", metavar="OVERRIDE", help="for train.py")
    options = parser.parse_args()
    preempted = _run(options.out / "preempted", options.arguments, disturbed=True)
    whole = _run(options.out / "whole", options.arguments, disturbed=False)
    log = (preempted / "train.log").read_text()
    print(f"stopped and continued: {log.count('continuing after step')} times")
    same = {
        "weights": _weights(preempted) == _weights(whole),
        "metrics": _metrics(preempted) == _metrics(whole),
    }
    for what, equal in same.items():
        print(f"{what}: {'equal' if equal else 'DIFFERENT'}")
    print(f"{len(_metrics(whole))} lines of metrics, Top-1 {_summary(whole)['top1']:.2f} %")
    return 0 if all(same.values()) and log.count("continuing after step") == 2 else 1


def _run(folder: Path, arguments: list[str], *, disturbed: bool) -> Path:
    command = [sys.executable, str(TRAIN), "-m", "hydra/launcher=slurm", "hydra.launcher.poll_s=1", *arguments]
    with subprocess.Popen([*command, "seed=0", f"run_dir={folder}"]) as driver:  # noqa: S603 - the project's own script
        if disturbed:
            for third, preempt in ((1, ("scontrol", "requeue")), (2, ("scancel", "--signal=USR2"))):
                _wait_for_share(folder, third / 3, driver)
                (job,) = json.loads((folder / "slurm" / "jobs.json").read_text()).values()
                subprocess.run([*preempt, job], check=True)  # noqa: S603 - Slurm's own commands
        if driver.wait():
            raise SystemExit(driver.returncode)
    return _only(folder)


def _wait_for_share(folder: Path, share: float, driver: subprocess.Popen[bytes]) -> None:
    while driver.poll() is None:
        time.sleep(0.2)
        try:
            summary = _summary(_only(folder))
            if _metrics(_only(folder))[-1]["step"] >= share * summary["steps"]:
                return
        except (OSError, ValueError, IndexError):
            continue


def _only(folder: Path) -> Path:
    (path,) = folder.glob("*/summary.json")
    return path.parent


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "time_" not in k and k not in _VARYING} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
