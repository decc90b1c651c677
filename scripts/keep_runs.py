"""Add finished runs to docs/results/runs.csv, and fill the tables and plots of docs/results.md and README.md.

    python scripts/keep_runs.py runs/cpu_table    # add the runs of a sweep, then fill the tables
    python scripts/keep_runs.py                   # only fill the tables

--into names another table than runs. --without-times leaves out times, throughput and peak memory and keeps the reason,
for runs that shared their machine. The tables stand between markers; the rest of the documents is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from famba.analysis.report import Report, Table, difference, gather, interval, spread, tabulated
from famba.analysis.runs import read_runs, runs_csv
from famba.errors import DataError, FambaError

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs/results"
RUNS, GPU_COSTS = (KEPT / f"{name}.csv" for name in ("runs", "gpu_costs"))
NOT_RUN = "Not run yet."
RESULTS, README = ROOT / "docs/results.md", ROOT / "README.md"
TIMES = ("train_time_s", "eval_time_s", "images_per_s", "peak_memory_mib")
PRIVATE = ("/home/", "/root/", "/tmp/", "/mnt/", "/Users/")  # noqa: S108
PLOTS = ("accuracy_time", "accuracy_saved")
SHELF = {"vim": "`vim_micro`", "vit": "`vit_micro`"}


def main() -> int:
    """Add runs and fill the documents; return the exit status, 2 if a run is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs to add")
    parser.add_argument("--into", default="runs", metavar="NAME", help="add them to docs/results/NAME.csv")
    parser.add_argument("--without-times", metavar="REASON", help="leave out times and peak memory, for this reason")
    options = parser.parse_args()
    try:
        if options.runs:
            new, table = read_runs(options.runs), KEPT / f"{options.into}.csv"
            kept = read_runs([table]) if table.exists() else new.head(0)
            table.write_text(runs_csv(added(kept, new, options.without_times)))
        report = gather([RUNS])
        for name in PLOTS:
            save_plots(report.tables[0], name, name)
        for (document, name), text in texts(report).items():
            before, _, after = parts(document, name)
            document.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end of {name} -->{after}")
    except FambaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def added(kept: pd.DataFrame, runs: pd.DataFrame, without_times: str | None) -> pd.DataFrame:
    """Return the kept runs and the finished new ones. Raises DataError for runs that cannot be kept."""
    broken, left = ([f"{one.run}: {one.problem}" for one in of.itertuples() if one.problem] for of in (kept, runs))
    if broken:
        raise DataError(f"the table has rows that cannot be read; mend them first: {'; '.join(broken)}")
    if left:
        print("left out:", *left, sep="\n  ", file=sys.stderr)
    runs = runs.assign(**{"config.run_dir": "runs/" + runs["run"]})[runs["problem"] == ""].drop(columns="folder")
    private = [run for run, *cells in runs.to_numpy() if any(start in cell for cell in cells for start in PRIVATE)]
    if private:
        raise DataError(f"{', '.join(private)} name folders of this machine; train with relative paths")
    if again := sorted(set(runs["run"]) & set(kept["run"])):
        raise DataError(f"{', '.join(again)} are kept already; remove them from the table, or rename their folders")
    if without_times:
        gone = [name for name in runs if name in TIMES or name.startswith("epoch_time_s.")]
        runs = runs.assign(**dict.fromkeys(gone, ""), times_left_out=without_times)
    return pd.concat([kept, runs]).fillna("")


def texts(report: Report) -> dict[tuple[Path, str], str]:
    """Return the text between the markers of each document, from the report on the kept runs."""
    table = report.tables[0]
    plain = [label for label in table.rows.index if "," not in label]
    results, costs = (sheet.loc[plain] for sheet in table.sheets.values())
    none = table.rows["macs_per_image"]["none"]
    shares = pd.DataFrame({
        "fusion": plain,
        "multiply-adds, relative to none": [f"{macs / none:.3f}" for macs in table.rows.loc[plain, "macs_per_image"]],
        "training time, relative to none": table.rows.loc[plain, "train_time_share_of_none"].map("{:.3f}".format),
    })  # fmt: skip
    top1 = table.runs.pivot(index="seed", columns="label", values="top1")
    ways = []
    for label, row in table.rows[table.rows["strategy"].isin(["all", "upper"])].iterrows():
        first = "-" if label == row["strategy"] else difference(interval(top1[label], top1[row["strategy"]]))
        mean = spread(row["top1_percent_mean"], row["top1_percent_sd"], 2)
        to_none = difference(row, "top1_difference_to_none_points")
        ways.append([label, str(len(row["seeds"].split())), mean, first, to_none])
    tuned, detail = gather([KEPT / "finetune.csv"]).tables[0].sheets.values()
    tuned = pd.concat([tuned.iloc[:, [0, 2, 1, 3]], detail[["FLOPs (multiply-adds), M/image"]]], axis=1)
    headers = ["fusion", "seeds", "Top-1, %", "difference to the first, points (95 % interval)", "to none"]
    return {
        (RESULTS, "tables"): "\n\n".join(tabulated(sheet, "github") for sheet in (results, costs)),
        (RESULTS, "shares"): tabulated(shares, "github"),
        (RESULTS, "ways"): tabulated(pd.DataFrame(ways, columns=headers), "github"),
        (RESULTS, "shelf"): "\n\n".join(map(shelf, SHELF)),
        (RESULTS, "finetune"): other_runs("finetune"),
        (RESULTS, "gpu runs"): other_runs("gpu_runs"),
        (RESULTS, "gpu costs"): gpu_costs(),
        (README, "results"): tabulated(tuned[~tuned.index.str.contains(",")], "github"),
    }


