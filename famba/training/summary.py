"""Define summary.json: the result of a run, as training writes it and everything else reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

SUMMARY = "summary.json"
FORMAT = 1
_CONFIG = "config."

# NaN and infinity stand for a number that is not known, as in the loss of a run that diverged.
Number = Annotated[float | None, AfterValidator(lambda value: value if value is None or math.isfinite(value) else None)]


@dataclass(frozen=True)
class Summary:
    """Hold the result of a run, or of its part that is done. None stands for what is not known.

    Attributes:
        status: running, interrupted (it saved itself), failed or finished.
        format: version of these fields; 0 for the summaries of Famba 0.1, which do not say it.
        model: timm name of the network; data: name of the data set; strategy: of fusion.
        top1, top5: accuracy on the test images after the last step, in percent; loss: on the same images.
        ema_top1, ema_top5: accuracy of the averaged weights.
        selected: epoch, validation_top1, top1 and top5 of the weights that were the best on validation images.
        epoch, epochs, step, steps: how many are done, and how many there are.
        train_time_s: seconds for data and steps, without evaluation; eval_time_s: seconds for evaluation.
        epoch_time_s: mean seconds of an epoch for data and step, and of an evaluation.
        images_per_s: training images per second; peak_memory_mib: highest memory, in MiB.
        saved_bytes_per_image: bytes that are kept for the backward; macs_per_image: multiply-adds of the forward.
        parameters: number of weights; image_size: side in pixels; precision: of the forward; tokens: before layer 0.
        schedule: tokens removed in each layer; tokens_per_layer: tokens left after each; tokens_removed: in all.
        adapted: step, threshold and schedule of each measurement of an adaptive schedule.
        started_from: init_from, weights_sha256 and new_classifier, where a run started from other weights.
        budget_matched: whether the strategies at this budget remove the same number of tokens.
        updated: time of writing, ISO 8601. provenance: versions, commit, machine, seed and arguments.
        images: number of images by part of the data; classes: names of the classes by their number.
        weights_sha256: of model.safetensors. times_left_out: why a kept summary has no times.
        error: why a run failed. stalled_starts: starts on Slurm in a row that did no step.
    """

    status: str
    format: int = 0
    model: str | None = None
    data: str | None = None
    strategy: str | None = None
    top1: Number = None
    top5: Number = None
    loss: Number = None
    ema_top1: Number = None
    ema_top5: Number = None
    selected: dict[str, Any] | None = None
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    train_time_s: Number = None
    eval_time_s: Number = None
    epoch_time_s: dict[str, float] | None = None
    images_per_s: Number = None
    peak_memory_mib: Number = None
    saved_bytes_per_image: int | None = None
    macs_per_image: int | None = None
    parameters: int | None = None
    image_size: int | None = None
    precision: str | None = None
    tokens: int | None = None
    schedule: tuple[int, ...] | None = None
    adapted: tuple[dict[str, Any], ...] | None = None
    started_from: dict[str, Any] | None = None
    budget_matched: bool | None = None
    tokens_per_layer: tuple[int, ...] | None = None
    tokens_removed: int | None = None
    updated: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] | None = None
    classes: tuple[str, ...] | None = None
    weights_sha256: str | None = None
    times_left_out: str | None = None
    error: str | None = None
    stalled_starts: int = 0

    @classmethod
    def parse(cls, content: str | bytes) -> Summary:
        """Read a summary from JSON; keys that are not known here are passed over.

        Raises ValueError, with the field and its value, for what is no summary or of a later format.
        """
        try:
            found = _ADAPTER.validate_json(content)
        except ValidationError as error:
            raise ValueError(_explain(error)) from None
        if found.format > FORMAT:
            raise ValueError(f"its format is {found.format}, this version of Famba reads up to {FORMAT}; update Famba")
        return found

    def values(self) -> dict[str, Any]:
        """Return plain values by name, as JSON holds them."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER = TypeAdapter(Summary)


def to_row(summary: Summary, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a run as one flat row of text, for CSV files: fields of its summary and, behind "config.", its settings.

    Nested keys are joined by dots. A cell holds text as it is, everything else as JSON, and text that JSON could be
    mistaken for in quotes. Fields of the summary that are not known have no cell; a setting of None is "null".
    """
    from famba.training.config import flatten, with_added_keys  # imports torch, which reading a summary does without

    known = {name: value for name, value in summary.values().items() if value is not None}
    settings = flatten(with_added_keys(config), _CONFIG)
    return {name: _to_cell(value) for name, value in [*flatten(known).items(), *settings.items()]}


def from_row(row: Mapping[str, str]) -> tuple[Summary, dict[str, Any]]:
    """Return the summary and the nested configuration that `to_row` made a row of; empty cells count as absent.

    Raises ValueError where the cells are no summary.
    """
    from famba.training.config import with_added_keys

    values: dict[str, Any] = {}
    for name, cell in row.items():
        if cell == "":
            continue
        *groups, last = name.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ValueError(f"column {name} contradicts column {group}")
        place[last] = from_cell(cell)
    config = values.pop(_CONFIG.removesuffix("."), {})
    return Summary.parse(json.dumps(values)), with_added_keys(config)


def from_cell(cell: str) -> Any:
    """Return the value that a cell of a row stands for."""
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def _to_cell(value: Any) -> str:
    is_plain = isinstance(value, str) and value != "" and from_cell(value) is value
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _explain(error: ValidationError) -> str:
    """Say the first field at fault in one line."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"it has no {name}"
    return f"{name} is {first['input']!r}: {reason}" if name else f"it holds no summary ({reason})"
