"""The end of a search: baselines and shortlist on the holdout, the noise floor, the verdict.

What is scored here is no trial; see `evolve.kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from evolve.baselines import baseline_jobs
from evolve.budget import ended_at
from evolve.errors import SearchStoppedError
from evolve.export import keep_current, write_best
from evolve.kept import kept_outcomes
from evolve.noise import Noise, measured
from evolve.plan import Plan
from evolve.study import Study, is_violating
from evolve.tasks import SPLITS, Outcomes, Split
from evolve.verdict import SHORTLIST, Elsewhere, Verdict, conclude, constrained, winner_of
from evolve.workers import Pool
from evolve.workers.worker import Job


def judge(study: Study, plan: Plan, pool: Pool, scored: Callable[[], None]) -> Verdict | None:
    """Score baselines and shortlist on the holdout and compare them; None where every trial failed."""
    if study.best() is None:
        return None
    finalists = frozen_shortlist(study, plan)
    *_, split = _splits(plan)
    baselines, members = _compared(study, plan, pool, finalists, split, scored)
    holdouts = {n: by_split["holdout"] for n, by_split in members.items()}
    number = _winner(study, plan, holdouts)
    winner = _job(study, plan, number, split)
    noise, reported = _of_winner(study, plan, pool, winner, members[number][split], scored)
    elsewhere = None
    if plan.report_only and reported is not None:
        by_name = {name: by_split["report"] for name, by_split in baselines.items()}
        elsewhere = Elsewhere(plan.report_only, reported, by_name)
    verdict = conclude(plan.tasks, holdouts, baselines, noise, elsewhere, number)
    if (violations := study.violations(study.trials()[number])) is not None:
        on_holdout = _violations(plan, holdouts[number], baselines)
        verdict = constrained(verdict, plan.tasks, violations, on_holdout)
    unscored = [job.name for job in _baseline_jobs(plan) if job.name not in baselines]
    unscored += [f"trial {n}" for n in finalists if n not in members]
    own = plan.tasks.notices()  # which the verdict has said
    if notices := [notice for notice in study.note("notices") or () if notice not in own]:
        verdict = replace(verdict, text="; ".join([verdict.text, *notices]))
    if unscored:
        text = f"{verdict.text}; not compared with {', '.join(unscored)}, which could not be scored"
        verdict = replace(verdict, text=text)
    write_best(study, plan, study.trials()[number], verdict)
    study.keep_note("verdict", {**asdict(verdict), "finished": study.n_finished})
    keep_current(study, plan, verdict)
    return verdict


def base_scores(
    study: Study, plan: Plan, pool: Pool, scored: Callable[[], None]
) -> dict[str, float] | None:
    """Score the base model on the search documents, where a constraint refers to it.

    It is one of the baselines: the verdict recalls what is scored here.

    Raises:
        SearchStoppedError: it cannot be scored.
    """
    if not plan.objectives.needs_base:
        return None
    jobs = _baseline_jobs(plan)
    ((file, job),) = (
        (f"baseline-{i}", job) for i, job in enumerate(jobs) if job.name == plan.start.base_model
    )
    outcomes = kept_outcomes(study, plan, pool, [(file, job)], scored).get(file)
    if outcomes is None:
        name, kind, text = study.note(f"{file} failed")
        raise SearchStoppedError(
            f"search.constraints refer to the base model {name}, which could not be scored ({kind}: "
            f"{text}); write a score in place of `not_below: base`"
        )
    return plan.tasks.scores(outcomes["search"])


def _violations(
    plan: Plan, winner: Outcomes, baselines: Mapping[str, Mapping[Split, Outcomes]]
) -> dict[str, float]:
    """Return the winner's violations on the holdout, by constraint; empty where there is none."""
    if not any(winner.values()):
        return {}
    base = None
    if plan.objectives.needs_base and plan.start.base_model:
        base = plan.tasks.scores(baselines[plan.start.base_model]["holdout"])
    return plan.objectives.violations(plan.tasks.scores(winner), base)


def _splits(plan: Plan) -> tuple[Split, ...]:
    return SPLITS if plan.search_file.scoring.holdout else ("search",)


def _baseline_jobs(plan: Plan) -> list[Job]:
    splits = (*_splits(plan), *(("report",) if plan.report_only else ()))
    jobs = baseline_jobs(plan.start, plan.setup.prompting, plan.references())
    return [replace(job, splits=splits) for job in jobs]


def shortlist(study: Study, plan: Plan) -> list[int]:
    """Choose the trials that the holdout is asked about: the search's best, each another recipe.

    None but the first may violate a constraint, and that only where all do. Without a holdout there
    is nothing to ask. Of a Pareto front it is the default choice alone: which of the others is better
    is not the holdout's to say.
    """
    if plan.search_file.search.objective == "pareto":
        best = study.best()
        return [best.number] if best else []
    n = SHORTLIST if plan.search_file.scoring.holdout else 1
    chosen: dict[str, int] = {}
    for trial in study.ranked():
        if chosen and is_violating(study.violations(trial)):
            break
        chosen.setdefault(plan.space.recipe(trial.params).to_yaml(), trial.number)
        if len(chosen) == n:
            break
    return list(chosen.values())


