"""Run folders as reports read them, made up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from famba.analysis.report import Table, gather

MODEL = "vim_micro_patch4_32"
SCHEDULES = {"none": [0, 0, 0, 0], "all": [3, 3, 3, 3], "interleaved": [0, 6, 0, 6], "lower": [4, 4, 4, 0],
             "upper": [0, 4, 4, 4], "adaptive": [1, 2, 4, 5]}  # fmt: skip
CONFIG: dict[str, Any] = {
    "model": {"name": MODEL, "depth": 4, "drop_path": 0.0, "cls_position": "head"},
    "fusion": {"strategy": "none", "budget": 12, "layers": None, "order": "sequence", "weighting": "mean",
               "place": "before_mixer", "adapt_at": None, "adapt_images": None},
    "data": {"name": "cifar100", "root": "data/one", "image_size": None, "subset": None, "workers": 2},
    "recipe": {"lr": 0.004, "mixup": 0.8},
    "trainer": {"epochs": 3, "batch_size": 64, "precision": "auto", "log_every": 10, "compile": False},
    "logger": {"name": "none"}, "ops": {"backend": "auto"}, "seed": 0, "run_dir": "runs/x", "init_from": None,
}  # fmt: skip
PROVENANCE = {
    "started": "2026-11-24T10:00:00+00:00", "famba": "0.1.0", "git_commit": "a" * 40, "packages": {"torch": "2.14.1"},
    "device": "A CPU, 2 cores, 1 threads", "processes": 1, "cuda": None, "backend": "native",
}  # fmt: skip
SUMMARY: dict[str, Any] = {
    "status": "finished", "top5": 40.0, "images_per_s": 120.0, "peak_memory_mib": 1000.0,
    "saved_bytes_per_image": 700_000, "macs_per_image": 28_000_000, "parameters": 340_068, "image_size": 32,
    "precision": "fp32", "steps": 300, "step": 300, "tokens": 17, "adapted": None,
}  # fmt: skip
NONE = {0: 12.0, 1: 13.0, 2: 12.5}
UPPER = {0: 11.5, 1: 12.2, 2: 12.3}


def write_run(
    folder: Path,
    strategy: str = "none",
    seed: int = 0,
    top1: float = 12.0,
    config: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """A finished run; config changes dotted keys, origin the provenance."""
    folder.mkdir(parents=True)
    schedule = summary.pop("schedule", SCHEDULES[strategy])
    told = copy.deepcopy(CONFIG)
    for key, value in {"fusion.strategy": strategy, "seed": seed, "run_dir": str(folder), **(config or {})}.items():
        *groups, name = key.split(".")
        place = told
        for group in groups:
            place = place[group]
        place[name] = value
    left = [17 - sum(schedule[: i + 1]) for i in range(len(schedule))]
    found = {
        **SUMMARY, "model": told["model"]["name"], "strategy": strategy, "top1": top1, "schedule": schedule,
        "tokens_per_layer": left, "train_time_s": 600.0 + seed if strategy == "none" else 360.0 + 2 * seed,
        "provenance": {**PROVENANCE, "seed": seed, **(origin or {})}, **summary,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text(yaml.safe_dump(told))
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "epoch": step // 101, "loss": 4.0 - 0.005 * step} for step in range(10, 301, 10)
    ]
    for epoch in range(3):
        lines.append({"kind": "epoch", "step": 100 * (epoch + 1), "epoch": epoch, "test_top1": top1 - 2 + epoch})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_seeds(folder: Path, strategy: str, top1: list[float], **costs: list[float]) -> None:
    """A seed of a strategy for each Top-1, with its costs."""
    for seed, value in enumerate(top1):
        write_run(folder / f"{strategy}{seed}", strategy, seed, value, **{key: of[seed] for key, of in costs.items()})


def write_pair(folder: Path) -> Path:
    """Without fusion and upper, three seeds each."""
    write_seeds(folder, "none", list(NONE.values()))
    write_seeds(folder, "upper", list(UPPER.values()))
    return folder


def table_of(*paths: Path) -> Table:
    (table,) = gather(paths).tables
    return table


def left_out(*paths: Path) -> dict[str, tuple[str, str]]:
    """Kind and reason by the name of each run that is left out, or counted for accuracy alone."""
    listed = [(kind, *runs) for kind, found in gather(paths).left_out.items() for runs in found]
    return {name.partition("/")[2]: (kind, reason) for kind, names, reason in listed for name in names.split("; ")}
