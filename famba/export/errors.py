"""What can go wrong in an export that is not the user's input."""

from __future__ import annotations

from famba.errors import FambaError


class ExportError(FambaError, RuntimeError):
    """A model that cannot be written in a format, or a file that does not compute what the model does."""
