"""Kill runs by SIGKILL at random moments, and see that each ends as one that nobody killed: bit for bit.

    python scripts/kill_runs.py --runs 50
    python scripts/kill_runs.py --runs 20 --processes 2    # one of two processes that train together is killed

A run is killed up to three times, in a step, in an evaluation, while a checkpoint is written or while it starts, and
started again with the same command each time. Then its weights, averaged weights, metrics (timings and memory aside)
and results are compared with those of a run that nobody killed. The runs are forked from a process that has imported
all they need, which is what makes fifty of them take minutes; whatever else a run does, it does. The exit status is 1
where anything differs.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401 - what a run imports late is imported here once
import torch

from famba.training.app import main as train
from famba.training.checkpoint import load

SETTINGS = (
    "model=vim_micro",
    "model.depth=2",
    "model.embed_dim=16",
    "model.d_state=2",
    "model.patch_size=8",
    "model.drop_path=0.2",
    "fusion=upper",
    "fusion.budget=0.5",
    "data=digits",
    "data.subset=200",
    "data.val_fraction=0.2",
    "recipe=quick",
    "recipe.mixup=0.8",
    "recipe.ema_decay=0.9",
    "trainer.epochs=3",
    "trainer.batch_size=16",
    "trainer.accumulation=2",
    "trainer.precision=fp32",
    "trainer.log_every=1",
    "trainer.save_every_min=0.0001",
)
STEPS, EPOCHS = 30, 3
# An end that is waited for longer counts as a hang.
PATIENCE_S = 60.0
_VARYING = ("images_per_s", "peak_memory_mib")
_RESULTS = ("status", "top1", "top5", "loss", "ema_top1", "selected", "step", "epoch", "weights_sha256")


def main() -> int:
    """Kill, start again, compare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, help="that train together; one of them is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="keep the run folders here instead of removing them")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON alone")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill-runs-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        outcome = _kill_all(folder, options)
    finally:
        if options.out is None:
            shutil.rmtree(folder)
    print(json.dumps(outcome) if options.json else _told(outcome))
    return 1 if outcome["differing"] or not outcome["kills"] else 0


def _kill_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(options.seed)  # noqa: S311 - moments, not secrets
    whole = Run(folder / "whole", options.processes)
    whole.start()
    whole.wait(5 * PATIENCE_S)
    expected = whole.results()
    kills: collections.Counter[str] = collections.Counter()
    differing: dict[str, list[str]] = {}
    longest_end = 0.0
    for number in range(options.runs):
        run = Run(folder / f"run_{number:03d}", options.processes)
        for _ in range(draw.randint(1, 3)):
            run.start()
            if _wait_for_a_moment(run, draw):
                print(f"{run.folder.name}: killed {run.where()}", file=sys.stderr)
                longest_end = max(longest_end, run.kill(draw))
                kills[run.where()] += 1
        run.start()
        run.wait(5 * PATIENCE_S)
        different = _differences(expected, run.results())
        if different:
            differing[run.folder.name] = different
        elif options.out is None:
            shutil.rmtree(run.folder)
    return {
        "runs": options.runs,
        "processes": options.processes,
        "kills": dict(kills),
        "longest_end_s": round(longest_end, 1),
        "differing": differing,
    }


