"""Networks with token fusion: Vision Mamba, registered with timm, and its weights; timm's vision transformers."""

from famba import plugins
from famba.models.backbone import BACKBONES, Backbone, create_network, register_backbone
from famba.models.vim import Vim, create_vim
from famba.models.vit import apply_tome, remove_tome
from famba.models.weights import load_vim_checkpoint

__all__ = [
    "BACKBONES",
    "Backbone",
    "Vim",
    "apply_tome",
    "create_network",
    "create_vim",
    "load_vim_checkpoint",
    "register_backbone",
    "remove_tome",
]

plugins.load_all()  # they may import what is above
