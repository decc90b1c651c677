"""Which patches belong together, as lines between them and as colours: plain arrays, before anything is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.int64]
Segment = tuple[tuple[int, int], tuple[int, int]]
"""A line from (x, y) to (x, y), in patches from the upper left corner of the image."""


def shared(held: Grid) -> npt.NDArray[np.bool_]:
    """Which patches of a grid (rows, columns) of tokens are held by a token that holds others too."""
    _, places, counts = np.unique(held, return_inverse=True, return_counts=True)
    return (counts[places] > 1).reshape(held.shape)


def mean_colours(image: npt.NDArray[np.uint8], held: Grid) -> npt.NDArray[np.uint8]:
    """Give the patches of each token that holds several the mean colour of all of them; leave the others as they are.

    Args:
        image: (height, width, 3), each a whole multiple of the grid's side.
        held: which token holds each patch (rows, columns).

    Returns:
        The same shape as `image`, rounded half up.
    """
    rows, columns = held.shape
    height, width = image.shape[0] // rows, image.shape[1] // columns
    patches = image.reshape(rows, height, columns, width, 3).astype(np.float64).mean(axis=(1, 3))
    tokens, places = np.unique(held, return_inverse=True)
    places = places.reshape(-1)
    sums = np.stack([np.bincount(places, patches[..., c].reshape(-1), len(tokens)) for c in range(3)], axis=1)
    means = sums / np.bincount(places, minlength=len(tokens))[:, None]
    filled = np.floor(means[places].reshape(rows, columns, 3) + 0.5).astype(np.uint8)
    spread = (1, height, width)
    chosen = np.kron(shared(held), np.ones(spread[1:], dtype=bool)).astype(bool)
    return np.where(chosen[..., None], filled.repeat(height, axis=0).repeat(width, axis=1), image)


def borders(held: Grid) -> list[Segment]:
    """Lines around the tokens of a grid (rows, columns) that hold several patches, as long as they run straight.

    They lie between patches of different tokens, and on the image's edge, where either side is a token that holds
    several; between two patches that stand alone there is none.
    """
    rows, columns = held.shape
    around = np.pad(held, 1, constant_values=-1)
    several = np.pad(shared(held), 1)
    across = (around[1:] != around[:-1]) & (several[1:] | several[:-1])  # between a row and the next
    beside = (around[:, 1:] != around[:, :-1]) & (several[:, 1:] | several[:, :-1])
    lines: list[Segment] = []
    for y in range(rows + 1):
        lines += [((start, y), (end, y)) for start, end in _runs(across[y, 1:-1])]
    for x in range(columns + 1):
        lines += [((x, start), (x, end)) for start, end in _runs(beside[1:-1, x])]
    return lines


def scattered(held: Grid) -> list[list[tuple[int, int]]]:
    """Tokens whose patches do not all touch: for each a patch (row, column) in each of its parts.

    Ordered by how many patches they hold, those with the most first; the patch is the part's nearest to its middle.
    """
    parts: dict[int, list[npt.NDArray[np.int64]]] = {}
    for part in _parts(held):
        parts.setdefault(int(held[tuple(part[0])]), []).append(part)
    several = sorted((found for found in parts.values() if len(found) > 1), key=lambda found: -sum(map(len, found)))
    return [[_middle(part) for part in found] for found in several]


def _parts(held: Grid) -> Iterator[npt.NDArray[np.int64]]:
    """Patches (n, 2) that touch, side by side, and are of one token."""
    left = set(np.ndindex(held.shape))
    for start in np.ndindex(held.shape):
        if start not in left:
            continue
        left.remove(start)
        part = [start]
        for row, column in part:
            around = ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1))
            for place in around:
                if place in left and held[place] == held[start]:
                    left.remove(place)
                    part.append(place)
        yield np.array(part)


def _middle(part: npt.NDArray[np.int64]) -> tuple[int, int]:
    nearest = np.square(part - part.mean(axis=0)).sum(axis=1).argmin()
    row, column = part[nearest].tolist()
    return row, column


def _runs(there: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where stretches of True begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], there, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2):
        yield int(start), int(end)


def shown_layers(depth: int, schedules: Sequence[Sequence[int]], count: int) -> list[int]:
    """Choose layers to show: all where they are few, else evenly from the first that fuses in any schedule to the last.

    Returns at most `count` of 0 .. depth - 1, ascending.
    """
    if count >= depth:
        return list(range(depth))
    if count == 1:
        return [depth - 1]
    fusing = [layer for layer in range(depth) if any(one[layer] for one in schedules)]
    first = min(fusing[0] if fusing else 0, depth - 1)
    return sorted({round(place) for place in np.linspace(first, depth - 1, count)})
