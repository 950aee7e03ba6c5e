"""What each of several workers on one host holds of its own, and what they hold together.

    python tests/benchmarks/shared_sources.py TESTBED [--workers 2 3] [--dtype bfloat16 | float32]

Searches over the testbed's models; before one ends, the memory of every Ray actor is read from
/proc/PID/smaps: private pages, and those mapped from the models' files or from casts of them. A
dtype other than the models' own makes casts of every source.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from kill_workers import actors

from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.workers.start import Workers

MB = 1024


def pages_mb(process: int) -> dict[str, float]:
    """Read a process's memory in MB: anonymous, and of the sources private and in proportion."""
    found: defaultdict[str, float] = defaultdict(float)
    kind = ""
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            path = rest[4] if len(rest) > 4 else ""
            is_cast = "evolve-shared-" in path
            kind = "casts" if is_cast else "models" if path.endswith(".safetensors") else "other"
        elif first in ("Rss:", "Pss:", "Anonymous:"):
            what = first[:-1].lower()
            found["own" if what == "anonymous" else f"{kind} {what}"] += int(rest[0]) / MB
    return found


def measured(testbed: Path, n_workers: int, dtype: str) -> list[dict[str, float]]:
    """Search with so many workers and return what each held, when all had evaluated a candidate."""
    data = SearchFile.load(Path("configs/testbed.yml")).as_dict()
    texts = {"base_model": str(testbed / "base"), "dtype": dtype}
    for model in data["models"]:
        model["model"] = str(testbed / Path(model["model"]).name)
    data |= texts
    n = 3 * n_workers
    data["search"] |= {"n_iterations": n, "sampler": "random"}
    data["scoring"] |= {"limit": 10, "holdout": 0.0, "task_paths": [str(testbed / "tasks")]}
    found: list[dict[str, float]] = []

    def look(event: str, study: Any, plan: Any) -> None:
        if event == "told" and len(study.finished()) == n:
            found.extend(pages_mb(process) for process in actors(os.getpid()))

    with tempfile.TemporaryDirectory() as place:
        run(SearchFile(data), folder=Path(place) / "s", workers=Workers(n_workers), progress=look)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    for n_workers in arguments.workers:
        for i, pages in enumerate(measured(arguments.testbed, n_workers, arguments.dtype)):
            shown = ", ".join(f"{kind} {mb:.0f}" for kind, mb in sorted(pages.items()))
            print(f"{n_workers} workers, worker {i}: MB {shown}")


if __name__ == "__main__":
    main()
