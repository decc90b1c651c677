"""Loading in this process or in workers, with the same result and the same errors."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from famba.data.plan import MicroBatch
from famba.errors import ConfigError, FambaError

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
Fetch: TypeAlias = Callable[[MicroBatch], Batch]

_TIME_TO_SAVE_S = 60


class _Fetching(Dataset[Any]):
    """Lets torch's workers call a fetch function with micro-batches as the "indices"."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, key: MicroBatch) -> Batch | FambaError:
        try:
            return self.fetch(key)
        except FambaError as error:
            return error  # as a value: raised in a worker it would arrive wrapped in a traceback


def fetch_all(
    fetch: Fetch, keys: Iterable[MicroBatch], workers: int, *, pin_memory: bool
) -> Generator[Batch, None, None]:
    """Yield fetch(key) for each key, in order.

    Args:
        fetch: picklable where workers are not forked.
        keys: what to load.
        workers: processes that load ahead; 0 loads here. They end when the generator does or is closed.
        pin_memory: page-locked results, for copies to a CUDA device; without CUDA it does nothing.
    """
    if workers == 0:
        for key in keys:
            yield _pinned(fetch(key)) if _pins(pin_memory) else fetch(key)
        return
    yield from _unwrapped(_start(_Fetching(fetch), workers, pin_memory=pin_memory, sampler=keys))


def iterate(
    dataset: IterableDataset[Any], workers: int, *, pin_memory: bool, worker_seed: int
) -> Generator[Any, None, None]:
    """Yield what a data set yields that yields whole batches (or errors, which are raised).

    Args:
        dataset: as `fetch` in `fetch_all`.
        workers: as in `fetch_all`; their batches take turns.
        pin_memory: as in `fetch_all`.
        worker_seed: each worker's seed, as torch tells it, is this one's and the worker's number's.
    """
    if workers == 0:
        for batch in _unwrapped(iter(dataset)):
            yield _pinned(batch) if _pins(pin_memory) and batch is not None else batch
        return
    yield from _unwrapped(_start(dataset, workers, pin_memory=pin_memory, worker_seed=worker_seed))


def check_workers(workers: int) -> None:
    """Raise ConfigError for a negative number of workers."""
    if workers < 0:
        raise ConfigError(f"workers is {workers}, but must be 0 (load in the training process) or more.")


def _start(
    dataset: Dataset[Any],
    workers: int,
    *,
    pin_memory: bool,
    sampler: Iterable[Any] | None = None,
    worker_seed: int = 0,
) -> Iterator[Any]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=_pins(pin_memory),
        worker_init_fn=_leave_signals_to_parent,
        # Its own generator: the global one belongs to the training loop.
        generator=torch.Generator().manual_seed(worker_seed),
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; torch's workers use none of the parent's.
        warnings.filterwarnings("ignore", r".*use of fork\(\) may lead to deadlocks", DeprecationWarning)
        return iter(loader)


def _unwrapped(items: Iterator[Any]) -> Generator[Any, None, None]:
    try:
        for item in items:
            if isinstance(item, FambaError):
                raise item
            yield item
    finally:
        # The last reference: workers end now, not when someone lets go of an error's traceback.
        del items


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals_to_parent(_: int) -> None:
    # Sent to the whole group by Ctrl-C or Slurm, they are for the training process, which ends its workers.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By this one Python ends workers too, should one be left at its exit: not at once, but all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_TIME_TO_SAVE_S))


def _pins(pin_memory: bool) -> bool:
    return pin_memory and torch.cuda.is_available()


def _pinned(batch: Batch) -> Batch:
    return batch[0].pin_memory(), batch[1].pin_memory()
