"""`famba report --out`: what is compared with what, and the numbers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from report_runs import (
    MODEL,
    NONE,
    UPPER,
    row_of,
    sorted_out,
    table_of,
    write_pair,
    write_run,
)
from scipy.stats import ttest_rel

from famba.analysis.palette import looks
from famba.analysis.report import cells, curves
from famba.analysis.report.comparable import sort_out
from famba.analysis.report.conclusion import conclusions
from famba.analysis.report.notes import notes
from famba.analysis.report.plots import plots
from famba.analysis.report.rows import MEMORY, SAVED, TIME, Row, Table, build_table, pareto
from famba.analysis.report.runs import read_runs
from famba.analysis.report.settings import labels
from famba.analysis.report.statistics import paired, sample
from famba.fusion import Fusion, schedule
from famba.fusion.schedules import strategy_names
from famba.training.compose import compose
from famba.training.config import flatten, plain

# Numbers


def test_mean_and_sample_deviation_worked_by_hand() -> None:
    found = sample([12.0, 13.0, None, 12.5])
    assert found is not None
    assert (found.mean, found.n) == (12.5, 3)
    assert found.sd == pytest.approx(0.5)  # sqrt((0.25 + 0.25 + 0) / 2)
    assert sample([]) is None
    assert sample([7.0]).sd is None  # type: ignore[union-attr]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    found = paired(UPPER, NONE)
    assert found is not None
    # Differences -0.5, -0.8, -0.2: mean -0.5, deviation 0.3; t(0.975, 2) is 4.3027.
    assert found.mean == pytest.approx(-0.5)
    assert found.high == pytest.approx(-0.5 + 4.302653 * 0.3 / math.sqrt(3), abs=1e-5)
    expected = ttest_rel(list(UPPER.values()), list(NONE.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert not found.is_lower
    assert not found.is_higher


def test_seeds_without_a_counterpart_are_left_out_and_named() -> None:
    found = paired({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.5, 1: 1.0, 3: -50.0})
    assert found is not None
    assert (found.mean, found.seeds, found.unpaired) == (0.75, (0, 1), (3, 7))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_a_table_of_means_shares_and_differences(tmp_path: Path) -> None:
    table = table_of(write_pair(tmp_path))
    none, upper = table.rows
    assert (none.label, upper.label, upper.seeds) == ("none", "upper", (0, 1, 2))
    assert upper.top1.mean == pytest.approx(12.0)
    assert upper.difference is not None
    assert upper.difference.mean == pytest.approx(-0.5)
    assert upper.time_share == pytest.approx(362 / 601)
    assert none.difference is None
    assert none.time_share == upper.memory_share == 1.0
    assert (upper.tokens_left.mean, upper.tokens) == (5, 17)
    assert upper.token_layers == pytest.approx((17 + 13 + 9 + 5) / 68)


def test_one_seed_has_no_interval_and_nothing_is_claimed(tmp_path: Path) -> None:
    for strategy, top1 in (("none", 10.0), ("upper", 20.0), ("adaptive", 30.0)):
        write_run(tmp_path / strategy, strategy, 0, top1)
    table = table_of(tmp_path)
    results, _ = cells.sheets(table)
    assert [row[3] for row in results.rows] == ["-", "+10.00 (one seed)", "+20.00 (one seed)"]
    assert any(note.startswith("One seed alone") for note in notes(table))
    said = " ".join(conclusions(table))
    assert "Best trade-off: not to be told" in said
    assert "not to be told from one seed" in said
    assert "is more accurate" not in said


# What is compared with what


def test_odd_runs_are_listed_with_what_differs_and_not_averaged(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path / "unfinished", "upper", 3, 99.0, status="interrupted")
    write_run(tmp_path / "recipe", "upper", 3, 99.0, config={"recipe.lr": 0.001, "trainer.epochs": 9})
    write_run(tmp_path / "data", "upper", 4, 99.0, config={"data.subset": 500})
    write_run(tmp_path / "code", "upper", 5, 99.0, origin={"git_commit": "b" * 40})
    write_run(tmp_path / "dirty", "upper", 6, 99.0, origin={"git_commit": "a" * 40 + "-dirty"})
    write_run(tmp_path / "half", "upper", 7, 99.0, precision="bfloat16")
    (write_run(tmp_path / "damaged", "upper", 8, 99.0) / "summary.json").write_text('{"status": "fin')
    (write_run(tmp_path / "bare", "upper", 9, 99.0) / "config.yaml").unlink()
    write_run(tmp_path / "hollow", "upper", 10, math.nan)
    (comparable,), others = sorted_out(tmp_path)
    table = build_table(comparable)
    assert row_of(table, "upper").seeds == (0, 1, 2)
    assert row_of(table, "upper").top1.mean == pytest.approx(12.0)
    assert others["unfinished"].reasons == ("interrupted after step 300 of 300",)
    assert others["recipe"].reasons == (
        "recipe.lr: 0.001, in the table 0.004",
        "trainer.epochs: 9, in the table 3",
    )
    assert others["data"].reasons == ("data.subset: 500, in the table not known",)
    assert others["code"].reasons == (f"git commit: {'b' * 40}, in the table {'a' * 40} (other code)",)
    assert "not committed, which is other code too" in others["dirty"].reasons[0]
    assert others["half"].reasons == ("precision: bfloat16, in the table fp32",)
    assert others["damaged"].kind == others["bare"].kind == others["hollow"].kind == "damaged"
    assert "config.yaml is missing" in others["bare"].reasons[0]
    assert "top1 is nan" in others["hollow"].reasons[0]


def test_what_has_no_bearing_on_results_parts_no_runs(tmp_path: Path) -> None:
    write_pair(tmp_path)
    free = {"data.root": "elsewhere", "trainer.log_every": 5, "logger.name": "wandb", "ops.backend": "native",
            "trainer.precision": "fp32", "data.image_size": 32}  # fmt: skip
    write_run(tmp_path / "more", "upper", 3, 12.0, config=free)
    (comparable,), others = sorted_out(tmp_path)
    assert len(comparable.runs) == 7
    assert not others
    assert not comparable.elsewhere


def test_where_images_lie_says_which_they_are_for_folders(tmp_path: Path) -> None:
    write_run(tmp_path / "a", seed=0, config={"data.name": "folder", "data.root": "one"})
    write_run(tmp_path / "b", seed=1, config={"data.name": "folder", "data.root": "one"})
    write_run(tmp_path / "c", seed=2, config={"data.name": "folder", "data.root": "other"})
    _, others = sorted_out(tmp_path)
    assert others["c"].reasons == ("data.root: other, in the table one",)


def test_a_run_from_another_device_counts_for_accuracy_alone(tmp_path: Path) -> None:
    write_pair(tmp_path)
    gpu = {"device": "A GPU", "cuda": "12.9", "backend": "triton"}
    write_run(tmp_path / "gpu", "upper", 3, 16.0, origin=gpu, train_time_s=1.0, peak_memory_mib=5.0)
    write_run(tmp_path / "moved", "lower", 0, 11.0, origin=gpu, train_time_s=2.0)
    table = table_of(tmp_path)
    upper, lower = row_of(table, "upper"), row_of(table, "lower")
    assert upper.top1.mean == pytest.approx(13.0)
    assert upper.time_s is not None
    assert (upper.time_s.mean, upper.time_s.n) == (362.0, 3)
    assert lower.is_elsewhere
    assert (lower.time_share, lower.memory_share, lower.time_difference) == (None, None, None)
    assert lower not in pareto(table.rows, TIME)
    remarks = {run.name.partition("/")[2]: run.reasons for run in table.comparable.remarks}
    assert "device: A GPU, in the table A CPU, 2 cores, 1 threads" in remarks["gpu"]
    results, _ = cells.sheets(table)
    assert next(row for row in results.rows if row[0] == "lower")[5:7] == ["0.0 *", "-"]


def test_repeated_seeds_count_once_if_they_agree_and_not_at_all_if_they_do_not(tmp_path: Path) -> None:
    write_pair(tmp_path)
    late = {"started": "2026-11-25T10:00:00+00:00"}
    write_run(tmp_path / "again", "none", 0, NONE[0], origin=late, config={"fusion.order": "tome"}, train_time_s=9.0)
    write_run(tmp_path / "other", "upper", 1, 50.0, origin=late)
    (comparable,), others = sorted_out(tmp_path)
    table = build_table(comparable)
    assert row_of(table, "none").seeds == (0, 1, 2)
    assert row_of(table, "none").time_s.mean == 601.0  # type: ignore[union-attr]
    assert row_of(table, "upper").seeds == (0, 2)
    assert "with the same result as" in others["again"].reasons[0]
    assert "none of them counts" in others["other"].reasons[0]
    assert "(50.00 %)" in others["upper1"].reasons[0]


def test_the_same_folder_given_twice_is_one_run(tmp_path: Path) -> None:
    write_pair(tmp_path / "runs")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    runs, _ = read_runs([tmp_path / "runs", tmp_path / "runs" / "none0", tmp_path / "link"])
    assert len(runs) == 6


def test_models_have_tables_of_their_own(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path / "deep", "upper", 0, 20.0, config={"model.depth": 8})
    write_run(tmp_path / "dropped", "upper", 3, 20.0, config={"model.drop_path": 0.1})
    tables, others = sorted_out(tmp_path)
    assert [table.model for table in tables] == [f"{MODEL}, depth 4", f"{MODEL}, depth 8"]
    assert others["dropped"].reasons == ("model.drop_path: 0.1, in the table 0.0",)


# Labels, printed figures, looks


def test_labels_say_only_what_differs() -> None:
    def fusion(strategy: str, schedule: tuple[int, ...] = (0, 4, 4, 4), **changes: Any) -> Fusion:
        return Fusion(strategy=strategy, **changes).resolved(schedule)

    alike = {fusion("upper"), fusion("lower", (4, 4, 4, 0)), fusion("none", (0, 0, 0, 0))}
    assert set(labels(alike).values()) == {"upper", "lower", "none"}
    tome = fusion("upper", order="tome")
    assert labels([*alike, tome])[tome] == "upper, order tome"
    assert labels([tome])[tome] == "upper", "what all share is said once, beside the table"
    few = fusion("upper", (0, 2, 2, 2))
    assert labels([*alike, few])[few] == "upper, budget 6"
    one, two = (fusion("custom", schedule, layers=(0, 1)) for schedule in ((11, 1), (1, 11)))
    assert set(labels([one, two, fusion("all", (6, 6))]).values()) == {
        "custom, budget 11 1", "custom, budget 1 11", "all"
    }  # fmt: skip
    soon, late = (fusion("adaptive", adapt_at=(at,), adapt_images=64) for at in (0.05, 0.5))
    assert labels([soon, late])[late] == "adaptive, adapt_at 0.5"


def papers(folder: Path, name: str, strategy: str, seed: int, **changes: Any) -> Path:
    """A run in the paper's own setting, but for what is changed."""
    told = plain(compose([f"fusion={strategy}", "model=vim_s", "recipe=paper", f"seed={seed}", "run_dir=x"]))
    config = flatten({**told, "fusion": {**told["fusion"], "strategy": strategy}}) | changes
    counts = list(schedule(strategy, 24, 197, changes.get("fusion.budget", 168)))
    left = [197 - sum(counts[: i + 1]) for i in range(24)]
    return write_run(folder / name, strategy, seed, 70.0, config=config, schedule=counts, tokens_per_layer=left,
                     tokens=197, image_size=224, parameters=2.6e7)  # fmt: skip


