"""One search under each `search.signal`: what the winner is worth, and what finding it takes.

    python tests/benchmarks/signals.py TESTBED [--n 120] [--seeds 0 1] [--cases testbed skills]

Two cases, both TIES with a weight and a density a model and layer group (12 variables each):
`testbed`, the models of configs/testbed.yml in three layer groups, begun at its good guess;
`skills`, the quickstart's three specialists in two layer groups, begun where one skill's exact match
is zero. For every signal and seed a row says

- the winner's score on the holdout, a task and in sum, and the paired difference of the sum to the
  winner under `metric` of the same seed, with its 95% interval;
- mean seconds a candidate (merge, load and score), by the search's own record;
- after how many candidates each task's metric had left zero, `-` where it never did. Under
  `likelihood` candidates are scored by metric for this afterwards, outside the seconds.

With `--folder DIR` searches stay there, and go on when the command is run again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from evolve.intervals import gain_interval
from evolve.loop import StudyResult, run
from evolve.plan import Plan, make_plan
from evolve.search_file import SearchFile, Signal
from evolve.tasks import Outcomes, Split
from evolve.workers import Pool
from evolve.workers.start import Workers, start_pool
from evolve.workers.worker import Job

ROOT = Path(__file__).resolve().parents[2]
SIGNALS: tuple[Signal, ...] = get_args(Signal)
CASES = ("testbed", "skills")


def testbed_case(testbed: Path) -> SearchFile:
    """TIES on 135M models, a weight and a density for each of 2 models in 3 layer groups."""
    text = (ROOT / "configs/testbed.yml").read_text().replace("/tmp/testbed", str(testbed))
    return SearchFile(yaml.safe_load(text)).changed(search={"layer_granularity": 10})


def skills_case() -> SearchFile:
    """TIES on the quickstart's models, a weight and a density for each of 3 models in 2 layer groups."""
    data = SearchFile.load(ROOT / "configs/quickstart.yml").as_dict()
    data |= {"merge_method": "ties", "parameters": {"normalize": False}}
    for model in data["models"]:
        model["model"] = str(ROOT / model["model"])
        model["parameters"] = {
            "weight": {"low": 0.0, "high": 2.0, "start": 0.2},
            "density": {"low": 0.05, "high": 1.0, "start": 0.2},
        }
    data["base_model"] = str(ROOT / data["base_model"])
    data["search"]["layer_granularity"] = 2
    data["scoring"]["task_paths"] = [str(ROOT / "tasks")]
    return SearchFile(data)


@dataclass(frozen=True)
class Found:
    """What one search gave.

    Attributes:
        holdout: the winner's outcomes.
        scores: its scores on the holdout.
        seconds: mean a candidate.
        left_zero: by task the first candidate, from 1, whose metric was not zero; None = none.
    """

    holdout: Outcomes
    scores: dict[str, float]
    seconds: float
    left_zero: dict[str, int | None]


def searched(file: SearchFile, folder: Path) -> Found:
    """Run a search, or go on with it, and look at what it found."""
    result = run(file, folder=folder)
    plan = make_plan(file)
    assert result.best is not None
    pool = start_pool(plan, Workers())
    try:
        holdout = scored(plan, pool, result.best.params, "holdout")
        left_zero = first_above_zero(result, plan, pool)
    finally:
        pool.close()
    complete = [t for t in result.study.finished() if "scores" in t.user_attrs]
    seconds = sum(sum(trial.user_attrs["seconds"].values()) for trial in complete) / len(complete)
    return Found(holdout, plan.tasks.scores(holdout), seconds, left_zero)


def scored(plan: Plan, pool: Pool, params: dict[str, Any], split: Split) -> Outcomes:
    """Score a candidate by the tasks' metrics."""
    prompting = plan.setup.prompting
    pool.submit(Job("candidate", "final", plan.space.recipe(params), (split,), (prompting,)))
    result = pool.wait()
    assert result.failure is None, result.failure
    return result.outcomes[prompting][split]


def first_above_zero(result: StudyResult, plan: Plan, pool: Pool) -> dict[str, int | None]:
    """Find for each task the first candidate, from 1, whose metric was not zero."""
    found: dict[str, int | None] = {task.key: None for task in plan.tasks.tasks}
    for trial in result.study.finished():
        if None not in found.values():
            break
        if "scores" not in trial.user_attrs:
            continue
        scores = trial.user_attrs["scores"]
        if not found.keys() <= scores.keys():
            scores = plan.tasks.scores(scored(plan, pool, trial.params, "search"))
        for key, first in found.items():
            if first is None and scores[key] > 0:
                found[key] = trial.number + 1
    return found


def report(case: str, found: dict[tuple[Signal, int], Found], file: SearchFile) -> None:
    """Print one case's table."""
    plan = make_plan(file)
    n = sum(task.n_documents("holdout") for task in plan.tasks.tasks)
    keys = [task.key for task in plan.tasks.tasks]
    print(f"\n{case}: {file.search.n_iterations} candidates, winner on {n} holdout documents\n")
    columns = ["signal", "seed", *keys, "sum", "sum - metric's", "seconds", "left zero after"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for (signal, seed), its in found.items():
        difference = ""
        if signal != "metric" and ("metric", seed) in found:
            gain = gain_interval(plan.tasks, its.holdout, found["metric", seed].holdout)
            difference = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        cells = [
            signal,
            str(seed),
            *(f"{its.scores[key]:.3f}" for key in keys),
            f"{plan.tasks.objective(its.scores):.3f}",
            difference,
            f"{its.seconds:.2f}",
            ", ".join("-" if first is None else str(first) for first in its.left_zero.values()),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the searches and print a table a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", type=Path, metavar="TESTBED")
    parser.add_argument("--n", type=int, default=120, help="candidates a search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--folder", type=Path, help="where the searches stay; default: a new one")
    given = parser.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="signals-"))
    print(f"searches in {folder}")
    for case in given.cases:
        plain = testbed_case(given.testbed.resolve()) if case == "testbed" else skills_case()
        found = {}
        for seed in given.seeds:
            for signal in SIGNALS:
                file = plain.changed(search={"n_iterations": given.n, "seed": seed, "signal": signal})
                found[signal, seed] = searched(file, folder / f"{case}-{signal}-{seed}")
        report(case, found, file)


if __name__ == "__main__":
    main()
