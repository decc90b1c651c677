"""What a run says to the terminal while it goes on."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

_log = logging.getLogger(__name__)
_PLAIN_SECONDS = 30.0
_WARM_STEPS, _TIMED_STEPS = 2, 8


class Progress:
    """A bar on a terminal, a plain line every half minute elsewhere, and a first estimate of the time left."""

    def __init__(self, total_steps: int, step: int, images_per_step: int, shown: bool) -> None:
        self._total = total_steps
        self._images = images_per_step
        self._shown = shown
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=step, disable=None if shown else True, unit="step", dynamic_ncols=True
        )
        self._first = step
        self._started = self._last_line = time.monotonic()

    def step(self, step: int, epoch: int, loss: float | None) -> None:
        """Say that `step` steps are done; loss where it is known."""
        if not self._shown:
            return
        self._bar.update(step - self._bar.n if not self._bar.disable else 0)
        if loss is not None:
            self._bar.set_postfix_str(f"epoch {epoch + 1} loss {loss:.3f}", refresh=False)
        self._estimate(step)
        due = time.monotonic() - self._last_line > _PLAIN_SECONDS
        if not self._on_terminal and due and loss is not None:
            self._last_line = time.monotonic()
            rate = (step - self._first) / (self._last_line - self._started)
            left = duration((self._total - step) / rate)
            _log.info(
                "step %d of %d, epoch %d, loss %.4f, %.1f images/s, %s left",
                step,
                self._total,
                epoch + 1,
                loss,
                rate * self._images,
                left,
            )

    def _estimate(self, step: int) -> None:
        done = step - self._first
        if done == _WARM_STEPS:
            self._warm = time.monotonic()
        if done == _WARM_STEPS + _TIMED_STEPS:
            seconds = (time.monotonic() - self._warm) / _TIMED_STEPS
            _log.info(
                "%.2f s per step: about %s for the %d steps left, evaluation apart",
                seconds,
                duration(seconds * (self._total - step)),
                self._total - step,
            )

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._bar.close()


def duration(seconds: float) -> str:
    """Write seconds for people: "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def epoch_line(epoch: int, epochs: int, images: str, values: Mapping[str, float]) -> str:
    """Say what came of an epoch, counted from 0: loss, Top-1 on the images that were evaluated, speed and time."""
    top1, averaged = values.get(f"{images}_top1"), values.get(f"{images}_ema_top1")
    result = "" if top1 is None else f", {images} Top-1 {top1:.2f} %"
    if averaged is not None:
        result += f" (EMA {averaged:.2f} %)"
    seconds = values["time_data_s"] + values["time_step_s"] + values.get("time_eval_s", 0.0)
    speed = f"{values['images_per_s']:.1f} images/s"
    return f"epoch {epoch + 1} of {epochs}: loss {values['train_loss']:.4f}{result}, {speed}, {duration(seconds)}"


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign, and without one where it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
