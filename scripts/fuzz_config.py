"""Refuse a thousand configurations that cannot work: each by an error that names the key, and without a trace.

    python scripts/fuzz_config.py --cases 1000 --commands 20

The cases come from the schema of the configuration (tests/config_fuzz.py). All run in this process, the first few of
each kind also as `python train.py ...` with a limit of ten seconds. The exit status is 1 where one ends otherwise.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from config_fuzz import Case, Verdict, cases, fault, judge  # type: ignore[import-not-found]  # noqa: E402


def main() -> int:
    """Run the cases; print every fault and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many in this process")
    parser.add_argument("--commands", type=int, default=20, help="how many also as a command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that a command may take")
    options = parser.parse_args()
    drawn = cases(options.cases, options.seed)
    inside = [_in_folder(case, judge) for case in drawn]
    spread = drawn[:: max(1, len(drawn) // max(1, options.commands))][: options.commands]
    outside = [_in_folder(case, partial(_command, limit_s=options.limit)) for case in spread]
    _report("in one process", inside)
    _report("as commands", outside)
    if outside:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"each command took {(used.ru_utime + used.ru_stime) / len(outside):.1f} s of a processor on average")
    return int(any(verdict.fault for verdict in inside + outside))


def _in_folder(case: Case, run: Callable[[Case, Path], Verdict]) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        verdict = run(case, Path(folder))
    if verdict.fault:
        line = " ".join(map(repr, case.arguments))
        print(f"FAULT {verdict.fault}\n  {line[:600]}\n  {verdict.message[:600]}", flush=True)
    return verdict


def _command(case: Case, folder: Path, limit_s: float) -> Verdict:
    started = time.perf_counter()
    command = [sys.executable, str(REPOSITORY / "train.py"), *case.arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return Verdict(case, "", limit_s, f"runs longer than {limit_s:.0f} s")
    seconds = time.perf_counter() - started
    return Verdict(case, done.stderr, seconds, fault(case, done.returncode, done.stderr, seconds, folder, limit_s))


def _report(where: str, verdicts: list[Verdict]) -> None:
    if not verdicts:
        return
    times = sorted(verdict.seconds for verdict in verdicts)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(v.case.kind for v in verdicts).items())
    faults = sum(verdict.fault is not None for verdict in verdicts)
    print(
        f"{len(verdicts)} {where} ({kinds}): {faults} faults; {sum(times):.0f} s in all, "
        f"median {times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
