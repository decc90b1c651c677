"""The global generators, seeded from the seed and the place in the run."""

from __future__ import annotations

import random

import numpy as np
import torch

from famba.data.draws import Stream, derived_integer


def seed_generators(stream: Stream, *place: int) -> None:
    """Seed every global generator that timm or torch draws from, for one use at one place in the run.

    So what is drawn never depends on what ran before, and nothing of a generator has to be saved.
    """
    torch.manual_seed(derived_integer(stream, *place))
    np.random.seed(derived_integer(stream, *place, bits=32))
    random.seed(derived_integer(stream, *place))
