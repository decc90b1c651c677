"""Draw, for each image, which patches each token of a trained network holds, in up to eight layers: `famba visualize`.

Patches that share a token are outlined, in their mean colour; parts of one token that do not touch share a letter.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import ascii_letters
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy import ndimage
from torch import Tensor

from famba.analysis import options as shared
from famba.analysis.options import Variant, label_variants, own, variants
from famba.analysis.predict import image_files
from famba.analysis.trained import Trained, load_trained
from famba.data.augment import Normalize, evaluation_scaling
from famba.data.images import read_file
from famba.drawing import FAINT, INK, drawing, files
from famba.fusion import tokens_per_layer

Grid = npt.NDArray[np.int64]
"""Array (rows, columns) of the tokens that hold the patches."""
PRUNED = -1
"""Stands in a grid where no token holds a patch any more."""
_KEY = (
    "Outlined: patches that share a token, in their mean colour. Equal letters or numbers in a panel: parts of one "
    "token that do not touch."
)
_GREY, _LETTERS, _LINE = 200, 14, 0.155  # of pruned patches; of the title letters to an inch, and inches to a line
_PANEL, _LARGEST, _BESIDE = 1.55, 3.0, 1.2  # inches: a panel of 8 x 8 patches, the widest panel, labels of rows
_WIDEST_LABEL = 13  # characters
_HEIGHT = 0.72  # of a tag, in patches


class Row(NamedTuple):
    """Hold what a way of fusing makes of an image: for each layer shown its tokens, and which of them holds a patch."""

    label: str
    tokens: Sequence[int]
    held: Sequence[Grid]


def draw_patches(image: npt.NDArray[np.uint8], layers: Sequence[int], rows: Sequence[Row]) -> Figure:
    """Draw an image (s, s, 3), and for each way of fusing a row with a panel for each layer."""
    across, patches = len(layers) + 1, len(rows[0].held[0])
    panel = min(_LARGEST, _PANEL * max(1.0, patches / 8) ** 0.5)  # so that tags have room in finer grids
    key = f"{_KEY} Grey: pruned." if any((held == PRUNED).any() for row in rows for held in row.held) else _KEY
    width = _BESIDE + panel * across
    title = textwrap.wrap(key, int(_LETTERS * width))
    above = 0.18 + _LINE * len(title)
    height = above + (panel + 0.32) * len(rows)
    figure = Figure(figsize=(width, height))
    sides = {"left": _BESIDE / width, "right": 1 - 0.05 / width, "top": 1 - above / height, "bottom": 0.24 / height}
    panels = figure.subplots(len(rows), across, squeeze=False, gridspec_kw={**sides, "wspace": 0.06, "hspace": 0.2})
    for row, (first, *others) in zip(rows, panels, strict=True):
        _show(first, image, "image")
        text = "\n".join(textwrap.wrap(row.label, _WIDEST_LABEL))
        first.set_ylabel(text, rotation="horizontal", ha="right", va="center", fontsize=10, color=INK)
        for axes, layer, tokens, held in zip(others, layers, row.tokens, row.held, strict=True):
            said = f"layer {layer}: {tokens} tokens"
            if (held == PRUNED).any():
                _show(axes, np.where(_spread(held == PRUNED, image)[..., None], np.uint8(_GREY), image), said)
                continue
            _show(axes, mean_colours(image, held), said)
            # Pixels of imshow have their centres at whole numbers. White with black around it is seen on any image.
            outline = list(len(image) / patches * borders(held) - 0.5)
            for colour, thickness in (("black", 1.7), ("white", 0.8)):
                axes.add_collection(LineCollection(outline, colors=colour, linewidths=thickness))
            draw_tags(axes, held, len(image) // patches, 72 * panel / patches)
    figure.suptitle("\n".join(title), fontsize=9, color=INK, y=1 - 0.08 / height, va="top")
    return figure


def _show(axes: Axes, image: npt.NDArray[np.uint8], label: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label, labelpad=3, color=INK)
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT, linewidth=0.4)


def _spread(values: npt.NDArray, image: npt.NDArray[np.uint8]) -> npt.NDArray:
    """Return values of patches (rows, columns, ...) for each pixel of an image."""
    return values.repeat(image.shape[0] // values.shape[0], axis=0).repeat(image.shape[1] // values.shape[1], axis=1)


def _shared(held: Grid) -> npt.NDArray[np.bool_]:
    """Return which patches are held by a token that holds others too (rows, columns)."""
    _, places, counts = np.unique(held, return_inverse=True, return_counts=True)
    return (counts[places] > 1).reshape(held.shape)


def mean_colours(image: npt.NDArray[np.uint8], held: Grid) -> npt.NDArray[np.uint8]:
    """Give the patches of each token that holds several their mean colour; image and result (height, width, 3)."""
    token = _spread(held, image)
    means = np.stack([ndimage.mean(image[..., channel], token, index=token) for channel in range(3)], axis=-1)
    filled = np.floor(means + 0.5).astype(np.uint8)
    return np.where(_spread(_shared(held), image)[..., None], filled, image)


def borders(held: Grid) -> npt.NDArray[np.int64]:
    """Return lines (n, 2, 2) around the tokens that hold several patches, each from (x, y) to (x, y), in patches."""
    around, several = np.pad(held, 1, constant_values=PRUNED), np.pad(_shared(held), 1)
    found = []
    for turn in (False, True):  # between rows, and between columns
        ids, many = (around.T, several.T) if turn else (around, several)
        y, x = np.nonzero(((ids[1:] != ids[:-1]) & (many[1:] | many[:-1]))[:, 1:-1])
        lines = np.stack([np.stack([x, y], axis=1), np.stack([x + 1, y], axis=1)], axis=1)
        found.append(lines[..., ::-1] if turn else lines)
    return np.concatenate(found)


def draw_tags(axes: Axes, held: Grid, pixels: int, points: float) -> None:
    """Write a letter in the middle of each part of a token whose patches do not all touch; the largest token has "a".

    pixels, points: side of a patch in the image, and on paper.
    """
    parts = {token: ndimage.label(held == token) for token in dict.fromkeys(held.flat)}
    scattered = [token for token, (_, count) in parts.items() if count > 1]
    scattered.sort(key=lambda token: -int((held == token).sum()))
    edge = withStroke(linewidth=1.6, foreground="black")
    look: dict[str, Any] = {"color": "white", "ha": "center", "va": "center_baseline", "zorder": 3}
    for tag, token in zip(itertools.chain(ascii_letters, map(str, itertools.count(1))), scattered, strict=False):
        labelled, count = parts[token]
        for number in range(1, count + 1):
            part = np.argwhere(labelled == number)
            row, column = part[np.square(part - part.mean(axis=0)).sum(axis=1).argmin()]
            at = pixels * (column + 0.5) - 0.5, pixels * (row + 0.5) - 0.5
            axes.text(*at, tag, size=_HEIGHT * points, path_effects=[edge], **look)


_SAMPLES_NOTE = (
    "Photos: china.jpg by flickr.com/photos/danielbuechele, flower.jpg by flickr.com/photos/vultilion, both CC BY 2.0 "
    "(creativecommons.org/licenses/by/2.0), cropped and scaled; they come with scikit-learn."
)
_MOST_LAYERS, _AT_ONCE, _LONGEST_NAME = 8, 16, 80


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba visualize`."""
    parser.description = __doc__
    parser.epilog = "example: famba visualize runs/mine cat.jpg dog.jpg --fusion lower,upper --out pictures"
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=shared.CHECKPOINT)
    text = "image files of any size, or folders of them (default: two photos of scikit-learn's)"
    add("images", nargs="*", metavar="IMAGE", help=text)
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
    with shared.computing(trained, device, torch.float32):
        for file in shared.write_files(folder, draw(trained, compared, images, device)):
            print(file)
    if not options.images:
        print(_SAMPLES_NOTE)
    return 0


