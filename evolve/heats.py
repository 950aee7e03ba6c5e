"""Who is asked what, one job after another: a candidate whole, or raced over blocks of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evolve.budget import Budget
from evolve.front import front, spread
from evolve.kept import kept_outcomes
from evolve.plan import Plan
from evolve.racing import Document, Race, Round, Values, values_of
from evolve.smoothing import MOST_SMOOTHED, coordinates, smoothed
from evolve.study import Study
from evolve.tasks import Documents, Outcomes
from evolve.workers import Pool
from evolve.workers.worker import Job, Result
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class Heats:
    """The jobs of a search's candidates.

    Without racing a candidate is one job over all search documents. With it, it is asked half a
    block, then the other half unless it is dropped.

    Args:
        study: what was told before is learned from.
        base: the base model's scores, where a constraint refers to them.
    """

    def __init__(self, study: Study, plan: Plan, base: Mapping[str, float] | None = None) -> None:
        self._study, self._plan, self.base = study, plan, base
        self.race = plan.race()
        self._halves: dict[int, Result] = {}
        if self.race:
            for trial in sorted(study.ranked(), key=lambda trial: int(trial.user_attrs["told"])):
                self.race.tell(trial.number, self._values(self.race, trial))

    def _values(self, race: Race, trial: FrozenTrial) -> Values:
        if (recorded := trial.user_attrs.get("raced")) is not None:
            return race.recalled(trial.number, recorded)
        return race.values(trial.number, self._told(trial.number))

    def _told(self, number: int) -> Outcomes:
        return self._study.outcomes.load(f"trial-{number}")["search"]

    # ---- during the search ----------------------------------------------------------------------

    def begin(self, number: int, recipe: Recipe) -> Job:
        """Return a candidate's first job."""
        prompting, signal = self._plan.setup.prompting, self._plan.search_file.search.followed
        asked = by_leaf(self.race.blocks(number)[0]) if self.race else None
        return Job(
            str(number), "trial", recipe, ("search",), (prompting,), signal=signal, documents=asked
        )

    def more(self, result: Result) -> Job | None:
        """Return a candidate's next job; None where it has been asked enough, or has failed."""
        number = int(result.job.name)
        if not self.race or result.failure or number in self._halves:
            return None
        outcomes = result.outcomes[self._plan.setup.prompting]["search"]
        if self.race.is_hopeless(number, self.race.values(number, outcomes, n_halves=1)):
            return None
        self._halves[number] = result
        return replace(result.job, documents=by_leaf(self.race.blocks(number)[1]))

    def whole(self, result: Result) -> Result:
        """Return a candidate's last result joined with the one before."""
        first = self._halves.pop(int(result.job.name), None)
        if first is None:
            return result
        seconds = first.seconds + result.seconds
        if result.failure:
            return replace(result, seconds=seconds)
        prompting = self._plan.setup.prompting
        both = joined(first.outcomes[prompting]["search"], result.outcomes[prompting]["search"])
        return replace(result, outcomes={prompting: {"search": both}}, seconds=seconds)

    def scores(self, number: int, outcomes: Outcomes) -> tuple[dict[str, float], dict[str, float]]:
        """Return a candidate's scores over all search documents, and their standard errors if estimated.

        Raises:
            TrialTaskError: a score cannot be computed.
        """
        if self.race is None:
            return self._plan.followed.scores(outcomes), {}
        estimates = self.race.estimates(self.race.values(number, outcomes))
        return (
            {key: estimate.value for key, estimate in estimates.items()},
            {key: estimate.standard_error for key, estimate in estimates.items()},
        )

    def recorded(self, number: int, outcomes: Outcomes) -> dict[str, Any]:
        """Return what a trial's record says of its race, so that a resume need not open every file."""
        if self.race is None:
            return {}
        return {"raced": self.race.recorded(number, self.race.values(number, outcomes))}

    def tell(self, number: int, outcomes: Outcomes) -> None:
        """Learn from a candidate that was told."""
        if self.race:
            self.race.tell(number, self.race.values(number, outcomes))

    # ---- before the finals ----------------------------------------------------------------------

    def elite(self, pool: Pool, budget: Budget, scored: Callable[[], None]) -> list[FrozenTrial]:
        """Return the candidates for the finals, the best first; see `evolve.front.spread`.

        Raced candidates go through rounds, in which those who are left are asked more documents, as long
        as the budget allows it. Who is left is said by smoothed estimates; of a front, members from all
        over it.
        """
        ranked, race = self._study.ranked(), self.race
        if race is None or not ranked:
            return ranked
        values = {trial.number: self._values(race, trial) for trial in ranked}
        points = {
            trial.number: coordinates(self._plan.space.variables, trial.params)
            for trial in ranked[:MOST_SMOOTHED]
        }
        known: dict[int, Outcomes] = {}  # of those who take part
        ratings = self._rated(race, ranked, values, points)
        for i, each in enumerate(race.rounds()):
            # A front's members are all as good; at most twice the round's places are theirs.
            n_on_front = min(len(front(*ratings)), 2 * each.n_candidates)
            order = spread(*ratings, max(each.n_candidates, n_on_front))
            ranked = [ranked[j] for j in order]
            known |= {t.number: self._told(t.number) for t in ranked if t.number not in known}
            jobs = self._round(i, each, ranked, known, budget)
            found = kept_outcomes(self._study, self._plan, pool, jobs, scored)
            for number in (trial.number for trial in ranked):
                if (more := found.get(_file(i, number))) is not None:
                    known[number] = joined(known[number], more["search"])
                    values[number] = values_of(known[number])
            ratings = self._rated(race, ranked, values, points)
        return [ranked[j] for j in spread(*ratings, len(ranked))]

    def _rated(
        self,
        race: Race,
        trials: Sequence[FrozenTrial],
        values: Mapping[int, Values],
        points: Mapping[int, np.ndarray],
    ) -> tuple[np.ndarray, list[float]]:
        """Return the values of candidates, and their violations in all, by what is known by now.

        Args:
            values: what every candidate gave, also those who are out.
            points: where candidates are in the space; the estimates of these are smoothed.
        """
        estimates = {number: race.estimates(its) for number, its in values.items()}
        scores = {
            number: {key: estimate.value for key, estimate in by_key.items()}
            for number, by_key in estimates.items()
        }
        for key in (task.key for task in self._plan.followed.tasks):
            some = [estimates[number][key] for number in points]
            steadier = smoothed(
                np.array([*points.values()]),
                np.array([estimate.value for estimate in some]),
                np.array([estimate.standard_error for estimate in some]),
            )
            for number, value in zip(points, steadier, strict=True):
                scores[number][key] = float(value)
        ratings = [self._plan.objectives.rate(scores[trial.number], self.base) for trial in trials]
        return np.array([r.values for r in ratings]), [r.total_violation for r in ratings]

    def _wanted(self, each: Round, known: Outcomes) -> dict[str, list[Document]]:
        """Return by score what is new to a candidate of a round's documents."""
        before = {key: {(o.leaf, o.document) for o in every} for key, every in known.items()}
        return {
            key: [document for document in documents if document not in before[key]]
            for key, documents in each.documents.items()
        }

    def _round(
        self,
        i: int,
        each: Round,
        trials: Sequence[FrozenTrial],
        known: Mapping[int, Outcomes],
        budget: Budget,
    ) -> Iterator[tuple[str, Job]]:
        """Yield the jobs of round `i`, by file: what is new to each, as long as the budget allows it."""
        for trial in trials:
            wanted = self._wanted(each, known[trial.number])
            n_wanted = len({document for every in wanted.values() for document in every})
            file = _file(i, trial.number)
            if n_wanted and budget.takes(file, n_wanted, keep_for_finals=True):
                job = self.begin(trial.number, self._plan.space.recipe(trial.params))
                yield file, replace(job, kind="final", documents=by_leaf(wanted))


def _file(i: int, number: int) -> str:
    """Name the file of what a trial gave in round `i`."""
    return f"round-{i + 1}-{number}"


def by_leaf(documents: Mapping[str, list[Document]]) -> Documents:
    """Return documents, given by score, by leaf."""
    found: dict[str, set[int]] = {}
    for every in documents.values():
        for leaf, number in every:
            found.setdefault(leaf, set()).add(number)
    return {leaf: tuple(sorted(numbers)) for leaf, numbers in found.items()}


def joined(some: Outcomes, more: Outcomes) -> Outcomes:
    """Return the outcomes of both, each document once, in order of leaves and documents."""
    both = {}
    for key in some:
        every = {
            (outcome.leaf, outcome.document): outcome for outcome in (*some[key], *more.get(key, ()))
        }
        both[key] = [every[place] for place in sorted(every)]
    return both
