"""Draw Top-1 of several rules against multiply-adds and time, and print it as a table, from a CSV of `famba evaluate`.

Usage: python scripts/rule_curves.py evaluate.csv rules.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from famba.drawing import FAINT, INK, drawing, files
from famba.training.logging import signed

# Okabe and Ito's colours; each rule has a marker of its own too.
LOOKS = (("#E69F00", "s"), ("#009E73", "D"), ("#56B4E9", "v"), ("#0072B2", "^"), ("#CC79A7", "P"), ("#D55E00", "X"))
MODES = {"fuse": "-", "prune": (0, (3.5, 1.8))}


def main() -> None:
    """Print the table, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table")
    parser.add_argument("plot")
    options = parser.parse_args()
    rows = pd.read_csv(options.table)
    print(as_markdown(rows))
    with drawing():
        Path(options.plot).write_bytes(files("rules", draw(rows), ("png",))["rules.png"])


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in which tokens were reduced, but for the network as it was trained."""
    return rows[(rows["removed"] > 0) & ~rows["own"].astype(bool)]


def as_markdown(rows: pd.DataFrame) -> str:
    """Return for each rule, mode and budget Top-1, and the interval of its difference to the network as trained."""
    found = compared(rows).copy()
    ends = [found[f"difference_{end}95"].map(signed) for end in ("low", "high")]
    found["text"] = found["top1"].map("{:.2f}".format) + " (" + ends[0] + " to " + ends[1] + ")"
    order = list(dict.fromkeys(zip(found["rule"], found["mode"], strict=True)))
    table = found.set_index(["rule", "mode", "removed"])["text"].unstack().loc[order].reset_index()
    table["rule"] = "`" + table["rule"] + "`"
    return str(table.to_markdown(index=False, disable_numparse=True))


def draw(rows: pd.DataFrame) -> Figure:
    """Draw Top-1 over multiply-adds and over time per image, a line for each rule and mode."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    rows = rows.assign(macs=rows["macs_per_image"] / 1e6, ms=1e3 / rows["images_per_s"])
    found, whole = compared(rows), rows[rows["removed"] == 0].iloc[0]
    looks = dict(zip(dict.fromkeys(found["rule"]), LOOKS, strict=False))
    for number, (x, label) in enumerate({"macs": "multiply-adds, M", "ms": "ms per image"}.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        for (rule, mode), own in found.sort_values("removed", kind="stable").groupby(["rule", "mode"], sort=False):
            color, marker = looks[rule]
            face = color if mode == "fuse" else "white"
            look = {"color": color, "marker": marker, "markerfacecolor": face, "linestyle": MODES[mode]}
            axes.plot(own[x], own["top1"], markersize=5, linewidth=1.2, label=f"{rule}, {mode}", **look)
        axes.plot([whole[x]], [whole["top1"]], "o", color=INK, label="no reduction", markersize=6)
        axes.vlines(found[x], found["top1_low95"], found["top1_high95"], colors=FAINT, linewidth=0.4, zorder=0)
        axes.set(xlabel=label, ylabel="Top-1, %" if not number else None)
        axes.grid(visible=True)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, handlelength=3)
    return figure


if __name__ == "__main__":
    main()
