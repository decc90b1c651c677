"""Draw the operations of timm's RandAugment and AutoAugment policies, and of colour jitter, for a whole batch.

The policies themselves, operations, probabilities, magnitudes and weights, are read from timm's own objects. What is
drawn is numbers on the host; `batch_operations` applies them on any device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Int64
from scipy.special import ndtri
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from torch import Tensor

from famba.errors import ConfigError

Array: TypeAlias = npt.NDArray[Any]

DRAWS = 4  # uniform numbers that one operation takes: for its choice, whether it acts, its magnitude, and its sign
_NAMED = ("v0", "v0r", "original", "originalr", "3a")
_LEVELS = 10.0  # magnitudes count from 0 to this
_VALUES = np.arange(256)


class Step(NamedTuple):
    """Says which images go through an operation, and with which parameters."""

    kind: str  # "move", or a key of one of the maps at the end of `batch_operations`
    rows: Tensor  # int64 (n,), the images' numbers in the batch
    values: Tensor  # (n, ...), a row for each image


def brightness_tables(factor: Array) -> Array:
    """Return tables, uint8 (n, 256), that scale values by a factor as `ImageEnhance.Brightness` does."""
    return (factor.astype(np.float32)[:, None] * _VALUES.astype(np.float32)).clip(0, 255).astype(np.uint8)


def blur_weights(radius: Array) -> Int64[np.ndarray, "n 3"]:
    """Return the weights, of 2**24 in all, of a box whose triple use is a Gaussian blur of at most 2.4 pixels.

    They are those of a pixel, of its neighbours and of those beyond (Gwosdek et al. 2011, "Theoretical foundations of
    Gaussian convolution by extended box filtering").
    """
    variance = radius.astype(np.float32) ** 2 / np.float32(3)
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inner = (2**24 / (2 * (whole + part) + 1)).astype(np.int64)
    edge = (2**24 - (2 * whole.astype(np.int64) + 1) * inner) // 2
    wide = whole > 0
    return np.stack([inner, np.where(wide, inner, edge), np.where(wide, edge, 0)], axis=1)


def rotations(degrees: Array, size: int) -> Float64[np.ndarray, "n 6"]:
    """Return the matrices that rotate size x size images counter-clockwise about their centre."""
    angle = -np.radians(degrees)
    cos, sin, middle = np.cos(angle).round(15), np.sin(angle).round(15), size / 2
    return np.stack([cos, sin, middle - middle * (cos + sin), -sin, cos, middle + middle * (sin - cos)], axis=1)


def _posterize(bits: Array) -> Array:
    low = 8 - np.clip(bits, 0, 8).astype(np.int64)[:, None]
    return (_VALUES >> low << low).astype(np.uint8)


def _solarize(threshold: Array) -> Array:
    return np.where(threshold.astype(np.int64)[:, None] > _VALUES, _VALUES, 255 - _VALUES).astype(np.uint8)


def _solarize_add(added: Array) -> Array:
    return np.where(_VALUES < 128, (_VALUES + added.astype(np.int64)[:, None]).clip(max=255), _VALUES).astype(np.uint8)


class _Drawn(NamedTuple):
    """Holds what an operation draws, float64 (n,), and the side of the images in pixels."""

    level: Array  # magnitude over 10
    signed: Array  # the same or its negative
    uniform: Array  # where there is no sign
    size: int


def _enhanced(drawn: _Drawn) -> Array:
    return drawn.level * 1.8 + 0.1


def _enhanced_increasing(drawn: _Drawn) -> Array:
    return np.maximum(0.1, 1 + drawn.signed * 0.9)


def _matrix(place: int, amount: Array) -> Array:
    matrix = np.tile([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], (len(amount), 1))
    matrix[:, place] = amount
    return matrix


BY_NAME: Mapping[str, tuple[str, Callable[[_Drawn], Array]]] = {
    "AutoContrast": ("autocontrast", lambda drawn: drawn.level),
    "Equalize": ("equalize", lambda drawn: drawn.level),
    "Invert": ("table", lambda drawn: _solarize(drawn.level * 0)),
    "Rotate": ("move", lambda drawn: rotations(drawn.signed * 30, drawn.size)),
    "Posterize": ("table", lambda drawn: _posterize(np.trunc(drawn.level * 4))),
    "PosterizeIncreasing": ("table", lambda drawn: _posterize(4 - np.trunc(drawn.level * 4))),
    "PosterizeOriginal": ("table", lambda drawn: _posterize(4 + np.trunc(drawn.level * 4))),
    "Solarize": ("table", lambda drawn: _solarize(np.trunc(drawn.level * 256))),
    "SolarizeIncreasing": ("table", lambda drawn: _solarize(256 - np.trunc(drawn.level * 256))),
    "SolarizeAdd": ("table", lambda drawn: _solarize_add(np.minimum(128, np.trunc(drawn.level * 110)))),
    "Color": ("color", _enhanced),
    "ColorIncreasing": ("color", _enhanced_increasing),
    "Contrast": ("contrast", _enhanced),
    "ContrastIncreasing": ("contrast", _enhanced_increasing),
    "Brightness": ("table", lambda drawn: brightness_tables(_enhanced(drawn))),
    "BrightnessIncreasing": ("table", lambda drawn: brightness_tables(_enhanced_increasing(drawn))),
    "Sharpness": ("sharpness", _enhanced),
    "SharpnessIncreasing": ("sharpness", _enhanced_increasing),
    "ShearX": ("move", lambda drawn: _matrix(1, drawn.signed * 0.3)),
    "ShearY": ("move", lambda drawn: _matrix(3, drawn.signed * 0.3)),
    "TranslateXRel": ("move", lambda drawn: _matrix(2, drawn.signed * 0.45 * drawn.size)),
    "TranslateYRel": ("move", lambda drawn: _matrix(5, drawn.signed * 0.45 * drawn.size)),
    "Desaturate": ("color", lambda drawn: 1 - np.clip(0.5 + drawn.level * 0.5, 0.5, 1)),
    "GaussianBlur": ("blur", lambda drawn: blur_weights(np.clip(0.1 + drawn.level * 1.9, 0.1, 2))),
    "GaussianBlurRand": ("blur", lambda drawn: blur_weights(0.1 + (2 * drawn.level.clip(0, 1) - 0.1) * drawn.uniform)),
}


@dataclass(frozen=True, eq=False)
class Policy:
    """Holds the operations among which each image's are drawn."""

    names: tuple[str, ...]
    probability: Array  # (o,), that an operation acts once it is chosen
    magnitude: Array  # (o,)
    spread: float  # standard deviation of the magnitude; infinite: uniform from 0 to it
    upper: float  # largest magnitude
    layers: int  # operations for each image
    weights: Array | None  # (o,), of operations that are drawn without repetition
    tied: bool  # whether the operations stand in groups of `layers`, one of which is drawn

    @classmethod
    @cache
    def of(cls, text: str) -> Policy:
        """Read a policy that timm can read. Raises ConfigError for one that has no batched form or cannot be drawn."""
        name, tied = text.split("-")[0], not text.startswith("rand")
        if name not in ("rand", *_NAMED):
            raise _unknown(text, f"known are rand and {', '.join(_NAMED)}, with their settings")
        transform = auto_augment_transform(text, {}) if tied else rand_augment_transform(text, {})
        groups = transform.policy if tied else [transform.ops]
        operations = [operation for group in groups for operation in group]
        layers, weights = (len(groups[0]), None) if tied else (transform.num_layers, transform.choice_weights)
        if weights is not None and layers > len(weights):
            raise _unknown(text, f"it draws {layers} of {len(weights)} operations without repetition")
        names = tuple(operation.name for operation in operations)
        probability = np.array([operation.prob for operation in operations])
        magnitude = np.array([operation.magnitude for operation in operations], dtype=np.float64)
        spread, upper = operations[0].magnitude_std, operations[0].magnitude_max or _LEVELS
        return cls(names, probability, magnitude, spread, upper, layers, weights, tied)

    def choose(self, uniform: Float64[np.ndarray, "b l {DRAWS}"]) -> tuple[Array, Array, Array]:
        """Return operations, their numbers in `names`; whether they act; and their magnitudes: (b, l) each."""
        chosen = self._chosen(uniform[..., 0])
        magnitude = self.magnitude[chosen]
        if math.isinf(self.spread):
            magnitude = magnitude * uniform[..., 2]
        elif self.spread > 0:
            magnitude = magnitude + self.spread * ndtri(uniform[..., 2])
        return chosen, uniform[..., 1] <= self.probability[chosen], magnitude.clip(0, self.upper)

    def draw(self, uniform: Float64[np.ndarray, "b l {DRAWS}"], size: int) -> Iterator[Step]:
        """Yield the steps of a batch of size x size images, from uniform numbers for each layer."""
        chosen, acts, magnitude = self.choose(uniform)
        names = np.array(self.names)[chosen]
        for layer in range(self.layers):
            found = []
            for name in dict.fromkeys(self.names):
                rows = np.flatnonzero(acts[:, layer] & (names[:, layer] == name))
                if len(rows):
                    kind, values = BY_NAME[name]
                    level, last = magnitude[rows, layer] / _LEVELS, uniform[rows, layer, 3]
                    signed = np.where(last > 0.5, -level, level)
                    found.append((kind, rows, values(_Drawn(level, signed, last, size))))
            yield from _steps(found)

    def _chosen(self, uniform: Float64[np.ndarray, "b l"]) -> Int64[np.ndarray, "b l"]:
        number = len(self.names)
        if self.tied:
            group = np.floor(uniform[:, :1] * (number // self.layers)).astype(np.int64)
            return group * self.layers + np.arange(self.layers)
        if self.weights is None:
            return np.floor(uniform * number).astype(np.int64)
        left, chosen = np.tile(self.weights, (len(uniform), 1)), np.zeros(uniform.shape, np.int64)
        for layer in range(self.layers):
            upto = left.cumsum(1)
            chosen[:, layer] = (uniform[:, layer, None] * upto[:, -1:] >= upto).sum(1).clip(max=number - 1)
            left[np.arange(len(left)), chosen[:, layer]] = 0
        return chosen


def jitter(uniform: Float64[np.ndarray, "b {DRAWS}"], strength: float) -> Iterator[Step]:
    """Yield the steps of torchvision's `ColorJitter` of brightness, contrast and saturation, in random order."""
    orders = np.array(list(itertools.permutations(range(3))))
    order = orders[np.floor(uniform[:, 0] * len(orders)).astype(np.int64)]
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * uniform[:, 1:]
    for turn in range(3):
        found = []
        for number, kind in enumerate(("table", "contrast", "color")):
            rows = np.flatnonzero(order[:, turn] == number)
            factor = factors[rows, number]
            found.append((kind, rows, brightness_tables(factor) if kind == "table" else factor))
        yield from _steps(found)


def _steps(found: Iterable[tuple[str, Array, Array]]) -> Iterator[Step]:
    """Join operations of the same kind, at most one of which an image goes through."""
    kinds: dict[str, list[tuple[Array, Array]]] = {}
    for kind, rows, values in found:
        if len(rows):
            kinds.setdefault(kind, []).append((rows, values))
    for kind, parts in kinds.items():
        yield Step(kind, *(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))


def _unknown(text: str, reason: str) -> ConfigError:
    return ConfigError(
        f"auto_augment {text!r} does not work on whole batches: {reason}. Choose one that does, such as "
        "rand-m9-mstd0.5-inc1, or recipe.augmentation=timm, which augments image by image with timm's own transforms.",
        "auto_augment",
    )
