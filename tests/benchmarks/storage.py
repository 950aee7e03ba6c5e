"""What a candidate costs beside its evaluation, as the study grows: ask, tell, status, resume.

    python tests/benchmarks/storage.py [--storage URL] [--n 100 1000 10000]

A search of 50 variables runs in evolve/loop.py with workers that answer at once, 100 documents on each
of three tasks. `ask` is from one candidate's end to the next one's start, `tell` from a result's arrival
to its record being whole: medians of the last 50 candidates before each size. `status` is the whole
command, `resume` from opening the study to the next candidate's start. Then the samplers' own time for
one proposal, over a record in memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, create_trial

from evolve.budget import Budget
from evolve.heats import Heats
from evolve.loop import search
from evolve.plan import Plan, make_plan
from evolve.samplers import derived_rng, make_sampler
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.tasks import Outcome
from evolve.workers.worker import Job, Result, Seconds

ROOT = Path(__file__).resolve().parents[2]
N_LAST = 50
SAMPLERS = ("cma", "tpe", "gp", "nsga2", "qmc", "random")
# One proposal of Gaussian processes over 10,000 trials takes 100 million numbers a matrix, and hours.
MOST = {"gp": 1000}
POPULATION = 16


def search_file(n: int) -> SearchFile:
    """The quickstart's models and tasks with 50 variables: gradients of weights and of densities."""
    models = [
        {
            "model": f"configs/quickstart/models/{name}",
            "parameters": {
                "weight": {"low": 0.0, "high": 1.5, "points": points},
                "density": {"low": 0.1, "high": 1.0, "points": points},
            },
        }
        for name, points in (("reverse", 9), ("sort", 8), ("largest", 8))
    ]
    return SearchFile(
        {
            "merge_method": "ties",
            "base_model": "configs/quickstart/models/base",
            "models": models,
            "dtype": "float32",
            "tasks": ["qs_reverse", "qs_sort", "qs_largest"],
            "search": {"sampler": "cma", "n_iterations": n, "racing": "none"},
            "scoring": {"task_paths": ["tasks"], "limit": 100, "holdout": 0.5},
        }
    )


class Instant:
    """A pool that answers at once, and notes when it was given a job and asked for a result."""

    size = 1
    by_generation = False

    def __init__(self, study: Study, plan: Plan) -> None:
        self._study, self._plan = study, plan
        self._job: Job | None = None
        self.submitted: list[float] = []
        self.answered: list[float] = []

    def submit(self, job: Job) -> None:
        self.submitted.append(time.perf_counter())
        self._job = job

    def wait(self) -> Result:
        assert self._job is not None
        job = self._job
        params = self._study.trials()[int(job.name)].params
        x = np.array([v.to_unit(params[v.name]) for v in self._plan.space.variables])
        score = 1 - float(((x - 0.6) ** 2).mean())
        outcomes = {
            task.key: [
                Outcome(leaf.name, document, score, {}, f"{task.metric},{task.filter}")
                for leaf in task.leaves
                for document in leaf.documents["search"]
            ]
            for task in self._plan.tasks.tasks
        }
        self.answered.append(time.perf_counter())
        return Result(job, {job.promptings[0]: {"search": outcomes}}, Seconds(0.1, 0.1, 1.0))


def measured(folder: Path, url: str | None, sizes: list[int]) -> Iterator[tuple[int, str]]:
    """Run the search from size to size; give each size and its row of the table."""
    for n in sizes:
        for upto in (n - N_LAST, n):
            plan = make_plan(search_file(upto))
            told: list[float] = []
            began = time.perf_counter()
            with Study.create_or_resume(folder, url, plan.search_file, {"benchmark": 1}) as study:
                pool = Instant(study, plan)

                def show(event: str, study: Study = study, told: list[float] = told) -> None:
                    if event == "told":
                        study.keep_note("seconds_total", time.perf_counter())
                        told.append(time.perf_counter())

                study.keep_note("n_layers", plan.n_layers)
                search(study, plan, pool, Heats(study, plan), Budget(study, plan), show)  # type: ignore[arg-type]
        resume = pool.submitted[0] - began
        asks = [begun - ended for begun, ended in zip(pool.submitted[1:], told, strict=False)]
        tells = [ended - given for ended, given in zip(told, pool.answered, strict=True)]
        began = time.perf_counter()
        status = [sys.executable, "-m", "evolve.cli", "status", str(folder)]
        subprocess.run(status, check=True, capture_output=True, cwd=ROOT)
        took = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.glob("study.db*"))
        yield (
            n,
            (
                f"| {n:,} | {1e3 * statistics.median(asks):.1f} | {1e3 * statistics.median(tells):.1f} | "
                f"{took:.1f} | {resume:.1f} | {size / 1e6:.1f} |"
            ),
        )


def proposing(name: str, n: int) -> float:
    """Return the seconds of one proposal after n random trials, the sampler having seen n - 1."""
    space = search_file(1).space(lambda model: 2)
    n_objectives = 2 if name == "nsga2" else 1
    sampler = make_sampler(name, space, 0, n_objectives)
    rng = derived_rng(0)
    distributions = space.distributions()
    trials = [_trial(rng, i, space, distributions, n_objectives) for i in range(n)]
    sampler.propose(n - 1, trials[:-1])
    began = time.perf_counter()
    sampler.propose(n, trials)
    return time.perf_counter() - began


def _trial(
    rng: np.random.RandomState,
    number: int,
    space: Any,
    distributions: dict[str, BaseDistribution],
    n: int,
) -> FrozenTrial:
    trial = create_trial(
        params={v.name: v.from_unit(rng.rand()) for v in space.variables},
        distributions=distributions,
        values=rng.rand(n).tolist(),
        user_attrs={"told": number, "generation": number // POPULATION},
    )
    trial.number = number
    return trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--storage", help="URL of a database; default: SQLite in the folder")
    parser.add_argument("--n", type=int, nargs="+", default=[100, 1000, 10000], help="sizes")
    parser.add_argument("--samplers", nargs="*", default=SAMPLERS, choices=SAMPLERS)
    options = parser.parse_args()
    if options.n:
        with tempfile.TemporaryDirectory() as place:
            print("| trials | ask ms | tell ms | status s | resume s | MB |\n|---|---|---|---|---|---|")
            for _, row in measured(Path(place) / "growing-search", options.storage, options.n):
                print(row, flush=True)
    print("\n| sampler | " + " | ".join(f"{n:,}" for n in options.n) + " |")
    print("|---|" + "---|" * len(options.n))
    for name in options.samplers:
        cells = (
            f"{1e3 * proposing(name, n):.1f} ms" if n <= MOST.get(name, n) else "not run"
            for n in options.n
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
