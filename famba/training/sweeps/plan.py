"""What a sweep consists of, what of it is done, and what came of each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from omegaconf import DictConfig, open_dict

from famba.errors import FambaError, TrainingError
from famba.files import write_whole
from famba.training.compose import run_config
from famba.training.config import RunConfig
from famba.training.run_folder import SWEEP, RunFolder, finished
from famba.training.sweeps.names import recorded

if TYPE_CHECKING:
    from hydra_plugins.famba_launchers import FambaLauncher


@dataclass(frozen=True)
class Run:
    """One run of a sweep. values is its whole configuration, with Hydra's part."""

    name: str
    folder: Path
    overrides: tuple[str, ...]
    config: RunConfig
    values: DictConfig

    def done(self) -> dict[str, Any] | None:
        """Return the summary where nothing is left to do.

        Raises FambaError where the folder holds something else, or damage.
        """
        return finished(RunFolder(self.folder, writes=False), self.config)

    def summary(self) -> dict[str, Any] | None:
        """Return what its folder says so far. Raises FambaError where that is damaged."""
        return RunFolder(self.folder, writes=False).summary


class Sweep:
    """The runs of a launch, and what came of those that are done."""

    def __init__(self, launcher: FambaLauncher, job_overrides: Sequence[Sequence[str]], first: int) -> None:
        """Compose the runs and look which are finished; raise FambaError before anything is written."""
        setup_globals()
        self.runs = [_plan(launcher, overrides, first + index) for index, overrides in enumerate(job_overrides)]
        self.folder = Path(str(launcher.config.hydra.sweep.dir)).absolute()
        self._results = {run.name: summary for run in self.runs if (summary := run.done()) is not None}
        self._errors: dict[str, Exception] = {}
        self.left = [run for run in self.runs if run.name not in self._results]

    def announce(self) -> None:
        """Write down what the sweep consists of, and say it."""
        _record(self.folder, self.runs)
        done = len(self.runs) - len(self.left)
        count = f"{len(self.runs)} run{'s' if len(self.runs) != 1 else ''}"
        say(f"sweep of {count} in {short(self.folder)}" + (f", {done} finished already" if done else ""))

    def finish(self, run: Run, summary: dict[str, Any]) -> None:
        """Take down that a run is finished, and say so."""
        self._results[run.name] = summary
        say(f"{run.name}: finished, Top-1 {summary['top1']:.2f} %{self._progress()}")

    def fail(self, run: Run, error: Exception, log: Path) -> None:
        """Take down that a run failed, and say so."""
        self._errors[run.name] = RunFailedError(error, log)
        say(f"{run.name}: failed{self._progress()}, {self._errors[run.name]}")

    def returns(self) -> list[JobReturn]:
        """Return what came of each run, as Hydra's sweepers take it."""
        if self._errors:
            listed = "".join(f"\n  {name}: {error}" for name, error in self._errors.items())
            error = TrainingError(
                f"{len(self._errors)} of {len(self.runs)} runs failed:{listed}\n"
                "The same command runs these again, and no others"
            )
        return [
            _Return(run, self._results[run.name]["top1"]) if run.name in self._results else _Return(run, error)
            for run in self.runs
        ]

    def _progress(self) -> str:
        return f" ({len(self._results) + len(self._errors)} of {len(self.runs)})" if len(self.runs) > 1 else ""


class RunFailedError(FambaError):
    """A run of a sweep that failed, and where it says more."""

    def __init__(self, error: Exception, log: Path) -> None:
        kind = "error" if isinstance(error, FambaError) else type(error).__name__
        super().__init__(f"{kind}: {error}\n    log: {short(log)}")


class _Return(JobReturn):
    """A result for Hydra's sweepers; where it is an error they get to raise it, without a word of Hydra's own."""

    def __init__(self, run: Run, value: float | Exception) -> None:
        failed = isinstance(value, Exception)
        super().__init__(
            overrides=list(run.overrides),
            working_dir=str(run.folder),
            status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
            _return_value=value,
        )

    @property  # type: ignore[misc]
    def return_value(self) -> Any:
        """Top-1. Raises what made the run fail."""
        if isinstance(self._return_value, Exception):
            raise self._return_value
        return self._return_value


def say(line: str) -> None:
    """Print a line at once, whoever reads it."""
    print(line, flush=True)


def _record(folder: Path, runs: Sequence[Run]) -> None:
    """Add runs to what the folder knows; those of an earlier start stay."""
    now = {run.name: {"folder": run.name, "overrides": list(run.overrides)} for run in runs}
    before = {run["folder"]: run for run in recorded(folder)}
    text = json.dumps({"runs": list({**before, **now}.values())}, indent=2) + "\n"
    write_whole(folder / SWEEP, lambda file: Path(file).write_text(text))


def _plan(launcher: FambaLauncher, overrides: Sequence[str], index: int) -> Run:
    values = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(values):
        values.hydra.job.id = values.hydra.job.num = index
    name = str(values.hydra.sweep.subdir)
    folder = Path(str(values.hydra.sweep.dir), name).absolute()
    config = replace(run_config(values), run_dir=str(folder))
    return Run(name, folder, tuple(overrides), config, values)


def short(path: Path) -> str:
    """A path as a user in the present folder would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
