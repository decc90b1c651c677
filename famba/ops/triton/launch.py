"""Launch the Triton kernels: tuned on a CUDA device, by Triton's interpreter on a CPU, or only noted down.

An argument of a kernel is a tensor, a `tl.constexpr`, or a number that may differ from call to call; no number is
compiled in unless it is declared constexpr, so that neither length nor batch makes Triton compile again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from famba.ops.availability import interpreted

# Products and sums in one instruction: what Triton does by itself in some releases and warns of in others.
_FUSED = {"enable_fp_fusion": True}

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Configuration:
    """Hold one way to run a kernel: values of constexpr arguments, warps of a program, stages of pipelined loops.

    registers: the most that a thread may take. Where it is None the assembler looks for room for more programs at once,
    and may spill a few bytes for it that it would have had registers for.
    """

    constants: Mapping[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Return the same but for the constants, by Triton's names."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@dataclass(frozen=True)
class Launch:
    """Hold a call of a kernel that was noted down instead of made."""

    kernel: Kernel
    arguments: Mapping[str, Any]


_noted: list[Launch] | None = None


class Kernel:
    """Hold a Triton function with the configurations that tuning may choose from.

    On a device Triton times each configuration at the first call for the constants named in `key` and the dtypes, and
    keeps the fastest for the process: not on disk, where a first call of another size would decide for all that follow.
    Sums over states may be rounded otherwise in another configuration. The interpreter takes the first. A configuration
    must not change the shape of a tensor.
    """

    def __init__(self, function: Callable[..., None], configurations: Sequence[Configuration], key: Sequence[str]):
        parameters = inspect.signature(function).parameters
        constants = [name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)]
        self.name = function.__name__.lstrip("_")
        self.configurations = tuple(configurations)
        self.constants = frozenset(constants)
        self.jit = triton.jit(function)
        self._function, self._key = function, list(key)
        self._tuned = len(self.configurations) > 1 and not interpreted()
        self._launched: Any = None

    def _prepared(self, arguments: Mapping[str, Any]) -> Any:
        # Only a call tells numbers from tensors, whose alignment must be compiled in: wide loads depend on it.
        given = {name: value for name, value in arguments.items() if name not in self.constants}
        numbers = [name for name, value in given.items() if isinstance(value, (int, float))]
        jit = triton.jit(self._function, do_not_specialize=numbers)
        configurations = [triton.Config(dict(c.constants), **c.options()) for c in self.configurations]
        return triton.autotune(configurations, self._key)(jit) if self._tuned else jit

    def launch(self, grid: Grid, **arguments: Any) -> None:
        """Run over a grid, a function of the constants, on the device of the first tensor."""
        if _noted is not None:
            _noted.append(Launch(self, arguments))
            return
        tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):
            if self._launched is None:
                self._launched = self._prepared(arguments)
            if self._tuned:
                self._launched[grid](**arguments, **_FUSED)
                return
            first = self.configurations[0]
            every = {**arguments, **first.constants}
            self._launched[grid(every)](**every, **first.options(), **_FUSED)


def kernel(configurations: Sequence[Configuration], key: Sequence[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Decorate a Triton function; see `Kernel`."""
    return lambda function: Kernel(function, configurations, key)


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Note down launches instead of making them, so that they can be compiled without a device."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before
