"""CIFAR as the Hugging Face hub stores it: parquet files with encoded images."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famba.data.images import decode_rgb, naming
from famba.data.reading import Colour
from famba.data.sources import ArraySource, check_label
from famba.errors import DataError

SIDE = 32  # pixels
_IMAGE_COLUMNS = ("img", "image")
_ROWS_AT_ONCE = 1000
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


def shards(folder: Path, split: str) -> list[Path]:
    """Return the parquet files of a split ("train" or "test") in order; empty where there are none.

    Raises:
        DataError: where the names say that there are more files than lie there.
    """
    found = sorted(folder.glob(f"{split}-*.parquet"))
    for path in found:
        match = _SHARD.search(path.name)
        if match and int(match[2]) != len(found):
            raise DataError(
                f"{folder}: {path.name} is one of {int(match[2])} files, but {len(found)} lie there. "
                "Fetch the missing ones, or remove those of another data set."
            )
    return found


def read_parquet(
    paths: list[Path], label_columns: tuple[str, ...], num_classes: int, background: Colour | None
) -> ArraySource:
    """Read and decode parquet files of 32 x 32 images, in order.

    Args:
        paths: the files of one split.
        label_columns: names the labels' column may have; the first that exists is read.
        num_classes: number of classes.
        background: as in `famba.data.images.to_rgb`.

    Raises:
        DataError: naming the file, and the row (from 0, within the file) where one is at fault.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in paths:
        for row, (image, label) in enumerate(_rows(path, label_columns)):
            where = partial("{}, row {}".format, path, row)
            images.append(_pixels(image, where, background))
            labels.append(_label(label, num_classes, where))
    if not images:
        raise DataError(f"{paths[0].parent}: {paths[0].name} holds no images.")
    # Decoded images are (h, w, 3); the copy to (n, 3, h, w) is made once for all of them.
    data = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
    return ArraySource(torch.from_numpy(data), torch.tensor(labels), num_classes)


def class_names(path: Path, label_columns: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names of the classes in the order of their numbers, where the hub wrote them into the file.

    Arguments and errors are those of `read_parquet`, for one file.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
        column = _column(path, schema.names, label_columns)
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[column]["names"]
        except (ValueError, KeyError, TypeError):  # another program wrote the file, or it says numbers alone
            return None
    return tuple(map(str, names))


def _rows(path: Path, label_columns: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    with _opened(path) as file:
        names = file.schema_arrow.names
        columns = [_column(path, names, _IMAGE_COLUMNS), _column(path, names, label_columns)]
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from zip(batch.column(columns[0]).to_pylist(), batch.column(columns[1]).to_pylist(), strict=True)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file; what goes wrong inside the block becomes a DataError that names it."""
    import pyarrow
    from pyarrow import parquet  # only this format needs it

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error}). It may be incomplete: fetch it again."
        ) from error


def _column(path: Path, names: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{path}: no column {' or '.join(map(repr, wanted))} among {', '.join(names)}.")


def _pixels(value: Any, where: Callable[[], str], background: Colour | None) -> np.ndarray:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise DataError(f"{where()}: holds no encoded image. Replace or remove it.")
    with naming(where):
        image = decode_rgb(io.BytesIO(encoded), background)
    if image.size != (SIDE, SIDE):
        raise DataError(f"{where()}: the image is {image.width} x {image.height} pixels, not {SIDE} x {SIDE}.")
    return np.asarray(image)


def _label(value: Any, num_classes: int, where: Callable[[], str]) -> int:
    if not isinstance(value, int):
        raise DataError(f"{where()}: label {value!r} is not an integer.")
    return check_label(value, num_classes, where)
