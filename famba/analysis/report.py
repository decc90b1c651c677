"""Make the paper's table from one's own runs, over seeds, with intervals and plots: `famba report`.

Runs of a model are compared where they share data, recipe, precision and code; each length of training has a table.
Time, throughput and memory are compared where they share the machine too: a run from another machine counts for
accuracy alone.
"""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined
from scipy.stats import t

from famba.analysis.figures import Plot, draw, time_unit
from famba.analysis.options import prepare_folder, write_files
from famba.analysis.runs import read_runs, run_table
from famba.data import PUBLISHED
from famba.errors import DataError
from famba.fusion import SETTINGS, Fusion
from famba.fusion.schedules import NONE, strategy_names
from famba.training.logging import signed
from famba.training.records import from_cell

COSTS = ("train_time_s", "peak_memory_mib", "saved_bytes_per_image", "images_per_s")
_NUMBERS = [*COSTS, "top1", "top5", "macs_per_image", "parameters", "tokens"]
_OUTCOME = ["image_size", "precision", "steps", "provenance.famba", "provenance.git_commit"]
_MODEL = ["model", *(f"config.model.{key}" for key in ("patch_size", "depth", "embed_dim", "d_state", "cls_position"))]
_MODEL += ["precision", "config.trainer.epochs"]
_MACHINE = ("device", "processes", "backend")
_PLACE = [f"provenance.{key}" for key in (*_MACHINE, "cuda")]
_SPEED = ("compile", "cuda_graphs", "grad_checkpointing", "accumulation")
_PLACE += ["config.data.workers", "config.data.device", *(f"config.trainer.{key}" for key in _SPEED)]
# Settings that have no bearing on results, or whose outcome the summary tells.
_IGNORED = """fusion. logger. model.name seed run_dir resume data.image_size trainer.device trainer.log_every
    trainer.eval_every trainer.eval_images trainer.save_every_min trainer.precision ops.backend"""
