"""Draw how a trained network fuses the tokens of images: `famba visualize`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from famba.analysis import options as shared
from famba.analysis.figures import drawing, files
from famba.analysis.pictures import PRUNED, Row, draw_patches
from famba.analysis.variants import Variant, label_variants, own, variants
from famba.data.augment import Normalize, evaluation_scaling
from famba.data.images import Colour, decode_rgb, naming
from famba.errors import DataError
from famba.fusion import tokens_per_layer
from famba.training.weights import Trained, load_trained

_SAMPLES_NOTE = (
    "Photos: china.jpg by flickr.com/photos/danielbuechele, flower.jpg by flickr.com/photos/vultilion, both CC BY 2.0 "
    "(creativecommons.org/licenses/by/2.0), cropped and scaled; they come with scikit-learn."
)
_MOST_LAYERS, _AT_ONCE, _LONGEST_NAME = 8, 16, 80


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba visualize`."""
    parser.description = (
        "Draw, for each image, which patches each token holds, in up to eight layers. Patches that share a token are "
        "outlined, in their mean colour; parts of one token that do not touch carry the same letter."
    )
    parser.epilog = "example: famba visualize runs/mine cat.jpg dog.jpg --fusion lower,upper --out pictures"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=shared.CHECKPOINT)
    add("images", nargs="*", metavar="IMAGE", help="image files of any size (default: two photos of scikit-learn's)")
    shared.add_fusion_options(parser, "without these, the schedule that the model was trained with; a row for each")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    add("--out", default="pictures", metavar="FOLDER", help="where to write (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Check everything that is asked, draw the pictures, and name the files."""
    asked = shared.read_fusion(options)
    device = shared.device(options.device)
    trained = load_trained(options.checkpoint)
    compared = variants(trained, asked) or [own(trained)]
    images = read_images(trained, options.images)
    folder = shared.prepare_folder(options.out)
    for file in shared.write_files(folder, draw(trained, compared, images, device)):
        print(file)
    if not options.images:
        print(_SAMPLES_NOTE)
    return 0


def shown_layers(schedules: Sequence[Sequence[int]], most: int = _MOST_LAYERS) -> list[int]:
    """Choose layers to show: all where they are few, else evenly from the first that fuses in any schedule to the last.

    Returns at most `most` of 0 .. depth - 1, ascending.
    """
    depth = len(schedules[0])
    if most >= depth:
        return list(range(depth))
    first = next((layer for layer in range(depth) if any(one[layer] for one in schedules)), 0)
    return sorted({round(place) for place in np.linspace(depth - 1, first, most)})


def read_images(trained: Trained, given: Sequence[str]) -> dict[str, Tensor]:
    """Read image files, decoded, scaled and cropped as evaluation does; samples where none is given.

    Returns uint8 (3, s, s) of the network's size, by names without what shells and systems stumble over. Raises
    DataError naming the file that is missing or is no image, or two of one name.
    """
    background = trained.reading.colour
    found = [(Path(file).stem, _read(Path(file), background)) for file in given] if given else list(_samples())
    scaling = evaluation_scaling(trained.scaling, trained.image_size)
    images: dict[str, Tensor] = {}
    for stem, image in found:
        name = re.sub(r"[^\w.+-]+", "_", stem)[:_LONGEST_NAME]
        if name in images:
            raise DataError(f"two images are named {name}; rename one, or draw them into two folders")
        images[name] = scaling.image(image)
    return images


def normalized(trained: Trained, images: dict[str, Tensor]) -> Tensor:
    """Return what the network takes, float32 (n, 3, s, s)."""
    return Normalize(trained.mean, trained.std)(torch.stack(list(images.values())))


def _read(file: Path, background: Colour | None) -> Image.Image:
    if not file.is_file():
        what = "is a folder; give the image files in it" if file.is_dir() else "is not there; give image files"
        raise DataError(f"{file} {what}")
    with naming(lambda: str(file)), open(file, "rb") as opened:
        try:
            return decode_rgb(opened, background)
        except UnidentifiedImageError:  # whose own message names Python's file object
            raise DataError(f"{file} is no image of a kind that Pillow knows; give PNG, JPEG or the like") from None


def _samples() -> Iterable[tuple[str, Image.Image]]:
    from sklearn.datasets import load_sample_images  # takes a second, and only these images need it

    found = load_sample_images()
    for file, image in zip(found.filenames, found.images, strict=True):
        yield Path(file).stem, Image.fromarray(image)


def draw(
    trained: Trained, compared: Sequence[Variant], images: dict[str, Tensor], device: torch.device
) -> dict[str, bytes]:
    """Return tokens_NAME.png for each image."""
    model = trained.model.to(device)
    inputs = [part.to(device) for part in normalized(trained, images).split(_AT_ONCE)]
    layers, side = shown_layers([one.schedule for one in compared]), math.isqrt(model.num_patches)
    rows: dict[str, list[Row]] = {name: [] for name in images}
    for variant, label in zip(compared, label_variants(compared), strict=True):
        variant.put_into(model)
        is_pruned = variant.fusion.mode == "prune"
        if variant.removed:
            label = f"{label}: {variant.removed} of {model.num_patches} {'pruned' if is_pruned else 'removed'}"
        tokens, held = tokens_per_layer(variant.schedule, model.num_tokens), list[Tensor]()
        for part in inputs:
            traced = model.trace(part)
            if is_pruned:
                pairs = zip(traced, model.not_pruned(part), strict=True)
                traced = tuple(places.masked_fill(~there, PRUNED) for places, there in pairs)
            held += torch.stack([traced[layer] for layer in layers], dim=1).unflatten(2, (side, side)).cpu()
        for own_rows, grids in zip(rows.values(), held, strict=True):
            own_rows.append(Row(label, [tokens[layer] for layer in layers], list(grids.numpy())))
    pictures: dict[str, bytes] = {}
    with drawing():
        for name, pixels in images.items():
            figure = draw_patches(pixels.permute(1, 2, 0).numpy(), layers, rows[name])
            pictures |= files(f"tokens_{name}", figure, ["png"])
    return pictures
