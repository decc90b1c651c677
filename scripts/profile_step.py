"""Profile a training step with torch's profiler.

Usage: python scripts/profile_step.py [--device cpu] [--backend auto] [--fusion none] [--batch 32] [--precision fp32]
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import famba

DEPTH, TOKENS, BUDGET = 24, 197, 168


def main() -> None:
    """Print the median time of a step in seconds, and the 15 operations that take most of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--fusion", default="none")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    schedule = famba.fusion.schedule(options.fusion, DEPTH, TOKENS, BUDGET)
    model = timm.create_model("vim_tiny_patch16_224", num_classes=100, fusion=schedule).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    targets = torch.randint(0, 100, (options.batch,), device=options.device)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    with famba.ops.use_backend(options.backend):
        step()
        times = []
        for _ in range(options.rounds):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        kinds = [ProfilerActivity.CPU] if options.device == "cpu" else [ProfilerActivity.CUDA]
        with profile(activities=kinds) as result:
            step()
    print(f"step: {statistics.median(times):.2f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(
        result.key_averages().table(
            sort_by=f"self_{'cpu' if options.device == 'cpu' else 'device'}_time_total",
            row_limit=15,
            max_name_column_width=60,
        )
    )


if __name__ == "__main__":
    main()
