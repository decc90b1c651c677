"""The two ways in which folders and images are read: as now, and as Famba 0.1 did."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageColor

from famba.errors import ConfigError, near_miss

Colour = tuple[int, int, int]
"""Red, green and blue in 0..255."""
VERSIONS = (1, 2)


@dataclass(frozen=True)
class Reading:
    """How folders and images are read.

    Attributes:
        version: 2; or 1 for what Famba 0.1 did: innermost folders are classes, `.png`, `.jpg` and `.jpeg` alone are
            images, transparency and EXIF orientation are dropped, 16 bits are cut off.
        background: what lies behind transparent images: a colour's name, as in CSS, or "#rrggbb".

    Raises:
        ConfigError: for another version or colour, and for a background in version 1, which has none.
    """

    version: int = 2
    background: str = "white"

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ConfigError(f"version is {self.version}; allowed: 2, or 1 to read as Famba 0.1 did.", "version")
        colour = _colour(self.background)
        if self.version == 1 and colour != _colour(Reading.background):
            raise ConfigError(
                f"background is {self.background!r}, but version 1 drops transparency and has none; leave it out, or "
                "use version 2.",
                "background",
            )

    @property
    def colour(self) -> Colour | None:
        """The background as `famba.data.images.to_rgb` takes it: None for version 1."""
        return None if self.version == 1 else _colour(self.background)


def _colour(name: str) -> Colour:
    try:
        red, green, blue, *alpha = ImageColor.getrgb(name)
        if alpha:
            raise ValueError("what lies behind cannot be transparent itself")
    except ValueError:
        raise ConfigError(
            f'background {name!r} is no colour; allowed: a name such as white or black, or "#rrggbb"'
            f"{near_miss(name, list(ImageColor.colormap))}",
            "background",
        ) from None
    return red, green, blue