_FREE = (*(f"config.{key}" for key in _IGNORED.split()), *_PLACE)
# What tells fusion settings apart, in the order in which they are sorted; for some, what a label need not say.
_SETTING = ["strategy", *SETTINGS, "budget", "adapt_at", "adapt_images", "schedule"]
_USUAL = {name: str(value or "") for name, value in Fusion().settings().items()}
_USUAL |= {"budget": "the most common", "layers": ""}
_KINDS = {
    "unfinished": "Not finished",
    "damaged": "Damaged",
    "other": "Another recipe, other data or other code than the table of their model",
    "repeated": "The same setting and seed as an earlier run; only the earlier one counts",
    "elsewhere": "Counted for accuracy alone, since they were trained on another machine",
}
READING = """± is the sample standard deviation over seeds; a single number is of one seed.
Differences are paired by seed, with 95 % intervals by Student's t; about one in twenty misses the true difference.
Costs come from runs on the table's machine; costs relative to none use the seeds that both have. Training time is for \
data and steps, without evaluation and the capture of CUDA graphs; other costs of an adaptive run are of its last one.
Top-1 and Top-5 are of the test images after the last step.""".splitlines()
_TOP1 = "top1_difference_to_none_points"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `famba report`."""
    parser.description = (
        "Compare runs, from run folders and from CSV files of runs: in a table on the terminal, or with --out in a "
        "report with means over seeds, intervals and plots, as Markdown, CSV, LaTeX and one HTML page."
    )
    text = "run folders, folders that hold some, or CSV files with a run per row"
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a report to this folder instead")


def run(options: argparse.Namespace) -> int:
    """Print the table of runs, or write the report."""
    out = options.out
    print(run_table(read_runs(options.runs)) if out is None else terminal(write_report(options.runs, out), out))
    return 0


@dataclass(frozen=True)
class Table:
    """Hold the settings of a model that may be compared.

    runs: as `read_runs` gives them, with label, seed, numbers as floats, and here (whether on the table's machine).
    rows: the columns of report.csv by label; sheets: as text. shared: what the runs share, and the machine of costs.
    """

    model: str
    runs: pd.DataFrame
    rows: pd.DataFrame
    sheets: dict[str, pd.DataFrame]
    conclusion: str
    notes: list[str]
    shared: pd.Series

    @cached_property
    def plots(self) -> list[Plot]:
        """Draw the table's pictures, once they are asked for."""
        return draw(self.rows, re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")[:200] or "model")


class Report(NamedTuple):
    """Hold a table for each model. left_out: by kind of reason the names of runs, and the reasons."""

    tables: list[Table]
    left_out: dict[str, list[tuple[str, str]]]
    headline: str


def write_report(paths: Iterable[str | Path], out: Path) -> Report:
    """Write report.md, .csv, .tex, .html and plots/ on the runs in some folders and CSV files.

    Raises DataError where no table can be made, ConfigError or CheckpointError where the folder cannot be written.
    """
    report = gather(paths)
    prepare_folder(out / "plots")
    files: dict[str, str | bytes] = {"report.md": rendered(report, "md"), "report.csv": table_csv(report)}
    files["report.tex"] = latex(report)
    for plot in (plot for table in report.tables for plot in table.plots):
        files |= {f"plots/{name}": content for name, content in plot.files.items()}
    # The page last, so that it is there only with all that belongs to it.
    write_files(out, files | {"report.html": rendered(report, "html")})
    return report


def gather(paths: Iterable[str | Path]) -> Report:
    """Read runs and work out a report. Raises DataError where no table can be made of them."""
    runs = read_runs(paths).replace("null", "")
    left_out = [(run.kind, run.run, run.problem) for run in runs.itertuples() if run.problem]
    usable = runs[runs["problem"] == ""]
    tables = _tables(_prepared(usable), left_out) if len(usable) else []
    if not tables:
        lines = "\n".join(f"  {run}: {reason}" for _, run, reason in left_out[:8])
        raise DataError(f"no run of these can stand in a table:\n{lines}\nWait for them, continue them, or name others")
    found = pd.DataFrame(left_out, columns=["kind", "run", "reason"])
    listed: dict[str, list[tuple[str, str]]] = {}
    for kind, title in _KINDS.items():
        for reason, names in found[found["kind"] == kind].groupby("reason")["run"]:
            listed.setdefault(title, []).append(("; ".join(sorted(names)), reason))
    counted, moved = sum(len(table.runs) for table in tables), int((found["kind"] == "elsewhere").sum())
    headline = f"{counted} runs in the tables, {moved} of them for accuracy alone; {len(found) - moved} left out."
    return Report(tables, listed, headline)


def _prepared(runs: pd.DataFrame) -> pd.DataFrame:
    """Add numbers, seed and lists, and the fusion setting as text: without fusion nothing but the strategy counts."""
    names = {f"config.fusion.{name}": name for name in (*_SETTING, "layers")}
    needed = [*names, *_NUMBERS, *_MODEL, *_PLACE, *_OUTCOME, "started_from.weights_sha256", "config.init_from"]
    needed += ["config.data.name", "config.data.root", "config.recipe.repeats", "provenance.started"]
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *needed])), fill_value="")
    counts = {name: runs[name].map(lambda cell: float(cell or "nan")) for name in _NUMBERS}
    counts |= {name: counts[name].where(counts[name] > 0) for name in COSTS}
    counts |= {"seed": runs["provenance.seed"].astype(int), "left": runs["tokens_per_layer"].map(from_cell)}
    removed = runs["schedule"].map(lambda cell: str(sum(from_cell(cell))))
    setting = runs[[*names]].rename(columns=names)
    setting = setting.assign(strategy=runs["strategy"], schedule=runs["schedule"], budget=removed).replace("false", "")
    # An adaptive schedule is a result, not a setting.
    adaptive = runs["strategy"] == "adaptive"
    setting["schedule"] = setting["schedule"].mask(adaptive, "")
    setting[["adapt_at", "adapt_images"]] = setting[["adapt_at", "adapt_images"]].where(adaptive, "")
    setting.loc[runs["strategy"] == NONE, setting.columns != "strategy"] = ""
    setting = setting.map(lambda cell: cell.strip("[]").replace(",", ""))
    # The layers that were asked for do not count beside the schedule that came of them.
    setting["layers"] = setting.groupby(_SETTING)["layers"].transform("first")
    # The images of a published set are the same wherever they lie, and weights are told by what they are.
    root = runs["config.data.root"].mask(runs["config.data.name"].isin(PUBLISHED), "")
    digest = runs["started_from.weights_sha256"]
    started = runs["config.init_from"].mask(digest != "", "weights of SHA-256 " + digest.str[:16])
    # Repeated augmentation parts the images among processes; for one alone it does nothing.
    parted, processes = runs["config.recipe.repeats"], runs["provenance.processes"]
    several = ~parted.isin(["", "1"]) & (processes != "1")
    changed = {"config.data.root": root, "config.init_from": started}
    changed["config.recipe.repeats"] = parted.where(parted == "", "1").mask(several, parted + " over " + processes)
    return runs.assign(**counts, **setting, **changed)


