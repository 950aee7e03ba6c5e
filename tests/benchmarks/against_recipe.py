"""A search's winner against any recipe, on the search's holdout, with the paired interval.

    python tests/benchmarks/against_recipe.py DIR RECIPE.yml

What the verdict does for the baselines, for a recipe of your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evolve.intervals import gain_interval, score_interval
from evolve.plan import make_plan
from evolve.study import Study, load_outcomes
from evolve.workers.start import Workers, start_pool
from evolve.workers.worker import Job
from merge_core.recipe import Recipe


def main() -> None:
    """Score the recipe and print both, and the difference of the objectives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yml")
    arguments = parser.parse_args()
    study = Study.open(arguments.folder)
    best = study.best()
    assert best is not None, "no completed trial"
    plan = make_plan(study.search_file())
    prompting = plan.setup.prompting
    recipe = Recipe.load(arguments.recipe)
    job = Job(str(arguments.recipe), "baseline", recipe, ("holdout",), (prompting,))
    pool = start_pool(plan, Workers())
    pool.submit(job)
    result = pool.wait()
    assert result.failure is None, result.failure
    theirs = result.outcomes[prompting]["holdout"]
    ours = load_outcomes(study.outcomes.path(f"holdout-{best.number}"))["holdout"]
    for task in plan.tasks.tasks:
        a, b = (score_interval(task, outcomes[task.key], plan.tasks.seed) for outcomes in (ours, theirs))
        print(
            f"{task.key}: best {a.value:.3f} [{a.low:.3f}, {a.high:.3f}], "
            f"recipe {b.value:.3f} [{b.low:.3f}, {b.high:.3f}]"
        )
    gain = gain_interval(plan.tasks, ours, theirs)
    print(f"best - recipe, weighted sum: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    mean = 1 / len(plan.tasks.tasks)
    print(
        f"the same as a mean: {gain.value * mean:+.3f} [{gain.low * mean:+.3f}, {gain.high * mean:+.3f}]"
    )


if __name__ == "__main__":
    main()
