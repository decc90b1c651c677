"""Check in a fresh process that an exported file computes what the model does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from famba import ops
from famba.errors import FambaError

BATCHES = (1, 3, 8)
"""Batch sizes that are tried. None is the one that a model is traced with."""
TOLERANCE = 1e-4
"""Outputs may lie so far apart, as a share of the largest logit, or of 1 where that is smaller."""
_RUNTIMES = {"safetensors": "timm", "torch_export": "torch", "onnx": "onnxruntime"}
_SAID = 2000  # characters of what a process said that an error repeats


class ExportError(FambaError, RuntimeError):
    """Say that a model cannot be written in a format, or that a file does not compute what the model does."""


def check_file(target: str, file: Path, model: nn.Module, shape: Sequence[int]) -> str:
    """Run a file in a fresh process on random inputs, compare with the model, and say what came of it.

    All outputs have to agree. Where one alone does not, rounding may have decided between two tokens that are equally
    similar to a third: then those of as many other inputs have to.

    Args:
        target: "safetensors", "torch_export" or "onnx".
        file: the file, or the folder of a model.
        model: what it was made from, in eval mode.
        shape: of one input, without the batch.

    Raises:
        ExportError: it does not load, or it computes something else.
    """
    runtime = f"{_RUNTIMES[target]} {metadata.version(_RUNTIMES[target])}"
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(batch, *shape, generator=generator) for batch in BATCHES]
        with torch.no_grad(), ops.use_backend("reference"):
            expected = torch.cat([model(images) for images in inputs])
        found = torch.cat(_run_fresh(target, file, inputs))
        if found.shape != expected.shape:
            raise ExportError(f"{file.name} gives {tuple(found.shape)} where the model gives {tuple(expected.shape)}")
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        apart = (found - expected).abs().amax(tuple(range(1, found.ndim)))
        differ = int((~(apart <= allowed)).sum())  # also where it is NaN
        if not differ:
            batches = ", ".join(map(str, BATCHES[:-1])) + f" and {BATCHES[-1]}"
            return (
                f"checked in a fresh process by {runtime}: {len(apart)} random inputs in batches of {batches}, "
                f"logits differ by at most {apart.max().item():.1e} (allowed: {allowed:.1e})"
            )
        if differ > 1:
            break
    raise ExportError(
        f"{file.name}, run by {runtime}, differs from the model by {apart.max().item():.2e} on {differ} of "
        f"{len(apart)} random inputs; allowed: {allowed:.1e}. Nothing was kept"
    )


def _run_fresh(target: str, file: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    names = [f"batch_{index:02d}" for index in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        given, computed = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(given, **{name: images.numpy() for name, images in zip(names, inputs, strict=True)})  # type: ignore[arg-type]
        # By its text, not its path, which would put its folder before the packages.
        code = Path(__file__).with_name("fresh.py").read_text()
        command = [sys.executable, "-c", code, target, str(file.resolve()), str(given), str(computed)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - this Python
        if done.returncode or not computed.is_file():
            said = (done.stderr or done.stdout).strip()[-_SAID:]
            raise ExportError(f"{file.name} does not run in a fresh process (status {done.returncode}):\n{said}")
        with np.load(computed) as outputs:
            return [torch.from_numpy(outputs[name]) for name in names]
