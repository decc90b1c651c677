"""Networks with token fusion: Vision Mamba, registered with timm, and its weights; timm's vision transformers."""

from famba.models.checkpoints import load_vim_checkpoint
from famba.models.fused import FusedNetwork
from famba.models.networks import create_network
from famba.models.registered import create_vim
from famba.models.tome import apply_tome, remove_tome
from famba.models.vim import Vim

__all__ = ["FusedNetwork", "Vim", "apply_tome", "create_network", "create_vim", "load_vim_checkpoint", "remove_tome"]
