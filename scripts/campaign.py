"""Make the results of docs/results.md on one GPU, run after run, for as long as there is time.

    python scripts/campaign.py --minutes 9 data.root=data/cifar100   # arguments behind the options go to every run
    python scripts/campaign.py --list                                # the runs in order of value, and what is kept

Each run is short. What has finished is a row of docs/results/gpu_runs.csv (accuracy) or gpu_costs.csv (time and
memory at 224 x 224), which the next call passes over. A run that the time did not allow is begun anew: the
state of its optimizer is too large to carry away. It is safe to stop this at any moment, and to call it again.
--small tries all of it on a CPU at a tenth of the size; its rows stay in its own folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from famba.analysis.runs import read_runs, runs_csv
from famba.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("none", "all", "interleaved", "lower", "upper")
TRAINING_IMAGES = 50_000
START_S = 45.0  # imports, the first CUDA kernels, the last evaluation
# Images per second of the runs whose names begin so, while none of them is kept.
ASSUMED = {"weights": 40_000.0, "cost/vim_ti": 2_500.0, "cost/vim_s": 900.0, "": 10_000.0}
COST_STEPS, COST_BATCH = 200, 128


class Run(NamedTuple):
    """Name a run of the campaign: its table, its arguments for train.py, and the images that it trains on."""

    name: str
    table: str
    arguments: tuple[str, ...]
    images: int


def table_run(name: str, *arguments: str, seed: int = 0, epochs: int = 30) -> Run:
    """Return a run of experiment=small_table."""
    given = ("experiment=small_table", *arguments, f"seed={seed}", f"trainer.epochs={epochs}")
    return Run(f"{name}/seed{seed}", "gpu_runs.csv", given, epochs * TRAINING_IMAGES)


def cost_run(model: str, strategy: str) -> Run:
    """Return some steps of experiment=paper_table, for the time of an epoch and the peak memory."""
    steps = (f"trainer.max_steps={COST_STEPS}", f"trainer.batch_size={COST_BATCH}", "trainer.precision=bf16")
    given = ("experiment=paper_table", f"model={model}", f"fusion={strategy}", "seed=0", *steps, "data.subset=30000")
    return Run(f"cost/{model}/{strategy}", "gpu_costs.csv", given, COST_STEPS * COST_BATCH)


def campaign() -> list[Run]:
    """List all runs, the most valuable first."""
    weights = ("model=vim_micro", "fusion=none", "data.val_fraction=0.04")
    # 16 of 24 layers take 0.667 of the multiply-adds, and `upper` 0.674.
    smaller = ("fusion=none", "model.depth=16")
    rules = {one: ("fusion=upper", f"fusion.rule={one}", "fusion.place=after_scan") for one in ("neighbours", "delta")}
    return [
        table_run("weights", *weights, epochs=300),
        *(table_run(one, f"fusion={one}", seed=seed) for seed in range(3) for one in STRATEGIES),
        *(cost_run(model, one) for model in ("vim_ti", "vim_s") for one in STRATEGIES),
        *(table_run("smaller", *smaller, seed=seed) for seed in range(3)),
        *(table_run("adaptive", "fusion=adaptive", seed=seed) for seed in range(3)),
        *(table_run(f"rule-{one}", *given, seed=seed) for one, given in rules.items() for seed in range(3)),
        *(table_run("order-tome", "fusion=upper", "fusion.order=tome", seed=seed) for seed in range(3)),
        *(table_run("weighting-size", "fusion=upper", "fusion.weighting=size", seed=seed) for seed in range(3)),
        *(table_run(one, f"fusion={one}", seed=seed) for seed in (3, 4) for one in STRATEGIES),
        *(table_run(f"long/{one}", f"fusion={one}", epochs=100) for one in STRATEGIES),
    ]


def reduced(run: Run) -> Run:
    """Return a run of the same kind that a CPU does in a minute."""
    small = ("model=vim_micro", "data.subset=2000", "trainer.batch_size=64", "trainer.precision=fp32")
    if run.table == "gpu_costs.csv":
        return run._replace(arguments=(*run.arguments, *small, "data.image_size=32", "trainer.max_steps=5"), images=320)
    arguments = [one for one in run.arguments if not one.startswith("model")]
    return run._replace(
        arguments=(*arguments, *small, "model.depth=6", "trainer.epochs=1", "recipe.warmup_epochs=0.3"), images=2000
    )


def kept(path: Path) -> pd.DataFrame:
    """Return the rows of a table, none where it does not exist."""
    return read_runs([path]) if path.exists() else pd.DataFrame(columns=["run"])


def expected_s(run: Run, rows: pd.DataFrame) -> float:
    """Estimate the seconds of a run, by the slowest kept run of its kind."""
    start = next(start for start in ASSUMED if run.name.startswith(start))
    alike = rows[[next(one for one in ASSUMED if name.startswith(one)) == start for name in rows["run"]]]
    rates = pd.to_numeric(alike.get("images_per_s", pd.Series(dtype=float)), errors="coerce").dropna()
    return START_S + run.images / (rates.min() if len(rates) else ASSUMED[start])


def train(run: Run, folder: Path, given: Sequence[str], seconds: float) -> bool:
    """Train in a folder of its own; return whether the run finished in time."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "train.py", *run.arguments, *given, f"run_dir={folder}", "resume=never"]
    process = subprocess.Popen(command)  # noqa: S603
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        process.kill()
        process.wait()


def keep(run: Run, folder: Path, table: Path) -> None:
    """Add a finished run to its table, which is replaced as a whole."""
    row = read_runs([folder]).assign(run=run.name)
    rows = pd.concat([kept(table), row]).fillna("").assign(folder="")
    table.parent.mkdir(parents=True, exist_ok=True)
    write_whole(table, lambda path: Path(path).write_text(runs_csv(rows)))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def main() -> int:
    """Train what is missing until the time is over; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="how long to train (9)")
    parser.add_argument("--list", action="store_true", help="only list the runs")
    parser.add_argument("--small", action="store_true", help="try it on a CPU: tiny runs, kept in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"), help="folder for runs (runs/campaign)")
    parser.add_argument("given", nargs="*", help="KEY=VALUE for every run, such as data.root=data/cifar100")
    options = parser.parse_args()
    os.chdir(ROOT)  # paths in a kept row are relative
    end = time.monotonic() + 60 * options.minutes
    tables = options.out if options.small else Path("docs/results")
    runs = [reduced(run) for run in campaign()] if options.small else campaign()
    missing = [run for run in runs if run.name not in set(kept(tables / run.table)["run"])]

    left, planned = 60 * options.minutes, []
    for run in missing:
        seconds = expected_s(run, kept(tables / run.table))
        planned.append(seconds <= left)
        left -= seconds if seconds <= left else 0
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are kept. Expected now: {sum(planned)} more.", flush=True)
    if options.list:
        for run, fits in zip(missing, planned, strict=True):
            print(f"{'now  ' if fits else 'later'} {run.name}: train.py {' '.join(run.arguments)}")
        return 0
    failed = []
    for run in missing:
        left = end - time.monotonic()
        if expected_s(run, kept(tables / run.table)) > left:
            continue  # a shorter one may fit
        print(f"== {run.name}, {left:.0f} s left", flush=True)
        folder = options.out / run.name
        if train(run, folder, options.given, left):
            keep(run, folder, tables / run.table)
        elif time.monotonic() < end:
            failed.append(run.name)
        else:
            print(f"{run.name} ran out of time; the next call begins it anew", flush=True)
    if failed:
        print(f"error: failed: {', '.join(failed)}; their logs are in {options.out}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
