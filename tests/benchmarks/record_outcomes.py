"""Record what many candidates give on each of the testbed's documents: outcomes.npz, for replay.py.

    python tests/benchmarks/record_outcomes.py /tmp/testbed OUT.npz     # most of an hour on two cores

First known recipes, then a Sobol sequence over the space, then four rounds of steps around the best
so far, so that the record is densest where searches go.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy.stats.qmc import Sobol

from evolve.plan import make_plan
from evolve.search_file import SearchFile
from evolve.workers.worker import Job, Worker

N_SOBOL = 128
# Steps as a share of each range, and how many candidates take them.
ROUNDS = ((0.25, 60), (0.18, 60), (0.12, 60), (0.08, 60))
N_BEST = 14
TASKS = ("tb_addition", "tb_roman")


def search_file(testbed: Path) -> SearchFile:
    """TIES over two specialists, a weight and a density for each of 3 layer groups: 12 variables."""
    parameters = {
        "weight": {"low": 0.0, "high": 2.0, "start": 0.8},
        "density": {"low": 0.1, "high": 1.0, "start": 0.5},
    }
    return SearchFile(
        {
            "merge_method": "ties",
            "base_model": f"{testbed}/base",
            "models": [
                {"model": f"{testbed}/{name}", "parameters": parameters} for name in ("addition", "roman")
            ],
            "parameters": {"normalize": False},
            "dtype": "bfloat16",
            "tasks": list(TASKS),
            "search": {"layer_granularity": 10, "signal": "both", "racing": "none"},
            "scoring": {
                "backend": "hf",
                "limit": None,
                "holdout": 0.0,
                "task_paths": [f"{testbed}/tasks"],
            },
        }
    )


class Recorder:
    """Scores points of the unit cube by metric and likelihood, and keeps every document's outcome."""

    def __init__(self, testbed: Path, out: Path) -> None:
        self.plan = make_plan(search_file(testbed), device="cpu")
        self._worker = Worker(self.plan.setup, self.plan.tasks, self.plan.sources)
        self._out = out
        self.points: list[np.ndarray] = []
        self.exact: list[np.ndarray] = []
        self._likelihood: list[np.ndarray] = []

    def add(self, point: np.ndarray) -> None:
        space, prompting = self.plan.space, self.plan.setup.prompting
        values = {v.name: v.from_unit(float(u)) for v, u in zip(space.variables, point, strict=True)}
        job = Job("point", "trial", space.recipe(values), ("search",), (prompting,), signal="both")
        result = self._worker.evaluate(job)
        if result.failure:
            sys.exit(str(result.failure))
        outcomes = result.outcomes[prompting]["search"]
        self.points.append(point)
        self.exact.append(np.array([o.value for task in TASKS for o in outcomes[task]], np.uint8))
        likelihoods = [o.value for task in TASKS for o in outcomes[f"{task}:likelihood"]]
        self._likelihood.append(np.array(likelihoods, np.float16))

    def scores(self) -> np.ndarray:
        """Return each candidate's sum of the two exact-match scores."""
        n = self.plan.tasks.tasks[0].n_documents("search")
        exact = np.array(self.exact, float)
        total: np.ndarray = exact[:, :n].mean(axis=1) + exact[:, n:].mean(axis=1)
        return total

    def save(self) -> None:
        np.savez_compressed(
            self._out,
            x=np.array(self.points, np.float32),
            exact=np.array(self.exact),
            likelihood=np.array(self._likelihood),
        )


def main() -> None:
    """Record, saving now and then."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    recorder = Recorder(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
    space = recorder.plan.space
    starts = {**space.starts()}
    for values in recorder.plan.known.values():
        known = {**starts, **values}
        recorder.add(np.array([v.to_unit(known[v.name]) for v in space.variables]))
    n = len(space.variables)
    for point in Sobol(n, scramble=True, rng=1).random(N_SOBOL):
        recorder.add(point)
    recorder.save()
    rng = np.random.default_rng(5)
    for sigma, count in ROUNDS:
        best = np.argsort(-recorder.scores())[:N_BEST]
        for _ in range(count):
            step = sigma * rng.standard_normal(n)
            recorder.add(np.clip(recorder.points[rng.choice(best)] + step, 0, 1))
        recorder.save()
        print(f"{len(recorder.points)} candidates, best {recorder.scores().max():.3f}", flush=True)


if __name__ == "__main__":
    main()