def _tables(runs: pd.DataFrame, left_out: list[tuple[str, str, str]]) -> list[Table]:
    """Return for each model its largest group of runs that may be compared; the others go to left_out, with a kind."""
    free = (*_FREE, *_MODEL[1:])
    what = [name for name in runs if name.startswith("config.") and not name.startswith(free)] + _OUTCOME
    place = [*_PLACE, *(name for name in runs if name.startswith("provenance.packages."))]
    tables = []
    models = _with_smaller(dict(list(runs.assign(smaller="").groupby(_MODEL))))
    keys = pd.DataFrame(list(models), columns=_MODEL)
    for key, own in models.items():
        apart = keys[keys["model"] == key[0]].nunique() > 1
        told = [(name, value) for name, value in zip(_MODEL, key, strict=True) if apart[name]]
        chosen = _largest(own, what)
        first, others = chosen.iloc[0], own.drop(chosen.index)
        left_out += [("other", run["run"], _differences(first[what], run)) for _, run in others.iterrows()]
        here = _largest(chosen, place).iloc[0][place]
        chosen = chosen.assign(here=(chosen[place] == here).all(axis=1), label=_labels(chosen))
        order = ["here", "provenance.started", "train_time_s", "run"]
        chosen = chosen.sort_values(order, ascending=[False, True, True, True])
        again = chosen[chosen.duplicated(["label", "seed"])]
        left_out += [("repeated", run.run, f"seed {run.seed} of {run.label}") for run in again.itertuples()]
        chosen = chosen.drop(again.index)
        moved = chosen[~chosen["here"]]
        left_out += [("elsewhere", run["run"], _differences(here, run)) for _, run in moved.iterrows()]
        name = ", ".join([key[0], *(f"{name.rpartition('.')[2]} {value or 'as registered'}" for name, value in told)])
        tables.append(_table(name, chosen, first[what], here))
    return sorted(tables, key=lambda table: (table.rows["parameters"].min(), table.model))


def _with_smaller(models: dict[Any, pd.DataFrame]) -> dict[Any, pd.DataFrame]:
    """Put networks without fusion beside the fused one that they are a smaller form of; smaller is in their labels.

    A reduction of tokens that loses to a smaller network is worth nothing.
    """
    sizes = {_MODEL.index(f"config.model.{name}"): name for name in ("depth", "embed_dim")}
    unfused = [key for key, runs in models.items() if set(runs["strategy"]) == {NONE}]
    fused = [key for key in models if key not in unfused]
    for key in unfused:
        same = [one for one in fused if all(key[i] == one[i] for i in range(len(key)) if i not in sizes)]
        parameters = {one: models[one]["parameters"].min() for one in same}
        if larger := [one for one in same if parameters[one] > models[key]["parameters"].max()]:
            nearest = min(larger, key=lambda one: parameters[one])
            told = ", ".join(f"{n} {key[i] or 'as registered'}" for i, n in sizes.items() if key[i] != nearest[i])
            models[nearest] = pd.concat([models[nearest], models.pop(key).assign(smaller=told)])
    return models


