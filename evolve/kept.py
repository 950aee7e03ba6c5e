"""Recipes that are scored outside the trials: once, with their outcomes kept in the folder.

So a run that was interrupted at its end scores only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from evolve.errors import StorageError, TrialError
from evolve.plan import Plan
from evolve.study import Study
from evolve.tasks import SPLITS, Outcomes, ScoredTask, Split
from evolve.workers import Pool
from evolve.workers.worker import Job


def kept_outcomes(
    study: Study, plan: Plan, pool: Pool, job: Job, file: str, scored: Callable[[], None]
) -> dict[Split, Outcomes] | None:
    """Score a recipe, or recall its outcomes; None where it cannot be scored, and a note says why.

    Of several promptings the one with the better objective counts, on the holdout if that is asked.

    Args:
        file: names the outcomes, and "FILE failed" the note: [job's name, kind, text].
        scored: called where something was scored.
    """
    if not study.outcomes.has(file):
        pool.submit(job)
        result = pool.wait()
        if result.failure:
            study.keep_note(f"{file} failed", [job.name, *result.failure])
            return None

        def objective(by_split: Mapping[Split, Outcomes]) -> float:
            *_, last = (split for split in job.splits if split in SPLITS)
            tasks = plan.tasks.following(job.signal)
            return tasks.objective(tasks.scores(by_split[last]))

        every = list(result.outcomes.values())
        try:
            study.outcomes.save(file, max(every, key=objective) if len(every) > 1 else every[0])
        except TrialError as error:
            study.keep_note(f"{file} failed", [job.name, error.kind, str(error)])
            return None
        scored()
    outcomes = study.outcomes.load(file)
    _check(study.outcomes.path(file), plan, job, outcomes)
    return outcomes


def _check(path: Path, plan: Plan, job: Job, outcomes: Mapping[Split, Outcomes]) -> None:
    """Check that a file holds every task and split that was asked for.

    Raises:
        StorageError: it does not, and may be made again.
    """
    for split in job.splits:
        tasks = plan.report_only if split == "report" else plan.tasks.following(job.signal)
        drawn: Split = "search" if split == "report" else split
        for task in tasks.tasks if tasks else ():
            if _asks(job, task, drawn) and not outcomes.get(split, {}).get(task.key):
                raise StorageError(
                    f"{path} has no outcomes of {task.key} on {split} documents; remove the file, and "
                    f"run the same command again"
                )


def _asks(job: Job, task: ScoredTask, split: Split) -> bool:
    """Tell whether a job asks documents of a task; of a few documents all may be another's."""
    if job.documents is None:
        return task.n_documents(split) > 0
    asked = job.documents
    return any(set(leaf.documents[split]) & set(asked.get(leaf.name, ())) for leaf in task.leaves)
