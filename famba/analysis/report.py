"""`famba report`: the paper's table from one's own runs, over seeds, with intervals and plots.

Runs of a model are compared where they share data, recipe, precision and code. Time, throughput and memory are compared
where they share the machine too: a run from another machine counts for accuracy alone.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
from scipy.stats import t

from famba.analysis.folders import prepared
from famba.analysis.plots import Plot, draw, time_unit
from famba.analysis.runs import read_metrics, read_runs
from famba.data import PUBLISHED
from famba.errors import DataError
from famba.files import write_whole
from famba.fusion.schedules import PAPER, schedule, strategy_names
from famba.training.compose import compose
from famba.training.config import plain
from famba.training.reporting import signed
from famba.training.summary import Summary, from_cell, to_row

NONE = "none"
COSTS = ("train_time_s", "peak_memory_mib", "saved_bytes_per_image")
_EXACT = "saved_bytes_per_image"  # counted, so one seed is enough to compare it
_NUMBERS = [*COSTS, "images_per_s", "top1", "top5", "macs_per_image", "parameters", "tokens"]
_MODEL = tuple(f"config.model.{name}" for name in ("patch_size", "depth", "embed_dim", "d_state", "cls_position"))
_PLACE = (*(f"config.trainer.{name}" for name in ("compile", "cuda_graphs", "grad_checkpointing", "accumulation")),
          "config.data.workers", *(f"provenance.{name}" for name in ("device", "processes", "backend", "cuda")))  # fmt: skip
_OUTCOME = ("image_size", "precision", "steps", "parameters", "tokens", "provenance.famba", "provenance.git_commit")
# Settings that have no bearing on results, or whose outcome the summary tells.
_IGNORED = tuple(f"config.{name}" for name in (
    "fusion.", "logger.", "model.name", "seed", "run_dir", "resume", "trainer.device", "trainer.log_every",
    "trainer.eval_every", "trainer.save_every_min", "trainer.precision", "data.image_size", "ops.backend"))  # fmt: skip
# What tells fusion settings apart, in the order in which they are sorted; for some, what a label need not say.
_SETTING = ["strategy", "order", "weighting", "place", "budget", "adapt_at", "adapt_images", "schedule", "mode", "proportional"]  # fmt: skip
_USUAL = {"order": "sequence", "weighting": "mean", "place": "before_mixer", "mode": "fuse", "proportional": "",
          "budget": None, "layers": ""}  # fmt: skip
_KINDS = {
    "unfinished": "Not finished",
    "damaged": "Damaged",
    "other": "Another recipe, other data or other code than the table of their model",
    "repeated": "The same setting and seed more than once",
    "elsewhere": "Counted for accuracy alone, since they were trained on another machine",
}
_READING = """± is the sample standard deviation over seeds; a single number is of one seed.
Differences are paired by seed, with 95 % intervals by Student's t; of many about one in twenty misses the true difference.
A setting is on the Pareto front, and ringed in plots, unless another beats it: by the means it is at least as accurate at \
no more cost, and the interval of one of the two differences excludes 0.
Shares of none are over the seeds that both have. Training time is that of data and steps, without evaluation.
Top-1 and Top-5 are of the test images after the last step.""".splitlines()
_TEMPLATE = Path(__file__).with_suffix(".html")
_SOURCE = "arXiv 2409.09808, CIFAR-100 on an A100 with the paper's recipe"
# Shen et al., "Famba-V: Fast Vision Mamba with Cross-Layer Token Fusion": Top-1 in percent and training time.
_PRINTED = {
    ("vim_small_patch16_224", "none"): (76.9, ""),
    ("vim_small_patch16_224", "upper"): (75.2, ""),
    ("vim_tiny_patch16_224", "interleaved"): (67.0, "under 4 h"),
}

LeftOut = tuple[str, str, str]  # kind, run, reason


@dataclass(frozen=True)
class Table:
    """The settings of a model that may be compared.

    runs: as `read_runs` gives them, with label, seed, numbers as floats, here (on the table's machine) and timed.
    rows: the columns of report.csv by label. by_seed: Top-1 and each cost of the timed runs, seeds by labels. shared:
    what the runs share, and the machine that times and memory are of. notes: what a reader has to know.
    """

    model: str
    runs: pd.DataFrame
    rows: pd.DataFrame
    by_seed: dict[str, pd.DataFrame]
    shared: pd.Series
    notes: list[str]
    plots: list[Plot]

    @property
    def sheets(self) -> dict[str, pd.DataFrame]:
        """The results as the paper has them and the costs in detail, as text with units in the headers."""
        return _sheets(self.rows)

    @property
    def conclusion(self) -> str:
        """What the intervals show of accuracy and time against none."""
        return _conclusion(self.rows)


@dataclass(frozen=True)
class Report:
    """A table for each model. left_out: by kind of reason the names of runs, and the reasons."""

    tables: list[Table]
    left_out: dict[str, list[tuple[str, str]]]
    headline: str
    reading: list[str]


def write_report(paths: Iterable[str | Path], out: Path) -> Report:
    """Write report.md, .csv, .tex, .html and plots/ on the runs in some folders and CSV files.

    Raises ConfigError where the folder cannot be written, before any run is read, DataError where no table can be made,
    and CheckpointError where the disk refuses later.
    """
    with prepared(out, out / "plots"):
        report = gather(paths)
        files = {"report.md": markdown(report), "report.csv": table_csv(report), "report.tex": latex(report)}
        contents = {name: text.encode() for name, text in files.items()}
        for plot in (plot for table in report.tables for plot in table.plots if plot.svg):
            contents |= {f"plots/{plot.name}.svg": plot.svg, f"plots/{plot.name}.png": plot.png}
        # Last, so that a page is there only with all that belongs to it.
        contents["report.html"] = page(report).encode()
        for name, content in contents.items():
            write_whole(out / name, lambda file, content=content: Path(file).write_bytes(content))  # type: ignore[misc]
    return report


def gather(paths: Iterable[str | Path]) -> Report:
    """Read runs and work out a report. Raises DataError where no table can be made of them."""
    runs = read_runs(paths).replace("null", "")
    problems = runs[runs["problem"] != ""]
    left_out: list[LeftOut] = list(problems[["kind", "run", "problem"]].itertuples(index=False, name=None))
    tables = _tables(runs[runs["problem"] == ""], left_out)
    if not tables:
        lines = "\n".join(f"  {run}: {reason}" for _, run, reason in left_out[:8])
        raise DataError(
            f"no run of these {len(runs)} can stand in a table:\n{lines}\nWait for them, continue them, or name others"
        )
    listed: dict[str, list[tuple[str, str]]] = {title: [] for title in _KINDS.values()}
    found = pd.DataFrame(left_out, columns=["kind", "run", "reason"])
    for (kind, reason), names in found.groupby(["kind", "reason"], sort=False)["run"]:
        listed[_KINDS[kind]].append(("; ".join(names), reason))
    counted, elsewhere = sum(len(table.runs) for table in tables), int((found["kind"] == "elsewhere").sum())
    headline = (
        f"{counted} runs in the tables, {elsewhere} of them for accuracy alone; {len(found) - elsewhere} left out."
    )
    return Report(tables, {title: runs for title, runs in listed.items() if runs}, headline, _READING)


# Which runs are compared


def _tables(runs: pd.DataFrame, left_out: list[LeftOut]) -> list[Table]:
    """Return for each model its largest group of runs that may be compared; the others go to left_out."""
    if runs.empty:
        return []
    runs = _prepared(runs)
    what, place, models = _what(runs), _place(runs), runs[["model", *_MODEL]]
    tables = []
    for key, own in runs.groupby(list(models), sort=False):
        alike = models[models["model"] == key[0]]
        told = [f"{name.split('.')[-1]} {value or 'as registered'}" for name, value in zip(models, key, strict=True)
                if alike[name].nunique() > 1]  # fmt: skip
        chosen = _largest(own, what)
        shared = what.loc[chosen.index[0]]
        others = own.index.difference(chosen.index)
        left_out += [("other", own.at[i, "run"], _differences(shared, what.loc[i])) for i in others]
        here = place.loc[_largest(chosen, place).index[0]]
        chosen = chosen.assign(here=(place.loc[chosen.index] == here).all(axis=1), label=_labels(chosen))
        chosen = _each_once(chosen, left_out)
        moved = chosen.index[~chosen["here"]] if len(chosen) else []
        left_out += [("elsewhere", chosen.at[i, "run"], _differences(here, place.loc[i])) for i in moved]
        if len(chosen):
            tables.append(_table(", ".join([key[0], *told]), chosen, shared, here, place))
    return sorted(tables, key=lambda table: (table.rows["parameters"].min(), table.model))


def _prepared(runs: pd.DataFrame) -> pd.DataFrame:
    """Add numbers, seed and lists, and the fusion setting as text: without fusion nothing but the strategy counts."""
    fusion = [f"config.fusion.{name}" for name in (*_SETTING, "layers")]
    needed = [*fusion, *_NUMBERS, *_MODEL, *_PLACE, *_OUTCOME, "provenance.started", "started_from.weights_sha256"]
    runs = runs.reindex(
        columns=list(dict.fromkeys([*runs, *needed, "config.data.root", "config.init_from"])), fill_value=""
    )
    settings = runs[fusion].rename(columns=lambda name: name.removeprefix("config.fusion."))
    removed = runs["schedule"].map(lambda cell: str(sum(from_cell(cell))))
    settings = settings.assign(strategy=runs["strategy"], schedule=runs["schedule"], budget=removed)
    settings["proportional"] = settings["proportional"].replace("false", "")
    # An adaptive schedule is a result; where a schedule is set, nothing else of it counts.
    adaptive = runs["strategy"] == "adaptive"
    settings["schedule"] = settings["schedule"].mask(adaptive, "")
    settings[["adapt_at", "adapt_images"]] = settings[["adapt_at", "adapt_images"]].where(adaptive, "")
    settings.iloc[:, 1:] = settings.iloc[:, 1:].where(runs["strategy"] != NONE, "")
    settings = settings.map(lambda cell: cell.strip("[]").replace(",", ""))
    settings["setting"] = settings[_SETTING].agg("|".join, axis=1)
    settings["layers"] = settings.groupby("setting")["layers"].transform("first")
    numbers = {name: runs[name].map(lambda cell: float(cell or "nan")) for name in _NUMBERS}
    numbers |= {name: numbers[name].where(numbers[name] > 0) for name in (*COSTS, "images_per_s")}
    lists = {"seed": runs["provenance.seed"].astype(int), "left": runs["tokens_per_layer"].map(from_cell)}
    return runs.assign(**numbers, **lists, **settings, steps=runs["steps"])


def _what(runs: pd.DataFrame) -> pd.DataFrame:
    """Return all that a run has to share with another to be compared with it."""
    counts = [
        name for name in runs if name.startswith("config.") and not name.startswith((*_IGNORED, *_MODEL, *_PLACE))
    ]
    what = runs[[*counts, *_OUTCOME]].rename(columns=_short).astype(str)
    # The images of a published set are the same wherever they lie, and weights are told by what they are.
    what["data.root"] = what["data.root"].mask(what["data.name"].isin(PUBLISHED), "")
    digest = runs["started_from.weights_sha256"]
    head = runs.get("started_from.new_classifier", digest).map({"true": ", a new classifier"}).fillna("")
    return what.assign(init_from=what["init_from"].mask(digest != "", "weights of SHA-256 " + digest.str[:16] + head))


def _place(runs: pd.DataFrame) -> pd.DataFrame:
    """Return all that a run has to share with another for their times and memory to be compared."""
    return runs[[*_PLACE, *(name for name in runs if name.startswith("provenance.packages."))]].rename(columns=_short)


def _short(name: str) -> str:
    return re.sub(r"^(config|provenance\.packages|provenance)\.", "", name)


def _largest(runs: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of equal keys that have the most settings and seeds; of several such with none, then the latest."""

    def size(group: pd.DataFrame) -> tuple[int, bool, str]:
        trials = len(group.drop_duplicates(["setting", "seed"]))
        return trials, (group["strategy"] == NONE).any(), group["provenance.started"].max()

    groups = keys.loc[runs.index].groupby(list(keys), sort=False).indices
    return max((runs.iloc[places] for places in groups.values()), key=size)


def _labels(runs: pd.DataFrame) -> pd.Series:
    """Return a label for each run's setting: the strategy, and what tells it from the other settings."""
    common = _usual(runs)
    told = {i: [name for name in common if runs.at[i, name] not in ("", common[name])] for i in runs.index}

    def label(i: int) -> str:
        return ", ".join([runs.at[i, "strategy"], *(f"{name} {runs.at[i, name]}" for name in told[i])])

    labels = pd.Series({i: label(i) for i in runs.index})
    for _, alike in runs.groupby(labels):
        differs = [name for name in ("adapt_at", "adapt_images", "schedule") if alike[name].nunique() > 1]
        told |= {i: [*told[i], *differs] for i in alike.index}
    return pd.Series({i: label(i) for i in runs.index})


def _usual(runs: pd.DataFrame) -> dict[str, str]:
    """Return what holds where a label says nothing else: the default where a run has it, else what most have."""
    fused = runs[runs["strategy"] != NONE]
    return {n: d if d in set(fused[n]) else fused[n].mode().min() for n, d in _USUAL.items() if len(fused)}


def _each_once(runs: pd.DataFrame, left_out: list[LeftOut]) -> pd.DataFrame:
    """Return each setting and seed once.

    Repeats of the same result are one trial, of which the first counts. Where results differ none does: a choice would
    be arbitrary, and a mean would pass two draws off as one seed.
    """
    once = []
    runs = runs.sort_values(["here", "provenance.started", "run"], ascending=[False, True, True])
    for (label, seed), same in runs.groupby(["label", "seed"], sort=False):
        agree = len(same.drop_duplicates(["top1", "top5", "tokens_per_layer"])) == 1
        once += list(same.index[:1]) if agree else []
        results = ", ".join(f"{run} ({top1:.2f} %)" for run, top1 in zip(same["run"], same["top1"], strict=True))
        verdict = "the first of these equal results counts" if agree else "none of these different results counts"
        reason = f"seed {seed} of {label}: {verdict}: {results}"
        left_out += [("repeated", run, reason) for run in same["run"].iloc[int(agree) :]]
    return runs.loc[once]


def _differences(table: pd.Series, run: pd.Series) -> str:
    """Return the keys in which a run differs from what a table's runs share."""
    return "; ".join(
        f"{key}: {run[key][:80] or 'not known'}, in the table {table[key][:80] or 'not known'}"
        for key in sorted(table.index[table != run])
    )


# Numbers


def _table(model: str, runs: pd.DataFrame, what: pd.Series, here: pd.Series, places: pd.DataFrame) -> Table:
    """Gather runs into rows. Times are of the runs on the table's machine; where a row has none, of one other machine."""
    order = {name: place for place, name in enumerate(strategy_names())}
    runs = runs.assign(rank=runs["strategy"].map(order).fillna(len(order))).sort_values(["rank", *_SETTING, "seed"])
    at_hand = [own[own["here"]] if own["here"].any() else _largest(own, places) for _, own in runs.groupby("label")]
    runs["timed"] = runs.index.isin(pd.concat(at_hand).index)

    def by_seed(value: str) -> pd.DataFrame:
        timed = runs[runs["timed"]] if value in (*COSTS, "images_per_s") else runs
        return timed.pivot(index="seed", columns="label", values=value).reindex(columns=runs["label"].unique())

    values = {name: by_seed(name) for name in ("top1", "top5", *COSTS, "images_per_s")}
    fronts = {cost: _front(values["top1"], values[cost], runs, cost == _EXACT) for cost in COSTS}
    rows = _rows(runs, values, what, here).assign(model=model)
    rows["on_pareto_front_of_time"] = rows.index.isin(fronts["train_time_s"])
    metrics = {run: read_metrics(folder) for run, folder in zip(runs["run"], runs["folder"], strict=True)}
    stem = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:60] or "model"
    plots = draw(rows, runs, fronts, {run: logged for run, (logged, _) in metrics.items()}, stem)
    notes = _notes(rows, runs) + [f"{run}: {remark}." for run, (_, remark) in metrics.items() if remark]
    settings = pd.Series(_usual(runs)).rename(lambda name: f"fusion.{name}, unless a row says otherwise")
    shared = pd.concat([what, here, settings])
    return Table(model, runs, rows, values, shared[shared != ""], notes, plots)


