"""The beginning of a search, held where nobody sees it, to measure what the whole will take.

The search's own first candidates are evaluated in the workers that it would have, and recorded in a
temporary folder. Where the end of the search asks more than a candidate is asked, one is asked that.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from evolve.baselines import baseline_jobs
from evolve.budget import Budget, budget_faults, most_candidates
from evolve.candidates import commonest_failure
from evolve.errors import SearchFileError, SearchStoppedError
from evolve.forecast import Amounts, Pace, Scoring
from evolve.heats import Heats
from evolve.intervals import is_binary
from evolve.judge import base_scores
from evolve.loop import search
from evolve.plan import Plan
from evolve.samplers.pace import proposing_seconds
from evolve.samplers.stages import sampler_of
from evolve.study import Study, load_outcomes, save_outcomes
from evolve.tasks import Outcomes
from evolve.under_way import UnderWay, nobody_waits
from evolve.verdict import SHORTLIST
from evolve.workers import Pool
from evolve.workers.worker import Job, Result, Seconds

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Candidates a worker evaluates; and more, where these are quick, until so many seconds are measured.
LEAST, LEAST_S = 3, 2.0
# The winner is scored twice more; see `evolve.noise`.
_REPETITIONS = 2


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, and what it showed.

    Attributes:
        n_candidates: how many were evaluated, those that failed included.
        failures: what went wrong, one line each.
        binary: the tasks whose outcomes are hits and misses.
    """

    pace: Pace
    n_candidates: int
    failures: tuple[str, ...]
    binary: frozenset[str]


def rehearse(plan: Plan, pool: Pool, start_up_s: float, under_way: UnderWay = nobody_waits) -> Rehearsal:
    """Evaluate the first candidates of a search, and measure.

    Args:
        pool: the workers of the search, up.
        start_up_s: what it took until they were.

    Raises:
        SearchFileError: the search's limits allow no candidate.
        SearchStoppedError: no candidate could be evaluated.
    """
    if faults := budget_faults(plan):
        raise SearchFileError(faults)
    with tempfile.TemporaryDirectory(prefix="evolve-check-") as place:
        folder = Path(place) / f"{plan.search_file.name}-search"
        names = plan.objectives.names
        opened = Study.create_or_resume(folder, None, plan.search_file, plan.identity(), len(names))
        with opened as study:
            return _Rehearsal(plan, pool, study, under_way).measured(start_up_s)


