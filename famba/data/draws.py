"""Draw random numbers that depend on (seed, epoch, position) and on nothing else.

No generator outlives a call, so any step of any epoch can be produced directly, by any process or worker.
"""

from __future__ import annotations

import enum
import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

WORDS = 4  # 64-bit words in one block of Philox, hence for one position


class Stream(enum.IntEnum):
    """Names what draws are for, independent of each other. Changing a value changes every run."""

    ORDER = 1
    REPEATED_ORDER = 2
    AUGMENTATION = 3
    SPLIT = 4
    WEIGHTS = 7
    STEP = 8
    SUBSET = 9
    HELD_OUT = 10
    BATCH = 11


def derive(stream: Stream, *values: int) -> np.random.SeedSequence:
    """Return a seed sequence for a stream and non-negative integers below 2**64."""
    # Every value takes two 32-bit words, so that no two lists of values become the same entropy.
    entropy = np.array([int(stream), len(values), *values], dtype=np.uint64).view(np.uint32)
    return np.random.SeedSequence(entropy.tolist())


def derived_integer(stream: Stream, *values: int, bits: int = 63) -> int:
    """Return one integer in [0, 2**bits), bits at most 64, for interfaces that want a single seed."""
    return int(derive(stream, *values).generate_state(1, np.uint64)[0]) >> (64 - bits)


def _philox_key(stream: Stream, values: tuple[int, ...], epoch: int) -> npt.NDArray[np.uint64]:
    return np.array([derived_integer(stream, *values, bits=64), epoch], dtype=np.uint64)


def permutation(stream: Stream, seed: int, epoch: int, length: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(length), int64 (length,)."""
    bits = np.random.Philox(key=_philox_key(stream, (seed,), epoch))
    return np.random.Generator(bits).permutation(length)


def words(stream: Stream, values: tuple[int, ...], epoch: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return uint64 (count, WORDS): row i belongs to position start + i, whatever start and count are."""
    bits = np.random.Philox(key=_philox_key(stream, values, epoch), counter=[start, 0, 0, 0])
    return np.asarray(bits.random_raw(count * WORDS), dtype=np.uint64).reshape(count, WORDS)


def uniforms(
    stream: Stream, values: tuple[int, ...], epoch: int, start: int, count: int, numbers: int
) -> npt.NDArray[np.float64]:
    """Return float64 (count, numbers) above 0 and below 1: row i belongs to position start + i."""
    blocks = -(-numbers // WORDS)
    drawn = words(stream, values, epoch, start * blocks, count * blocks).reshape(count, blocks * WORDS)
    return ((drawn[:, :numbers] >> np.uint64(12)) + 0.5) * 2.0**-52


def seed_global_generators(stream: Stream, values: tuple[int, ...], epoch: int, position: int) -> None:
    """Seed `random`, `numpy.random` and torch's CPU generator, from which timm's transforms draw, for one sample."""
    state = derive(stream, *values, epoch, position).generate_state(3, np.uint64)
    # Not torch.manual_seed: a worker process must not touch the device.
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(int(state[2]) >> 1)


def sent(values: Any, device: torch.device) -> Any:
    """Return a tensor, or tuples of them, on a device without waiting: CUDA reads page-locked memory meanwhile."""
    if isinstance(values, tuple):
        moved = [sent(value, device) for value in values]
        return type(values)(*moved) if hasattr(values, "_fields") else tuple(moved)
    if not isinstance(values, torch.Tensor):
        return values
    if values.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available() and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
