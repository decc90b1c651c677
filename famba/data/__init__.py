"""Open data sets, augment their images, and load batches."""

from __future__ import annotations

from famba.data.augment import Augmentation
from famba.data.images import Reading, open_image
from famba.data.loader import Batch, TrainBatches, eval_batches, train_batches
from famba.data.published import download
from famba.data.sources import ArraySource, Source, Splits, labels_of, renumber, sample
from famba.data.splits import (
    LOADERS,
    PUBLISHED,
    check_folder,
    check_request,
    held_out,
    load_splits,
    num_classes_of,
    training_images_of,
)

__all__ = [
    "LOADERS",
    "PUBLISHED",
    "ArraySource",
    "Augmentation",
    "Batch",
    "Reading",
    "Source",
    "Splits",
    "TrainBatches",
    "check_folder",
    "check_request",
    "download",
    "eval_batches",
    "held_out",
    "labels_of",
    "load_splits",
    "num_classes_of",
    "open_image",
    "renumber",
    "sample",
    "train_batches",
    "training_images_of",
]
