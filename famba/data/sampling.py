"""Parts of a data set in which every class is in proportion. They depend on the labels alone, and on no seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from famba.data.draws import Stream, permutation
from famba.data.sources import Source, labels_of, take


def balanced_order(labels: npt.NDArray[np.int64], stream: Stream) -> npt.NDArray[np.int64]:
    """Order images so that the first of them, however many, hold every class in proportion.

    The j-th of a class's n images, j from 0 in an order that is drawn once and for all, gets the place (j + 0.5) / n;
    of equal places, lower class numbers come first.

    Args:
        labels: int64 (n,).
        stream: what the order within classes is drawn for.

    Returns:
        Indices, int64 (n,).
    """
    places = np.empty(len(labels))
    by_class = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[by_class], return_index=True)
    for number, own in zip(numbers.tolist(), np.split(by_class, starts[1:]), strict=True):
        places[own[permutation(stream, number, 0, len(own))]] = (np.arange(len(own)) + 0.5) / len(own)
    return np.lexsort((labels, places))


def sample(source: Source, images: int, version: int) -> Source:
    """Return a fixed sample of so many images, at most all, in the order of the source.

    A smaller sample lies in a larger one. version: 2; 1 for images that are evenly spaced, as Famba 0.1 took them.
    """
    if version == 1:
        return take(source, np.arange(images) * len(source) // images)
    return take(source, np.sort(balanced_order(labels_of(source), Stream.SUBSET)[:images]))
