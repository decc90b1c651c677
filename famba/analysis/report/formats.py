"""A report as Markdown, CSV, LaTeX and one HTML page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from tabulate import tabulate

from famba.analysis.report.cells import MINUS, Sheet
from famba.analysis.report.contents import Part, Report
from famba.analysis.report.plots import Plot, inline
from famba.analysis.report.rows import TIME, Row, Table, pareto
from famba.analysis.report.statistics import Difference, Sample
from famba.fusion.schedules import NONE

_TEMPLATE = Path(__file__).with_name("page.html")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MINUS: "$-$",
}


def markdown(report: Report) -> str:
    """Return the tables, conclusions and notes; pictures by their path from the report's folder."""
    lines = ["# Token fusion in Vision Mamba", "", _md(report.headline), ""]
    for part in report.parts:
        lines += [f"## {_md(part.table.model)}", "", *_paragraphs(part.conclusions)]
        for sheet in part.sheets:
            lines += [f"### {sheet.title}", "", _md_table(sheet), ""]
        lines += [*(f"- {_md(note)}" for note in part.notes), *([""] if part.notes else [])]
        for plot in part.plots:
            picture = [f"![{_md(plot.title)}](plots/{plot.name}.svg)", ""] if plot.svg else []
            lines += [*picture, f"{_md(plot.title)}. {_md(plot.caption)}", ""]
        lines += ["### What all of these runs share", ""]
        lines += [*(f"- {_md(name)}: {_md(value)}" for name, value in part.shared), ""]
    lines += ["## Runs left out, and what differs", ""]
    for group in report.left_out:
        lines += [f"{group.title}:", ""]
        for names, reasons in group.listed:
            lines += [f"- {_md(names)}", *(f"  - {_md(reason)}" for reason in reasons)]
        lines.append("")
    if not report.left_out:
        lines += ["None: every run found counts in full.", ""]
    lines += ["## How to read this", "", *(f"- {_md(note)}" for note in report.reading)]
    return "\n".join(lines) + "\n"


def table_csv(report: Report) -> str:
    """Return a line for each row of all tables: unrounded, units in the names of the columns, empty where not known."""
    text = io.StringIO()
    records = []
    for table in (part.table for part in report.parts):
        front = pareto(table.rows, TIME)
        records += [_record(table, row, row in front) for row in table.rows]
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def latex(report: Report) -> str:
    r"""Return two tables for each model, with booktabs; to be read in by \input."""
    lines = ["% needs \\usepackage{booktabs} and, for what is wider than the text, \\usepackage{graphicx}"]
    for part in report.parts:
        for sheet in part.sheets:
            lines += ["", _tex_table(part, sheet)]
    return "\n".join(lines) + "\n"


def page(report: Report) -> str:
    """Return one page that needs nothing but itself: no script, no other file, no network."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)

    def picture(plot: Plot) -> Markup:
        return Markup(inline(plot))  # noqa: S704 - drawn by matplotlib, which escapes text

    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(report=report, inline=picture)


def _record(table: Table, row: Row, is_on_front: bool) -> dict[str, Any]:
    """A row's values; floats are written so that they read back the same."""
    where = dict.fromkeys(("device", "processes", "backend"))
    if not row.is_elsewhere:
        where = {key: table.comparable.place.get(key) for key in where}
    fusion, difference = row.fusion, row.difference
    layers = zip(*(run.tokens_per_layer for run in row.runs), strict=False)
    return {
        "model": table.model,
        "fusion": row.label,
        "strategy": fusion.strategy,
        **{name: None if fusion.strategy == NONE else value for name, value in fusion.settings().items()},
        "tokens_removed": fusion.removed,
        "data": table.comparable.what.get("data.name"),
        "seeds": " ".join(map(str, row.seeds)),
        **_moments("top1_percent", row.top1),
        **_moments("top5_percent", row.top5),
        **_interval("top1_difference_to_none_points", difference),
        "top1_difference_to_none_seeds": " ".join(map(str, difference.seeds)) if difference else None,
        **_moments("train_time_s", row.time_s),
        "train_time_share_of_none": row.time_share,
        **_interval("train_time_difference_to_none_s", row.time_difference),
        **_moments("peak_memory_mib", row.memory_mib),
        "peak_memory_share_of_none": row.memory_share,
        **_moments("saved_bytes_per_image", row.saved_bytes),
        "saved_bytes_share_of_none": row.saved_share,
        **_moments("images_per_s", row.images_per_s),
        "macs_per_image": row.macs.mean if row.macs else None,
        "parameters": row.parameters.mean if row.parameters else None,
        "tokens": row.tokens,
        "tokens_left_mean": row.tokens_left.mean,
        "tokens_per_layer_mean": " ".join(f"{sum(layer) / len(layer):g}" for layer in layers),
        "token_layers_share_of_all": row.token_layers,
        "on_pareto_front_of_time": is_on_front,
        "paper_top1_percent": row.printed.top1,
        "paper_train_time": row.printed.time,
        **where,
        "famba": table.comparable.what.get("famba version"),
        "git_commit": table.comparable.what.get("git commit"),
    }


def _moments(name: str, found: Sample | None) -> dict[str, float | None]:
    return {f"{name}_mean": found.mean if found else None, f"{name}_sd": found.sd if found else None}


def _interval(name: str, found: Difference | None) -> dict[str, float | None]:
    return {
        name: found.mean if found else None,
        f"{name}_low95": found.low if found else None,
        f"{name}_high95": found.high if found else None,
    }


def _paragraphs(sentences: list[str]) -> list[str]:
    return [line for sentence in sentences for line in (_md(sentence), "")]


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _md_table(sheet: Sheet) -> str:
    return _tabulated(sheet, "github", _md)


def _tex_table(part: Part, sheet: Sheet) -> str:
    # The escapes are this module's: tabulate's own know nothing of a minus sign.
    rules = _tabulated(sheet, "latex_booktabs", lambda text: text)
    body = _tex_rows(rules, sheet)
    caption = f"{_tex(part.table.model)}: {sheet.title.lower()}. " + _tex(
        "Mean and standard deviation over seeds; differences paired by seed with 95 % intervals."
        if sheet.title == "Results"
        else "Means over seeds."
    )
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{caption}}}",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            body + "}",
            "\\end{table}",
        ]
    )


def _tex_rows(rules: str, sheet: Sheet) -> str:
    """The frame as tabulate sets it, the cells as LaTeX takes them."""
    frame = rules.splitlines()
    head = frame.index("\\midrule")
    rows = [" & ".join(map(_tex, row)) + r" \\" for row in [sheet.headers, *sheet.rows]]
    return "\n".join([*frame[: head - 1], rows[0], "\\midrule", *rows[1:], *frame[head + 1 + len(sheet.rows) :]])


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _tabulated(sheet: Sheet, form: str, escape: Callable[[str], str]) -> str:
    sides = ["right" if numeric else "left" for numeric in sheet.is_numeric]
    headers, rows = [*map(escape, sheet.headers)], [[*map(escape, row)] for row in sheet.rows]
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=sides)
