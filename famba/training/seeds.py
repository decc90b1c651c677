"""Random numbers that depend on the seed and the place in the run, never on what ran before."""

from __future__ import annotations

import random
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """Streams of random numbers: the draws of one never depend on how many another took."""

    WEIGHTS = 0
    STEP = 1


def derive(seed: int, stream: Stream, *keys: int) -> int:
    """Return a 63-bit seed for a stream and a place in it, the same on every machine."""
    state = np.random.SeedSequence([seed, stream, *keys]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def seed_generators(seed: int) -> None:
    """Seed every global generator that timm or torch draws from in a step."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
