"""Training, evaluation, pictures and the exported card's code read a file in one way, and number classes alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier import write_images
from images_and_loaders import training
from PIL import Image, ImageOps
from runs import run
from torch import Tensor

from famba.analysis.trained import load_trained
from famba.analysis.visualize import read_images
from famba.cli import main as famba
from famba.data.augment import Normalize, evaluation_scaling
from famba.data.folders import order
from famba.training.build import load_images, load_splits
from famba.training.setup import prepare

BACKGROUND = "#336699"


def shown(file: Path) -> Image.Image:
    """The image as a viewer shows it on the background."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
    canvas = Image.new("RGB", image.size, BACKGROUND)
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_images(root / "images")
    # 32 / 0.9 pixels, which timm rounds to another number than evaluation does.
    data = ("data=folder", f"data.root={root / 'images'}", "data.subset=null", "data.image_size=32", "data.workers=0")
    run(root / "run", *data, f"data.background='{BACKGROUND}'", "recipe.eval_crop=0.9")
    return root


def files_of(root: Path) -> list[Path]:
    """The test images in order."""
    folder = root / "images" / "test"
    return [
        folder / name for name in sorted((str(file.relative_to(folder)) for file in folder.rglob("*.*")), key=order)
    ]


def scaled(root: Path) -> Tensor:
    """The test images as the network should take them."""
    one = load_trained(root / "run")
    scaling = evaluation_scaling(one.scaling, one.image_size)
    pixels = torch.stack([scaling.image(image) for image in map(shown, files_of(root))]).float() / 255
    return (pixels - torch.tensor(one.mean).view(3, 1, 1)) / torch.tensor(one.std).view(3, 1, 1)


def test_evaluation_pictures_and_training_see_upright_images_on_the_background(trained: Path) -> None:
    one = load_trained(trained / "run")
    assert one.config is not None
    test = load_splits(one.config).test
    torch.testing.assert_close(load_images(one.config, prepare(one.config).image_size, test), scaled(trained))
    files = [str(file) for file in files_of(trained)]
    pixels = torch.stack(list(read_images(one, files).values()))
    torch.testing.assert_close(Normalize(one.mean, one.std)(pixels), scaled(trained))
    # The test images, which training would read just so, without augmentation.
    plain = replace(one.scaling, kind="batch", crop_padding=0, hflip=0.0)
    (batch,) = training(test, plain, image_size=32, batch_size=17).epoch(0)
    scaling = evaluation_scaling(replace(one.scaling, eval_crop=1.0), 32)
    expected = {scaling.image(image).numpy().tobytes() for image in map(shown, files_of(trained))}
    assert {image.mul(255).round().to(torch.uint8).numpy().tobytes() for image in batch[0]} == expected


@pytest.mark.usefixtures("unchecked")
def test_the_code_of_the_card_gives_what_evaluation_gives(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert famba(["export", str(trained / "run"), "--format", "safetensors", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    one = load_trained(trained / "run")
    with torch.no_grad():
        expected = one.model(scaled(trained))
        for file, logits in list(zip(files_of(trained), expected, strict=True))[::5]:
            namespace: dict[str, Any] = {}
            exec(code.replace("IMAGE", str(file)), namespace)
            torch.testing.assert_close(namespace["logits"][0], logits, rtol=1e-4, atol=1e-4)
    reading = json.loads((out / "config.json").read_text())["famba"]["reading"]
    assert reading == {"version": one.reading.version, "background": one.reading.background}
