"""Define summary.json: the result of a run, as training writes it and everything else reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from famba.training.records import flatten

SUMMARY = "summary.json"
FORMAT = 2
_CONFIG = "config."

# NaN and infinity stand for a number that is not known, as in the loss of a run that diverged.
Number = Annotated[float | None, AfterValidator(lambda value: value if value is None or math.isfinite(value) else None)]


@dataclass(frozen=True)
class Summary:
    """Hold the result of a run, or of its part that is done. None stands for what is not known.

    status is running, interrupted (it saved itself), failed or finished; format the version of these fields, 0 for
    Famba 0.1; reading turns the selected epoch of formats up to 1, which counted from 0, into one that counts from 1.
    top1, top5 and loss are of the test images after the last step, accuracies in percent; ema_ of the
    averaged weights; selected of the weights that validation selected, with their epoch. epoch and step count what is
    done. Times are seconds: train_time_s without evaluation, epoch_time_s means of data, step and evaluation.
    schedule has the tokens removed in each layer, tokens_per_layer those left after each, tokens those before the
    first; adapted has each measurement of an adaptive schedule, started_from the weights of init_from. budget_matched
    tells whether other strategies remove as many. weights_sha256 is of model.safetensors; times_left_out says why a
    kept summary has no times.
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

    @classmethod
    def parse(cls, content: str | bytes) -> Summary:
        """Read a summary from JSON. Raises ValueError for what is no summary, or of a later format."""
        try:
            found = _ADAPTER.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            name, given = ".".join(map(str, first["loc"])), repr(first["input"])[:100]
            raise ValueError(
                f"{name} is {given}: {first['msg']}" if name else f"it is no summary: {first['msg']}"
            ) from None
        if found.format > FORMAT:
            raise ValueError(f"its format is {found.format}, this version of Famba reads up to {FORMAT}; update Famba")
        selected = found.selected
        if found.format < 2 and selected is not None and isinstance(selected.get("epoch"), int):
            return replace(found, format=FORMAT, selected={**selected, "epoch": selected["epoch"] + 1})
        return found

    def values(self) -> dict[str, Any]:
        """Return plain values by name, as JSON holds them."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER = TypeAdapter(Summary)


def to_row(summary: Summary, config: Mapping[str, Any]) -> dict[str, str]:
    """Return a run as one flat row of text, for CSV files: its summary and, behind "config.", its settings."""
    from famba.training.config import with_added_keys  # imports torch, which reading a summary does without

    known = {name: value for name, value in summary.values().items() if value is not None}
    settings = flatten(with_added_keys(config), _CONFIG)
    return {name: to_cell(value) for name, value in [*flatten(known).items(), *settings.items()]}


def from_row(row: Mapping[str, str]) -> tuple[Summary, dict[str, Any]]:
    """Return the summary and the configuration that `to_row` made a row of. Raises ValueError if it is none."""
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


def to_cell(value: Any) -> str:
    """Return the cell of a row that stands for a value."""
    is_plain = isinstance(value, str) and value != "" and from_cell(value) is value
    return value if is_plain else json.dumps(value, ensure_ascii=False)
