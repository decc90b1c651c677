"""Shapes in signatures are checked while the tests run."""

from __future__ import annotations

from jaxtyping import install_import_hook

# Before famba is first imported. float annotations take ints, as PEP 484 has it.
install_import_hook(
    ["famba.ops", "famba.fusion", "famba.models"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