def shown_layers(schedules: Sequence[Sequence[int]]) -> list[int]:
    """Choose layers to show, ascending: all where they are few, else evenly from the first that fuses to the last."""
    depth = len(schedules[0])
    if depth <= _MOST_LAYERS:
        return list(range(depth))
    first = next((layer for layer in range(depth) if any(one[layer] for one in schedules)), 0)
    return sorted({round(place) for place in np.linspace(depth - 1, first, _MOST_LAYERS)})


def read_images(trained: Trained, given: Sequence[str]) -> dict[str, Tensor]:
    """Read image files, scaled and cropped as evaluation does; samples where none is given.

    Returns uint8 (3, s, s) by distinct plain names. Raises DataError for a file that is missing or is no image.
    """
    found = [(file.stem, read_file(file, trained.reading.colour)) for file in image_files(given)]
    if not found:
        from sklearn.datasets import load_sample_images  # takes a second, and only these images need it

        samples = load_sample_images()
        pairs = zip(samples.filenames, samples.images, strict=True)
        found = [(Path(name).stem, Image.fromarray(pixels)) for name, pixels in pairs]
    scaling = evaluation_scaling(trained.scaling, trained.image_size)
    images: dict[str, Tensor] = {}
    for stem, image in found:
        plain = re.sub(r"[^\w.+-]+", "_", stem)[:_LONGEST_NAME]
        names = [plain, *(f"{plain}_{number}" for number in range(2, len(images) + 3))]
        images[next(name for name in names if name not in images)] = scaling.image(image)
    return images


def draw(
    trained: Trained, compared: Sequence[Variant], images: dict[str, Tensor], device: torch.device
) -> dict[str, bytes]:
    """Return tokens_NAME.png for each image."""
    model = trained.model.to(device)
    inputs = Normalize(trained.mean, trained.std)(torch.stack(list(images.values()))).split(_AT_ONCE)
    layers, side = shown_layers([one.schedule for one in compared]), math.isqrt(model.num_patches)
    rows: dict[str, list[Row]] = {name: [] for name in images}
    for variant, label in zip(compared, label_variants(compared), strict=True):
        variant.put_into(model)
        is_pruned = variant.fusion.mode == "prune"
        if variant.removed:
            label = f"{label}: {variant.removed} of {model.num_patches} {'pruned' if is_pruned else 'removed'}"
        tokens, held = tokens_per_layer(variant.schedule, model.num_tokens), list[Tensor]()
        for part in inputs:
            traced = model.trace(part.to(device))
            if is_pruned:
                pairs = zip(traced, model.not_pruned(part.to(device)), strict=True)
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
