"""A run that Famba 0.1 began, kept in tests/earlier/0.1, and the images that it was begun with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

KEPT = Path(__file__).parent / "earlier" / "0.1"
STEPS = 12
# Beside TINY of runs.py.
CHANGES = (
    "model.embed_dim=8",
    "model.drop_path=0.1",
    "fusion=upper",
    "fusion.budget=4",
    "data=folder",
    "data.image_size=24",
    "data.subset=24",
    "data.val_fraction=0.25",
    "data.workers=0",
    "recipe.mixup=0.8",
    "recipe.cutmix=1.0",
    "recipe.ema_decay=0.9",
    "recipe.clip_grad=1.0",
    "recipe.lr=0.01",
    "trainer.epochs=4",
    "trainer.batch_size=6",
    "trainer.device=cpu",
    "ops.backend=reference",
)


def write_images(root: Path) -> None:
    """Write images that version 0.1 read in its own way: nested, transparent, turned, hidden, and of other formats."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("bird/small", "cat", "dog", "Egret"):
            for number in range(count):
                path = root / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = drawn.integers(0, 256, (20, 26, 4), dtype=np.uint8)
                exif = Image.Exif()
                exif[0x0112] = 6 if number % 2 else 1  # the orientation
                Image.fromarray(pixels, "RGBA").save(path, exif=exif)
        Image.new("RGB", (8, 8)).save(root / part / "cat" / "0.webp")