def _rows(runs: pd.DataFrame, by_seed: dict[str, pd.DataFrame], what: pd.Series, place: pd.Series) -> pd.DataFrame:
    """Return the columns of report.csv by label: unrounded, units in their names, NaN for what is not known."""
    groups = runs.groupby("label", sort=False)
    first, is_here = groups.first(), groups["here"].any()
    columns = {"model": "", "fusion": first.index.to_series(), **first[_SETTING[:4]], "mode": first["mode"]}
    columns |= {"tokens_removed": first["budget"].replace("", "0").astype(int), "data": what["data.name"]}
    columns["seeds"] = groups["seed"].agg(lambda seeds: " ".join(map(str, seeds)))
    for name, values in by_seed.items():
        name = {"top1": "top1_percent", "top5": "top5_percent"}.get(name, name)
        columns |= {f"{name}_mean": values.mean(), f"{name}_sd": values.std()}
    top1, time = _to_none(by_seed["top1"]), _to_none(by_seed["train_time_s"]).where(is_here, axis=0)
    columns |= top1.add_prefix("top1_difference_to_none_points")
    columns |= time.drop(columns="_seeds").add_prefix("train_time_difference_to_none_s")
    columns["top1_difference_to_none_seeds"] = columns.pop("top1_difference_to_none_points_seeds")
    for cost, name in zip(COSTS, ("train_time", "peak_memory", "saved_bytes"), strict=True):
        columns[f"{name}_share_of_none"] = _share_of_none(by_seed[cost]).where(is_here)
    layers = groups["left"].agg(lambda runs: [sum(layer) / len(layer) for layer in zip(*runs, strict=True)])
    used = runs["left"].map(sum) / (runs["tokens"] * runs["left"].map(len))
    printed = [_printed(run) for _, run in first.assign(label=first.index).iterrows()]
    columns |= {
        **groups[["macs_per_image", "parameters"]].mean(),
        "tokens": first["tokens"].astype(int),
        "tokens_left_mean": layers.str[-1],
        "tokens_per_layer_mean": layers.map(lambda layers: " ".join(f"{tokens:g}" for tokens in layers)),
        "token_layers_share_of_all": used.groupby(runs["label"]).mean(),
        "on_pareto_front_of_time": False,
        "paper_top1_percent": pd.Series([top1 for top1, _ in printed], first.index),
        "paper_train_time": pd.Series([time for _, time in printed], first.index),
        **{name: is_here.map({True: place[name], False: ""}) for name in ("device", "processes", "backend")},
        "famba": what["famba"],
        "git_commit": what["git_commit"],
    }
    return pd.DataFrame(columns, index=first.index)


