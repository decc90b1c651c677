"""How strategies look in every plot: colours that colour-blind readers tell apart (Okabe and Ito 2008), and markers."""

from __future__ import annotations

from typing import NamedTuple


class Look(NamedTuple):
    """Colour, marker and line style, as matplotlib takes them."""

    color: str
    marker: str
    line: str


_LOOKS = {
    "none": Look("#000000", "o", "-"),
    "all": Look("#E69F00", "s", "--"),
    "interleaved": Look("#009E73", "D", "-."),
    "lower": Look("#56B4E9", "v", ":"),
    "upper": Look("#0072B2", "^", "-"),
    "adaptive": Look("#D55E00", "P", "--"),
}
_OTHERS = (Look("#CC79A7", "X", "-."), Look("#8C6D00", "*", ":"), Look("#7F7F7F", "h", "-"))


def look(strategy: str, index: int = 0) -> Look:
    """The look of a strategy; one that is not the project's own takes its turn by `index` among three more."""
    return _LOOKS.get(strategy) or _OTHERS[index % len(_OTHERS)]
