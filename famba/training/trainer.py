"""The training loop: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famba import data
from famba.data.draws import Stream
from famba.errors import CheckpointError, TrainingError
from famba.files import sha256
from famba.fusion import tokens_per_layer
from famba.fusion.schedules import Adapted
from famba.ops.registry import resolve
from famba.training import checkpoint
from famba.training.build import Batches, build_model, load_images, load_splits, make_loaders, model_classes
from famba.training.checkpoint import Saver, Totals, TrainedOn, TrainingState, check_same_data, find_checkpoint
from famba.training.config import RunConfig, plain
from famba.training.devices import (
    memory_error,
    out_of_memory,
    peak_memory_mib,
    reset_peak_memory,
    seed_generators,
    synchronize,
)
from famba.training.distributed import Process
from famba.training.evaluation import evaluate
from famba.training.graph import GraphStep, obstacle
from famba.training.interrupts import Interrupted, StopAsked, StopRequest
from famba.training.logging import Metrics, Progress, epoch_line
from famba.training.measure import macs_per_image, saved_bytes_per_image
from famba.training.optimizer import LearningRate, create_optimizer
from famba.training.provenance import now, provenance
from famba.training.run_folder import WEIGHTS, RunFolder
from famba.training.setup import Setup
from famba.training.step import Step
from famba.training.summary import FORMAT, Summary
from famba.training.weights import start_from

_log = logging.getLogger(__name__)

# Save before an evaluation where more work than this could be lost in it.
_WORTH_SAVING_S = 60.0


def new_state(
    config: RunConfig,
    setup: Setup,
    trained_on: TrainedOn,
    device: torch.device,
    fresh: bool = True,
    fused: bool = False,
) -> TrainingState:
    """Build network and optimizer as they are before the first step; the same for every strategy at one seed.

    fresh: whether to read init_from; not where a checkpoint follows. fused: the form of the optimizer, see
    `create_optimizer`.
    """
    seed_generators(Stream.WEIGHTS, config.seed)
    classes = model_classes(config, trained_on.num_classes)
    model = build_model(config.model.name, {**setup.model_arguments, "num_classes": classes})
    totals = Totals()
    if fresh and config.init_from is not None:
        totals.started_from = start_from(model, config.init_from, trained_on.classes)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.to(device)
    decay = config.recipe.ema_decay
    return TrainingState(
        model=model,
        optimizer=create_optimizer(model, config, fused),
        scaler=torch.amp.GradScaler(device.type, enabled=setup.autocast == torch.float16),
        ema=None if decay is None else ModelEmaV3(model, decay=decay),
        totals=totals,
    )


class Training:
    """One run in one process. Read `run` first; the methods stand in the order in which it needs them."""

    def __init__(self, config: RunConfig, setup: Setup, folder: RunFolder, process: Process, stop: StopRequest) -> None:
        self.config, self.setup, self.folder, self.process, self.stop = config, setup, folder, process, stop
        self.device = process.device
        splits = load_splits(config)
        self.loaders = make_loaders(config, setup.image_size, splits, process)
        self.trained_on = TrainedOn.of(splits)
        self.steps_per_epoch = self.loaders.train.steps_per_epoch
        in_all_epochs = config.trainer.epochs * self.steps_per_epoch
        self.total_steps = min(in_all_epochs, config.trainer.max_steps or in_all_epochs)
        self.adapt_steps, self.adapt_images = self._plan_adapting(splits.train, in_all_epochs)

        found = find_checkpoint(config, folder.checkpoints, process)
        if found is not None:
            check_same_data(found, self.trained_on)
        backend = resolve(self.device.type, setup.dtype)
        self.computed = f"{str(setup.dtype).removeprefix('torch.')} on {self.device.type} by {backend}"
        no_graph = obstacle(config, self.device, process.world_size, backend)
        self.state = new_state(config, setup, self.trained_on, self.device, fresh=found is None, fused=no_graph is None)
        self.learning_rate = LearningRate(self.state.optimizer, config, self.steps_per_epoch)
        self._restore(found)
        folder.write_config(plain(config))
        self.saver = Saver()
        self._at_start = self._saved = self._place()
        self._saved_at = time.monotonic()

        self.provenance = provenance(process.device, config.seed, process.world_size, setup.dtype)
        self._measure_costs()
        reset_peak_memory(process.device)
        if no_graph is not None and self.device.type == "cuda":
            _log.info("steps are no CUDA graphs, and may wait for the host: %s", no_graph)
        kind = GraphStep if no_graph is None else Step
        self.forward = self._forward_model()
        self.step = kind(config, self.state, self.forward, process, setup.autocast)
        self.metrics = Metrics(folder, config.logger, plain(config), self.state.step)
        # A look at the loss makes a GPU wait, so the loss is looked at now and then there, and at every step on a CPU.
        waits = self.device.type != "cpu" or self.step.masks
        self._look_every = config.trainer.log_every if waits else 1
        self._unseen: list[Tensor] = []
        # Within the optimizer's step the state is neither that of the step before nor that of the step after.
        self._sound = True

    def _plan_adapting(self, train: data.Source, in_all_epochs: int) -> tuple[frozenset[int], Tensor]:
        """Return the steps before which an adaptive schedule is measured, and the images (n, 3, s, s) for it.

        The images are a sample of the training set with every class in proportion, which depends on the data alone.
        """
        config, last = self.config, self.config.trainer.max_steps
        shares, count = config.fusion.adapt_at, config.fusion.adapt_images
        if shares is None or count is None:
            return frozenset(), torch.empty(0)
        # Shares of all epochs: a run that continues with more max_steps measures at the same steps.
        steps = frozenset(int(share * in_all_epochs) for share in shares)
        if last is not None and last <= max(steps):
            told = f"measures after steps {sorted(steps)} of the {in_all_epochs} in all epochs"
            _log.warning("fusion=adaptive %s; trainer.max_steps=%d ends before", told, last)
        chosen = data.sample(train, min(count, len(train)), config.data.version)
        return steps, load_images(config, self.setup.image_size, chosen)

    def _restore(self, found: dict[str, Any] | None) -> None:
        """Continue from a checkpoint, or begin anew."""
        if found is None:
            self.folder.rewind_metrics(0, epoch_ended=True)
            return
        self.state.restore(found)
        if found.get("computed", self.computed) != self.computed:
            _log.warning(
                "begun in %s, continuing in %s: results will differ from one whole run",
                found["computed"],
                self.computed,
            )
        self.folder.rewind_metrics(self.state.step, epoch_ended=not self.state.totals.epoch_open)
        _log.info("continuing after step %d of %d", self.state.step, self.total_steps)

    def _measure_costs(self) -> None:
        """Count multiply-adds, and bytes saved for the backward, per image with the schedule as it is."""
        model, size = self.state.model, self.setup.image_size
        self.saved_bytes = saved_bytes_per_image(model, size, self.setup.autocast)
        self.macs = macs_per_image(model, size)

    def _forward_model(self) -> nn.Module:
        model: nn.Module = self.state.model
        if self.config.trainer.compile:
            # Shapes are fixed by schedule and batch size: a graph for each is faster than one for all.
            model = cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False))
        if self.process.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary. Raises Interrupted once a requested stop is saved."""
        self.folder.write_summary(self.summary("running"))
        start, trainer = self.state.step, self.config.trainer
        progress = Progress(self.total_steps, start, trainer.batch_size, self.process.is_main)
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
                parts = trainer.accumulation * self.process.world_size
                raise memory_error(error, trainer.batch_size // parts, trainer.accumulation) from error

    # One epoch

    def _train_epoch(self, progress: Progress) -> None:
        epoch, first = divmod(self.state.step, self.steps_per_epoch)
        if first == 0:
            self.state.totals.begin_epoch()
        self.forward.train()
        with contextlib.closing(self.loaders.train.epoch(epoch, first)) as batches:
            last = min((epoch + 1) * self.steps_per_epoch, self.total_steps)
            while self.state.step < last:
                if self.state.step in self.adapt_steps:
                    self._take_losses(self.state.step)
                    self._adapt(epoch)
                loss = self._step(epoch, batches)
                progress.step(self.state.step, epoch, loss)
                if self.state.step < last:
                    self._between_steps()

    def _adapt(self, epoch: int) -> None:
        """Measure the adaptive schedule; its time is training time."""
        began = time.perf_counter()
        state = self.state
        self.step.schedule_changes()
        schedule, threshold = self.process.from_main(self._adapted() if self.process.is_main else None)
        state.set_fusion(schedule)
        state.totals.add(0, 0.0, time.perf_counter() - began)
        state.totals.schedules.append({"step": state.step, "threshold": threshold, "schedule": list(schedule)})
        self._measure_costs()
        values = {"threshold": threshold, **{f"layer_{layer}": float(r) for layer, r in enumerate(schedule)}}
        # Logged for the step that it first acts in: a run that continues from here measures and logs again.
        self.metrics.log("schedule", state.step + 1, epoch, values)
        removed = " ".join(map(str, schedule))
        _log.info(
            "after step %d the layers remove %s tokens (threshold of cosine similarity: %.3f)",
            state.step,
            removed,
            threshold,
        )

    def _adapted(self) -> Adapted:
        model, autocast = self.state.model, self.setup.autocast
        was_training = model.training
        model.eval()
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            adapted = model.adapted_fusion(self.adapt_images.to(self.device), sum(self.setup.schedule))
        model.train(was_training)
        return adapted

    def _step(self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]) -> float | None:
        """Do one step; return its loss where it was looked at."""
        state = self.state
        begin = time.perf_counter()
        lr = self.learning_rate.set(state.step)
        self._sound = not self.step.masks  # those have done the whole step by then
        self._unseen.append(self.step.gradients(batches))
        done, seen = state.step + 1, None
        if done % self._look_every == 0 or done == self.total_steps or done % self.steps_per_epoch == 0:
            seen = self._take_losses(done)
        self._sound = False
        self.step.update()
        state.step = done
        state.totals.epoch_open = self._sound = True
        state.totals.add(1, self.step.data_s, time.perf_counter() - begin - self.step.data_s)
        if seen is None:
            return None
        if done % self.config.trainer.log_every == 0:
            values = {"loss": seen[0], "grad_norm": seen[1], "lr": lr, "images_per_s": self._images_per_s()}
            self.metrics.log("train", done, epoch, values)
        return seen[0]

    def _take_losses(self, last_step: int) -> tuple[float, float] | None:
        """Read the losses of the steps since the last look from the device, and return the last loss and gradient norm.

        Raises TrainingError for a loss or norm that is not finite: where each step is looked at, before the optimizer
        uses its gradients.
        """
        if not self._unseen:
            return None
        records = self.process.mean(torch.stack(self._unseen)).tolist()
        self._unseen.clear()
        for step, (loss, norm) in enumerate(records, start=last_step - len(records) + 1):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.state.scaler.is_enabled()):
                raise TrainingError(self._explain_loss(step, loss, norm))
            self.state.totals.epoch_loss += loss
            self.state.totals.epoch_losses += 1
        return records[-1]

    def _explain_loss(self, step: int, loss: float, norm: float) -> str:
        state = self.state
        if self.step.masks:
            # The weights are still those of the step before the first bad one: count the steps since as not done.
            state.totals.add(step - 1 - state.step, 0.0, 0.0)
            state.step = step - 1
            state.totals.epoch_open = bool(state.step % self.steps_per_epoch)
        kept = "no earlier state is kept, since this is the first epoch"
        if state.is_finite():
            kept = f"the state before it is kept in {self._save()}"
            self.saver.wait()
        elif self._saved[0]:
            kept = f"the last good state is that of step {self._saved[0]}"
        epoch, lr = (step - 1) // self.steps_per_epoch, self.learning_rate.set(step - 1)
        return (
            f"the loss is {loss} at step {step} (epoch {epoch + 1}), with learning rate {lr:.3g} and gradient norm "
            f"{norm:.3g}; {kept}. "
            "In a new run_dir, a smaller recipe.lr, recipe.clip_grad=1 or trainer.precision=fp32 may help"
        )

    def _between_steps(self) -> None:
        """Save where it is time to or where a stop is asked for, in all processes at the same step."""
        self.saver.check()
        due = time.monotonic() - self._saved_at > 60 * self.config.trainer.save_every_min
        number, save = self.process.largest(self.stop.number, int(due and self.process.is_main))
        if number or save:
            self._take_losses(self.state.step)
        if number:
            raise StopAsked(number)
        if save:
            self._save()

    # Between epochs

    def _epoch_end(self) -> int:
        """Return the number of steps after which the current epoch ends."""
        epoch = (self.state.step - 1) // self.steps_per_epoch
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def _finish_epoch(self) -> None:
        """Evaluate, select, log and save."""
        if time.monotonic() - self._saved_at > _WORTH_SAVING_S:
            self._save()
        state, totals, trainer = self.state, self.state.totals, self.config.trainer
        epoch, name = (state.step - 1) // self.steps_per_epoch, self.loaders.selection_name
        selected = False
        values: dict[str, float] = {
            "train_loss": totals.epoch_loss / max(1, totals.epoch_losses),
            "time_data_s": totals.epoch_data_s,
            "time_step_s": totals.epoch_step_s,
        }
        if state.step == self.total_steps or (epoch + 1) % trainer.eval_every == 0:
            began = time.perf_counter()
            totals.evaluated = self._evaluate(self.loaders.selection)
            values |= {f"{name}_{metric}": value for metric, value in totals.evaluated.items()}
            values["time_eval_s"] = time.perf_counter() - began
            totals.eval_s += values["time_eval_s"]
            totals.evaluations += 1
            top1 = totals.evaluated["top1"]
            # Never by the test images.
            selected = name == "validation" and top1 > totals.best.get("validation_top1", -1.0)
            if selected:
                totals.best = {"epoch": epoch, "validation_top1": top1}
        values |= {"images_per_s": self._images_per_s(), "peak_memory_mib": peak_memory_mib(self.device)}
        self.metrics.log("epoch", state.step, epoch, values)
        _log.info("%s", epoch_line(epoch, trainer.epochs, name, values))
        totals.epoch_open = False
        self._save(selected)
        self.folder.write_summary(self.summary("running"))

    def _evaluate(self, batches: Batches) -> dict[str, float]:
        """Return Top-1, Top-5 and loss, with EMA also those of its weights under ema_ names."""
        results = self._test(self.state.model, batches)
        if self.state.ema is not None:
            averaged = self._test(self.state.ema.module, batches)
            results |= {f"ema_{name}": value for name, value in averaged.items()}
        return results

    def _test(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        return evaluate(model, batches, self.process, self.step.infer(model), lambda: self.stop.number)

    def _images_per_s(self) -> float:
        synchronize(self.device)
        totals = self.state.totals
        seconds = totals.epoch_data_s + totals.epoch_step_s
        return self.config.trainer.batch_size * totals.epoch_steps / max(seconds, 1e-9)

    # The end

    def _finish(self) -> dict[str, Any]:
        self.saver.wait()
        if self.loaders.selection_name == "validation":
            self.state.totals.evaluated = self._evaluate(self.loaders.test)
            self._test_selected()
        summary = self.summary("finished")
        if self.folder.writes:
            weights = self.folder.path / WEIGHTS
            checkpoint.save_weights(weights, self.state.model.state_dict())
            summary["weights_sha256"] = sha256(weights)
        self.metrics.sync()
        self.folder.write_summary(summary)
        self.metrics.finish(summary)
        return summary

    def _test_selected(self) -> None:
        """Test the checkpoint that validation selected."""
        best = self.state.totals.best
        path, selected = self.folder.checkpoints.best, None
        if not best:
            return
        try:
            selected = checkpoint.load(path)
            if selected["totals"]["best"].get("epoch") != best["epoch"]:
                raise CheckpointError(f"{path} is of another epoch than the one that was selected")
        except CheckpointError as error:
            selected = None
            _log.warning("the selected weights cannot be tested: %s", error)
        # Where one process cannot read it, none goes on to test it.
        if self.process.largest(int(selected is None)) != [0] or selected is None:
            return
        model = copy.deepcopy(self.state.model)
        model.set_fusion(selected["schedule"])
        model.load_state_dict(selected["model"])
        results = self._test(model, self.loaders.test)
        best |= {"top1": results["top1"], "top5": results["top5"]}

    def summary(self, status: str) -> dict[str, Any]:
        """Return the summary of the run so far, as plain values."""
        config, setup, totals, schedule = self.config, self.setup, self.state.totals, self.state.model.fusion
        on_test = status == "finished" or self.loaders.selection_name == "test"
        tested = totals.evaluated if on_test else {}
        epochs = max(totals.steps / self.steps_per_epoch, 1e-9)
        train_time = totals.data_s + totals.step_s
        return Summary(
            status=status,
            format=FORMAT,
            model=config.model.name,
            data=config.data.name,
            strategy=config.fusion.strategy,
            top1=tested.get("top1"),
            top5=tested.get("top5"),
            loss=tested.get("loss"),
            ema_top1=tested.get("ema_top1"),
            ema_top5=tested.get("ema_top5"),
            selected=totals.best or None,
            epoch=self.state.step // self.steps_per_epoch,
            epochs=config.trainer.epochs,
            step=self.state.step,
            steps=self.total_steps,
            train_time_s=train_time,
            eval_time_s=totals.eval_s,
            epoch_time_s={
                "data": totals.data_s / epochs,
                "step": totals.step_s / epochs,
                "evaluation": totals.eval_s / max(1, totals.evaluations),
            },
            images_per_s=config.trainer.batch_size * totals.steps / max(train_time, 1e-9),
            peak_memory_mib=peak_memory_mib(self.device),
            saved_bytes_per_image=self.saved_bytes,
            macs_per_image=self.macs,
            parameters=sum(p.numel() for p in self.state.model.parameters()),
            image_size=setup.image_size,
            precision="fp32" if setup.autocast is None else str(setup.autocast).removeprefix("torch."),
            tokens=setup.tokens,
            schedule=tuple(schedule),
            adapted=tuple(totals.schedules) or None,
            started_from=totals.started_from or None,
            budget_matched=setup.matched,
            tokens_per_layer=tuple(tokens_per_layer(schedule, setup.tokens)),
            tokens_removed=sum(schedule),
            updated=now(),
            provenance=self.provenance,
            images=self.trained_on.images,
            classes=self.trained_on.classes,
        ).values()

    # Saving and stopping

    def _place(self) -> tuple[int, bool]:
        """Return the steps done, and whether their epoch is yet to be evaluated."""
        return self.state.step, self.state.totals.epoch_open

    @property
    def has_progressed(self) -> bool:
        """Return whether a step or an evaluation was done since the start."""
        return self._place() != self._at_start

    def _save(self, selected: bool = False) -> Path:
        """Save the state in the background; the returned path is there once the saver has written it."""
        step = self.state.step
        self._saved, self._saved_at = self._place(), time.monotonic()

        def write(content: dict[str, Any]) -> None:
            # Lines that a continuation will not write again must be on the disk first.
            self.metrics.sync()
            self.folder.checkpoints.save(step, content, selected)

        if self.folder.writes:
            about = {
                "config": plain(self.config),
                "data": self.trained_on.as_dict(),
                "world_size": self.process.world_size,
                "computed": self.computed,
            }
            self.saver.save({**about, **self.state.content()}, write)
        return self.folder.checkpoints.path(step)

    def _stopped(self, number: int) -> Interrupted:
        """Save where that is not done yet, in all processes before any of them ends."""
        path = self._save() if self._place() != self._saved else self.folder.checkpoints.path(self.state.step)
        self.saver.wait()
        self.folder.write_summary(self.summary("interrupted"))
        self.process.wait_for_all()
        return Interrupted(
            f"stopped after step {self.state.step} of {self.total_steps}, saved in {path}; "
            f"the same command with run_dir={self.folder.path} continues",
            number,
        )

    def _keep(self, error: Exception) -> None:
        """Save the steps since the last checkpoint before an error ends the run."""
        try:
            self.saver.wait()
            if isinstance(error, CheckpointError):
                for kept in self.folder.checkpoints.newest_first()[:1]:
                    _log.warning("the last checkpoint is %s; the same command continues from there", kept)
                return
            if self.process.world_size == 1:
                with contextlib.suppress(RuntimeError):  # a device may not answer any more
                    self._take_losses(self.state.step)
            unsaved = self.folder.writes and self._place() != self._saved and self._sound and not self._unseen
            if unsaved and self.state.is_finite():
                path = self._save()
                self.saver.wait()
                _log.warning("the state after step %d is kept in %s", self.state.step, path)
        except CheckpointError as refused:
            _log.warning("%s", refused)