def interval(ours: pd.Series, base: pd.Series) -> pd.Series:
    """Return the mean difference of two columns by seed ("") and its 95 % interval by Student's t (_low95, _high95).

    _seeds lists the seeds that are in both. The ends are NaN for one such seed, all three numbers for none.
    """
    found = (ours - base).dropna()
    half = t.ppf(0.975, len(found) - 1) * found.std() / len(found) ** 0.5 if len(found) > 1 else float("nan")
    seeds = " ".join(map(str, found.index))
    return pd.Series({"": found.mean(), "_low95": found.mean() - half, "_high95": found.mean() + half, "_seeds": seeds})


def _to_none(by_seed: pd.DataFrame) -> pd.DataFrame:
    """Return the intervals of each label's difference to none; NaN for none itself, and where it is missing."""
    unknown = by_seed.iloc[:, 0] * float("nan")
    base = by_seed.get(NONE, unknown)
    found = pd.DataFrame({label: interval(unknown if label == NONE else by_seed[label], base) for label in by_seed}).T
    return found.astype({"": float, "_low95": float, "_high95": float})


def _share_of_none(by_seed: pd.DataFrame) -> pd.Series:
    """Return each label's cost as a share of that of none, over the seeds that both have."""
    base = by_seed.get(NONE, by_seed.iloc[:, 0] * float("nan"))
    both = by_seed.where(base.notna(), axis=0)
    return both.sum(min_count=1) / both.notna().mul(base, axis=0).sum(min_count=1)


