"""Check in a fresh process that an exported file computes what the model does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from famba import ops
from famba.errors import FambaError
from famba.ops.reference import split_alternately

BATCHES = (1, 3, 8)
"""Batch sizes that are tried. None is the one that a model is traced with."""
TOLERANCE = 1e-4
"""Outputs may lie so far apart, as a share of the largest logit, or of 1 where that is smaller."""
NEAR_TIE = 1e-5
"""Cosines that lie closer may come out in another order in another runtime, which rounds differently."""
_RUNTIMES = {"safetensors": "timm", "torch_export": "torch", "onnx": "onnxruntime"}
_SAID = 2000  # characters of what a process said that an error repeats


class ExportError(FambaError, RuntimeError):
    """Say that a model cannot be written in a format, or that a file does not compute what the model does."""


def check_file(target: str, file: Path, model: nn.Module, shape: Sequence[int]) -> str:
    """Run a file in a fresh process on random inputs, compare with the model, and say what came of it.

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
    runtime = f"{_RUNTIMES[target]} {metadata.version(_RUNTIMES[target])}"
    return judged(file, runtime, found, expected, margins)


def judged(file: Path, runtime: str, found: Tensor, expected: Tensor, margins: Tensor) -> str:
    """Compare outputs (n, classes), and say by how much they differ.

    An image may differ where its margin (n,) is below NEAR_TIE. Raises ExportError where any other does, or most do.
    """
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
    batches = ", ".join(map(str, BATCHES[:-1])) + f" and {BATCHES[-1]}"
    said = (
        f"checked in a fresh process by {runtime}: {len(apart)} random inputs in batches of {batches}, "
        f"logits differ by at most {apart[~tied].max().item():.1e} (allowed: {allowed:.1e})"
    )
    if tied.any():
        said += (
            f"\n{int(tied.sum())} of them differ by up to {apart[tied].max().item():.1e}: there, two cosines lie "
            f"closer than {NEAR_TIE:.0e}, and rounding decides which tokens fuse"
        )
    return said


def _run_fresh(target: str, file: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    names = [f"batch_{index:02d}" for index in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        given, computed = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        np.savez(given, **{name: images.numpy() for name, images in zip(names, inputs, strict=True)})  # type: ignore[arg-type]
        # By its text, not its path, which would put its folder before the packages.
        code = Path(__file__).with_name("fresh.py").read_text()
        done = subprocess.run(  # noqa: S603 - this Python, on this package's code
            [sys.executable, "-c", code, target, str(file.resolve()), str(given), str(computed)],
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


def matching_margins(model: nn.Module, images: Tensor) -> Tensor:
    """Return for each image (b, ...) the smallest difference of cosines that any layer's matching turned on, (b,).

    Infinite where nothing fuses. Where it is as small as a rounding, one runtime may choose one pair and the next
    another; both are right, and what comes out differs by far more than a rounding.
    """
    with torch.no_grad(), ops.use_backend("reference"), _Watching() as watching:
        model(images)
    nothing = torch.full((len(images),), float("inf"))
    return torch.stack([nothing, *watching.margins]).amin(0)


class _Watching(TorchDispatchMode):
    """Note the margin of every matching within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.margins: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.famba.match_tokens.default:
            metric, leading, protected, _, r, *_ = args
            self.margins.append(_margin(metric, leading, protected, r))
        return func(*args, **(kwargs or {}))


def _margin(metric: Tensor, leading: int, protected: Tensor | None, r: int) -> Tensor:
    """Return how close a matching is to another, (b,).

    The smaller of two differences: between the last pair that fuses and the first that does not; and, of a token that
    fuses, between its closest partner and the next.
    """
    unit, batch = F.normalize(metric.float(), dim=-1), len(metric)
    in_a, in_b = split_alternately(leading, protected, metric.shape[1], metric.device)
    a, b = (unit.gather(1, x.expand(batch, -1).unsqueeze(2).expand(-1, -1, unit.shape[2])) for x in (in_a, in_b))
    closest = (a @ b.transpose(1, 2)).topk(min(2, b.shape[1]), dim=2).values
    order = closest[:, :, 0].argsort(dim=1, descending=True, stable=True)
    closest = closest.gather(1, order.unsqueeze(2).expand_as(closest))
    found = [metric.new_full((batch,), float("inf"))]
    if r < closest.shape[1]:
        found.append(closest[:, r - 1, 0] - closest[:, r, 0])
    if closest.shape[2] > 1:
        found.append((closest[:, :r, 0] - closest[:, :r, 1]).amin(1))
    return torch.stack(found).amin(0)
