"""How often the verdict claims a gain where there is none, and where there is one; simulated outcomes.

    python tests/benchmarks/null_test.py              # no gain: 1,000 searches, in minutes
    python tests/benchmarks/null_test.py --power      # candidates differ: shortlists of 1, 2, 3, 5 and 8

Each search has 160 candidates and 4 baselines, 200 search and 200 holdout documents of one task.
Document i is answered right with its own probability p_i, uniform on [0, 1], by every model: nobody
is better than anybody. Whether a model does is an independent draw, or one that it shares in part
with the others: y = 1 where sqrt(r) g_i + sqrt(1 - r) e_i < z(p_i), with g_i common to all models, r
the correlation and z the normal quantile. With `--power` a candidate's z(p_i) is shifted by an
ability of its own, normal with the given spread; baselines keep 0.

Shortlist, winner and verdict are the search's own functions, on a study in memory. A gain must be
shown over the best baseline; equal baselines make that harder than the level asks, so the verdict
over a single baseline is printed too, where the level is met from below. Beside them: what
the best candidate minus a baseline, on the search documents with its plain paired interval, would
have claimed, over one baseline (the starts, say) and over the best of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr, ndtri

from evolve.intervals import gain_interval
from evolve.judge import frozen_shortlist
from evolve.plan import Plan, make_plan
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.study.storage import Storage
from evolve.tasks import Outcome, Outcomes, Split
from evolve.verdict import conclude

ROOT = Path(__file__).resolve().parents[2]
N_CANDIDATES, N_BASELINES = 160, 4
CORRELATIONS = (0.0, 0.8)
SPREADS = (0.1, 0.2)
SHORTLISTS = (1, 2, 3, 5, 8)
TASK = "qs_sort"


@dataclass(frozen=True)
class Simulated:
    """One search's outcomes.

    Attributes:
        by_split: whether a document was answered right; shape (models, documents), baselines first.
        abilities: expected score minus a baseline's, over all documents there could be; (models,).
    """

    by_split: dict[Split, np.ndarray]
    abilities: np.ndarray

    def outcomes(self, model: int, split: Split) -> Outcomes:
        """Spell a model's outcomes as an engine's answers would be."""
        values = self.by_split[split][model].tolist()
        return {TASK: [Outcome(TASK, i, float(value)) for i, value in enumerate(values)]}


def searches(plan: Plan, n: int, correlation: float, spread: float = 0.0) -> Iterator[Simulated]:
    """Draw the outcomes of n searches."""
    rng = np.random.default_rng([n, round(100 * correlation), round(100 * spread)])
    (task,) = plan.tasks.tasks
    for _ in range(n):
        shift = np.zeros(N_BASELINES + N_CANDIDATES)
        shift[N_BASELINES:] = rng.normal(0, spread, N_CANDIDATES)
        by_split: dict[Split, np.ndarray] = {}
        for split in ("search", "holdout"):
            size = task.n_documents(split)
            level = ndtri(rng.random(size))
            common = np.sqrt(correlation) * rng.normal(size=size)
            own = np.sqrt(1 - correlation) * rng.normal(size=(len(shift), size))
            by_split[split] = common + own < level + shift[:, None]
        # With z(p) standard normal, as p is uniform, P(right) is Phi(shift / sqrt 2).
        yield Simulated(by_split, ndtr(shift / np.sqrt(2)) - 0.5)


def recorded(plan: Plan, simulated: Simulated) -> Study:
    """Make the record of a search whose trials scored so."""
    trials = []
    rng = np.random.default_rng(0)
    now = datetime.now()
    for number in range(N_CANDIDATES):
        score = float(simulated.by_split["search"][N_BASELINES + number].mean())
        params = {v.name: float(rng.uniform(v.low, v.high)) for v in plan.space.variables}
        trial = FrozenTrial(
            number=number,
            state=TrialState.COMPLETE,
            value=score,
            datetime_start=now,
            datetime_complete=now,
            params=params,
            distributions=plan.space.distributions(),
            user_attrs={"scores": {TASK: score}, "objective": score},
            system_attrs={},
            intermediate_values={},
            trial_id=-1,
        )
        trials.append(trial)
    return Study(Path("/nowhere"), "null", _InMemory(trials))


class _InMemory(Storage):
    """A storage of trials that nobody reads again."""

    def __init__(self, trials: list[FrozenTrial]) -> None:
        self._trials = trials

    def trials(self) -> list[FrozenTrial]:
        return self._trials

    def notes(self) -> dict[str, str]:
        return {}

    def keep_notes(self, notes: Mapping[str, str]) -> None:
        pass


def baselines(simulated: Simulated) -> dict[str, dict[Split, Outcomes]]:
    """Name the baselines and spell their outcomes."""
    return {
        f"baseline {i}": {split: simulated.outcomes(i, split) for split in ("search", "holdout")}
        for i in range(N_BASELINES)
    }


def claims(plan: Plan, simulated: Simulated) -> tuple[bool, bool, bool, bool]:
    """Tell whether a gain is claimed.

    Returns:
        By the verdict over all baselines, and over the first alone; by best minus the first baseline
        on the search documents, and by best minus the best one there.
    """
    finalists = frozen_shortlist(recorded(plan, simulated), plan)
    members = {n: simulated.outcomes(N_BASELINES + n, "holdout") for n in finalists}
    every = baselines(simulated)
    verdict = conclude(plan.tasks, members, every)
    over_one = conclude(plan.tasks, members, {"baseline 0": every["baseline 0"]})
    scores = simulated.by_split["search"].mean(axis=1)
    best = N_BASELINES + int(scores[N_BASELINES:].argmax())
    one, strongest = (
        gain_interval(
            plan.tasks, simulated.outcomes(best, "search"), simulated.outcomes(baseline, "search")
        )
        for baseline in (0, int(scores[:N_BASELINES].argmax()))
    )
    return verdict.is_shown, over_one.is_shown, one.low > 0, strongest.low > 0


def power(plan: Plan, simulated: Simulated, sizes: Sequence[int]) -> list[tuple[bool, float]]:
    """Tell by size of the shortlist whether a gain is claimed, and what the winner truly gains."""
    scores = simulated.by_split["search"][N_BASELINES:].mean(axis=1)
    ranked = np.argsort(-scores, kind="stable")
    found = []
    for size in sizes:
        members = {int(n): simulated.outcomes(N_BASELINES + n, "holdout") for n in ranked[:size]}
        verdict = conclude(plan.tasks, members, baselines(simulated))
        found.append((verdict.is_shown, float(simulated.abilities[N_BASELINES + verdict.trial])))
    return found


def simulated_plan() -> Plan:
    """Plan a search on 200 search and 200 holdout documents of one task; no model is run."""
    file = SearchFile.load(ROOT / "configs/quickstart.yml").as_dict()
    models = str(ROOT / "configs/quickstart/models")
    file["base_model"] = f"{models}/base"
    for entry in file["models"]:
        entry["model"] = f"{models}/{Path(entry['model']).name}"
    file["tasks"] = [TASK]
    file["search"] |= {"n_iterations": N_CANDIDATES, "racing": "none"}
    file["scoring"] |= {"limit": 200, "holdout": 200, "task_paths": [str(ROOT / "tasks")]}
    return make_plan(SearchFile(file), device="cpu")


def main() -> None:
    """Print rates, with their standard errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--power", action="store_true", help="candidates that differ")
    parser.add_argument("--searches", type=int, default=1000)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    plan, n = simulated_plan(), arguments.searches
    for correlation in CORRELATIONS:
        if not arguments.power:
            found = np.array([claims(plan, each) for each in searches(plan, n, correlation)])
            shown, over_one, one, strongest = found.mean(axis=0)
            print(
                f"correlation {correlation}: the verdict claims a gain in {shown:.1%} of {n} searches, "
                f"over a single baseline in {over_one:.1%}; "
                f"on the search documents best minus one baseline in {one:.1%}, minus the best in "
                f"{strongest:.1%}",
                flush=True,
            )
            continue
        for spread in SPREADS:
            results = np.array(
                [power(plan, each, SHORTLISTS) for each in searches(plan, n, correlation, spread)]
            )
            errors = results.std(axis=0) / np.sqrt(n)
            for size, (shown, gain), (e, f) in zip(SHORTLISTS, results.mean(axis=0), errors, strict=True):
                print(
                    f"correlation {correlation}, spread {spread}, shortlist of {size}: a gain is claimed "
                    f"in {shown:.3f} +- {e:.3f}, the winner truly gains {gain:.4f} +- {f:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
