"""Compare the batched augmentation with timm's, on CIFAR-100: pictures, contact sheets, and rates on one CPU thread.

    python scripts/check_augmentation.py --root data            # each operation on 1,000 images, as a table
    python scripts/check_augmentation.py --sheet operations.png # each operation at three magnitudes beside timm's
    python scripts/check_augmentation.py --rate                 # images per second of a core, recipe=paper at 224
    python scripts/check_augmentation.py --statistics 32        # of what comes out, with 95 % intervals, recipe=paper

Without a folder of CIFAR-100 the images are crops of the photographs that scikit-learn ships.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate
from timm.data.auto_augment import AugmentOp
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from famba.data import ArraySource, Augmentation, load_splits
from famba.data.augment import AugmentationOptions, BatchAugmentation, timm_transform
from famba.data.batch_operations import Geometry, change
from famba.data.batch_policy import BY_NAME, DRAWS, Policy
from famba.data.batch_resample import BOX_DRAWS, crop, random_boxes, resize_and_crop

_MEAN, _STD, _FILL = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), (129, 124, 112)
_MAGNITUDES = (2.0, 5.0, 9.0)
_OPTIONS = {
    "hflip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "random_erasing": 0.25,
    "erasing_mode": "pixel",
    "interpolation": "bicubic",
    "eval_crop": 0.875,
}


def images_of(root: Path | None, count: int, side: int = 32) -> list[Image.Image]:
    """Return the first training images, or crops of photographs."""
    if root is not None:
        splits = load_splits("cifar100", root, subset=None, val_fraction=0.0, num_classes=None)
        if not isinstance(splits.train, ArraySource):
            raise SystemExit(f"{root} does not hold CIFAR-100")
        return [vision.to_pil_image(image) for image in splits.train.images[:count]]
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        photo = Image.fromarray(load_sample_images().images[number % 2])
        left, top = (int(rng.integers(0, length - 2 * side + 1)) for length in photo.size)
        found.append(photo.resize((side, side), box=(left, top, left + 2 * side, top + 2 * side)))
    return found


def tensor_of(images: list[Image.Image]) -> Tensor:
    """Return uint8 (b, 3, h, w)."""
    return torch.stack([vision.pil_to_tensor(image) for image in images])


def both(name: str, magnitude: float, images: list[Image.Image]) -> tuple[Tensor, Tensor]:
    """Return the images after the batched operation and after timm's, with the same draws, as whole numbers."""
    policy = Policy((name,), np.ones(1), np.array([magnitude]), 0.0, 10.0, 1, None, False)
    numbers = np.zeros((len(images), 1, DRAWS))
    numbers[:, 0, -1] = [random.Random(number).random() for number in range(len(images))]  # noqa: S311
    operation = AugmentOp(name, 1.0, magnitude, {"img_mean": _FILL, "interpolation": Image.Resampling.BICUBIC})
    (step,) = policy.draw(numbers, images[0].width)
    found = tensor_of(images)
    change(found, step, Geometry(_FILL, "bicubic"), torch.float32)
    wanted = []
    for number, image in enumerate(images):
        random.seed(number)
        wanted.append(operation(image))
    return found, tensor_of(wanted)


def differences(images: list[Image.Image]) -> list[tuple[str, float, float, float]]:
    """Return name, magnitude, and the largest and the mean difference, of 255, for each operation."""
    rows = []
    pairs: list[tuple[str, float, tuple[Tensor, Tensor]]] = []
    for size in (32, 224):
        mode, count = InterpolationMode.BICUBIC, len(images)
        boxes = random_boxes(np.random.default_rng(size).random((count, BOX_DRAWS)), 32, 32)
        found = crop(tensor_of(images), torch.from_numpy(boxes), torch.zeros(count, dtype=torch.bool), size, "bicubic")
        wanted = [
            vision.resized_crop(x, *map(int, box), [size, size], mode) for x, box in zip(images, boxes, strict=True)
        ]
        pairs.append((f"random resized crop to {size}", 0, (found, tensor_of(wanted))))
        side = round(size / 0.875)
        central = [vision.center_crop(vision.resize(image, side, mode), [size, size]) for image in images]
        pairs.append(
            (
                f"resize and crop to {size}",
                0,
                (resize_and_crop(tensor_of(images), side, size, "bicubic"), tensor_of(central)),
            )
        )
    pairs += [(name, magnitude, both(name, magnitude, images)) for name in BY_NAME for magnitude in _MAGNITUDES]
    for name, magnitude, (ours, theirs) in pairs:
        away = (ours.float() - theirs).abs()
        rows.append((name, magnitude, float(away.max()), float(away.mean())))
    return rows