class Run:
    """A run folder, and the processes that train in it."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self._processes = processes
        self._living: list[int] = []
        self._starts = 0

    def start(self) -> None:
        """Start the processes by the same command as ever."""
        self._starts += 1
        port = _free_port()
        self._living = [self._fork(rank, port) for rank in range(self._processes)]

    def ended(self) -> bool:
        """Whether all processes have ended."""
        self._living = [pid for pid in self._living if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        return not self._living

    def wait(self, seconds: float) -> None:
        """Wait until all have ended. Raises TimeoutError, and kills them, where they do not."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                for pid in self._living:
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{self.folder} has not ended after {seconds:.0f} s; see {self._log}")
            time.sleep(0.002)

    def kill(self, draw: random.Random) -> float:
        """Kill one process; return the seconds that the others took to end."""
        began = time.monotonic()
        os.kill(draw.choice(self._living), signal.SIGKILL)
        self.wait(PATIENCE_S)
        return time.monotonic() - began

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def has_joined(self) -> bool:
        """Whether the processes have found one another; before that, whoever started them would end them."""
        said = self._log.read_text() if self._log.exists() else ""
        return self._processes == 1 or said.count("run folder:") == self._starts

    def is_saving(self) -> bool:
        """Whether a checkpoint is half written."""
        return any(self.folder.glob("checkpoints/.*.tmp"))

    def where(self) -> str:
        """Where the run stands, as far as its folder tells."""
        lines = self.lines()
        if self.is_saving():
            return "while a checkpoint was written"
        if not lines:
            return "while it started"
        at_end = lines[-1]["step"] % (STEPS // EPOCHS) == 0
        return "in an evaluation" if at_end and lines[-1]["kind"] == "train" else "in a step"

    def results(self) -> dict[str, Any]:
        """All that must not depend on interruptions."""
        summary = json.loads((self.folder / "summary.json").read_text())
        content = load(self.folder / "checkpoints" / f"step_{STEPS:08d}.pt")
        lines = [
            {key: value for key, value in line.items() if "time_" not in key and key not in _VARYING}
            for line in self.lines()
        ]
        return {
            "weights": (self.folder / "model.safetensors").read_bytes(),
            "averaged weights": {name: value.numpy().tobytes() for name, value in content["ema"].items()},
            "selected weights": {
                name: value.numpy().tobytes()
                for name, value in load(self.folder / "checkpoints" / "best.pt")["model"].items()
            },
            "metrics": lines,
            "summary": {key: summary.get(key) for key in _RESULTS},
            "files": sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*")),
        }

    @property
    def _log(self) -> Path:
        return self.folder.with_suffix(".log")

    def _fork(self, rank: int, port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self._processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = train([*SETTINGS, f"run_dir={self.folder}"])
            sys.stdout.flush()
        finally:
            os._exit(status)


def _wait_for_a_moment(run: Run, draw: random.Random) -> bool:
    """Wait for a moment to kill at; whether the run was still going on then."""
    done = len(run.lines())
    step = draw.randint(min(done, STEPS), STEPS)
    epoch_end = (draw.randrange(EPOCHS) + 1) * (STEPS // EPOCHS)
    moments: dict[str, tuple[Callable[[], bool], float]] = {
        "start": (lambda: True, 1.5),
        "step": (lambda: len(run.lines()) >= step, 0.05),
        "evaluation": (lambda: run.lines()[-1:] != [] and run.lines()[-1]["step"] >= epoch_end, 0.05),
        "checkpoint": (lambda: len(run.lines()) >= step and run.is_saving(), 0.0),
    }
    reached, later = moments[draw.choices(list(moments), weights=(1, 3, 3, 3))[0]]
    while not (run.has_joined() and reached()):
        if run.ended():
            return False
        time.sleep(0.0005)
    time.sleep(draw.uniform(0.0, later))
    return not run.ended()


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    different = [name for name in expected if expected[name] != found[name]]
    if "metrics" in different:
        places = [(line["kind"], line["step"]) for line in found["metrics"]]
        twice = [place for place, times in collections.Counter(places).items() if times > 1]
        different.append(f"metrics: {len(found['metrics'])} lines of {len(expected['metrics'])}, twice {twice}")
    return different


def _told(outcome: dict[str, Any]) -> str:
    kills = ", ".join(f"{number} {where}" for where, number in sorted(outcome["kills"].items()))
    total = sum(outcome["kills"].values())
    lines = [f"{outcome['runs']} runs of {outcome['processes']} processes, {total} kills: {kills}"]
    if outcome["processes"] > 1:
        lines.append(f"the longest time that the others took to end: {outcome['longest_end_s']} s")
    lines += [f"{run} differs in {', '.join(what)}" for run, what in outcome["differing"].items()]
    lines.append(f"{outcome['runs'] - len(outcome['differing'])} of {outcome['runs']} equal a run that nobody killed")
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
