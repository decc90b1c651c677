"""Vision Mamba with token fusion, registered with timm, and its weights."""

from famba.models.checkpoints import load_vim_checkpoint
from famba.models.registered import create_vim
from famba.models.vim import Vim

__all__ = ["Vim", "create_vim", "load_vim_checkpoint"]
