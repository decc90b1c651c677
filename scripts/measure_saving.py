"""Measure what saving costs training: rounds of steps with a checkpoint and without, in turn.

    python scripts/measure_saving.py --model vim_micro --rounds 7

Prints the size of a checkpoint, how long the training thread is held up by a save, how long the write takes beside it,
the time that a round of steps loses to one save altogether, and how often a run may save before it loses 2 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from famba.training.build import new_state
from famba.training.checkpoint import Checkpoints
from famba.training.compose import compose
from famba.training.config import plain
from famba.training.devices import describe_device
from famba.training.saving import Saver
from famba.training.setup import prepare
from famba.training.state import TrainingState
from famba.training.trained_on import TrainedOn

_LIMIT = 0.02


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_micro", help="a choice of the group model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write: the file system in question (default: temporary)")
    options = parser.parse_args()

    config = compose([f"model={options.model}", f"run_dir={tempfile.gettempdir()}/unused"])
    setup = prepare(config)
    state = new_state(config, setup, TrainedOn(100, None, {}), setup.device)
    images = torch.randn(options.batch, 3, setup.image_size, setup.image_size, device=setup.device)
    labels = torch.arange(options.batch, device=setup.device) % 100
    content = {"config": plain(config), "world_size": 1}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = Checkpoints(Path(folder))
        plain_s: list[float] = []
        saving_s: list[float] = []
        blocked_s: list[float] = []
        write_s: list[float] = []
        for number in range(options.rounds + 1):
            without = _round(state, images, labels, options.steps)
            saver = Saver()
            began = time.perf_counter()
            saver.save({**content, **state.content()}, partial(_write, checkpoints, number, write_s))
            blocked_s.append(time.perf_counter() - began)
            _round(state, images, labels, options.steps)
            saver.wait()
            saving_s.append(time.perf_counter() - began)
            plain_s.append(without)
        size = checkpoints.path(options.rounds).stat().st_size / 2**20
    # The first round warms up.
    lost = statistics.median(saving - without for saving, without in zip(saving_s[1:], plain_s[1:], strict=True))
    print(f"{options.model} on {describe_device(setup.device)}, torch {torch.__version__}")
    print(f"a checkpoint has {size:.1f} MiB")
    print(f"a round of {options.steps} steps without saving: {statistics.median(plain_s[1:]):.3f} s")
    print(f"the training thread is held up by a save for {statistics.median(blocked_s[1:]) * 1000:.1f} ms")
    print(f"the write beside it takes {statistics.median(write_s[1:]):.3f} s")
    print(f"a round loses {lost * 1000:.1f} ms to one save: 2 % of training where it saves every {lost / _LIMIT:.1f} s")
    return 0


def _round(state: TrainingState, images: torch.Tensor, labels: torch.Tensor, steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        nn.functional.cross_entropy(state.model(images), labels).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema is not None:
            state.ema.update(state.model)
    if images.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _write(checkpoints: Checkpoints, step: int, seconds: list[float], content: dict[str, Any]) -> None:
    began = time.perf_counter()
    checkpoints.save(step, content)
    seconds.append(time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
