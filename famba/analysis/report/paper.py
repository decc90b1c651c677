"""Figures in print, to stand beside one's own.

Source: Shen et al., "Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion", arXiv 2409.09808: CIFAR-100 on an A100.
A figure that is not listed here is not known here, and its cell stays empty.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "arXiv 2409.09808, CIFAR-100 on an A100 with the paper's recipe"
_DATA = "cifar100"


class Printed(NamedTuple):
    """Top-1 in percent of the test images, and the training time in the paper's words; None where not known."""

    top1: float | None
    time: str | None


_PRINTED = {
    ("vim_small_patch16_224", "none"): Printed(76.9, None),
    ("vim_small_patch16_224", "upper"): Printed(75.2, None),
    ("vim_tiny_patch16_224", "interleaved"): Printed(67.0, "under 4 h"),
}


def printed(model: str, strategy: str, data: str) -> Printed:
    """Return what the paper has for a timm name of a model, a strategy and a data set; empty where it is not known."""
    return _PRINTED.get((model, strategy), Printed(None, None)) if data == _DATA else Printed(None, None)
