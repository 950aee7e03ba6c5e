"""Mutated inputs for the real command, as many as asked for.

    python -m tests.benchmarks.fuzz    # 2,000 inputs: search files, recipes, models, storages
    python -m tests.benchmarks.fuzz --inputs 500 --seed 7 --kind storage

Each input has a seed; `--kind storage --seed N --inputs 1` repeats one. What counts as a fault, and
how inputs are made, is in tests/evolve/fuzzing.py. Exit status 1 where a fault was found.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.dont_write_bytecode = True

from tests.evolve.fuzzing import KINDS, World  # noqa: E402  Python's cache is no write of the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="in all, the same number of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    kinds = options.kind or KINDS
    root = Path(tempfile.mkdtemp(prefix="evolve-fuzz-"))
    n_faults = 0
    try:
        world = World(root)
        for kind in kinds:
            began, slowest, most = time.perf_counter(), 0.0, 0.0
            statuses: collections.Counter[object] = collections.Counter()
            for seed in range(options.seed, options.seed + max(1, options.inputs // len(kinds))):
                found = world.try_one(kind, seed)
                watched = world.last
                statuses[watched.status] += 1
                slowest, most = max(slowest, watched.seconds), max(most, watched.peak_mb)
                if found:
                    n_faults += 1
                    print(f"{kind} {seed}: {found.faults}\n  {' '.join(found.command)}")
                    print(watched.raised[-2000:] or watched.err[-500:], flush=True)
            ended = ", ".join(f"{n} with status {s}" for s, n in sorted(statuses.items(), key=str))
            taken = f"{statuses.total()} inputs in {time.perf_counter() - began:.0f} s ({ended})"
            print(f"{kind}: {taken}, slowest {slowest:.1f} s, largest {most:.0f} MB", flush=True)
    finally:
        shutil.rmtree(root)
    print(f"{n_faults} faults")
    raise SystemExit(n_faults > 0)


if __name__ == "__main__":
    main()
