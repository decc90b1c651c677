"""Vision Mamba with token fusion, registered with timm, and its weights."""

from famba.models import registered as registered
from famba.models.checkpoints import load_vim_checkpoint
from famba.models.vim import Vim

__all__ = ["Vim", "load_vim_checkpoint"]
