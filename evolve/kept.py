"""Recipes that are scored outside the trials: once, with their outcomes kept in the folder.

So a run that was interrupted at its end scores only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from evolve.errors import StorageError, TrialError
from evolve.plan import Plan
from evolve.study import Study
from evolve.tasks import SPLITS, Outcomes, ScoredTask, Split
from evolve.workers import Pool
from evolve.workers.worker import Job, Result


def kept_outcomes(
    study: Study,
    plan: Plan,
    pool: Pool,
    jobs: Iterable[tuple[str, Job]],
    scored: Callable[[], None],
) -> dict[str, dict[Split, Outcomes]]:
    """Score recipes, as many at once as there are workers, or recall their outcomes.

    Args:
        jobs: each by the name of its file; the next one is drawn when a worker is free for it.
        scored: called whenever something was scored.

    Returns:
        Outcomes by file. One that cannot be scored has none, and the note "FILE failed" says why:
        [job's name, kind, text].
    """
    found: dict[str, dict[Split, Outcomes]] = {}
    pending: dict[str, Job] = {}
    left = iter(jobs)
    n_at_once = 1 if pool.by_generation else pool.size  # a generation is of trials
    while True:
        while len(pending) < n_at_once and (next_one := next(left, None)) is not None:
            file, job = next_one
            if study.outcomes.has(file):
                found[file] = _recalled(study, plan, file, job)
            else:
                pool.submit(job)
                pending[file] = job
        if not pending:
            return found
        result = pool.wait()
        file = next(file for file, job in pending.items() if job is result.job)
        job = pending.pop(file)
        if failure := result.failure or _save(study, plan, file, job, result):
            study.keep_note(f"{file} failed", [job.name, *failure])
            continue
        scored()
        found[file] = _recalled(study, plan, file, job)


def _save(study: Study, plan: Plan, file: str, job: Job, result: Result) -> tuple[str, str] | None:
    """Save a result's outcomes; return kind and text of what makes that impossible.

    Of several promptings the one with the better objective counts, on the holdout if that is asked.
    """

    def objective(by_split: Mapping[Split, Outcomes]) -> float:
        *_, last = (split for split in job.splits if split in SPLITS)
        tasks = plan.tasks.following(job.signal)
        return tasks.objective(tasks.scores(by_split[last]))

    every = list(result.outcomes.values())
    try:
        study.outcomes.save(file, max(every, key=objective) if len(every) > 1 else every[0])
    except TrialError as error:
        return error.kind, str(error)
    return None


def _recalled(study: Study, plan: Plan, file: str, job: Job) -> dict[Split, Outcomes]:
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