def _front(top1: pd.DataFrame, spent: pd.DataFrame, runs: pd.DataFrame, is_exact: bool) -> list[str]:
    """Return the labels that no other beats, cheapest first; of known cost on the table's machine only."""
    costs = spent.mean()[runs.groupby("label")["here"].any().reindex(spent.columns)].dropna().sort_values(kind="stable")

    def beats(rival: str, label: str) -> bool:
        if costs[rival] > costs[label] or top1[rival].mean() < top1[label].mean():
            return False
        less = interval(spent[rival], spent[label])
        is_less = less["_high95"] < 0 or (is_exact and pd.isna(less["_high95"]) and less[""] < 0)
        return bool(is_less or interval(top1[rival], top1[label])["_low95"] > 0)

    return [label for label in costs.index if not any(beats(rival, label) for rival in costs.index)]


def _printed(run: pd.Series) -> tuple[float, str]:
    """Return Top-1 and time of the paper for a run of its setting; nothing for a run of another setting."""
    known = _PRINTED.get((run["model"], run["strategy"]))
    return (float("nan"), "") if known is None or _deviations(run) else known


def _deviations(run: pd.Series) -> str:
    """Return how a run differs from the paper's setting, which is that of experiment=paper_table; empty for none.

    Order and place of fusing are free: the paper and its code have two places, and no figures for the order.
    """
    wanted = _paper_settings().copy()
    given = run.reindex(wanted.index).fillna("").replace("null", "")
    if run["strategy"] != NONE:
        wanted["weighting"], wanted["mode"] = "mean", "fuse"
    removed = [before - after for before, after in zip([int(run["tokens"]), *run["left"]], run["left"], strict=False)]
    budgets = [list(schedule(run["strategy"], 24, 197, budget)) for budget in (168, PAPER)]
    wanted["tokens removed"] = " or ".join(str(sum(counts)) for counts in budgets)
    given["tokens removed"] = wanted["tokens removed"] if removed in budgets else str(sum(removed))
    given = given.reindex(wanted.index).fillna(run)
    return _differences(wanted.rename(_short), given.rename(_short)).replace("in the table", "there")