def draw_sheet(path: Path, photo: Image.Image) -> None:
    """Draw each operation at three magnitudes, beside timm's."""
    columns = 2 * len(_MAGNITUDES)
    names = list(BY_NAME)
    halves = -(-len(names) // 2)
    figure, axes = plt.subplots(halves, 2 * columns, figsize=(2 * columns * 1.1, halves * 1.25))
    for place in axes.flat:
        place.axis("off")
    for number, name in enumerate(names):
        row, start = number % halves, columns * (number // halves)
        for turn, magnitude in enumerate(_MAGNITUDES):
            for side, picture in enumerate(both(name, magnitude, [photo])):
                place = axes[row, start + 2 * turn + side]
                place.imshow(picture[0].permute(1, 2, 0).numpy())
                place.set_title(f"{'timm' if side else 'batch'} {magnitude:g}", fontsize=6, pad=2)
        axes[row, start].text(
            -0.04, 0.5, name, transform=axes[row, start].transAxes, rotation=90, fontsize=6, ha="right", va="center"
        )
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=110)
    sys.stdout.write(f"wrote {path}\n")


def rates(images: list[Image.Image], in_memory: bool, repeats: int = 9) -> tuple[float, float]:
    """Return images per second of processor time, of timm's transforms and of the batched augmentation.

    They run in turn, the median counts. in_memory: images lie there as one batch; else each is cropped by Pillow.
    """
    torch.set_num_threads(1)
    alone = timm_transform(Augmentation(kind="timm", crop_padding=0, **_OPTIONS), 224, _MEAN, _STD)  # type: ignore[arg-type]
    whole = BatchAugmentation(AugmentationOptions(crop_padding=None, **_OPTIONS), 224, _MEAN, _STD, 0)  # type: ignore[arg-type]
    pixels = tensor_of(images) if in_memory else None

    def batched(turn: int) -> Tensor:
        if pixels is not None:
            return whole(pixels, turn, 0)
        return whole(whole.crop_each(images, turn, 0), turn, 0, cropped=True)

    times = []
    for turn in range(repeats):
        began = time.process_time()
        torch.stack([alone(image) for image in images])
        between = time.process_time()
        batched(turn)
        times.append((between - began, time.process_time() - between))
    return tuple(len(images) / np.median(times, axis=0))


def features(batch: Tensor) -> dict[str, Tensor]:
    """Return statistics, float64 (b,) each, of normalised images: brightness, contrast, sharpness, and more."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    values = (batch * std + mean) * 255
    fill = (values - torch.tensor(_FILL).view(3, 1, 1)).abs().amax(1) < 0.5
    found = {
        **{f"mean of {name}": values[:, number].mean((1, 2)) for number, name in enumerate(("red", "green", "blue"))},
        "standard deviation": values.std((1, 2, 3)),
        "horizontal gradient": values.diff(dim=3).square().mean((1, 2, 3)).sqrt(),
        "vertical gradient": values.diff(dim=2).square().mean((1, 2, 3)).sqrt(),
        "saturation": (values.amax(1) - values.amin(1)).mean((1, 2)),
        "share of fill": fill.float().mean((1, 2)),
        "share out of 0..255 (noise)": ((values < -0.5) | (values > 255.5)).float().mean((1, 2, 3)),
        "share of 0 and 255": ((values < 0.5) | (values > 254.5)).float().mean((1, 2, 3)),
        "left half less right": (values[..., : values.shape[3] // 2].mean((1, 2, 3)) - values.mean((1, 2, 3))),
        "upper half less lower": (values[:, :, : values.shape[2] // 2].mean((1, 2, 3)) - values.mean((1, 2, 3))),
    }
    return {name: value.double() for name, value in found.items()}


def statistics(images: list[Image.Image], size: int) -> list[tuple[str, float, float, float, float]]:
    """Return name, timm's mean, and the batch's less timm's with its 95 % interval, for each feature of the images.

    The same images go through both, so the differences are paired; draws are each one's own.
    """
    alone = timm_transform(Augmentation(kind="timm", crop_padding=0, **_OPTIONS), size, _MEAN, _STD)  # type: ignore[arg-type]
    whole = BatchAugmentation(AugmentationOptions(crop_padding=None, **_OPTIONS), size, _MEAN, _STD, 0)  # type: ignore[arg-type]
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), 100):
        part = images[start : start + 100]
        pair = features(torch.stack([alone(image) for image in part])), features(whole(tensor_of(part), 0, start))
        for name in pair[0]:
            found.setdefault(name, []).append(torch.stack([one[name] for one in pair]))
    rows = []
    for name, parts in found.items():
        theirs, ours = torch.cat(parts, 1)
        away, half = float((ours - theirs).mean()), 1.96 * float((ours - theirs).std()) / len(ours) ** 0.5
        rows.append((name, float(theirs.mean()), away, away - half, away + half))
    return rows


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with CIFAR-100")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    parser.add_argument("--rate", action="store_true")
    parser.add_argument("--statistics", type=int, metavar="SIDE", help="of the model's images")
    arguments = parser.parse_args()
    if arguments.sheet:
        return draw_sheet(arguments.sheet, images_of(None, 1, 160)[0])
    if arguments.rate:
        photos = [
            Image.fromarray(image).resize((500, 375 - number))
            for number, image in enumerate(load_sample_images().images * 64)
        ]
        for name, some in (("32 x 32", images_of(arguments.root, 128)), ("500 x 300", photos)):
            timm_rate, batch_rate = rates(some, name == "32 x 32")
            rate = f"timm {timm_rate:.0f} images/s, batch {batch_rate:.0f}, ratio {batch_rate / timm_rate:.2f}"
            sys.stdout.write(f"{name}: {rate}\n")
        return None
    images = images_of(arguments.root, arguments.images)
    if arguments.statistics:
        headers = ["feature", "timm", "batch less timm", "95 % from", "to"]
        sys.stdout.write(tabulate(statistics(images, arguments.statistics), headers, floatfmt=".4g") + "\n")
        return None
    rows = differences(images)
    sys.stdout.write(
        tabulate(rows, ["operation", "magnitude", "largest difference of 255", "mean"], floatfmt=".4g") + "\n"
    )
    exact, worst = ("Equalize", "AutoContrast"), max(row[2] for row in rows)
    if worst > 1 or any(row[2] for row in rows if row[0] in exact):
        raise SystemExit("Pictures differ by more than 1 of 255, or those of an exact operation differ.")
    return None


if __name__ == "__main__":
    main()
