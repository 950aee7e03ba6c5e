"""Samplers compared on real models: a search a sampler and seed, winners on the full holdout.

    python tests/benchmarks/real_samplers.py TESTBED [--case testbed] [--n 120] [--seeds 0 1]

The cases of signals.py: TIES with 12 variables on the testbed's 135M models, or on the quickstart's.
Arms score every search document by metric; the winner's holdout score is the sum over the tasks.
Differences are of the first arm minus another, paired by document, with 95% intervals; at the end
their means over the seeds, with Student's interval.

- `auto`, `cma`, `random` ...: the product's own samplers, with known recipes first.
- `mergekit-evolve`: pycma set up as mergekit-evolve does it: start 1/M and density 1, sigma 1/6, no
  bounds, values folded into the ranges, the first best candidate wins.
- `default`: `sampler`, `signal` and `racing` all `auto`, as a search file that names none has them.

With `--folder DIR` searches stay there, and those of the product go on when it is run again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cma
import numpy as np
from replayed import interval
from signals import CASES, scored, skills_case, testbed_case

from evolve.intervals import gain_interval
from evolve.loop import run
from evolve.plan import Plan, make_plan
from evolve.search_file import SearchFile
from evolve.space import Value
from evolve.tasks import Outcomes
from evolve.workers import Pool
from evolve.workers.start import Workers, start_pool

ARMS = ("auto", "cma", "gp", "tpe", "random", "mergekit-evolve", "default")


def winner(arm: str, file: SearchFile, plan: Plan, pool: Pool, folder: Path) -> dict[str, Value]:
    """Return the values of an arm's winner."""
    if arm == "mergekit-evolve":
        return like_mergekit_evolve(file, plan, pool)
    search = {"sampler": arm, "signal": "metric", "racing": "none"}
    if arm == "default":
        search = dict.fromkeys(search, "auto")
    best = run(file.changed(search=search), folder=folder).study.best()
    assert best is not None
    return dict(best.params)


def like_mergekit_evolve(file: SearchFile, plan: Plan, pool: Pool) -> dict[str, Value]:
    """Search with pycma as mergekit-evolve sets it up."""
    variables = plan.space.variables
    n_models = len(file.template["models"])
    start = [1.0 if "density" in v.name else 1 / n_models for v in variables]
    rng = np.random.RandomState(file.search.seed)
    options = {"randn": rng.randn, "seed": np.nan, "verbose": -9, "verb_log": 0}
    strategy = cma.CMAEvolutionStrategy(start, 1 / 6, options)
    best, found, told = -math.inf, dict[str, Value](), 0
    while told < file.search.n_iterations:
        vectors, losses = strategy.ask(), []
        for vector in vectors[: file.search.n_iterations - told]:
            values: dict[str, Value] = {
                v.name: float(np.clip(abs(x), v.low, v.high)) if "density" in v.name else float(abs(x))
                for v, x in zip(variables, vector, strict=True)
            }
            told += 1
            value = plan.tasks.objective(plan.tasks.scores(scored(plan, pool, values, "search")))
            losses.append(-value)
            if value > best:
                best, found = value, values
        if len(losses) == len(vectors):
            strategy.tell(vectors, losses)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the searches and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path, metavar="TESTBED")
    parser.add_argument("--case", choices=CASES, default="testbed")
    parser.add_argument("--n", type=int, default=120, help="candidates a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:1] + ARMS[-3:-1])
    parser.add_argument("--folder", type=Path, help="where the searches stay; default: a new one")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="samplers-"))
    plain = testbed_case(given.testbed.resolve()) if given.case == "testbed" else skills_case()
    sums: dict[str, list[float]] = {arm: [] for arm in given.arms}
    first, *others = given.arms
    for seed in given.seeds:
        file = plain.changed(search={"n_iterations": given.n, "seed": seed})
        plan = make_plan(file.changed(search={"signal": "metric", "racing": "none"}))
        holdout: dict[str, Outcomes] = {}
        for arm in given.arms:
            pool = start_pool(plan, Workers())
            try:
                values = winner(arm, file, plan, pool, folder / f"{arm}-{seed}")
                holdout[arm] = scored(plan, pool, values, "holdout")
            finally:
                pool.close()
            scores = plan.tasks.scores(holdout[arm])
            sums[arm].append(plan.tasks.objective(scores))
            line = f"seed {seed} {arm:16} sum {sums[arm][-1]:.3f}"
            line += "".join(f"  {task} {score:.3f}" for task, score in scores.items())
            if arm != first:
                gain = gain_interval(plan.tasks, holdout[first], holdout[arm])
                line += f"  {first} minus it {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            print(line, flush=True)
    for arm in others if len(given.seeds) > 1 else ():
        print(f"{first} minus {arm}, over the seeds: {interval(np.subtract(sums[first], sums[arm]))}")


if __name__ == "__main__":
    main()
