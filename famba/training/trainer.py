"""The training loop: from a configuration to a finished run folder."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from famba import data
from famba.data.draws import Stream
from famba.errors import CheckpointError, TrainingError
from famba.files import sha256
from famba.fusion import tokens_per_layer
from famba.models import Backbone
from famba.ops.registry import resolve
from famba.training import checkpoint, devices, interrupts
from famba.training.build import Batches, build_model, load_images, load_splits, make_loaders, model_classes
from famba.training.checkpoint import Totals, TrainedOn, TrainingState, find_checkpoint
from famba.training.config import RunConfig, plain
from famba.training.distributed import Process
from famba.training.graph import GraphStep, obstacle
from famba.training.interrupts import Interrupted, StopRequest
from famba.training.logging import FILE_ONLY, Metrics, Progress, epoch_line
from famba.training.measure import evaluate, macs_per_image, now, provenance, saved_bytes_per_image, without_data
from famba.training.optimizer import create_optimizer, learning_rate, set_learning_rate
from famba.training.run_folder import WEIGHTS, RunFolder, again
from famba.training.setup import Setup
from famba.training.step import Step
from famba.training.weights import start_from

_log = logging.getLogger(__name__)
_STALLED_STARTS = 3  # of a job, before it is not requeued again
_AHEAD = 2  # steps that the host may be ahead of a GPU
_WORTH_SAVING_S = 60.0  # save before an evaluation if more work than this could be lost in it


class _DivergedError(TrainingError):
    """A loss that is not finite: the weights that led to it are not worth going on from."""


def new_state(
    config: RunConfig, setup: Setup, trained: TrainedOn, device: torch.device, fresh: bool = True, fused: bool = False
) -> TrainingState:
    """Build network and optimizer as they are before the first step; the same for every strategy at one seed.

    fresh: whether to read init_from, because no checkpoint follows. fused: as in `create_optimizer`.
    """
    devices.seed_generators(Stream.WEIGHTS, config.seed)
    classes = model_classes(config, trained.num_classes)
    model = build_model(config.model.name, {**setup.model_arguments, "num_classes": classes})
    totals = Totals()
    if fresh and config.init_from is not None:
        totals.started_from = start_from(model, config.init_from, trained.classes)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.to(device)
    ema = None if config.recipe.ema_decay is None else ModelEmaV3(model, decay=config.recipe.ema_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.autocast == torch.float16)
    return TrainingState(model, create_optimizer(model, config, fused), scaler, ema, totals)


class Training:
    """Do one run in one process. Read `run` first; the methods stand in the order in which it needs them."""

    def __init__(self, config: RunConfig, setup: Setup, folder: RunFolder, process: Process, stop: StopRequest) -> None:
        self.config, self.setup, self.folder, self.process, self.stop = config, setup, folder, process, stop
        self.device = process.device
        devices.release_memory(self.device)
        splits = load_splits(config)
        self.loaders = make_loaders(config, setup.image_size, splits, process)
        self.trained_on = TrainedOn.of(splits)
        self.steps_per_epoch = self.loaders.train.steps_per_epoch
        in_all_epochs = config.trainer.epochs * self.steps_per_epoch
        self.total_steps = min(in_all_epochs, config.trainer.max_steps or in_all_epochs)
        # Shares of all epochs: a run that continues with more max_steps measures at the same steps.
        self.adapt_steps = {int(share * in_all_epochs) for share in config.fusion.adapt_at or ()}
        adapt_images = min(config.fusion.adapt_images or 0, len(splits.train))
        self.adapt_source = data.sample(splits.train, adapt_images, config.data.version) if adapt_images else None

        settings = plain(config)
        self.about = {"config": settings, "data": asdict(self.trained_on), "world_size": process.world_size}
        found = find_checkpoint(config.resume, self.about, folder.checkpoints, process)
        self.backend = resolve(self.device.type, setup.dtype)
        no_graph = obstacle(config, self.device, process.world_size, self.backend)
        self.state = new_state(config, setup, self.trained_on, self.device, fresh=found is None, fused=no_graph is None)
        self.computed = f"{str(setup.dtype).removeprefix('torch.')} on {self.device.type} by {self.backend}"
        if found is not None:
            self.state.restore(found)
            most, ended = config.trainer.max_steps, not self.state.totals.epoch_open
            if most not in (None, found["config"]["trainer"]["max_steps"]) and self.state.step + ended > most:
                raise CheckpointError(f"{self.state.step} steps are done; trainer.max_steps={most} must be more")
            if (before := found.get("computed", self.computed)) != self.computed:
                _log.warning("begun in %s, continuing in %s: results will differ", before, self.computed)
            _log.info("continuing after step %d of %d", self.state.step, self.total_steps)
        folder.rewind_metrics(self.state.step, epoch_ended=not self.state.totals.epoch_open)
        folder.write_config(settings)
        self._saved, self._saved_at = self._place(), time.monotonic()
        self._first_step = self.state.step

        self.provenance = provenance(process.device, config.seed, process.world_size, setup.dtype)
        self._measure_costs()
        devices.reset_peak_memory(process.device)
        if no_graph is not None and self.device.type == "cuda":
            _log.info("steps are no CUDA graphs, and may wait for the host: %s", no_graph)
        self.forward = self._forward_model()
        self.step = (Step if no_graph else GraphStep)(config, self.state, self.forward, process, setup.autocast)
        self.metrics = Metrics(folder, config.logger, settings, self.state.step)
        # A look at the loss makes a GPU wait, so the loss is looked at now and then there, and at every step on a CPU.
        self._look_every = config.trainer.log_every if self.device.type != "cpu" or self.step.masks else 1
        self._unseen: list[Tensor] = []
        self._queued: deque[torch.cuda.Event] = deque()

    def _measure_costs(self) -> None:
        """Count multiply-adds, and bytes saved for the backward, per image with the schedule as it is."""
        own, arguments = self.state.model, self.setup.model_arguments
        if self.device.type == "cuda":  # without data, or else kernels would be tuned here for batches of a few images
            arguments = {**arguments, "num_classes": own.num_classes, "fusion": own.fusion}
            counted = without_data(self.config.model.name, arguments, self.device, self.backend)
            with contextlib.suppress(Exception), counted as model:  # of rules or networks that look at values
                model.set_grad_checkpointing(self.config.trainer.grad_checkpointing)
                return self._count_costs(model)
        return self._count_costs(own)

    def _count_costs(self, model: Backbone) -> None:
        self.saved_bytes = saved_bytes_per_image(model, self.setup.image_size, self.setup.autocast)
        self.macs = macs_per_image(model, self.setup.image_size)

    def _forward_model(self) -> nn.Module:
        model: nn.Module = self.state.model
        if self.config.trainer.compile:
            torch.compiler.reset()  # of runs before this one in the process, which count towards a limit
            # Shapes are fixed by schedule and batch size: a graph for each is faster than one for all.
            model = cast(nn.Module, torch.compile(model, fullgraph=True, dynamic=False))
        own = [self.device.index] if self.device.type == "cuda" else None
        return model if self.process.world_size == 1 else DistributedDataParallel(model, device_ids=own)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary. Raises Interrupted once a requested stop is saved."""
        self.folder.write_summary(self.summary("running"))
        start, trainer = self._place(), self.config.trainer
        # A forward takes a third of the time of a step.
        images = 3 * trainer.eval_every * trainer.batch_size * self.steps_per_epoch
        longer = 1 + (trainer.eval_images or self.trained_on.images[self.loaders.selection_name]) / images
        with Progress(self.total_steps, self.state.step, self.process.is_main, longer) as progress:
            try:
                at_end = self.state.step % self.steps_per_epoch == 0 or self.state.step == self.total_steps
                if self.state.totals.epoch_open and at_end:  # stopped in the evaluation of an epoch
                    self._finish_epoch()
                while self.state.step < self.total_steps:
                    self._train_epoch(progress)
                    self._finish_epoch()
                    if self.state.step < self.total_steps:
                        self._between_steps()
                return self._finish()
            except Interrupted as asked:
                self._end(asked.signal, start)
            except Exception as error:
                if not isinstance(error, _DivergedError):
                    self._save_after_error()
                if not devices.out_of_memory(error):
                    raise
                at_once = trainer.batch_size // trainer.accumulation // self.process.world_size
                raise devices.memory_error(error, at_once, trainer) from error

    def _train_epoch(self, progress: Progress) -> None:
        epoch, first = divmod(self.state.step, self.steps_per_epoch)
        if first == 0:
            totals = self.state.totals
            totals.epoch_data_s = totals.epoch_step_s = totals.epoch_loss = 0.0
            totals.epoch_steps = totals.epoch_losses = 0
        self.forward.train()
        with contextlib.closing(self.loaders.train.epoch(epoch, first)) as loaded:
            batches = progress.watched(loaded)
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
        self.step.changing = True  # until the step is done: a run that continues measures again
        adapted = None
        if self.process.is_main:
            assert self.adapt_source is not None, "a run has steps to adapt at and images for it, or neither"
            images = load_images(self.config, self.setup.image_size, self.adapt_source).to(self.device)
            state.model.eval()
            with torch.autocast(self.device.type, self.setup.autocast, enabled=self.setup.autocast is not None):
                adapted = state.model.adapted_fusion(images, sum(self.setup.schedule))
            state.model.train()
        schedule, threshold = self.process.from_main(adapted)
        state.set_fusion(schedule)
        state.totals.add(0, 0.0, time.perf_counter() - began)
        state.totals.schedules.append({"step": state.step, "threshold": threshold, "schedule": list(schedule)})
        self._measure_costs()
        values = {"threshold": threshold, **{f"layer_{layer}": float(r) for layer, r in enumerate(schedule)}}
        # Logged for the step that it first acts in: a run that continues from here measures and logs again.
        self.metrics.log("schedule", state.step + 1, epoch, values)
        _log.info("after step %d the layers remove %s tokens (cosines from %.3f)", state.step, schedule, threshold)

    def _step(self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]) -> float | None:
        """Do one step; return its loss where it was looked at."""
        state = self.state
        if state.step == self._first_step + 1 and self.device.type == "cuda" and not self.step.masks:
            devices.reset_peak_memory(self.device)  # kernels were tuned in the first, which takes memory
        begin = time.perf_counter()
        lr = learning_rate(self.config, self.steps_per_epoch, state.step)
        set_learning_rate(state.optimizer, lr)
        self._unseen.append(self.step.gradients(batches))
        done, seen = state.step + 1, None
        if done % self._look_every == 0 or done == self.total_steps or done % self.steps_per_epoch == 0:
            seen = self._take_losses(done)
        self.step.update()
        if self.device.type == "cuda":  # or else the host, far ahead, would prepare a batch for each step to come
            self._queued.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._queued) > _AHEAD:
                self._queued.popleft().synchronize()
        state.step = done
        state.totals.epoch_open = True
        state.totals.add(1, self.step.data_s, time.perf_counter() - begin - self.step.data_s - self.step.once_s)
        self.step.changing = False
        if seen is not None and done % self.config.trainer.log_every == 0:
            values = {"loss": seen[0], "grad_norm": seen[1], "lr": lr, "images_per_s": self._images_per_s()}
            self.metrics.log("train", done, epoch, values)
        return None if seen is None else seen[0]

    def _take_losses(self, last_step: int) -> tuple[float, float] | None:
        """Read the losses since the last look; return the last loss and norm. One that is not finite is an error."""
        if not self._unseen:
            return None
        records = (self.process.sum(torch.stack(self._unseen)) / self.process.world_size).tolist()
        self._unseen.clear()
        for step, (loss, norm) in enumerate(records, start=last_step - len(records) + 1):
            if not math.isfinite(loss) or not (math.isfinite(norm) or self.state.scaler.is_enabled()):
                lr = learning_rate(self.config, self.steps_per_epoch, step - 1)
                epoch, saved = (step - 1) // self.steps_per_epoch, self._saved[0]
                kept = f"the last good state is that of step {saved}" if saved else "no earlier state is kept"
                raise _DivergedError(
                    f"the loss is {loss} at step {step} (epoch {epoch + 1}), with learning rate {lr:.3g} and gradient "
                    f"norm {norm:.3g}; {kept}. In a new run_dir, a smaller recipe.lr, recipe.clip_grad=1 or "
                    "trainer.precision=fp32 may help"
                )
            self.state.totals.epoch_loss += loss
            self.state.totals.epoch_losses += 1
        return records[-1]

    def _between_steps(self) -> None:
        """Save if it is time to or a stop is asked for, in all processes at the same step."""
        self.folder.checkpoints.wait(block=False)
        due = time.monotonic() - self._saved_at > 60 * self.config.trainer.save_every_min
        number, save = self.process.largest(self.stop.number, int(due and self.process.is_main))
        if number or save:
            self._take_losses(self.state.step)
        if number:
            raise Interrupted("stopped between steps", number)
        if save:
            self._save()

    def _finish_epoch(self) -> None:
        """Evaluate, select, log and save."""
        if time.monotonic() - self._saved_at > _WORTH_SAVING_S:
            self._save()
        state, totals, trainer = self.state, self.state.totals, self.config.trainer
        epoch, name = (state.step - 1) // self.steps_per_epoch, self.loaders.selection_name
        at_end, selected = state.step == self.total_steps, False
        values: dict[str, float] = {
            "train_loss": totals.epoch_loss / max(1, totals.epoch_losses),
            "time_data_s": totals.epoch_data_s,
            "time_step_s": totals.epoch_step_s,
        }
        if at_end or (epoch + 1) % trainer.eval_every == 0:
            began = time.perf_counter()
            results = self._evaluate(self.loaders.selection if at_end else self.loaders.in_training)
            values |= {f"{name}_{metric}": value for metric, value in results.items()}
            values["time_eval_s"] = time.perf_counter() - began
            self.step.changing = True  # until the epoch is saved: a run that continues evaluates again
            totals.evaluated, totals.eval_s = results, totals.eval_s + values["time_eval_s"]
            totals.evaluations += 1
            # Never by the test images.
            selected = name == "validation" and results["top1"] > totals.best.get("validation_top1", -1.0)
            if selected:
                totals.best = {"epoch": epoch, "validation_top1": results["top1"]}
        values |= {"images_per_s": self._images_per_s(), "peak_memory_mib": devices.peak_memory_mib(self.device)}
        self.metrics.log("epoch", state.step, epoch, values)
        _log.info("%s", epoch_line(epoch, trainer.epochs, name, values))
        totals.epoch_open = False
        self._save(selected)
        self.step.changing = False
        self.folder.write_summary(self.summary("running"))

    def _evaluate(self, batches: Batches) -> dict[str, float]:
        """Return Top-1, Top-5 and loss, with EMA also those of its weights under ema_ names."""
        results = self._test(self.state.model, batches)
        if self.state.ema is not None:
            results |= {f"ema_{name}": value for name, value in self._test(self.state.ema.module, batches).items()}
        return results

    def _test(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        return evaluate(model, batches, self.process, self.step.infer(model), lambda: self.stop.number)

    def _images_per_s(self) -> float:
        devices.synchronize(self.device)
        seconds = self.state.totals.epoch_data_s + self.state.totals.epoch_step_s
        return self.config.trainer.batch_size * self.state.totals.epoch_steps / max(seconds, 1e-9)

    def _finish(self) -> dict[str, Any]:
        self.folder.checkpoints.wait()
        if self.loaders.selection_name == "validation":
            self.state.totals.evaluated = self._evaluate(self.loaders.test)
            self._test_selected()
        summary = self.summary("finished")
        if self.folder.writes:
            weights = self.folder.path / WEIGHTS
            checkpoint.save_weights(weights, self.state.model.state_dict())
            summary["weights_sha256"] = sha256(weights)
        self.metrics.sync()
        summary = self.folder.write_summary(summary)
        self.metrics.finish(summary)
        return summary

    def _test_selected(self) -> None:
        """Test the checkpoint that validation selected."""
        best, path, found = self.state.totals.best, self.folder.checkpoints.best, None
        if self.process.is_main:
            try:
                content = checkpoint.load(path)
                if content["totals"]["best"].get("epoch") != best["epoch"]:
                    raise CheckpointError(f"{path} is of another epoch")
                found = content["schedule"], content["model"]
            except CheckpointError as error:
                _log.warning("the selected weights cannot be tested: %s", error)
        if (selected := self.process.from_main(found)) is not None:
            model = copy.deepcopy(self.state.model)
            model.set_fusion(selected[0])
            model.load_state_dict(selected[1])
            results = self._test(model, self.loaders.test)
            best |= {"top1": results["top1"], "top5": results["top5"]}

    def summary(self, status: str) -> dict[str, Any]:
        """Return the summary of the run so far, by the fields of Summary."""
        config, setup, state, totals = self.config, self.setup, self.state, self.state.totals
        on_test = status == "finished" or self.loaders.selection_name == "test"
        epochs, train_time = max(totals.steps / self.steps_per_epoch, 1e-9), totals.data_s + totals.step_s
        times = totals.data_s / epochs, totals.step_s / epochs, totals.eval_s / max(1, totals.evaluations)
        schedule, best = state.model.fusion, totals.best
        return {
            "status": status,
            "updated": now(),
            "provenance": self.provenance,
            "model": config.model.name,
            "data": config.data.name,
            "strategy": config.fusion.strategy,
            **(totals.evaluated if on_test else {}),
            "selected": {**best, "epoch": best["epoch"] + 1} if best else None,  # people count from 1
            "started_from": totals.started_from or None,
            "epoch": state.step // self.steps_per_epoch,
            "epochs": config.trainer.epochs,
            "step": state.step,
            "steps": self.total_steps,
            "epoch_time_s": dict(zip(("data", "step", "evaluation"), times, strict=True)),
            "train_time_s": train_time,
            "eval_time_s": totals.eval_s,
            "images_per_s": config.trainer.batch_size * totals.steps / max(train_time, 1e-9),
            "peak_memory_mib": devices.peak_memory_mib(self.device),
            "macs_per_image": self.macs,
            "saved_bytes_per_image": self.saved_bytes,
            "image_size": setup.image_size,
            "parameters": sum(p.numel() for p in state.model.parameters()),
            "precision": "fp32" if setup.autocast is None else str(setup.autocast).removeprefix("torch."),
            "tokens": setup.tokens,
            "tokens_removed": sum(schedule),
            "schedule": schedule,
            "tokens_per_layer": tokens_per_layer(schedule, setup.tokens),
            "budget_matched": config.fusion.is_matched,
            "adapted": totals.schedules or None,
            "images": self.trained_on.images,
            "classes": self.trained_on.classes,
        }

    def _place(self) -> tuple[int, bool]:
        return self.state.step, self.state.totals.epoch_open

    def _save(self, selected: bool = False) -> None:
        """Save the state in the background; lines of metrics that a continuation will not write again come first."""
        self._saved, self._saved_at = self._place(), time.monotonic()
        if self.folder.writes:
            content = {**self.about, "computed": self.computed, **self.state.content()}
            self.folder.checkpoints.save(self.state.step, content, selected, self.metrics.sync)

    def _save_after_error(self) -> None:
        """Save what was computed, if an error came between two steps; say from where the run can go on."""
        with contextlib.suppress(Exception):  # the error that ended the run is the one to show
            self.folder.checkpoints.wait()
        with contextlib.suppress(Exception):
            if not self.step.changing and self._place() != self._saved:
                if self.process.world_size == 1:
                    self._take_losses(self.state.step)
                if not self._unseen:  # which may not be finite, and others may not answer to add them up
                    self._save()
                    self.folder.checkpoints.wait()
        if self.folder.writes and (kept := self.folder.checkpoints.newest_first()):
            _log.info("saved after step %d; to go on from there: %s", int(kept[0].stem[5:]), again(self.folder.path))

    def _end(self, number: int, start: tuple[int, bool]) -> NoReturn:
        """Save if that is not done yet, go back to Slurm's queue if it gave notice, and raise Interrupted.

        All processes save before any of them ends. start: the place in the run at the start.
        """
        if self._place() != self._saved:
            self._save()
        self.folder.checkpoints.wait()
        summary = self.folder.write_summary(self.summary("interrupted"))
        self.process.wait_for_all()
        step = self.state.step
        told = f"stopped after step {step} of {self.total_steps}, saved in {self.folder.checkpoints.path(step)}"
        stopped = Interrupted(f"{told}; to continue: {again(self.folder.path)}", number)
        if stopped.goes_on and self._place() == start == (0, False) and interrupts.restarts() >= _STALLED_STARTS - 1:
            raise TrainingError(f"stopped {_STALLED_STARTS} times before the first step; raise the job's time limit")
        _log.info("%s", stopped, extra=FILE_ONLY)
        if stopped.goes_on and self.process.is_main:
            interrupts.requeue()
            _log.info("back in Slurm's queue")
        self.metrics.finish(summary)
        if stopped.goes_on:
            self.folder.release()
            interrupts.wait_for_the_end(number)
        self.process.wait_for_all()  # whoever started the processes may end all of them as soon as one ends
        raise stopped from None
