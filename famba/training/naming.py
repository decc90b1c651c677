"""Arguments of the library by the names that a configuration has for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from famba.errors import FambaError

FUSION = {
    "strategy": "fusion.strategy",
    "budget": "fusion.budget",
    "counts": "fusion.budget",
    "layers": "fusion.layers",
}
MODEL = {"img_size": "data.image_size", "cls_position": "model.cls_position"}
DATA = {
    name: f"data.{name}" for name in ("name", "root", "subset", "val_fraction", "num_classes", "background", "version")
}
AUGMENTATION = {
    "kind": "recipe.augmentation",
    **{
        name: f"recipe.{name}"
        for name in (
            "crop_padding",
            "hflip",
            "auto_augment",
            "color_jitter",
            "random_erasing",
            "erasing_mode",
            "interpolation",
            "eval_crop",
        )
    },
}
BATCHES = {"batch_size": "trainer.batch_size", "repeats": "recipe.repeats"}


@contextmanager
def naming(keys: dict[str, str]) -> Iterator[None]:
    """Let an error about an argument name the key that it was set by, argument to key in `keys`."""
    try:
        yield
    except FambaError as error:
        key = keys.get(error.argument or "")
        if key is None or key in str(error):
            raise
        message = str(error)
        start = f"{error.argument} "
        named = f"{key} {message[len(start) :]}" if message.startswith(start) else f"{key}: {message}"
        raise type(error)(named, error.argument) from error