class _Rehearsal:
    """The measuring, in a study that will be thrown away."""

    def __init__(self, plan: Plan, pool: Pool, study: Study, under_way: UnderWay) -> None:
        self._plan, self._pool, self._study, self._under_way = plan, pool, study, under_way
        self._told: list[float] = []
        self._sizes: list[int] = []

    def measured(self, start_up_s: float) -> Rehearsal:
        """Evaluate the candidates and return what they took."""
        plan, study, n_workers = self._plan, self._study, self._pool.size
        heats = Heats(study, plan, base_scores(study, plan, self._pool, lambda: None))
        began = time.perf_counter()
        self._search(heats, LEAST * n_workers)
        if not self._complete():
            raise SearchStoppedError(
                f"none of the check's {len(study.trials())} candidates could be evaluated; "
                f"{commonest_failure(study.trials())}"
            )
        self._search(heats, len(self._told) + math.ceil(n_workers * LEAST_S / self._later_s(began)))
        complete = self._complete()
        later = [trial for trial in complete if trial.user_attrs["told"] >= n_workers] or complete
        split = _mean_seconds(later)
        documents = _mean([trial.user_attrs["documents"] for trial in later])
        # What was written per candidate, before anything else is.
        trial_bytes = self._trial_bytes()
        folder_bytes = self._sizes[-1] - len(self._sizes) * trial_bytes
        by_signal, by_metric, outcomes, per_document = self._whole(complete[-1], documents, split.score)
        return Rehearsal(
            Pace(
                start_up_s=start_up_s,
                first_s=(self._told[min(n_workers, len(self._told)) - 1] - began),
                merge_s=split.merge,
                load_s=split.load,
                score_s=split.score,
                other_s=max(0.0, self._later_s(began) - split.merge - split.load - split.score),
                by_signal=by_signal,
                by_metric=by_metric,
                proposing_s=self._proposing_s(),
                trial_bytes=trial_bytes,
                document_bytes=per_document,
                folder_bytes=max(0.0, folder_bytes),
            ),
            len(study.trials()),
            tuple(
                f"trial {trial.number}: {trial.user_attrs['failure']['text'].splitlines()[0]}"
                for trial in study.trials()
                if trial.state == TrialState.FAIL
            ),
            frozenset(task.key for task in plan.tasks.tasks if is_binary(task, outcomes[task.key])),
        )

    def _complete(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.trials() if trial.state == TrialState.COMPLETE]

    def _search(self, heats: Heats, n: int) -> None:
        """Let the search go on to its candidate `n`."""
        n = min(n, self._plan.search_file.search.n_iterations)
        self._under_way(f"evaluating {n} candidates, to measure what the search will take")
        cut = self._plan.search_file.changed(search={"n_iterations": n})
        plan = replace(self._plan, search_file=cut)
        search(self._study, plan, self._pool, heats, Budget(self._study, plan), self._note)

    def _note(self, event: str) -> None:
        if event == "told":
            self._told.append(time.perf_counter())
            self._sizes.append(_size(self._study.folder))

    def _later_s(self, began: float) -> float:
        """Return what a candidate after the workers' first ones takes in its worker."""
        n = self._pool.size
        # One worker that evaluates several at once takes a share of its time for each.
        at_once = 1 if self._pool.by_generation else n
        times = [began, *self._told]
        if len(self._told) > n:
            return (times[-1] - times[n]) / (len(self._told) - n) * at_once
        return (times[-1] - began) / max(1, len(self._told)) * at_once or LEAST_S

    def _trial_bytes(self) -> float:
        """Return by how much the folder grew a candidate; outcomes are written, the database by pages."""
        if len(self._sizes) < 2:
            return float(self._sizes[-1])
        return (self._sizes[-1] - self._sizes[0]) / (len(self._sizes) - 1)

    def _whole(
        self, trial: FrozenTrial, documents: float, score_s: float
    ) -> tuple[Scoring, Scoring, Outcomes, float]:
        """Return scoring by signal and by metric; a candidate's outcomes by metric, bytes a document."""
        study, plan = self._study, self._plan
        if not plan.needs_finals:
            scoring = Scoring.through([(documents, score_s)])
            path = study.outcomes.path(f"trial-{trial.number}")
            outcomes = load_outcomes(path)["search"]
            return scoring, scoring, outcomes, path.stat().st_size / documents
        settings = plan.search_file.search
        asked = Job(
            "whole",
            "final",
            plan.space.recipe(trial.params),
            ("search",),
            (plan.setup.prompting,),
        )
        n = plan.tasks.n_documents
        self._under_way("scoring a candidate on all search documents, as the finals will")
        result = self._evaluated(asked)
        if settings.followed == "metric":
            followed = result.seconds.score
        elif settings.racing == "always":
            followed = self._evaluated(replace(asked, signal=settings.followed)).seconds.score
        else:
            followed = score_s
        outcomes = result.outcomes[plan.setup.prompting]["search"]
        path = study.outcomes.path("whole")
        save_outcomes(path, {"search": outcomes})
        return (
            Scoring.through([(documents, score_s), (n, followed)]),
            Scoring.through([(n, result.seconds.score)]),
            outcomes,
            path.stat().st_size / n,
        )

    def _evaluated(self, job: Job) -> Result:
        """Evaluate a job.

        Raises:
            SearchStoppedError: it failed.
        """
        self._pool.submit(job)
        result = self._pool.wait()
        if result.failure:
            kind, text = result.failure
            raise SearchStoppedError(
                f"the check's candidate could not be scored by the tasks' own metrics ({kind}: {text}); "
                f"correct the task"
            )
        return result

    def _proposing_s(self) -> float:
        plan, settings = self._plan, self._plan.search_file.search
        self._under_way(f"asking the {settings.sampler} sampler, as late as it will be asked")
        n_objectives = len(plan.objectives.names)
        sampler = sampler_of(settings, plan.space, n_objectives)
        n = most_candidates(plan)
        return proposing_seconds(sampler, plan.space, n, n_objectives, settings.n_polish)


def amounts(plan: Plan, n_workers: int) -> Amounts:
    """Count what a plan has in store."""
    settings, tasks = plan.search_file.search, plan.tasks
    has_holdout = bool(plan.search_file.scoring.holdout)
    holdout = {leaf.name: leaf.documents["holdout"] for task in tasks.tasks for leaf in task.leaves}
    jobs = baseline_jobs(plan.start, plan.setup.prompting, plan.references())
    n_candidates = most_candidates(plan)
    n_shortlisted = 1 if settings.objective == "pareto" else min(SHORTLIST, n_candidates)
    return Amounts(
        n_candidates=n_candidates,
        n_workers=n_workers,
        timeout_s=settings.timeout_s,
        rounds=_rounds(plan),
        n_finalists=plan.n_finalists,
        search=tasks.n_documents,
        holdout=sum(map(len, holdout.values())) if has_holdout else 0,
        reported=plan.report_only.n_documents if plan.report_only else 0,
        baselines=tuple(len(job.promptings) for job in jobs),
        n_shortlisted=n_shortlisted if has_holdout else 0,
        n_repetitions=_REPETITIONS,
    )


def _rounds(plan: Plan) -> tuple[tuple[int, float], ...]:
    """Count the rounds' candidates, and the documents that are new to one of them.

    Of the documents that a round adds, a candidate's block holds its share.
    """
    race = plan.race()
    if race is None:
        return ()
    known = len({each for half in race.blocks(0) for every in half.values() for each in every})
    block = known / plan.followed.n_documents
    found, before = [], 0
    for each in race.rounds():
        asked = len({document for every in each.documents.values() for document in every})
        found.append((each.n_candidates, max(0, asked - before) * (1 - block)))
        before = asked
    return tuple(found)


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _mean_seconds(trials: Sequence[FrozenTrial]) -> Seconds:
    every = [trial.user_attrs["seconds"] for trial in trials]
    return Seconds(*(_mean([seconds[part] for seconds in every]) for part in ("merge", "load", "score")))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
