"""The end of a search: baselines and winner on the holdout, the noise floor, the verdict.

What is scored here is no trial; see `evolve.kept`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from evolve.errors import SearchStoppedError
from evolve.export import write_best
from evolve.kept import kept_outcomes
from evolve.noise import Noise, measured
from evolve.plan import Plan
from evolve.study import Study, load_outcomes
from evolve.tasks import SPLITS, Outcomes, Split
from evolve.verdict import Verdict, baseline_jobs, conclude
from evolve.workers import Pool
from evolve.workers.worker import Job


def judge(study: Study, plan: Plan, pool: Pool, scored: Callable[[], None]) -> Verdict | None:
    """Score baselines and winner on the holdout and compare them; None where every trial failed."""
    best = study.best()
    if best is None:
        return None
    splits: tuple[Split, ...] = SPLITS if plan.search_file.scoring.holdout else ("search",)
    jobs = _baseline_jobs(plan)
    baselines = {
        job.name: outcomes
        for i, job in enumerate(jobs)
        if (outcomes := kept_outcomes(study, plan, pool, job, f"baseline-{i}", scored))
    }
    recipe = plan.space.recipe(best.params)
    winner: dict[Split, Outcomes] | None = load_outcomes(study.search_outcomes_path(best.number))
    job = Job(str(best.number), "winner", recipe, splits[-1:], (plan.setup.prompting,))
    if "holdout" in splits:
        winner = kept_outcomes(study, plan, pool, job, f"holdout-{best.number}", scored)
    if winner is None:
        _, kind, text = study.note(f"holdout-{best.number} failed")
        raise SearchStoppedError(
            f"the winner, trial {best.number}, could not be scored on the holdout ({kind}: {text}); "
            f"run the same command again to try once more"
        )
    noise = _noise(study, plan, pool, job, winner[splits[-1]], scored)
    verdict = conclude(plan.tasks, best.number, winner["holdout"], baselines, noise)
    if unscored := [job.name for job in jobs if job.name not in baselines]:
        text = f"{verdict.text}; not compared with {', '.join(unscored)}, which could not be scored"
        verdict = replace(verdict, text=text)
    write_best(study, plan, best, verdict)
    study.keep_note("verdict", {**asdict(verdict), "finished": len(study.finished())})
    return verdict


def base_scores(
    study: Study, plan: Plan, pool: Pool, scored: Callable[[], None]
) -> dict[str, float] | None:
    """Score the base model on the search documents, where a constraint refers to it.

    It is the first of the baselines: the verdict recalls what is scored here.

    Raises:
        SearchStoppedError: it cannot be scored.
    """
    if not plan.objectives.needs_base:
        return None
    outcomes = kept_outcomes(study, plan, pool, _baseline_jobs(plan)[0], "baseline-0", scored)
    if outcomes is None:
        name, kind, text = study.note("baseline-0 failed")
        raise SearchStoppedError(
            f"search.constraints refer to the base model {name}, which could not be scored ({kind}: "
            f"{text}); write a score in place of `not_below: base`"
        )
    return plan.tasks.scores(outcomes["search"])


def _baseline_jobs(plan: Plan) -> list[Job]:
    splits: tuple[Split, ...] = SPLITS if plan.search_file.scoring.holdout else ("search",)
    jobs = baseline_jobs(plan.start, plan.setup.prompting, plan.references())
    return [replace(job, splits=splits) for job in jobs]


def kept_verdict(study: Study, plan: Plan) -> Verdict | None:
    """Recall the verdict of a search that is complete."""
    note = study.note("verdict")
    best = study.best()
    if note is None or best is None or note["trial"] != best.number:
        return None
    if note["finished"] < plan.search_file.search.n_iterations:
        return None
    return Verdict.recalled(note)


def _noise(
    study: Study, plan: Plan, pool: Pool, winner: Job, recorded: Outcomes, scored: Callable[[], None]
) -> Noise | None:
    """Score the winner twice more; None where a repetition fails."""
    (split,) = winner.splits
    repetitions = {}
    for name, in_reverse in (("again", False), ("reordered", True)):
        job = replace(winner, kind="noise", in_reverse=in_reverse)
        file = f"noise-{winner.name}-{name}"
        outcomes = kept_outcomes(study, plan, pool, job, file, scored)
        if outcomes is None:
            return None
        repetitions[name] = outcomes[split]
    return measured(plan.tasks, split, recorded, repetitions)
