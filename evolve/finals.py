"""The finals: of candidates that were ranked by less, the best are scored by the metrics on everything.

A signal, a part of the documents, or adapters in place of merged weights rank candidates while the
sampler searches; what they are worth to the user the tasks' own metrics say. The finalists are merged
and scored on all search documents in one go, as `evolve eval --like` does, and the best of them by
metric is the winner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from evolve.budget import Budget
from evolve.errors import SearchStoppedError
from evolve.front import ranking
from evolve.heats import Heats
from evolve.kept import kept_outcomes
from evolve.objectives import Objectives
from evolve.plan import Plan
from evolve.study import Finalist, Study
from evolve.workers import Pool
from evolve.workers.worker import Job

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def finals(
    study: Study,
    plan: Plan,
    pool: Pool,
    heats: Heats,
    budget: Budget,
    scored: Callable[[], None],
) -> None:
    """Score the best candidates by the tasks' metrics, and keep their order.

    They are taken in the order of what the sampler saw; one that cannot be scored makes way for the
    next. Candidates that are equal by metric keep that order. Where they were scored before, and no
    trial has finished since, nothing is done.

    Args:
        budget: ends the finals where the next finalist would exceed it.
        scored: called for each candidate that had to be scored.

    Raises:
        SearchStoppedError: none of them can be scored, or may be.
    """
    if study.has_finals:
        return
    ranked = heats.elite(pool, budget, scored)
    # Of a front every member: the sampler finds none better than another.
    n = max(plan.n_finalists, 0 if heats.race else len(study.front()))
    places = iter(ranked[: 2 * n])
    scores: dict[int, dict[str, float]] = {}
    is_spent = False

    def jobs(trials: Sequence[FrozenTrial]) -> Iterator[tuple[str, Job]]:
        """Yield what has to be scored, by file, as long as the budget allows it."""
        nonlocal is_spent
        for trial in trials:
            if (known := _known_scores(plan, trial)) is not None:
                scores[trial.number] = known
            elif budget.takes(_file(trial), plan.tasks.n_documents):
                recipe = plan.space.recipe(trial.params)
                prompting = (plan.setup.prompting,)
                yield _file(trial), Job(str(trial.number), "final", recipe, ("search",), prompting)
            else:
                is_spent = True
                return

    while not is_spent and (trials := list(islice(places, n - len(scores)))):
        found = kept_outcomes(study, plan, pool, jobs(trials), scored)
        for trial in trials:
            if (outcomes := found.get(_file(trial))) is not None:
                scores[trial.number] = plan.tasks.scores(outcomes["search"])
    by_metric = Objectives(plan.tasks, plan.search_file.search, "metric")
    finalists = [
        Finalist(number, scores[number], by_metric.rate(scores[number], heats.base))
        for number in (trial.number for trial in ranked)
        if number in scores
    ]
    if ranked and not finalists:
        if (failed := study.note(f"{_file(ranked[0])} failed")) is None:
            raise SearchStoppedError(budget.shortage())
        _, kind, text = failed
        raise SearchStoppedError(
            f"no candidate could be scored by the tasks' own metrics ({kind}: {text}); correct the "
            f"task, or run the same command again to try once more"
        )
    ratings = [finalist.rating for finalist in finalists]
    order = ranking(
        np.array([rating.values for rating in ratings]),
        [rating.total_violation for rating in ratings],
        [rating.objective for rating in ratings],
    )
    study.keep_finals([finalists[i] for i in order], budget.asked_later)


def _known_scores(plan: Plan, trial: FrozenTrial) -> dict[str, float] | None:
    """Return a candidate's scores where the search took them all, on all its documents."""
    scores = trial.user_attrs["scores"]
    if "standard_errors" in trial.user_attrs or trial.user_attrs.get("scored_as") == "adapter":
        return None
    keys = [task.key for task in plan.tasks.tasks]
    if trial.user_attrs["documents"] < plan.tasks.n_documents or not scores.keys() >= set(keys):
        return None
    return {key: scores[key] for key in keys}


def _file(trial: FrozenTrial) -> str:
    return f"final-{trial.number}"
