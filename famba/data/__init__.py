"""Data sets, augmentation and loaders."""

from __future__ import annotations

from famba.data.augment import Augmentation
from famba.data.download import default_root, download
from famba.data.loader import Batches, EvalBatches, TrainBatches, eval_batches, train_batches
from famba.data.sources import ArraySource, Source, Splits, SubsetSource, take
from famba.data.splits import LOADERS, check_name, load_splits, num_classes_of
from famba.data.streams import StreamSource
from famba.data.workers import Batch

__all__ = [
    "LOADERS",
    "ArraySource",
    "Augmentation",
    "Batch",
    "Batches",
    "EvalBatches",
    "Source",
    "Splits",
    "StreamSource",
    "SubsetSource",
    "TrainBatches",
    "check_name",
    "default_root",
    "download",
    "eval_batches",
    "load_splits",
    "num_classes_of",
    "take",
    "train_batches",
]
