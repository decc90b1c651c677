"""Reduce tokens: choose which, how many in each layer, and follow each patch."""

from famba.fusion import grid, scan_rules  # noqa: F401 - they register their rules
from famba.fusion.config import SETTINGS, Fusion, labels
from famba.fusion.rules import RULES, LayerTokens, match, register_rule
from famba.fusion.schedules import schedule, tokens_per_layer
from famba.fusion.token_map import TokenMap, not_pruned, trace, unfuse

__all__ = [
    "RULES",
    "SETTINGS",
    "Fusion",
    "LayerTokens",
    "TokenMap",
    "labels",
    "match",
    "not_pruned",
    "register_rule",
    "schedule",
    "tokens_per_layer",
    "trace",
    "unfuse",
]