@cache
def _paper_settings() -> pd.Series:
    row = to_row(Summary(""), plain(compose(["experiment=paper_table", "model=vim_s", "fusion=none"])))
    free = [
        f"config.{name}"
        for name in ("model.name", "model.num_classes", "data.root", "data.num_classes", "data.workers")
    ]
    counts = ("config.trainer.epochs", "config.trainer.max_steps", "config.trainer.batch_size", "config.data.",
              "config.model.", "config.init_from", "config.recipe.")  # fmt: skip
    row = {
        name: cell
        for name, cell in row.items()
        if name.startswith(counts) and name not in (*free, "config.data.image_size")
    }
    return pd.Series({**row, "image_size": "224"}).replace("null", "")


# Text


def spread(mean: float, sd: float, digits: int, factor: float = 1.0) -> str:
    """Write a mean and its standard deviation; the mean alone for one seed, a dash for none."""
    if pd.isna(mean):
        return "-"
    return f"{factor * mean:.{digits}f}" + ("" if pd.isna(sd) else f" ± {factor * sd:.{digits}f}")


def difference(found: pd.Series, name: str = "") -> str:
    """Write a difference and its interval, whose ends have as many digits as show their sign, up to four."""
    mean, low, high = found[name], found[f"{name}_low95"], found[f"{name}_high95"]
    if pd.isna(mean) or pd.isna(low):
        return "-" if pd.isna(mean) else f"{signed(mean)} (one seed)"

    def end(value: float) -> str:
        return next((text for digits in (2, 3, 4) if not (text := signed(value, digits))[0].isdigit()), signed(value))

    return f"{signed(mean)} ({end(low)} to {end(high)})"