def paper_cells(table: Table) -> list[list[str]]:
    results, _ = cells.sheets(table)
    at = results.headers.index("paper: Top-1, %")
    return [row[at : at + 2] for row in results.rows]


def test_figures_in_print_stand_beside_runs_of_the_papers_setting(tmp_path: Path) -> None:
    papers(tmp_path, "none", "none", 0)
    papers(tmp_path, "upper", "upper", 0)
    papers(tmp_path, "all", "all", 0)  # in the paper, but not known here
    table = table_of(tmp_path)
    assert paper_cells(table) == [["76.9", ""], ["", ""], ["75.2", ""]]
    assert any(note.startswith("Paper: arXiv 2409.09808") for note in notes(table))
    papers(tmp_path / "counts", "upper", "upper", 0, **{"fusion.budget": "paper"})
    assert paper_cells(table_of(tmp_path / "counts")) == [["75.2", ""]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trainer.epochs": 2}, "trainer.epochs is 2, not 300"),
        ({"recipe.mixup": 0.0}, "recipe.mixup is 0.0, not 0.8"),
        ({"data.subset": 500}, "data.subset is 500, but not set there"),
        ({"data.name": "cifar10"}, "data.name is cifar10, not cifar100"),
        ({"model.depth": 24}, "model.depth is 24, but not set there"),
        ({"fusion.budget": 96}, "96 tokens are removed, not 162 or 168"),
        ({"fusion.weighting": "size"}, "fusion.weighting is size, not mean"),
        ({"fusion.mode": "prune"}, "fusion.mode is prune, not fuse"),
    ],
)
def test_figures_in_print_do_not_stand_beside_runs_of_another_setting(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    papers(tmp_path, "upper", "upper", 0, **changes)
    table = table_of(tmp_path)
    assert paper_cells(table) == [["", ""]]
    (note,) = (note for note in notes(table) if "arXiv 2409.09808" in note)
    assert "are not set beside upper" in note
    assert said in note


def test_models_that_the_paper_does_not_have_have_no_columns_for_it(tmp_path: Path) -> None:
    table = table_of(write_pair(tmp_path))
    assert not any(header.startswith("paper") for header in cells.sheets(table)[0].headers)
    assert "arXiv" not in " ".join(notes(table))


def grey(colour: str) -> float:
    """Lightness as the eye has it, from 0 to 100."""
    red, green, blue = (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
                        for channel in to_rgb(colour))  # fmt: skip
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_strategies_are_told_apart_in_colour_and_in_grey() -> None:
    found = looks(strategy_names())
    assert len({own.marker for own in found}) == len({own.color for own in found}) == len(strategy_names())
    for one, other in itertools.combinations(found, 2):
        assert one.line != other.line or abs(grey(one.color) - grey(other.color)) > 15
    dashed = [own for own in looks(["all", "adaptive"]) if own.line != "-"]
    assert len(dashed) == 1


def test_a_strategy_keeps_its_colour_and_marker_and_its_settings_differ() -> None:
    upper, mine, again, third = looks(["upper", "mine", "upper", "upper"])
    assert (upper.color, upper.marker) == (again.color, again.marker) == (third.color, third.marker)
    assert len({(own.line, own.face) for own in (upper, again, third)}) == 3
    assert upper.face == upper.color
    assert looks(["upper"]) == [upper]
    assert mine.color != upper.color


def test_pruned_settings_have_a_row_of_their_own(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path / "pruned", "upper", 0, 10.0, config={"fusion.mode": "prune"})
    write_run(tmp_path / "fused", "upper", 3, 12.0, config={"fusion.mode": "fuse"})
    table = table_of(tmp_path)
    assert [row.label for row in table.rows] == ["none", "upper", "upper, mode prune"]
    # Runs from before there was a mode are of the same setting as those that say what they did.
    assert row_of(table, "upper").seeds == (0, 1, 2, 3)


# Conclusions


def spread_out(folder: Path, strategy: str, top1: list[float], **costs: list[float]) -> None:
    """A seed of a strategy for each Top-1, with its costs."""
    for seed, value in enumerate(top1):
        write_run(folder / f"{strategy}{seed}", strategy, seed, value, **{key: of[seed] for key, of in costs.items()})


def names(rows: list[Row]) -> list[str]:
    return [row.label for row in rows]


def test_the_front_leaves_out_what_another_beats_by_more_than_chance(tmp_path: Path) -> None:
    spread_out(tmp_path, "none", [12.0, 12.1, 12.2], train_time_s=[600.0, 602.0, 601.0])
    spread_out(tmp_path, "all", [11.0, 11.1, 11.2], train_time_s=[300.0, 301.0, 302.0])
    # Slower than all, and less accurate, both beyond doubt.
    spread_out(tmp_path, "lower", [10.0, 10.1, 10.2], train_time_s=[400.0, 401.0, 402.0])
    # Less accurate and slower than all by the means, but no more than seeds differ.
    spread_out(tmp_path, "upper", [11.5, 10.2, 11.3], train_time_s=[290.0, 330.0, 300.0])
    table = table_of(tmp_path)
    assert names(pareto(table.rows, TIME)) == ["all", "upper", "none"]
    said = " ".join(conclusions(table))
    assert "On the Pareto front of Top-1 against training time: all, upper and none." in said
    plot = plots(table, "x")[0]
    assert plot.caption.startswith("Ringed: the Pareto front")
    assert plot.svg is not None


def test_memory_that_scatters_marks_no_front(tmp_path: Path) -> None:
    spread_out(tmp_path, "none", [12.0, 13.0, 12.5], peak_memory_mib=[1225.0, 1285.0, 1250.0])
    spread_out(tmp_path, "all", [12.6, 12.2, 13.1], peak_memory_mib=[1277.0, 1248.0, 1306.0])
    spread_out(tmp_path, "upper", [12.9, 12.7, 12.4], peak_memory_mib=[1236.0, 1336.0, 1286.0])
    table = table_of(tmp_path)
    assert len(pareto(table.rows, MEMORY)) == 3
    memory = next(plot for plot in plots(table, "x") if plot.name == "x-accuracy_memory")
    assert memory.caption.startswith("No Pareto front is marked, since no setting beats another by more than chance.")


def test_one_seed_marks_no_front_but_of_what_is_worked_out(tmp_path: Path) -> None:
    spread_out(tmp_path, "none", [12.0], train_time_s=[600.0], saved_bytes_per_image=[700_000])
    spread_out(tmp_path, "all", [12.0], train_time_s=[300.0], saved_bytes_per_image=[400_000])
    table = table_of(tmp_path)
    assert names(pareto(table.rows, TIME)) == ["all", "none"]
    assert names(pareto(table.rows, SAVED)) == ["all"]
    said = "No Pareto front is to be told: of the 2 timed settings none is shown to be at least as accurate as another"
    assert conclusions(table)[0].startswith(said)


def write_strategies(folder: Path, offsets: dict[str, float]) -> Path:
    """Three seeds of each strategy; offsets to none differ a little between the seeds."""
    for strategy, offset in {"none": 0.0, **offsets}.items():
        for seed, top1 in NONE.items():
            value = top1 + offset + (0.02 * (seed - 1) if offset else 0.0)
            write_run(folder / f"{strategy}{seed}", strategy, seed, round(value, 3))
    return folder


def test_adaptive_is_called_better_only_where_every_interval_says_so(tmp_path: Path) -> None:
    fixed = {"all": -1.0, "interleaved": -0.5, "lower": -2.0, "upper": -0.2}
    said = conclusions(table_of(write_strategies(tmp_path / "better", {**fixed, "adaptive": 0.5})))[-1]
    assert said.startswith(
        "adaptive is more accurate than all 4 fixed schedules here: all, interleaved, lower and upper."
    )
    assert "upper +0.70 (+0.70 to +0.70), in 1.000 of its time" in said
    write_strategies(tmp_path / "not", {**fixed, "adaptive": -0.7})
    for seed, top1 in {0: 11.0, 1: 13.5, 2: 11.5}.items():
        (folder := tmp_path / "not" / f"all{seed}").rename(tmp_path / f"old{seed}")
        write_run(folder, "all", seed, top1)
    said = conclusions(table_of(tmp_path / "not"))[-1]
    assert "adaptive is not better than all of the fixed schedules in Top-1" in said
    assert "more accurate than lower, less accurate than interleaved and upper, not shown to differ from all" in said


def test_the_best_trade_off_never_rests_on_an_interval_around_0(tmp_path: Path) -> None:
    said = " ".join(conclusions(table_of(write_pair(tmp_path / "unclear")))).replace(cells.MINUS, "-")
    assert "A loss of Top-1 is not shown: -0.50 (-1.25 to +0.25) points over 3 seeds" in said
    assert "a loss of up to 1.25 points cannot be ruled out" in said
    said = " ".join(conclusions(table_of(write_strategies(tmp_path / "loss", {"upper": -2.0}))))
    assert "every faster setting on the front loses Top-1 against none; upper loses the least" in said
    said = " ".join(conclusions(table_of(write_strategies(tmp_path / "gain", {"upper": 2.0}))))
    assert "It is more accurate than none: by +2.00 (+1.95 to +2.05) points" in said


# Curves


def test_curves_are_means_and_ranges_over_seeds(tmp_path: Path) -> None:
    none = row_of(table_of(write_pair(tmp_path)), "none")
    found = curves.accuracy(none, "test")
    assert found is not None
    assert found.x.tolist() == [1, 2, 3]
    assert (found.mean[-1], found.low[-1], found.high[-1]) == (12.5, 12.0, 13.0)
    loss = curves.loss(none)
    assert loss is not None
    # Linear, so a running mean changes nothing away from the ends.
    assert loss.mean[15] == pytest.approx(4.0 - 0.005 * 160 + 0.01)
    assert curves.tokens(none).mean.tolist() == [17] * 5


def test_what_holds_for_several_rows_is_said_once(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_run(tmp_path / "all0", "all", 0, 11.0, train_time_s=None)
    write_run(tmp_path / "all1", "all", 1, 11.0)
    write_run(tmp_path / "lower0", "lower", 0, 11.0)
    write_run(tmp_path / "lower1", "lower", 1, 11.0)
    said = notes(table_of(tmp_path))
    assert "Seeds that a row and none do not share are left out of its difference: 2 (all; lower)." in said
    assert "Training time is not known of every run: all 1 of 2." in said
    assert not any("machine of most" in note for note in said)


def test_broken_metrics_are_a_gap_that_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    with open(tmp_path / "none0" / "metrics.jsonl", "ab") as file:
        file.write(b'\xff{"kind": "train", "st\n{"kind": "train", "step": 400, "loss": NaN}\n[]\n')
    (tmp_path / "none1" / "metrics.jsonl").unlink()
    table = table_of(tmp_path)
    said = " ".join(notes(table))
    assert "3 of 36 lines of metrics.jsonl cannot be read" in said
    assert "metrics.jsonl cannot be read (No such file or directory): no curves of this run" in said
    found = curves.accuracy(row_of(table, "none"), "test")
    assert found is not None
    assert (found.low[-1], found.high[-1]) == (12.0, 12.5)


def test_what_a_summary_lacks_is_a_marked_gap(tmp_path: Path) -> None:
    gaps = dict.fromkeys(("top5", "train_time_s", "peak_memory_mib", "images_per_s", "macs_per_image"))
    write_run(tmp_path / "run", "upper", 0, 12.0, **gaps)
    table = table_of(tmp_path)
    results, costs = cells.sheets(table)
    assert results.rows == [["upper", "1", "12.00", "-", "-", "-", "-", "-", "-"]]
    assert costs.rows[0][1] == "-"
    assert "No run without fusion" in " ".join(notes(table))


def test_runs_from_the_same_path_with_other_weights_are_kept_apart(tmp_path: Path) -> None:
    def started(digest: str, new_head: bool = False) -> dict[str, object]:
        return {"init_from": "old", "weights_sha256": digest * 64, "new_classifier": new_head}

    for name, seed, path, told in (
        ("one", 0, "old", started("a")),
        ("two", 1, "elsewhere/old", started("a")),
        ("three", 2, "old", started("b")),
        ("four", 3, "old", started("a", new_head=True)),
    ):
        write_run(tmp_path / name, seed=seed, config={"init_from": path}, started_from=told)
    (table,), others = sort_out(read_runs([tmp_path])[0])
    assert sorted(run.seed for run in table.runs) == [0, 1]
    assert sorted(other.name.split("/")[-1] for other in others) == ["four", "three"]
    assert all("aaaa" in reason for other in others for reason in other.reasons)


def test_shares_of_time_are_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, seconds in {0: 100.0, 1: 200.0, 2: 900.0}.items():
        write_run(tmp_path / f"none{seed}", "none", seed, train_time_s=seconds)
    for seed, seconds in {0: 60.0, 1: 90.0}.items():
        write_run(tmp_path / f"upper{seed}", "upper", seed, train_time_s=seconds)
    table = table_of(tmp_path)
    assert row_of(table, "upper").time_share == pytest.approx(150 / 300)
    assert row_of(table, "none").time_share == 1.0
