"""Time what each rule of token reduction adds to a training step of a Vim-Ti that fuses in every layer.

Prints, for each rule, the time of its reductions in the 24 layers (choosing, fusing, and the backward of that), beside
that of bipartite and as a share of the whole step with rule bipartite. Rules take turns; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch.nn import functional as F

from famba.fusion import RULES, Fusion
from famba.models import Backbone, create_network
from famba.models.backbone import Reduction, Tokens

CHANNELS, INNER = 192, 384


def main() -> None:
    """Print a table, and write it where asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")
    model = create_network("vim_tiny_patch16_224", num_classes=100, fusion="all").to(options.device)
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(options.batch, 3, 224, 224), torch.randint(0, 100, (options.batch,))
    images, labels = images.to(options.device), labels.to(options.device)

    def step() -> None:
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    contestants: dict[tuple[str, str], Callable[[], None]] = {("step", ""): step}
    for name, rule in RULES.items():
        for place, known in model.places.items():
            if rule.needs <= known:
                fusion = Fusion(rule=name, place=place, strategy="all")
                dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
                contestants[name, place] = reductions(model, fusion, options.batch, options.device, dtype)
    times: dict[tuple[str, str], list[float]] = {which: [] for which in contestants}
    for number in range(options.rounds + 1):
        for which, run in contestants.items():
            synchronize(options.device)
            began = time.perf_counter()
            run()
            synchronize(options.device)
            if number:
                times[which].append(time.perf_counter() - began)
    found = {which: statistics.median(own) for which, own in times.items()}
    rows = [
        {
            "rule": name,
            "place": place,
            "reductions_ms": 1000 * seconds,
            "of_bipartite": seconds / found["bipartite", place],
            "of_step_percent": 100 * seconds / found["step", ""],
        }
        for (name, place), seconds in found.items()
        if place
    ]
    table = pd.DataFrame(rows)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"step of {options.batch} images: {1000 * found['step', '']:.1f} ms; {where}, torch {torch.__version__}")
    print(table.to_string(index=False, float_format="%.2f"))
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.3f", lineterminator="\n")


def reductions(model: Backbone, fusion: Fusion, batch: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that reduces random tokens of the shapes in every layer, and sends gradients back."""
    layers, length, grid = [], model.num_tokens, model.grid_size
    for r in model.schedule_of(fusion):
        seen = torch.randn(
            batch, length, INNER if fusion.place == "after_scan" else CHANNELS, device=device, dtype=dtype
        )
        residual = torch.randn(batch, length, CHANNELS, device=device)
        measures = torch.rand(batch, length, 2, device=device)
        known = {"features": residual, "hidden": residual.to(dtype), "mixed": seen}
        known |= {"step_sizes": measures, "outputs": measures}
        layers += [(Reduction(fusion, r, grid), seen.requires_grad_(), residual.requires_grad_(), known)] if r else []
        length -= r
        grid_after = RULES[fusion.rule].grid_after
        grid = grid_after(grid, r) if grid_after is not None else grid

    def run() -> None:
        for reduction, seen, residual, known in layers:
            streams, _ = reduction(Tokens(model.special), [seen, residual], seen, **known)
            torch.autograd.grad(streams, [seen, residual], streams)

    return run


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
