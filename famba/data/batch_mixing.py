"""Mix the images and labels of a micro-batch as timm's Mixup does, by numbers that may lie on any device.

Mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy.special import betaincinv
from torch import Tensor

MIXING_DRAWS = 4
"""Uniform numbers that one micro-batch takes."""


@dataclass(frozen=True)
class Mixing:
    """Mixes each image with the one at its place from the end; at least one alpha must be above 0."""

    mixup: float  # alpha of the Beta distribution; 0: no mixup
    cutmix: float  # likewise for CutMix
    switch: float  # probability of CutMix where both are on
    smoothing: float  # of labels
    classes: int

    def draw(self, uniform: Float64[np.ndarray, " {MIXING_DRAWS}"], height: int, width: int) -> Float64[Tensor, " 6"]:
        """Draw how a micro-batch of height x width images mixes.

        Returns the share of its own label that an image keeps, the share of its own pixels outside of a box, and the
        box: top, bottom, left, right. Pixels in the box are those of the other image.
        """
        cuts = self.cutmix > 0 and (self.mixup == 0 or uniform[0] < self.switch)
        alpha = self.cutmix if cuts else self.mixup
        own = float(betaincinv(alpha, alpha, uniform[1]))
        if not cuts:
            return torch.tensor([own, own, 0, 0, 0, 0], dtype=torch.float64)
        box: list[int] = []
        for side, place in zip((height, width), uniform[2:], strict=True):
            length, centre = int(side * math.sqrt(1 - own)), int(side * place)
            box += [max(centre - length // 2, 0), min(centre + (length + 1) // 2, side)]
        area = (box[1] - box[0]) * (box[3] - box[2])
        return torch.tensor([1 - area / (height * width), 1, *box], dtype=torch.float64)

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int64[Tensor, " b"], drawn: Float64[Tensor, " 6"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b {self.classes}"]]:
        """Return mixed images and soft labels; drawn: what `draw` returned, on the images' device."""
        share, outside, top, bottom, left, right = drawn.unbind()
        y = torch.arange(images.shape[2], device=images.device)[:, None]
        x = torch.arange(images.shape[3], device=images.device)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        kept = torch.where(inside, 0, outside).to(images.dtype)
        low = self.smoothing / self.classes
        soft = images.new_full((len(labels), self.classes), low)
        soft = soft.scatter_(1, labels[:, None], 1 - self.smoothing + low)
        return images.flip(0).lerp(images, kept), soft.flip(0).lerp(soft, share.to(soft.dtype))