def _sheets(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    factor, unit = time_unit(rows)
    star = rows["device"].map({"": " *"}).fillna("") if rows["device"].any() else ""

    def cells(name: str, digits: int, factor: float = 1.0) -> pd.Series:
        return rows.apply(lambda row: spread(row[f"{name}_mean"], row[f"{name}_sd"], digits, factor), axis=1)

    def numbers(name: str, digits: int, factor: float = 1.0) -> pd.Series:
        return rows[name].map(lambda value: "-" if pd.isna(value) else f"{factor * value:,.{digits}f}")

    results = [
        ("fusion", rows["fusion"]),
        ("seeds", rows["seeds"].str.split().str.len().astype(str)),
        ("Top-1, %", cells("top1_percent", 2)),
        (
            "difference to none, points (95 % interval)",
            rows.apply(difference, axis=1, name="top1_difference_to_none_points"),
        ),
        ("Top-5, %", cells("top5_percent", 2)),
        (f"training time, {unit}", cells("train_time_s", 1, 1 / factor) + star),
        ("of none", numbers("train_time_share_of_none", 3)),
        ("peak memory, MiB", cells("peak_memory_mib", 0) + star),
        ("of none", numbers("peak_memory_share_of_none", 3)),
    ]
    if any(model == name for name, _ in _PRINTED for model in rows["model"].str.split(",").str[0]):
        printed = rows["paper_top1_percent"].map(lambda top1: "" if pd.isna(top1) else f"{top1:.1f}")
        results += [("paper: Top-1, %", printed), ("paper: time", rows["paper_train_time"])]
    left = rows["tokens_left_mean"].map(lambda tokens: f"{round(tokens, 1):g}")
    costs = [
        ("fusion", rows["fusion"]),
        ("images/s", cells("images_per_s", 1) + star),
        ("saved for the backward, kB/image", numbers("saved_bytes_per_image_mean", 0, 1e-3) + star),
        ("of none", numbers("saved_bytes_share_of_none", 3)),
        ("FLOPs (multiply-adds), M/image", numbers("macs_per_image", 1, 1e-6)),
        ("parameters, M", numbers("parameters", 2, 1e-6)),
        ("tokens left", left + " of " + rows["tokens"].astype(str)),
        ("token-layers, of all", numbers("token_layers_share_of_all", 3)),
    ]
    sheets = {"Results": results, "Cost": costs}
    return {title: pd.concat(dict(enumerate(text for _, text in sheet)), axis=1).set_axis([name for name, _ in sheet], axis=1)
            for title, sheet in sheets.items()}  # fmt: skip


def _conclusion(rows: pd.DataFrame) -> str:
    top1, time = "top1_difference_to_none_points", "train_time_difference_to_none_s"
    compared = rows[rows[f"{top1}_low95"].notna()]
    if compared.empty:
        return "Not enough seeds to compare: at least 2 that a setting and none share are needed."
    verdicts = (("More", compared[f"{top1}_low95"] > 0), ("Less", is_less := compared[f"{top1}_high95"] < 0))
    said = [
        f"{word} accurate than none: {'; '.join(f'{row.fusion} {difference(row, top1)}' for _, row in compared[found].iterrows())}."
        for word, found in verdicts
        if found.any()
    ] or ["No difference to none in Top-1 is shown."]
    kept = compared[(compared[f"{time}_high95"] < 0) & ~is_less]
    if kept.empty:
        return " ".join([*said, "No setting is shown to be faster than none without a loss of Top-1."])
    best = kept.loc[kept["top1_percent_mean"].idxmax()]
    return " ".join(
        [
            *said,
            "Best trade-off, the most accurate by the mean of those shown to be faster and not shown to be less accurate: "
            f"{best['fusion']}, {difference(best, top1)} points in {best['train_time_share_of_none']:.3f} of the time.",
        ]
    )


def _notes(rows: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    groups = runs.groupby("label", sort=False)
    seeds, timed = groups.size(), runs[runs["timed"]].groupby("label")["train_time_s"].count()
    single, fewer = seeds.index[seeds == 1], [label for label in rows.index if timed[label] < seeds[label]]
    moved = rows.index[rows["device"] == ""] if rows["device"].any() else []
    first = runs.drop_duplicates("label").set_index("label")
    other = {label: ways for label, run in first.iterrows()
             if (run["model"], run["strategy"]) in _PRINTED and (ways := _deviations(run))}  # fmt: skip
    found = {
        f"One seed alone, so neither spread nor interval: {'; '.join(single)}.": len(single),
        "No run without fusion (none) is among these: differences and shares are left open.": NONE not in rows.index,
        "On a CPU peak memory is all that the process keeps resident, for the most part libraries and data; the bytes saved "
        "for the backward show what fusing saves.": (runs["provenance.cuda"] == "").all(),
        f"* timed on another machine, so without shares and not in the plots of cost: {'; '.join(moved)}.": len(moved),
        "Training time is that of the runs on the table's machine of which it is known: "
        f"{'; '.join(f'{label} {timed[label]} of {seeds[label]}' for label in fewer)}.": len(fewer),
        "An adaptive schedule changes during training: FLOPs, saved bytes and tokens are of its last one.":
            (rows["strategy"] == "adaptive").any(),
        f"Paper: {_SOURCE}; empty where its figure is not known here.": rows["paper_top1_percent"].notna().any(),
        f"The figures of {_SOURCE}, are not set beside {'; '.join(other)}, of another setting: "
        f"{next(iter(other.values()), '')}.": len(other),
    }  # fmt: skip
    return [note for note, holds in found.items() if holds]


# Formats


def markdown(report: Report) -> str:
    """Return the report as Markdown; pictures by their path from the report's folder."""
    lines = ["# Token fusion in Vision Mamba", "", report.headline, ""]
    for table in report.tables:
        lines += [f"## {_md(table.model)}", "", _md(table.conclusion), ""]
        for title, sheet in table.sheets.items():
            lines += [f"### {title}", "", tabulated(sheet.map(_md), "github"), ""]
        lines += [*(f"- {_md(note)}" for note in table.notes), ""]
        for plot in table.plots:
            lines += [f"![{plot.title}](plots/{plot.name}.svg)", ""] if plot.svg else []
            lines += [f"{plot.title}. {plot.caption}", ""]
        shared = (f"- {_md(name)}: {_md(value)}" for name, value in table.shared.items())
        lines += ["### What all of these runs share", "", *shared, ""]
    lines += ["## Runs left out, and what differs", ""]
    for title, runs in report.left_out.items():
        lines += [f"{title}:", "", *(f"- {_md(names)}\n  - {_md(reason)}" for names, reason in runs), ""]
    return "\n".join([*lines, "## How to read this", "", *(f"- {line}" for line in report.reading)]) + "\n"


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


def page(report: Report) -> str:
    """Return one HTML page that needs nothing but itself: no script, no other file, no network."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["base64"] = lambda svg: base64.b64encode(svg).decode()
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(report=report)


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
