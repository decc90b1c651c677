"""Fuse tokens so that those that are left form a grid of rows and columns again."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from famba.errors import ConfigError
from famba.fusion.rules import LayerTokens, Layout, register_rule
from famba.fusion.token_map import Free, TokenMap, unit

Grid = tuple[int, int]


@lru_cache(maxsize=4096)
def _steps(grid: Grid) -> dict[int, Grid]:
    """Map each number of tokens that a layer can remove from a grid, at most half of them, to what is left."""
    rows, columns = grid
    found: dict[int, Grid] = {}
    for left_rows in range((rows + 1) // 2, rows + 1):
        for left_columns in range((columns + 1) // 2, columns + 1):
            r, after = rows * columns - left_rows * left_columns, (left_rows, left_columns)
            if 2 * r <= rows * columns:
                # Of several the one closest to a square, and of two such the one that merges along the rows.
                found[r] = min(found.get(r, after), after, key=lambda one: (abs(one[0] - one[1]), one[1]))
    return found


@torch.compiler.assume_constant_result
def grid_after(grid: Grid, r: int) -> Grid:
    """Return the rows and columns that are left where r tokens go, or raise ConfigError where these are not whole."""
    steps = _steps(grid)
    if r not in steps:
        near = " or ".join(str(one) for one in _nearest(r, steps))
        told = f"a grid of {grid[0]} x {grid[1]} loses whole rows and columns; the nearest number that it can lose is"
        raise ConfigError(f"r is {r}: {told} {near}", "r")
    return steps[r]


@lru_cache(maxsize=256)
def plan_grid(counts: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Return the schedule of whole rows and columns that is nearest to `counts`, with the same total.

    Layers that remove nothing go on doing so. Nearest is the least sum over layers of the difference in tokens left.
    Raises ConfigError, with the nearest totals, where whole rows and columns do not add up to the total.
    """
    total = sum(counts)
    if layout.grid is None or layout.grid[0] * layout.grid[1] != layout.patches:
        told = f"the rows and columns of {layout.patches} patches, and was given {layout.grid}"
        raise ConfigError(f"rule 'grid' needs {told}; give them as grid, or choose another rule", "rule")
    ends = _paths(counts, layout.grid, layout.patches - total)
    exact = [path for (rows, columns), path in ends.items() if layout.patches - rows * columns == total]
    if not exact:
        everywhere = _paths(counts, layout.grid, 0)
        near = " or ".join(str(one) for one in _nearest(total, [layout.patches - a * b for a, b in everywhere]))
        told = f"cannot remove {total} of {layout.grid[0]} x {layout.grid[1]} patches in whole rows and columns"
        raise ConfigError(
            f"rule 'grid' {told} in these layers; the nearest budget that it can spend is {near}", "budget"
        )
    return min(exact)[1]


def _paths(counts: tuple[int, ...], grid: Grid, least: int) -> dict[Grid, tuple[int, tuple[int, ...]]]:
    """Return for each grid that can be left, of at least so many tokens, the nearest way to it and its distance."""
    paths: dict[Grid, tuple[int, tuple[int, ...]]] = {grid: (0, ())}
    wanted = grid[0] * grid[1]
    for count in counts:
        wanted -= count
        following: dict[Grid, tuple[int, tuple[int, ...]]] = {}
        for before, (distance, spent) in paths.items():
            for r, after in _steps(before).items() if count else [(0, before)]:
                left = after[0] * after[1]
                if left >= least:
                    one = (distance + abs(left - wanted), (*spent, r))
                    following[after] = min(following.get(after, one), one)
        paths = following
    return paths


def _nearest(wanted: int, possible: dict[int, Grid] | list[int]) -> list[int]:
    """Return the nearest number below and the nearest above, as far as there are any."""
    below, above = [n for n in possible if n < wanted], [n for n in possible if n > wanted]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


@register_rule("grid", orders=["sequence"], plan=plan_grid, grid_after=grid_after)
def grid(tokens: LayerTokens, r: int) -> TokenMap:
    """Reduce a grid of tokens to a smaller one, as STORM does (arXiv 2606.19932).

    In each row only the neighbours (2j, 2j + 1) are compared, by cosine; the most similar pairs of every row fuse, the
    even token into the odd one, equally many in each row. Then the same is done in each column that is left. Of equal
    pairs the first fuses. r decides how many rows and columns go: of several ways, the one that leaves the squarest
    grid. Up to four tokens become one, their mean. The tokens that are left stand row by row; a special token that is
    not at the head stays behind the same share of them.
    """
    (rows, columns), (left_rows, left_columns) = tokens.grid, grid_after(tokens.grid, r)
    free = tokens.free
    x = free.take(tokens.metric).unflatten(1, (rows, columns))
    stays, places = _merge(x, columns - left_columns)
    if left_rows < rows:
        sizes = None if tokens.sizes is None else free.take(tokens.sizes).detach().reshape(-1, columns)
        kept = stays.flatten(0, 1).float() if tokens.mode == "prune" else None
        along_rows = TokenMap(places.flatten(0, 1), left_columns, kept=kept)
        x = along_rows.fuse(x.flatten(0, 1), sizes).unflatten(0, (-1, rows))
        along_columns = _merge(x.transpose(1, 2), rows - left_rows)
        down_stays, down = (part.transpose(1, 2).gather(2, places) for part in along_columns)
        stays, places = stays & down_stays, down * left_columns + places
    else:
        places = places + left_columns * torch.arange(rows, device=places.device).view(-1, 1)
    return _in_sequence(free, stays.flatten(1), places.flatten(1), r, tokens.mode)


def _merge(x: Float[Tensor, "b lines n c"], count: int) -> tuple[Bool[Tensor, "b lines n"], Int[Tensor, "b lines n"]]:
    """Merge the `count` most similar pairs (2j, 2j + 1) of each line.

    Returns which tokens stay, and the place in its shorter line of each, or of its pair.
    """
    batch, lines, n, _ = x.shape
    stays = torch.ones(batch, lines, n, dtype=torch.bool, device=x.device)
    if count:
        units = unit(x)
        pairs = (units[:, :, 0 : n - n % 2 : 2] * units[:, :, 1::2]).sum(3).nan_to_num(-1.0)
        chosen = pairs.argsort(dim=2, descending=True, stable=True)[:, :, :count]
        stays = stays.scatter(2, 2 * chosen, False)
    # Before a token that stays stand as many as before one that joins it: it is the next.
    return stays, stays.long().cumsum(2) - stays.long()


def _in_sequence(free: Free, stays: Bool[Tensor, "b m"], places: Int[Tensor, "b m"], r: int, mode: str) -> TokenMap:
    """Map a sequence to places of a grid, row by row, with the special tokens between them as before."""
    if free.others is None:
        return free.join(~stays, places, r, mode)
    special = free.special()
    numbers = torch.arange(special.shape[1], device=special.device)
    # How many patches stand before each special token, before and afterwards.
    before = (special - numbers) * (free.count - r) // free.count
    places = places + (before.unsqueeze(1) <= places.unsqueeze(2)).sum(2)
    kept = free.put(stays.float(), 1) if mode == "prune" else None
    return TokenMap(free.put(places, before + numbers), free.length - r, free.protected, kept=kept)