def _largest(runs: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Return the runs that share the most settings and seeds; of several such those with none, then the latest."""

    def size(group: pd.DataFrame) -> tuple[int, bool, str]:
        trials = len(group.drop_duplicates([*_SETTING, "seed"]))
        return trials, (group["strategy"] == NONE).any(), group["provenance.started"].max()

    return max((group for _, group in runs.groupby(names)), key=size)


def _labels(runs: pd.DataFrame) -> pd.Series:
    """Return a label for each run's setting: the strategy, and what tells it from the other settings."""
    common = _usual(runs)
    told = {name: runs[name].where(runs[name] != usual, "") for name, usual in common.items()}
    for name in ("adapt_at", "adapt_images", "schedule"):
        apart = runs.groupby(["strategy", *common])[name].transform("nunique") > 1
        told[name] = runs[name].where(apart, "")
    parts = {name: (f"{name} " + cells).where(cells != "", "") for name, cells in told.items()}
    columns = pd.DataFrame({"strategy": runs["strategy"], "smaller": runs["smaller"], **parts})
    return columns.apply(lambda row: ", ".join(filter(None, row)), axis=1)


def _usual(runs: pd.DataFrame) -> dict[str, str]:
    """Return what holds where a label says nothing else: the default where a run has it, else what most have."""
    fused = runs[runs["strategy"] != NONE]
    return {name: default if default in set(fused[name]) else fused[name].mode().min()
            for name, default in _USUAL.items() if len(fused)}  # fmt: skip


def _short(name: str) -> str:
    return re.sub(r"^(config|provenance\.packages|provenance)\.", "", name)


def _differences(table: pd.Series, run: pd.Series) -> str:
    """Return the keys in which a run differs from what a table's runs share."""
    names = sorted(name for name in table.index if run.get(name, "") != table[name])
    here, there = ([(of.get(name) or "not known")[:80] for name in names] for of in (run, table))
    pairs = zip(names, here, there, strict=True)
    return "; ".join(f"{_short(name)}: {own}, in the table {shared}" for name, own, shared in pairs)


def _table(model: str, runs: pd.DataFrame, what: pd.Series, here: pd.Series) -> Table:
    runs = runs.assign(rank=pd.Categorical(runs["strategy"], strategy_names()))  # those of other packages come last
    runs = runs.sort_values(["rank", "smaller", *_SETTING, "seed"])

    def by_seed(value: str) -> pd.DataFrame:
        of = runs[runs["here"]] if value in COSTS else runs
        return of.pivot(index="seed", columns="label", values=value).reindex(columns=runs["label"].unique())

    values = {name: by_seed(name) for name in ("top1", "top5", *COSTS)}
    rows = _rows(runs, values, what, here).assign(model=model)
    settings = pd.Series(_usual(runs), dtype=object).add_prefix("fusion, unless a row says otherwise: ")
    shared = pd.concat([what, here, settings]).rename(_short)
    notes = _notes(rows, values["train_time_s"].count())
    return Table(model, runs, rows, _sheets(rows), _conclusion(rows), notes, shared[shared != ""])


def _rows(runs: pd.DataFrame, by_seed: dict[str, pd.DataFrame], what: pd.Series, place: pd.Series) -> pd.DataFrame:
    """Return the columns of report.csv by label: unrounded, units in their names, NaN for what is not known."""
    groups = runs.groupby("label", sort=False)
    first = groups.first()
    columns = {"model": "", "fusion": first.index.to_series(), **first[["strategy", *SETTINGS]]}
    columns |= {"tokens_removed": first["budget"].replace("", "0").astype(int), "data": what["config.data.name"]}
    columns["seeds"] = groups["seed"].agg(lambda seeds: " ".join(map(str, seeds)))
    for name, values in by_seed.items():
        name = f"{name}_percent" if name in ("top1", "top5") else name
        columns |= {f"{name}_mean": values.mean(), f"{name}_sd": values.std()}
    top1, unknown = by_seed["top1"], pd.Series(index=by_seed["top1"].index, dtype=float)
    pairs = {label: (unknown if label == NONE else top1[label], top1.get(NONE, unknown)) for label in top1}
    gains = pd.DataFrame({label: interval(*pair) for label, pair in pairs.items()}).T
    columns |= gains.astype({"": float, "_low95": float, "_high95": float}).add_prefix(_TOP1)
    columns |= {_TOP1.replace("points", "seeds"): columns.pop(f"{_TOP1}_seeds")}
    for cost, name in zip(COSTS, ("train_time", "peak_memory", "saved_bytes"), strict=False):
        columns[f"{name}_share_of_none"] = _share_of_none(by_seed[cost])
    left = groups["left"].agg(lambda runs: [sum(layer) / len(layer) for layer in zip(*runs, strict=True)])
    used = runs["left"].map(sum) / (runs["tokens"] * runs["left"].map(len))
    columns |= {
        **groups[["macs_per_image", "parameters"]].mean(),
        "tokens": first["tokens"].astype(int),
        "tokens_left_mean": left.str[-1],
        "tokens_per_layer_mean": left.map(lambda layers: " ".join(f"{tokens:g}" for tokens in layers)),
        "token_layers_share_of_all": used.groupby(runs["label"]).mean(),
        **{name: groups["here"].any().map({True: place[f"provenance.{name}"], False: ""}) for name in _MACHINE},
        "famba": what["provenance.famba"],
        "git_commit": what["provenance.git_commit"],
    }
    return pd.DataFrame(columns, index=first.index)


def interval(ours: pd.Series, base: pd.Series) -> pd.Series:
    """Return the mean difference of two columns by seed ("") and its 95 % interval by Student's t (_low95, _high95).

    _seeds lists the seeds that are in both. The ends are NaN for one such seed, all three numbers for none.
    """
    found = (ours - base).dropna()
    half = t.ppf(0.975, len(found) - 1) * found.sem()
    seeds = " ".join(map(str, found.index))
    return pd.Series({"": found.mean(), "_low95": found.mean() - half, "_high95": found.mean() + half, "_seeds": seeds})


def _share_of_none(by_seed: pd.DataFrame) -> pd.Series:
    """Return each label's cost as a share of that of none, over the seeds that both have."""
    base = by_seed.get(NONE, pd.Series(index=by_seed.index, dtype=float))
    both = by_seed.where(base.notna(), axis=0)
    return both.sum(min_count=1) / both.notna().mul(base, axis=0).sum(min_count=1)


def spread(mean: float, sd: float, digits: int, factor: float = 1.0) -> str:
    """Write a mean and its standard deviation; the mean alone for one seed, a dash for none."""
    if pd.isna(mean):
        return "-"
    return f"{factor * mean:.{digits}f}" + ("" if pd.isna(sd) else f" ± {factor * sd:.{digits}f}")


def difference(found: pd.Series, name: str = "") -> str:
    """Write a difference and its interval; a dash for none."""
    mean, low, high = found[name], found[f"{name}_low95"], found[f"{name}_high95"]
    if pd.isna(mean):
        return "-"
    return f"{signed(mean)} ({'one seed' if pd.isna(low) else f'{signed(low)} to {signed(high)}'})"


def _sheets(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the results as the paper has them and the costs in detail, as text with units in the headers."""
    factor, unit = time_unit(rows)

    def cells(name: str, digits: int, factor: float = 1.0) -> pd.Series:
        if name in rows:
            return rows[name].map(lambda value: "-" if pd.isna(value) else f"{factor * value:,.{digits}f}")
        return rows.apply(lambda row: spread(row[f"{name}_mean"], row[f"{name}_sd"], digits, factor), axis=1)

    results = [
        ("fusion", rows["fusion"]),
        ("seeds", rows["seeds"].str.split().str.len().astype(str)),
        ("Top-1, %", cells("top1_percent", 2)),
        ("difference to none, points (95 % interval)", rows.apply(difference, axis=1, name=_TOP1)),
        ("Top-5, %", cells("top5_percent", 2)),
        (f"training time, {unit}", cells("train_time_s", 1, 1 / factor)),
        ("relative to none", cells("train_time_share_of_none", 3)),
        ("peak memory, MiB", cells("peak_memory_mib", 0)),
        ("relative to none", cells("peak_memory_share_of_none", 3)),
    ]
    costs = [
        ("fusion", rows["fusion"]),
        ("images/s", cells("images_per_s", 1)),
        ("saved for the backward, kB/image", cells("saved_bytes_per_image_mean", 0, 1e-3)),
        ("relative to none", cells("saved_bytes_share_of_none", 3)),
        ("FLOPs (multiply-adds), M/image", cells("macs_per_image", 1, 1e-6)),
        ("parameters, M", cells("parameters", 2, 1e-6)),
        ("tokens left", rows["tokens_left_mean"].map("{:.4g}".format) + " of " + rows["tokens"].astype(str)),
        ("token-layers, of all", cells("token_layers_share_of_all", 3)),
    ]
    sheets = {"Results": results, "Cost": costs}
    return {title: pd.concat([text.rename(name) for name, text in sheet], axis=1) for title, sheet in sheets.items()}


def _conclusion(rows: pd.DataFrame) -> str:
    """Return what the intervals show of each setting's accuracy against none, in one sentence."""
    low, high = rows[f"{_TOP1}_low95"], rows[f"{_TOP1}_high95"]
    if low.isna().all():
        return "Not enough seeds to compare: at least 2 that a setting and none share are needed."
    shown = {"more accurate": low > 0, "less accurate": high < 0, "no difference shown": (low <= 0) & (high >= 0)}
    return f"Against none, {'; '.join(f'{of}: ' + ' / '.join(rows.index[at]) for of, at in shown.items() if at.any())}."


def _notes(rows: pd.DataFrame, known: pd.Series) -> list[str]:
    """Return what a reader has to know to read a table right; known: runs by label whose time is known."""
    seeds = rows["seeds"].str.split().str.len()
    fewer = "; ".join(f"{name} {known[name]} of {seeds[name]}" for name in rows.index if known[name] < seeds[name])
    notes = ["No run without fusion (none) is among these, so nothing is compared with it."] * (NONE not in known)
    return notes + [f"Training time is known only for some runs on the table's machine: {fewer}."] * bool(fewer)


def rendered(report: Report, kind: str) -> str:
    """Return the report as "html", one page that needs nothing but itself, or "md" with pictures by their paths."""
    escapes = kind == "html"  # not in Markdown
    environment = Environment(autoescape=escapes, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701
    environment.filters["base64"] = lambda svg: base64.b64encode(svg).decode()
    environment.filters |= {"md": _md, "table": lambda sheet: tabulated(sheet.map(_md), "github")}
    template = Path(__file__).with_suffix(f".{kind}").read_text(encoding="utf-8")
    return environment.from_string(template).render(report=report, reading=READING)


def table_csv(report: Report) -> str:
    """Return a line for each row of all tables: unrounded, units in the names of the columns, empty where not known."""
    return pd.concat([table.rows for table in report.tables]).to_csv(index=False, lineterminator="\n")


def latex(report: Report) -> str:
    r"""Return two tables for each model, with booktabs; to be read in by \input."""
    lines = ["% needs \\usepackage{booktabs}"]
    for table in report.tables:
        for title, sheet in table.sheets.items():
            text = tabulated(sheet, "latex_booktabs").replace("±", r"$\pm$").replace("\N{MINUS SIGN}", "$-$")
            caption = f"{table.model}: {title.lower()}".replace("_", r"\_")
            lines += ["\\begin{table}", f"\\centering\n\\caption{{{caption}}}", text, "\\end{table}"]
    return "\n".join(lines) + "\n"


def terminal(report: Report, out: Path) -> str:
    """Return what to print of a report that has been written."""
    lines = []
    for table in report.tables:
        lines += [table.model, "", tabulated(table.sheets["Results"], "simple"), "", table.conclusion, ""]
    for title, runs in report.left_out.items():
        lines += [f"{title}:", *(f"  {names}: {reason}" for names, reason in runs), ""]
    return "\n".join([*lines, report.headline, f"{out / 'report.html'}"])


def tabulated(sheet: pd.DataFrame, form: str) -> str:
    """Return a table of text in one of tabulate's forms, all but its first column to the right."""
    sides = ["left", *["right"] * (len(sheet.columns) - 1)]
    return sheet.to_markdown(index=False, tablefmt=form, disable_numparse=True, colalign=sides)


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)
