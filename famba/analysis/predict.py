"""Print the five likeliest classes of each image by a trained network that fuses as in training: `famba predict`.

Images are read, scaled and cropped as evaluation does.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from famba.analysis import options as shared
from famba.analysis.trained import Trained, load_trained
from famba.data.augment import Normalize, evaluation_scaling
from famba.data.folders import is_hidden, is_image, order
from famba.data.images import read_file
from famba.errors import DataError
from famba.models.weights import WEIGHTS

_MOST, _AT_ONCE = 5, 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba predict`."""
    parser.description = __doc__
    parser.epilog = "example: famba predict runs/mine cat.jpg photos/"
    parser.add_argument("checkpoint", metavar="RUN", help=shared.CHECKPOINT)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders with images at any depth")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or mps")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects instead")


def run(options: argparse.Namespace) -> int:
    """Print the classes of every image."""
    files = image_files(options.images)  # before the network, which takes longer
    device = shared.device(options.device)
    trained = load_trained(options.checkpoint)
    with shared.computing(trained, device, torch.float32):
        found = predict(trained, files, device)
        if options.json:
            print(json.dumps(list(found), indent=2))
        for one in found:
            rows = [(f"{100 * likely['probability']:.1f} %", likely["class"]) for likely in one["classes"]]
            table = tabulate(rows, tablefmt="plain", colalign=("right", "left"), disable_numparse=True)
            print(f"{one['image']}\n{table}\n")
    return 0


def image_files(places: Sequence[str]) -> list[Path]:
    """List image files, those in folders in natural order. Raises DataError for a place without any."""
    files: list[Path] = []
    for place in map(Path, places):
        inside = [place]
        if place.is_dir():
            inside = [Path(at, name) for at, _, names in os.walk(place) for name in names]
            inside = [file for file in inside if is_image(file.name) and not is_hidden(file.name)]
        if not inside or not inside[0].is_file():
            told = "is a folder without images" if place.is_dir() else "is not there"
            raise DataError(f"{place} {told}; give image files, such as PNG or JPEG, or folders of them")
        files += sorted(inside, key=lambda file: order(str(file)))
    return list(dict.fromkeys(files))


def predict(trained: Trained, files: Sequence[Path], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield for each file its path ("image") and the likeliest classes, each with its number, name and probability.

    Raises DataError for a file that is no image.
    """
    model, names = trained.model.to(device), class_names(trained)
    scaling, normalize = evaluation_scaling(trained.scaling, trained.image_size), Normalize(trained.mean, trained.std)
    left = iter(files)
    while batch := list(islice(left, _AT_ONCE)):
        pixels = torch.stack([scaling.image(read_file(file, trained.reading.colour)) for file in batch])
        with torch.inference_mode():
            likely = model(normalize(pixels).to(device)).float().softmax(1).topk(min(_MOST, trained.classes))
        for file, values, numbers in zip(batch, likely.values.tolist(), likely.indices.tolist(), strict=True):
            classes = [
                {"class": names[number], "number": number, "probability": value}
                for number, value in zip(numbers, values, strict=True)
            ]
            yield {"image": str(file), "classes": classes}


def class_names(trained: Trained) -> Sequence[str]:
    """Return the names of the classes by their numbers, or the numbers in words where nothing tells the names."""
    if trained.class_names is not None:
        return trained.class_names
    # Famba 0.1 did not keep them, as in the run of the bundled weights.
    if trained.config is not None and (trained.config.data.name, trained.classes) == ("cifar100", 100):
        return (WEIGHTS / "vim_micro_patch4_32/classes.txt").read_text().split()
    return [f"class {number}" for number in range(trained.classes)]
