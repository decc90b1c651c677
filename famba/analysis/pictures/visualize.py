"""All pictures of one trained network."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from famba.analysis.figures import drawing, save
from famba.analysis.fusion_options import read_options
from famba.analysis.pictures.images import Shown, normalized, read_images
from famba.analysis.pictures.patches import PRUNED, Row, draw_patches
from famba.analysis.pictures.regions import Grid, shown_layers
from famba.analysis.pictures.similarity import Column, draw_similarity
from famba.analysis.variants import Variant, label_variants, own, variants
from famba.errors import ConfigError
from famba.fusion import tokens_per_layer
from famba.training.devices import choose_device, make_current
from famba.training.weights import Trained, load_trained

_MOST_LAYERS = 8
_AT_ONCE = 16


@dataclass(frozen=True)
class Request:
    """Pictures that can be drawn. layers: those that are shown."""

    trained: Trained
    variants: tuple[Variant, ...]
    images: tuple[Shown, ...]
    layers: tuple[int, ...]
    device: torch.device


def check(options: argparse.Namespace) -> Request:
    """Load network and images, and check everything that is asked. Raises FambaError for what cannot work."""
    asked = read_options(options)
    if options.layers_shown is not None and options.layers_shown < 1:
        raise ConfigError(f"--layers-shown is {options.layers_shown}; allowed: 1 or more")
    try:
        device = choose_device(options.device)
    except ConfigError as error:
        raise ConfigError(str(error).replace("trainer.device", "--device")) from error
    make_current(device)
    trained = load_trained(options.checkpoint)
    compared = tuple(variants(trained, asked) or [own(trained)])
    layers = shown_layers(
        len(trained.schedule), [one.schedule for one in compared], options.layers_shown or _MOST_LAYERS
    )
    return Request(trained, compared, tuple(read_images(trained, options.images)), tuple(layers), device)


def visualize(request: Request, folder: Path) -> list[Path]:
    """Write tokens_NAME.png for each image, similarity.png and similarity.svg; return the files."""
    trained = request.trained
    model = trained.model.to(request.device)
    inputs = normalized(trained, request.images).split(_AT_ONCE)
    names = _titles(request)
    rows: list[list[Row]] = [[] for _ in request.images]
    columns = []
    for variant, name in zip(request.variants, names, strict=True):
        variant.put_into(model)
        held = [_grids(request, variant, images.to(request.device)) for images in inputs]
        tokens = tokens_per_layer(variant.schedule, model.num_tokens)
        for number, grids in enumerate(grids for batch in held for grids in batch):
            rows[number].append(Row(name, [tokens[layer] for layer in request.layers], grids))
        columns.append(_column(request, variant, name, inputs))
    files = []
    with drawing():
        for image, own_rows in zip(request.images, rows, strict=True):
            figure = draw_patches(image.pixels.permute(1, 2, 0).numpy(), request.layers, own_rows)
            files += save(figure, folder, f"tokens_{image.name}", ["png"])
        files += save(draw_similarity(columns, len(request.images)), folder, "similarity")
    return files


def _titles(request: Request) -> list[str]:
    """Strategies by name, with how many patches go."""
    patches = request.trained.model.num_patches
    return [
        f"{name}: {one.removed} of {patches} {'pruned' if one.fusion.mode == 'prune' else 'removed'}"
        if one.removed
        else name
        for name, one in zip(label_variants(request.variants), request.variants, strict=True)
    ]


def _grids(request: Request, variant: Variant, images: Tensor) -> list[list[Grid]]:
    """For each image, and each layer shown, which token holds each patch; PRUNED where none does."""
    model = request.trained.model
    traced = model.trace(images)
    if variant.fusion.mode == "prune":
        pairs = zip(traced, model.not_pruned(images), strict=True)
        traced = tuple(held.masked_fill(~there, PRUNED) for held, there in pairs)
    side = math.isqrt(model.num_patches)
    held = torch.stack([traced[layer] for layer in request.layers], dim=1).cpu().numpy()
    return [[grid.reshape(side, side) for grid in image] for image in held]


def _column(request: Request, variant: Variant, name: str, inputs: Sequence[Tensor]) -> Column:
    model = request.trained.model
    found = [model.similarities(images.to(request.device)) for images in inputs]
    layers = list(zip(*found, strict=True))
    closest = [np.concatenate([one.closest.flatten().cpu().numpy() for one in layer]) for layer in layers]
    means = [float(torch.cat([one.mean for one in layer]).mean()) for layer in layers]
    return Column(name, closest, means, variant.schedule)
