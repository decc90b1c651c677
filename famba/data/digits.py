"""The handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from famba.data.sources import ArraySource, Splits

SIDE = 32  # pixels, as CIFAR
NUM_CLASSES = 10
TRAINING_IMAGES = 1437
_TEST_IMAGES = 360


def load_digits() -> Splits:
    """Return 1437 training and 360 test images, uint8 (n, 3, 32, 32), the same split in every run."""
    from sklearn import datasets, model_selection  # takes a second, and only these images need it

    digits = datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 as stored
    scaled = np.stack([_scale(image) for image in grey])
    images = torch.from_numpy(scaled)[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = model_selection.train_test_split(
        np.arange(len(labels)), test_size=_TEST_IMAGES, stratify=digits.target, random_state=0
    )

    def part(indices: np.ndarray) -> ArraySource:
        chosen = torch.from_numpy(np.sort(indices))
        return ArraySource(images[chosen], labels[chosen], NUM_CLASSES)

    classes = tuple(map(str, range(NUM_CLASSES)))
    return Splits(train=part(train), validation=None, test=part(test), classes=classes)


def _scale(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