def frozen_shortlist(study: Study, plan: Plan) -> list[int]:
    """Write the shortlist down before any of it meets the holdout, or recall what was written.

    A search that goes on freezes another one; members of those before stay finalists, so that the
    intervals count everything the holdout was asked about.
    """
    kept = study.note("shortlist") or {"trials": [], "finished": 0}
    finished = study.n_finished
    if finished > kept["finished"]:
        trials = list(dict.fromkeys([*shortlist(study, plan), *kept["trials"]]))
        kept = {"trials": trials, "finished": finished}
        study.keep_note("shortlist", kept)
    finalists: list[int] = kept["trials"]
    return finalists


def _winner(study: Study, plan: Plan, members: Mapping[int, Outcomes]) -> int:
    """Choose among the members by their holdout outcomes, in the search's order.

    One that violates a constraint wins only where all do. Of a Pareto front it is the default choice:
    members of earlier shortlists only widen the intervals.
    """
    trials = study.trials()
    eligible = [n for n in members if not is_violating(study.violations(trials[n]))] or list(members)
    if plan.search_file.search.objective == "pareto":
        return eligible[0]
    return winner_of(plan.tasks, {n: members[n] for n in eligible})


def _compared(
    study: Study,
    plan: Plan,
    pool: Pool,
    finalists: list[int],
    split: Split,
    scored: Callable[[], None],
) -> tuple[dict[str, dict[Split, Outcomes]], dict[int, dict[Split, Outcomes]]]:
    """Score baselines by name and finalists by trial; without a holdout, recall the first finalist's.

    Raises:
        SearchStoppedError: none of the finalists can be scored.
    """
    jobs = [(f"baseline-{i}", job) for i, job in enumerate(_baseline_jobs(plan))]
    on_holdout = {n: f"holdout-{n}" for n in finalists if split == "holdout"}
    of_finalists = [(file, _job(study, plan, n, split)) for n, file in on_holdout.items()]
    found = kept_outcomes(study, plan, pool, [*jobs, *of_finalists], scored)
    members = {n: found[file] for n, file in on_holdout.items() if file in found}
    if not on_holdout:
        members = {n: {"search": study.search_outcomes(n), "holdout": {}} for n in finalists[:1]}
    if not members:
        raise _unscored(study, f"holdout-{finalists[0]}", "the holdout")
    return {job.name: found[file] for file, job in jobs if file in found}, members


def _of_winner(
    study: Study, plan: Plan, pool: Pool, winner: Job, recorded: Outcomes, scored: Callable[[], None]
) -> tuple[Noise | None, Outcomes | None]:
    """Score the winner twice more, and on the tasks of `report_only`.

    Returns:
        The noise, None where a repetition fails; the outcomes of those tasks, None where there are none.

    Raises:
        SearchStoppedError: those tasks cannot be scored.
    """
    (split,) = winner.splits
    again = {
        f"noise-{winner.name}-{name}": replace(winner, kind="noise", in_reverse=in_reverse)
        for name, in_reverse in (("again", False), ("reordered", True))
    }
    jobs, report = list(again.items()), f"report-{winner.name}"
    if plan.report_only:
        jobs.append((report, replace(winner, splits=("report",))))
    found = kept_outcomes(study, plan, pool, jobs, scored)
    if plan.report_only and report not in found:
        raise _unscored(study, report, "the tasks of report_only")
    repetitions = {file.rpartition("-")[2]: found[file][split] for file in again if file in found}
    is_known = len(repetitions) == len(again)
    noise = measured(plan.tasks, split, recorded, repetitions) if is_known else None
    return noise, found[report]["report"] if plan.report_only else None


def _job(study: Study, plan: Plan, number: int, split: Split) -> Job:
    recipe = plan.space.recipe(study.trials()[number].params)
    return Job(str(number), "winner", recipe, (split,), (plan.setup.prompting,))


def _unscored(study: Study, file: str, where: str) -> SearchStoppedError:
    trial, kind, text = study.note(f"{file} failed")
    return SearchStoppedError(
        f"the winner, trial {trial}, could not be scored on {where} ({kind}: {text}); "
        f"run the same command again to try once more"
    )


def kept_verdict(study: Study, plan: Plan) -> Verdict | None:
    """Recall the verdict of a search that is complete."""
    note = study.note("verdict")
    best = study.best()
    if note is None or best is None or note["trial"] != best.number:
        return None
    settings = plan.search_file.search
    is_whole = (
        note["finished"] >= settings.n_iterations
        or study.note("exhausted")
        or ended_at(study, settings) is not None
    )
    if not is_whole:
        return None
    return Verdict.recalled(note)