def shelf(name: str) -> str:
    """Return a table of Top-1 without training, by strategy and number of tokens removed, mode and order."""
    found = pd.read_csv(KEPT / f"off_the_shelf_{name}.csv")
    whole, found = found[found["removed"] == 0].iloc[0], found[found["removed"] > 0]
    found = found.assign(way=found["mode"] + ", " + found["order"])
    rows = ["strategy", "removed"]
    table = found.pivot(index=rows, columns="way", values="top1")[list(found["way"].unique())].map("{:.2f}".format)
    fused = found[found["way"] == "fuse, sequence"].set_index(rows)["images_per_s"]
    table["images/s, relative to none"] = (fused / whole["images_per_s"]).map("{:.2f}".format)
    table.loc[("none", 0), :] = [f"{whole['top1']:.2f}"] * (len(table.columns) - 1) + ["1.00"]
    order = {one: place for place, one in enumerate(("none", *found["strategy"].unique()))}
    table = table.reset_index().sort_values("strategy", key=lambda column: column.map(order), kind="stable")
    return tabulated(table.rename(columns={"strategy": SHELF[name], "removed": "tokens removed"}), "github")


def other_runs(kept: str) -> str:
    """Return the results of docs/results/KEPT.csv, a table for each network and length of training."""
    if not (KEPT / f"{kept}.csv").exists():
        return NOT_RUN
    parts = []
    report = gather([KEPT / f"{kept}.csv"])
    print(*(f"not in the tables: {names}: {reason}" for rows in report.left_out.values() for names, reason in rows))
    for number, table in enumerate(report.tables):
        name = f"{table.model.split(', epochs')[0]}, {table.runs['epochs'].iloc[0]} epochs"
        parts += [f"{name}:", tabulated(table.sheets["Results"].loc[:, lambda sheet: (sheet != "-").any()], "github")]
        parts += [f"![{name}](results/{file})" for file in save_plots(table, table.plots[0].name, f"{kept}_{number}")]
    return "\n\n".join(parts)


def save_plots(table: Table, kind: str, name: str) -> list[str]:
    """Write the plot of a kind as a PNG, and return its name; no name where the table has too few runs for it."""
    found = [plot.files[f"{plot.name}.png"] for plot in table.plots if plot.name.endswith(kind)]
    for content in found:
        (KEPT / f"{name}.png").write_bytes(content)
    return [f"{name}.png" for _ in found]


def gpu_costs() -> str:
    """Return the paper's columns of cost, projected from the steps that scripts/campaign.py timed."""
    if not GPU_COSTS.exists():
        return NOT_RUN
    runs = read_runs([GPU_COSTS])
    rates = pd.to_numeric(runs["images_per_s"])
    costs = {
        "model": runs["model"],
        "fusion": runs["strategy"],
        "images/s": rates.map("{:,.0f}".format),
        "an epoch, s": (50_000 / rates).map("{:.1f}".format),
        "300 epochs, hours": (300 * 50_000 / rates / 3600).map("{:.1f}".format),
        "peak memory, MiB": pd.to_numeric(runs["peak_memory_mib"]).map("{:,.0f}".format),
        "Top-1, %": "",
    }
    return tabulated(pd.DataFrame(costs), "github")


def parts(document: Path, name: str) -> tuple[str, str, str]:
    """Return the text of a document before, between and after the markers of a name."""
    before, rest = document.read_text().split(f"<!-- {name} -->")
    between, after = rest.split(f"<!-- end of {name} -->")
    return before, between.strip(), after


if __name__ == "__main__":
    sys.exit(main())
