"""95 % intervals of Top-1 on test images: of one network's, and of the difference of two on the same images.

They say what other test images of the same kind could have given, not what another training would.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

_Z = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """Where a value lies, in percent or in points."""

    low: float
    high: float


def of_accuracy(hits: int, images: int) -> Interval:
    """Return Wilson's interval of a share of images, which holds near 0 and 100 % as well."""
    share, z2 = hits / images, _Z**2 / images
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(share * (1 - share) / images + z2 / (4 * images)) / (1 + z2)
    return Interval(100 * max(0.0, middle - half), 100 * min(1.0, middle + half))


def of_difference(gained: int, lost: int, images: int) -> Interval:
    """Return the interval of a paired difference in Top-1, by Agresti and Min (Statistics in Medicine 24, 2005).

    It is Wald's, which goes by the images that one of the two alone gets right as McNemar's test does, after half an
    image more in each of the four cells: so two networks that never differ are not said to be equal beyond doubt.

    Args:
        gained: images that this network gets right and the other does not.
        lost: images that the other gets right and this one does not.
        images: all of them.
    """
    gained_more, lost_more, total = gained + 0.5, lost + 0.5, images + 2
    middle = (gained_more - lost_more) / total
    half = _Z * math.sqrt(gained_more + lost_more - (gained_more - lost_more) ** 2 / total) / total
    return Interval(100 * max(-1.0, middle - half), 100 * min(1.0, middle + half))
