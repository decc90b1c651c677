"""Draw how a trained network fuses the tokens of images: `famba visualize`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from famba.analysis import options as shared
from famba.analysis.figures import drawing, rendered
from famba.analysis.pictures import PRUNED, Column, Grid, Row, draw_patches, draw_similarity
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
        "Draw, for each image, which patches each token holds, layer by layer; and over all images how similar the "
        "tokens of each layer are. Patches that share a token are outlined, in their mean colour; parts of "
        "one token that do not touch carry the same mark or letter."
    )
    parser.epilog = "example: famba visualize runs/mine cat.jpg dog.jpg --fusion lower,upper --out pictures"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=shared.CHECKPOINT)
    add("images", nargs="*", metavar="IMAGE", help="image files of any size (default: two photos of scikit-learn's)")
    shared.add_fusion_options(parser, "without these, the schedule that the model was trained with; a row for each")
    add("--layers-shown", type=int, metavar="N", help="layers in a picture of patches (default: all, 8 at most)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    add("--out", default="pictures", metavar="FOLDER", help="where to write (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Draw the pictures, and name the files."""
    request = check(options)
    folder = shared.prepare_folder(options.out)
    for file in shared.write_files(folder, draw(request)):
        print(file)
    if not options.images:
        print(_SAMPLES_NOTE)
    return 0


@dataclass(frozen=True)
class Request:
    """Hold what can be drawn. images: uint8 (3, s, s) of the network's size, by the name that a picture gets.

    layers: those that are shown.
    """

    trained: Trained
    variants: list[Variant]
    images: dict[str, Tensor]
    layers: list[int]
    device: torch.device


def check(options: argparse.Namespace) -> Request:
    """Load network and images, and check everything that is asked. Raises FambaError for what cannot work."""
    asked = shared.read_fusion(options)
    shared.at_least_one(options, "layers-shown")
    device = shared.device(options.device)
    trained = load_trained(options.checkpoint)
    compared = variants(trained, asked) or [own(trained)]
    count = options.layers_shown or _MOST_LAYERS
    layers = shown_layers(len(trained.schedule), [one.schedule for one in compared], count)
    return Request(trained, compared, read_images(trained, options.images), layers, device)


def shown_layers(depth: int, schedules: Sequence[Sequence[int]], count: int) -> list[int]:
    """Choose layers to show: all where they are few, else evenly from the first that fuses in any schedule to the last.

    Returns at most `count` of 0 .. depth - 1, ascending.
    """
    if count >= depth:
        return list(range(depth))
    first = next((layer for layer in range(depth) if any(one[layer] for one in schedules)), 0)
    return sorted({round(place) for place in np.linspace(depth - 1, first, count)})


def read_images(trained: Trained, files: Sequence[str]) -> dict[str, Tensor]:
    """Read image files by distinct names, decoded, scaled and cropped as evaluation does; samples where none is given.

    Raises DataError naming the file that is missing or is no image.
    """
    background = trained.reading.colour
    found = [(Path(file).stem, _read(Path(file), background)) for file in files] if files else list(_samples())
    scaling = evaluation_scaling(trained.scaling, trained.image_size)
    names = distinct(name for name, _ in found)
    return {name: scaling.image(image) for name, (_, image) in zip(names, found, strict=True)}


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


def distinct(names: Iterable[str]) -> list[str]:
    """Return names without what shells and systems stumble over; equal ones get a number."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.+-]+", "_", name)[:_LONGEST_NAME] or "image"
        candidates = [plain, *(f"{plain}_{number}" for number in range(2, len(found) + 3))]
        found.append(next(name for name in candidates if name not in found))
    return found


def draw(request: Request) -> dict[str, bytes]:
    """Return tokens_NAME.png for each image, similarity.png and similarity.svg."""
    model, layers = request.trained.model.to(request.device), request.layers
    inputs = [images.to(request.device) for images in normalized(request.trained, request.images).split(_AT_ONCE)]
    rows: dict[str, list[Row]] = {name: [] for name in request.images}
    columns = []
    for variant, label in zip(request.variants, label_variants(request.variants), strict=True):
        if variant.removed:
            does = "pruned" if variant.fusion.mode == "prune" else "removed"
            label = f"{label}: {variant.removed} of {model.num_patches} {does}"
        variant.put_into(model)
        tokens = tokens_per_layer(variant.schedule, model.num_tokens)
        held = [grids for images in inputs for grids in _grids(request, variant, images)]
        for own_rows, grids in zip(rows.values(), held, strict=True):
            own_rows.append(Row(label, [tokens[layer] for layer in layers], grids))
        found = list(zip(*(model.similarities(images) for images in inputs), strict=True))
        closest = [np.concatenate([one.closest.flatten().cpu().numpy() for one in layer]) for layer in found]
        means = [float(torch.cat([one.mean for one in layer]).mean()) for layer in found]
        columns.append(Column(label, closest, means, variant.schedule))
    files = {}
    with drawing():
        for name, pixels in request.images.items():
            figure = draw_patches(pixels.permute(1, 2, 0).numpy(), layers, rows[name])
            files[f"tokens_{name}.png"] = rendered(figure, "png")
        figure = draw_similarity(columns, len(rows))
        files |= {f"similarity.{kind}": rendered(figure, kind) for kind in ("png", "svg")}
    return files


def _grids(request: Request, variant: Variant, images: Tensor) -> list[list[Grid]]:
    """Return for each image, and each layer shown, which token holds each patch; PRUNED where none does."""
    model = request.trained.model
    traced = model.trace(images)
    if variant.fusion.mode == "prune":
        pairs = zip(traced, model.not_pruned(images), strict=True)
        traced = tuple(held.masked_fill(~there, PRUNED) for held, there in pairs)
    side = math.isqrt(model.num_patches)
    held = torch.stack([traced[layer] for layer in request.layers], dim=1).cpu().numpy()
    return [[grid.reshape(side, side) for grid in image] for image in held]
