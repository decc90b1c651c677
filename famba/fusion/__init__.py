"""Which tokens fuse, how many, in which layer, and where each patch went."""

from famba.fusion.matching import TokenMap, match
from famba.fusion.schedules import schedule, tokens_per_layer
from famba.fusion.tracing import still_there, trace, unfuse

__all__ = ["TokenMap", "match", "schedule", "still_there", "tokens_per_layer", "trace", "unfuse"]
