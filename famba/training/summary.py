"""Define summary.json: the result of a run, as training writes it and everything else reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

SUMMARY = "summary.json"
FORMAT = 2

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
            start = f"{name} is {given}" if name else "it is no summary"
            raise ValueError(f"{start}: {first['msg']}") from None
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
