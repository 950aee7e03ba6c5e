"""Candidates served at once as adapters of their base, beside merges one after another.

    python tests/benchmarks/population.py TESTBED [--candidates 8] [--dtype bfloat16] [--limit 40]

Candidates are task_arithmetic merges over the testbed's two adapters, with weights drawn by seed; both
testbed tasks score them, once by the tasks' metric, once by the likelihood. The same vLLM engine options
hold for both, the two take turns in this process, and each has answered a generation of other weights
before it is timed. Printed are seconds a candidate (merge, load and score; no engine's start), their
ratio, and how many document outcomes differ, beside how many differ where merges are scored again in
another order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measured import BASE, TUNED

if TYPE_CHECKING:
    from evolve.workers.worker import Job, Result

SIGNALS = ("metric", "likelihood")


def search_file(testbed: Path, n: int, dtype: str, limit: int) -> Any:
    """Return a search over both adapters, N candidates at once."""
    from evolve.search_file import SearchFile

    return SearchFile(
        {
            "merge_method": "task_arithmetic",
            "base_model": str(testbed / BASE),
            "models": [
                {
                    "model": f"{testbed / BASE}+{testbed / 'adapters' / name}",
                    "parameters": {"weight": {"low": 0.0, "high": 1.5}},
                }
                for name in TUNED
            ],
            "dtype": dtype,
            "tasks": ["tb_addition", "tb_roman"],
            "search": {"adapters_at_once": n, "signal": "both"},
            "scoring": {
                "backend": "vllm",
                "limit": limit,
                "holdout": 0,
                "task_paths": [str(testbed / "tasks")],
                "engine": {"max_model_len": 256},
            },
        }
    )


def generation(plan: Any, n: int, seed: int, signal: Any) -> list[Job]:
    """Draw candidates."""
    from evolve.workers.worker import Job

    rng = random.Random(seed)
    names = [variable.name for variable in plan.space.variables]
    points = [{name: rng.uniform(0.0, 1.5) for name in names} for _ in range(n)]
    prompting = (plan.setup.prompting,)
    return [
        Job(f"{seed}-{i}", "trial", plan.space.recipe(point), ("search",), prompting, signal=signal)
        for i, point in enumerate(points)
    ]


def timed(pool: Any, jobs: list[Job]) -> tuple[float, list[Result]]:
    """Evaluate jobs, as many at once as the pool takes; return seconds of all, and results."""
    began = time.perf_counter()
    results: list[Result] = []
    for start in range(0, len(jobs), pool.size):
        batch = jobs[start : start + pool.size]
        for job in batch:
            pool.submit(job)
        results += [pool.wait() for _ in batch]
    for result in results:
        if result.failure:
            sys.exit(f"{result.job.name}: {result.failure}")
    return time.perf_counter() - began, results


def differing(some: list[Result], others: list[Result]) -> tuple[int, float, int]:
    """Count outcomes that differ by more than 1e-6; the largest difference; how many there are."""
    values = [
        [
            outcome.value
            for result in results
            for by_split in result.outcomes.values()
            for every in by_split["search"].values()
            for outcome in every
        ]
        for results in (some, others)
    ]
    gaps = [abs(one - other) for one, other in zip(*values, strict=True)]
    return sum(gap > 1e-6 for gap in gaps), max(gaps), len(gaps)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=40, help="documents a task")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from evolve.plan import make_plan
    from evolve.workers.start import Workers, start_pool

    file = search_file(options.testbed.absolute(), options.candidates, options.dtype, options.limit)
    plan = make_plan(file, device="cpu")
    alone = replace(plan, search_file=file.changed(search={"adapters_at_once": "none"}))
    n = options.candidates
    found: dict[str, Any] = {}
    kept: dict[tuple[str, str], list[Result]] = {}
    for way, its_plan in (("at once", plan), ("one by one", alone)):
        pool = start_pool(its_plan, Workers())
        for signal in SIGNALS:
            timed(pool, generation(plan, n, 1, signal))
            jobs = generation(plan, n, 2, signal)
            seconds, kept[signal, way] = timed(pool, jobs)
            found.setdefault(signal, {})[way] = seconds / n
            print(f"{signal}, {way}: {seconds / n:.2f} s a candidate", file=sys.stderr, flush=True)
            if way == "one by one":
                _, kept[signal, "again"] = timed(pool, [replace(job, in_reverse=True) for job in jobs])
        pool.close()
    for signal in SIGNALS:
        row = found[signal]
        row["ratio"] = row["one by one"] / row["at once"]
        n_differ, largest, n_outcomes = differing(kept[signal, "at once"], kept[signal, "one by one"])
        n_noise, largest_noise, _ = differing(kept[signal, "again"], kept[signal, "one by one"])
        row |= {"outcomes": n_outcomes, "differ": n_differ, "largest": largest}
        row |= {"differ in another order": n_noise, "largest in another order": largest_noise}
    if options.json:
        print(json.dumps(found))
        return
    for signal, row in found.items():
        print(f"{signal:>10}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))


if __name__ == "__main__":
    main()
