"""Open data sets, augment their images, and load batches."""

from __future__ import annotations

from famba.data.augment import Augmentation
from famba.data.images import Reading, open_image
from famba.data.loader import Batch, Loading, TrainBatches, eval_batches, train_batches
from famba.data.published import NUM_CLASSES, TRAINING_IMAGES, download
from famba.data.sources import ArraySource, Source, Splits, labels_of, renumber, sample
from famba.data.splits import LOADERS, PUBLISHED, check_folder, check_request, held_out, load_splits

__all__ = [
    "LOADERS",
    "NUM_CLASSES",
    "PUBLISHED",
    "TRAINING_IMAGES",
    "ArraySource",
    "Augmentation",
    "Batch",
    "Loading",
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
    "open_image",
    "renumber",
    "sample",
    "train_batches",
]
