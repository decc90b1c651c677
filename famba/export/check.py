"""Whether a file that was exported computes what the model does, found out in a fresh process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from famba import ops
from famba.export.errors import ExportError
from famba.export.margins import matching_margins

BATCHES = (1, 3, 8)
"""Batch sizes that are tried. None is the one that a model is traced with."""
TOLERANCE = 1e-4
"""Of the largest logit, or of 1 where that is smaller: how far outputs may lie apart."""
NEAR_TIE = 1e-5
"""Cosines that lie closer may come out in another order in another runtime, which rounds differently."""

_FRESH = Path(__file__).parent / "fresh"
_SAID = 2000  # characters of what a process said that an error repeats


@dataclass(frozen=True)
class Check:
    """What a fresh process computed beside the model here, image by image.

    runtime: what ran the file, with its version. images: how many, in batches of `BATCHES`. difference: the largest of
    logits, over images without a near tie, or with one that came out alike. allowed: what it may be.
    ties: images that differ by more, each with a matching that turned on less than NEAR_TIE; tied_difference: theirs.
    """

    runtime: str
    images: int
    difference: float
    allowed: float
    ties: int
    tied_difference: float

    def __str__(self) -> str:
        batches = ", ".join(map(str, BATCHES[:-1])) + f" and {BATCHES[-1]}"
        said = (
            f"checked in a fresh process by {self.runtime}: {self.images} random inputs in batches of {batches}, "
            f"logits differ by at most {self.difference:.1e} (allowed: {self.allowed:.1e})"
        )
        if self.ties:
            said += (
                f"\n{self.ties} of them differ by up to {self.tied_difference:.1e}: there, two cosines lie closer than "
                f"{NEAR_TIE:.0e}, and rounding decides which tokens fuse"
            )
        return said


def missing_runtime(target: str) -> str | None:
    """Name the package that would have to be installed to check files of a format; None where all is there."""
    return "onnxruntime" if target == "onnx" and importlib.util.find_spec("onnxruntime") is None else None


def check_file(target: str, file: Path, model: nn.Module, shape: Sequence[int]) -> Check:
    """Run a file in a fresh process on random inputs, and compare with the model.

    Args:
        target: "safetensors", "torch_export" or "onnx".
        file: the file, or the folder of a model.
        model: what it was made from, in eval mode.
        shape: of one input, without the batch.

    Raises:
        ExportError: it does not load, or it computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *shape, generator=generator) for batch in BATCHES]
    with torch.no_grad(), ops.use_backend("reference"):
        expected = torch.cat([model(images) for images in inputs])
    found = torch.cat(_run_fresh(target, file, inputs))
    if found.shape != expected.shape:
        raise ExportError(f"{file.name} gives {tuple(found.shape)} where the model gives {tuple(expected.shape)}")
    margins = torch.cat([matching_margins(model, images) for images in inputs])
    return _judged(file, _runtime(target), found, expected, margins)


def _judged(file: Path, runtime: str, found: Tensor, expected: Tensor, margins: Tensor) -> Check:
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    apart = (found - expected).abs().amax(tuple(range(1, found.ndim)))
    differs = ~(apart <= allowed)  # also where it is NaN
    tied = differs & (margins < NEAR_TIE)
    # A near tie is rare: where most images differ, something else is wrong.
    if (differs & ~tied).any() or differs.sum() > len(differs) // 2:
        raise ExportError(
            f"{file.name}, run by {runtime}, differs from the model by {apart.max().item():.2e} on "
            f"{int(differs.sum())} of {len(differs)} random inputs; allowed: {allowed:.1e}. Nothing was kept"
        )
    worst = apart[tied].max().item() if tied.any() else 0.0
    return Check(runtime, len(apart), apart[~tied].max().item(), allowed, int(tied.sum()), worst)


def _run_fresh(target: str, file: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    names = [f"batch_{index:02d}" for index in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        given, computed = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(given, **{name: images.numpy() for name, images in zip(names, inputs, strict=True)})  # type: ignore[arg-type]
        # By its text, not its path: that would put its folder, whose files have the names of packages, before them.
        code = (_FRESH / f"{target}.py").read_text()
        done = subprocess.run(  # noqa: S603 - this Python, on this package's code
            [sys.executable, "-c", code, str(file.resolve()), str(given), str(computed)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not computed.is_file():
            said = (done.stderr or done.stdout).strip()[-_SAID:]
            raise ExportError(f"{file.name} does not run in a fresh process (status {done.returncode}):\n{said}")
        with np.load(computed) as outputs:
            return [torch.from_numpy(outputs[name]) for name in names]


def _runtime(target: str) -> str:
    package = {"safetensors": "timm", "torch_export": "torch", "onnx": "onnxruntime"}[target]
    return f"{package} {metadata.version(package)}"
