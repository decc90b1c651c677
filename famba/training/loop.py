"""The training loop: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famba.errors import CheckpointError, TrainingError
from famba.files import sha256
from famba.ops.registry import resolve
from famba.training import checkpoint
from famba.training.adapting import Adapting
from famba.training.build import load_splits, make_loaders, new_state
from famba.training.config import RunConfig, plain
from famba.training.devices import memory_error, out_of_memory, peak_memory_mib, reset_peak_memory, synchronize
from famba.training.distributed import Process
from famba.training.evaluation import evaluate
from famba.training.graph import GraphStep, obstacle
from famba.training.interrupts import Interrupted, StopAsked, StopRequest
from famba.training.loggers import Metrics
from famba.training.optimizer import LearningRate
from famba.training.reporting import Progress, epoch_line
from famba.training.resuming import find_checkpoint
from famba.training.run_folder import RunFolder
from famba.training.saving import Saver
from famba.training.setup import Setup
from famba.training.step import Step
from famba.training.summarize import gather_facts, summarize
from famba.training.trained_on import TrainedOn, check_same_data

_log = logging.getLogger(__name__)

# Work that a save before an evaluation keeps from a kill in it; less is not worth the save.
_WORTH_SAVING_S = 60.0


class Training:
    """One run in one process. `run` reads from top to bottom."""

    def __init__(self, config: RunConfig, setup: Setup, folder: RunFolder, process: Process, stop: StopRequest) -> None:
        self.config, self.setup, self.folder, self.process, self.stop = config, setup, folder, process, stop
        self.device = process.device
        splits = load_splits(config)
        self.loaders = make_loaders(config, setup, splits, process)
        self.steps_per_epoch = self.loaders.train.steps_per_epoch
        self.total_steps = config.trainer.epochs * self.steps_per_epoch
        if config.trainer.max_steps is not None:
            self.total_steps = min(self.total_steps, config.trainer.max_steps)

        self.adapting = Adapting(config, setup, splits.train, config.trainer.epochs * self.steps_per_epoch)
        self.trained_on = TrainedOn.of(splits)
        found = find_checkpoint(config, folder, process)
        if found is not None:
            check_same_data(found, self.trained_on)
        backend = resolve(self.device.type, setup.dtype)
        no_graph = obstacle(config, self.device, process.world_size, backend)
        self.state = new_state(config, setup, self.trained_on, self.device, fresh=found is None, fused=no_graph is None)
        self.learning_rate = LearningRate(self.state.optimizer, config, self.steps_per_epoch)
        self._restore(found)
        folder.write_config(plain(config))
        self.saver = Saver()
        self._at_start = self._saved = self._place()
        self._saved_at = time.monotonic()
        self.facts = gather_facts(self.state.model, config, setup, process, self.steps_per_epoch, self.total_steps)
        reset_peak_memory(process.device)
        self.forward = self._forward_model()
        self.step = self._make_step(no_graph)
        self.metrics = Metrics(folder, config.logger, plain(config), self.state.step)
        # A look at the loss makes a GPU wait, so it is looked at now and then there, and at every step on a CPU.
        waits = self.device.type != "cpu" or self.step.masks
        self._look_every = config.trainer.log_every if waits else 1
        self._unseen: list[Tensor] = []
        # Between two steps, the state is that of the step before; within the optimizer's it is of none.
        self._sound = True

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary. Raises Interrupted once a requested stop is saved."""
        self.folder.write_summary(self.summary("running"))
        start = self.state.step
        progress = Progress(self.total_steps, start, self.config.trainer.batch_size, self.process.is_main)
        with contextlib.closing(progress):
            try:
                if self.state.totals.epoch_open and self.state.step == self._epoch_end():
                    self._finish_epoch()
                while self.state.step < self.total_steps:
                    self._train_epoch(progress)
                    self._finish_epoch()
                    (number,) = self.process.largest(self.stop.number)
                    if number and self.state.step < self.total_steps:
                        raise StopAsked(number)
                return self._finish()
            except StopAsked as asked:
                raise self._stopped(asked.signal) from None
            except Exception as error:
                self._keep(error)
                if not out_of_memory(error):
                    raise
                trainer = self.config.trainer
                parts = trainer.accumulation * self.process.world_size
                raise memory_error(error, trainer.batch_size // parts, trainer.accumulation) from error

    @property
    def has_progressed(self) -> bool:
        """Whether a step or an evaluation was done since the start."""
        return self._place() != self._at_start

    def summary(self, status: str) -> dict[str, Any]:
        """Return the summary of the run so far, as plain values."""
        on_test = status == "finished" or self.loaders.selection_name == "test"
        tested = self.state.totals.evaluated if on_test else {}
        return summarize(
            status, self.config, self.setup, self.process, self.state, self.facts, tested, self.trained_on
        ).values()

    # One epoch

    def _train_epoch(self, progress: Progress) -> None:
        epoch, first = divmod(self.state.step, self.steps_per_epoch)
        if first == 0:
            self.state.totals.begin_epoch()
        self.forward.train()
        with contextlib.closing(self.loaders.train.epoch(epoch, first)) as batches:
            last = min((epoch + 1) * self.steps_per_epoch, self.total_steps)
            while self.state.step < last:
                if self.state.step in self.adapting.steps:
                    if self._unseen:
                        self._take_losses(self.state.step)
                    self._adapt(epoch)
                loss = self._step(epoch, batches)
                progress.step(self.state.step, epoch, loss)
                if self.state.step < last:
                    self._between_steps()

    def _adapt(self, epoch: int) -> None:
        """Measure the schedule anew; its time is training time."""
        began = time.perf_counter()
        state = self.state
        self.step.schedule_changes()
        schedule, threshold = self.adapting.measure(state.model, self.process)
        state.set_fusion(schedule)
        state.totals.add_time(time.perf_counter() - began)
        state.totals.schedules.append({"step": state.step, "threshold": threshold, "schedule": list(schedule)})
        self.facts = self.facts.measured_again(state.model, self.setup)
        values = {"threshold": threshold, **{f"layer_{layer}": float(r) for layer, r in enumerate(schedule)}}
        # Under the step that it first acts in: a run that goes on from here measures and logs again.
        self.metrics.log("schedule", state.step + 1, epoch, values)
        removed = " ".join(map(str, schedule))
        _log.info("after step %d the layers remove %s tokens (similar by %.3f)", state.step, removed, threshold)

    def _between_steps(self) -> None:
        """Save where it is time to or where a stop is asked for, in all processes at the same step."""
        self.saver.check()
        due = time.monotonic() - self._saved_at > 60 * self.config.trainer.save_every_min
        number, save = self.process.largest(self.stop.number, int(due and self.process.is_main))
        if (number or save) and self._unseen:
            self._take_losses(self.state.step)
        if number:
            raise StopAsked(number)
        if save:
            self._save()

    def _step(self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]) -> float | None:
        """Do one step; return its loss where it was looked at."""
        state = self.state
        begin = time.perf_counter()
        lr = self.learning_rate.set(state.step)
        self._sound = not self.step.masks  # those have done the whole step by then
        record = self.step.gradients(batches)
        seen = self._look(record)
        self._sound = False
        self.step.update()
        state.step += 1
        state.totals.epoch_open = self._sound = True
        state.totals.add_step(self.step.data_s, time.perf_counter() - begin - self.step.data_s)
        if state.step % self.config.trainer.log_every == 0 and seen is not None:
            speed = self._images_per_s()
            values = {"loss": seen[0], "grad_norm": seen[1], "lr": lr, "images_per_s": speed}
            self.metrics.log("train", state.step, epoch, values)
        return None if seen is None else seen[0]

    def _look(self, record: Tensor) -> tuple[float, float] | None:
        """Take what the steps since the last look came to to the host.

        Returns loss and gradient norm of this step, or None where it is not yet time. Raises TrainingError for what is
        not finite; where each step is looked at, before the optimizer sees its gradients.
        """
        self._unseen.append(record)
        next_step = self.state.step + 1
        if next_step % self._look_every and next_step < self.total_steps and next_step % self.steps_per_epoch:
            return None
        return self._take_losses(next_step)

    def _take_losses(self, last_step: int) -> tuple[float, float]:
        """Count the losses of the steps since the last look, and return the last one and its gradient norm."""
        records = self.process.mean(torch.stack(self._unseen)).tolist()
        self._unseen.clear()
        for step, (loss, norm) in enumerate(records, start=last_step - len(records) + 1):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.state.scaler.is_enabled()):
                raise TrainingError(self._explain_loss(step, loss, norm))
            self.state.totals.add_loss(loss)
        return records[-1]

    def _explain_loss(self, step: int, loss: float, norm: float) -> str:
        if self.step.masks:
            # Nothing has changed since the step before it.
            undone = self.state.step - (step - 1)
            self.state.totals.steps -= undone
            self.state.totals.epoch_steps -= undone
            self.state.step = step - 1
            self.state.totals.epoch_open = bool(self.state.step % self.steps_per_epoch)
        kept = "no state before it is kept, since this is the first epoch"
        if self.state.is_finite():
            kept = f"the state before it is kept in {self._save()}"
            self.saver.wait()
        elif self._saved[0]:
            kept = f"the last good state is that of step {self._saved[0]}"
        epoch = (step - 1) // self.steps_per_epoch
        lr = self.learning_rate.set(step - 1)
        return (
            f"the loss is {loss} at step {step} (epoch {epoch + 1}), with learning rate {lr:.3g} and gradient norm "
            f"{norm:.3g}; {kept}. "
            "In a new run_dir, a smaller recipe.lr, recipe.clip_grad=1 or trainer.precision=fp32 may help"
        )

    # Between epochs

    def _epoch_end(self) -> int:
        """Steps after which the epoch under way ends."""
        epoch = (self.state.step - 1) // self.steps_per_epoch
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def _finish_epoch(self) -> None:
        """Save what is worth it, evaluate, select, log, and save that it is done."""
        if time.monotonic() - self._saved_at > _WORTH_SAVING_S:
            self._save()
        state, trainer = self.state, self.config.trainer
        epoch = (state.step - 1) // self.steps_per_epoch
        at_end = state.step == self.total_steps
        selected = False
        values: dict[str, float] = {
            "train_loss": state.totals.epoch_loss / max(1, state.totals.epoch_losses),
            "time_data_s": state.totals.epoch_data_s,
            "time_step_s": state.totals.epoch_step_s,
        }
        if at_end or (epoch + 1) % trainer.eval_every == 0:
            began = time.perf_counter()
            results = self._evaluate(self.loaders.selection)
            values |= {f"{self.loaders.selection_name}_{name}": value for name, value in results.items()}
            values["time_eval_s"] = time.perf_counter() - began
            state.totals.eval_s += values["time_eval_s"]
            state.totals.evaluations += 1
            state.totals.evaluated = results
            selected = self._select(epoch, results)
        values |= {"images_per_s": self._images_per_s(), "peak_memory_mib": peak_memory_mib(self.device)}
        self.metrics.log("epoch", state.step, epoch, values)
        _log.info("%s", epoch_line(epoch, self.config.trainer.epochs, self.loaders.selection_name, values))
        state.totals.epoch_open = False
        self._save(selected)
        self.folder.write_summary(self.summary("running"))

    def _evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Top-1, Top-5 and loss, and with EMA those of its weights under ema_ names."""
        results = self._test(self.state.model, batches)
        if self.state.ema is not None:
            averaged = self._test(self.state.ema.module, batches)
            results |= {f"ema_{name}": value for name, value in averaged.items()}
        return results

    def _test(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        return evaluate(model, batches, self.process, self.step.infer(model), lambda: self.stop.number)

    def _select(self, epoch: int, results: dict[str, float]) -> bool:
        """Whether this is the best epoch by validation, where images are held out for it; never by the test set."""
        best = self.state.totals.best
        if self.loaders.selection_name != "validation" or results["top1"] <= best.get("validation_top1", -1.0):
            return False
        self.state.totals.best = {"epoch": epoch, "validation_top1": results["top1"]}
        return True

    def _finish(self) -> dict[str, Any]:
        self.saver.wait()
        if self.loaders.selection_name == "validation":
            self.state.totals.evaluated = self._evaluate(self.loaders.test)
            self._evaluate_selected()
        summary = self.summary("finished")
        if self.folder.writes:
            weights = self.folder.path / "model.safetensors"
            checkpoint.save_weights(weights, self.state.model.state_dict())
            summary["weights_sha256"] = sha256(weights)
        self.metrics.sync()
        self.folder.write_summary(summary)
        self.metrics.finish(summary)
        return summary

    def _evaluate_selected(self) -> None:
        """Test the checkpoint that validation selected."""
        path = self.folder.checkpoints.best
        if not self.state.totals.best:
            return
        selected = self._load_selected(path)
        # Where one process cannot read it, none goes on to test it.
        if self.process.largest(int(selected is None)) != [0]:
            return
        assert selected is not None
        model = copy.deepcopy(self.state.model)
        model.set_fusion(selected["schedule"])
        model.load_state_dict(selected["model"])
        results = self._test(model, self.loaders.test)
        self.state.totals.best |= {"top1": results["top1"], "top5": results["top5"]}

    def _load_selected(self, path: Path) -> dict[str, Any] | None:
        try:
            found = checkpoint.load(path)
            if found["totals"]["best"].get("epoch") != self.state.totals.best["epoch"]:
                raise CheckpointError(f"{path} is of another epoch than the one that was selected")
            return found
        except CheckpointError as error:
            _log.warning("the selected weights cannot be tested: %s", error)
            return None

    # Saving and stopping

    def _place(self) -> tuple[int, bool]:
        """Where the run is: steps done, and whether their epoch is yet to be evaluated."""
        return self.state.step, self.state.totals.epoch_open

    def _save(self, selected: bool = False) -> Path:
        """Save the state as it is now, beside what follows; the path is there once the saver has written it."""
        step = self.state.step
        self._saved, self._saved_at = self._place(), time.monotonic()

        def write(content: dict[str, Any]) -> None:
            # Lines that the checkpoint's continuation will not write again must be there before it is.
            self.metrics.sync()
            self.folder.checkpoints.save(step, content, selected)

        if self.folder.writes:
            self.saver.save(self._content(), write)
        return self.folder.checkpoints.path(step)

    def _keep(self, error: Exception) -> None:
        """Save the steps since the last checkpoint before an error ends the run."""
        try:
            self.saver.wait()
            if self.process.world_size == 1 and self._unseen:
                with contextlib.suppress(RuntimeError):  # a device may be beyond answering
                    self._take_losses(self.state.step)
            unsaved = self.folder.writes and self._place() != self._saved and self._sound and not self._unseen
            if isinstance(error, CheckpointError) and (kept := self.folder.checkpoints.latest) is not None:
                _log.warning("the last checkpoint is %s; the same command goes on from there", kept)
            if unsaved and not isinstance(error, CheckpointError) and self.state.is_finite():
                path = self._save()
                self.saver.wait()
                _log.warning("the state after step %d is kept in %s", self.state.step, path)
        except CheckpointError as refused:
            _log.warning("%s", refused)

    def _content(self) -> dict[str, Any]:
        content = {
            "config": plain(self.config),
            "data": self.trained_on.as_dict(),
            "world_size": self.process.world_size,
            "computed": self._computed(),
        }
        return {**content, **self.state.content()}

    def _stopped(self, number: int) -> Interrupted:
        """Save where that is not done yet, and say what was done; in all processes before any of them ends."""
        path = self._save() if self._place() != self._saved else self.folder.checkpoints.path(self.state.step)
        self.saver.wait()
        self.folder.write_summary(self.summary("interrupted"))
        self.process.wait_for_all()
        return Interrupted(
            f"stopped after step {self.state.step} of {self.total_steps}, saved in {path}; "
            f"the same command with run_dir={self.folder.path} goes on",
            number,
        )

    # Beginning

    def _restore(self, found: dict[str, Any] | None) -> None:
        if found is None:
            self.folder.rewind_metrics(0, epoch_ended=True)
            return
        self.state.restore(found)
        if found.get("computed", self._computed()) != self._computed():
            _log.warning(
                "begun in %s, going on in %s: not the run that it would have been", found["computed"], self._computed()
            )
        self.folder.rewind_metrics(self.state.step, epoch_ended=not self.state.totals.epoch_open)
        _log.info("continuing after step %d of %d", self.state.step, self.total_steps)

    def _computed(self) -> str:
        backend = resolve(self.device.type, self.setup.dtype)
        return f"{str(self.setup.dtype).removeprefix('torch.')} on {self.device.type} by {backend}"

    def _forward_model(self) -> nn.Module:
        model: nn.Module = self.state.model
        if self.config.trainer.compile:
            # Shapes are fixed by schedule and batch size: a graph for each is faster than one for all.
            model = cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False))
        if self.process.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def _make_step(self, no_graph: str | None) -> Step:
        """Return what does the steps, and say why it is no graph where it could be asked for one."""
        if no_graph is not None and self.device.type == "cuda":
            _log.info("steps are no CUDA graphs, and may wait for the host: %s", no_graph)
        kind = GraphStep if no_graph is None else Step
        return kind(self.config, self.state, self.forward, self.process, self.setup.autocast)

    def _images_per_s(self) -> float:
        synchronize(self.device)
        totals = self.state.totals
        seconds = totals.epoch_data_s + totals.epoch_step_s
        return self.config.trainer.batch_size * totals.epoch_steps / max(seconds, 1e-9)
