"""Every network that can be trained here, by its timm name."""

from __future__ import annotations

from typing import Any

import timm

from famba.models.fused import FusedNetwork
from famba.models.tome import apply_tome
from famba.models.vim import Vim

_VIT_MODULES = ("vision_transformer", "deit")
_FUSION = "fusion_"


def vim_names() -> list[str]:
    """Names of Vims."""
    return timm.list_models("vim_*")


def vit_names() -> list[str]:
    """Names of vision transformers, most of which can fuse: `apply_tome` says which cannot."""
    return [*timm.list_models("vit_micro_*"), *(name for m in _VIT_MODULES for name in timm.list_models(module=m))]


def create_network(name: str, **arguments: Any) -> FusedNetwork:
    """Build a network by its timm name.

    Args:
        name: of `vim_names` or `vit_names`, with or without a tag of pretrained weights.
        arguments: as timm.create_model takes them, with those of `famba.models.Vim` on fusion for either kind: fusion,
            the schedule (None for no fusion), fusion_order, fusion_weighting, fusion_mode, fusion_place. A transformer
            takes fusion_proportional besides, as in `apply_tome`.

    Raises:
        ConfigError: what does not fit.
    """
    if name.split(".")[0] in vim_names():
        model = timm.create_model(name, **arguments)
        assert isinstance(model, Vim)
        return model
    fusion = arguments.pop("fusion", None)
    ways = {key.removeprefix(_FUSION): arguments.pop(key) for key in list(arguments) if key.startswith(_FUSION)}
    vit = timm.create_model(name, **arguments)
    place = ways.pop("place", None)
    network = apply_tome(vit, (0,) * len(vit.blocks) if fusion is None else fusion, **ways)  # type: ignore[arg-type]
    network.set_fusion(network.fusion, place=place)
    return network
