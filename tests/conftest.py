"""Shapes in signatures are checked while the tests run; Triton's kernels run in its interpreter where no GPU is."""

from __future__ import annotations

import os

import torch
from jaxtyping import install_import_hook

# Before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before famba is first imported. float annotations take ints, as PEP 484 has it.
install_import_hook(
    ["famba.ops", "famba.fusion", "famba.models"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
