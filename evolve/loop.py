"""The whole story of a search: propose, evaluate, record, and at the end the verdict.

plan = make_plan(SearchFile.load("search.yml"))
result = run(plan.search_file, folder=Path("my-search"))
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from evolve.errors import SearchStoppedError
from evolve.export import export_yaml
from evolve.plan import Plan, make_plan
from evolve.samplers import Proposal, make_sampler
from evolve.search_file import SearchFile
from evolve.study import Study, load_outcomes, save_outcomes
from evolve.tasks import SPLITS, Outcomes, Split
from evolve.verdict import Verdict, baseline_jobs, conclude
from evolve.workers import Pool
from evolve.workers.local import LocalPool
from evolve.workers.worker import Job, Result, Seconds, Worker
from merge_core.checkpoint.write import write_text
from merge_core.errors import RecipeError
from merge_core.recipe import Recipe

Progress = Callable[[str, Study | None, Plan], None]
# Before so many candidates have finished, a share of failures says little.
_FEW = 5


@dataclass(frozen=True)
class Workers:
    """How many workers evaluate candidates, and where.

    `count` 1 is this process; more are Ray actors.
    """

    count: int = 1
    gpus_each: float = 0
    ray_address: str | None = None


@dataclass(frozen=True)
class StudyResult:
    """What a search found: its record, the best trial and the verdict on it."""

    study: Study
    best: FrozenTrial | None
    recipe: Recipe | None
    verdict: Verdict | None
    was_complete: bool


def run(
    search_file: SearchFile,
    *,
    folder: Path | None = None,
    storage: str | None = None,
    workers: Workers | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_unsafe_code: bool = False,
    progress: Progress = lambda event, study, plan: None,
) -> StudyResult:
    """Run a search, or go on with it, up to `n_iterations` candidates in total.

    Args:
        search_file: what to search.
        folder: the storage path, by default NAME-search; made, or resumed where it holds this search.
        storage: URL of another storage than folder/study.db.
        progress: called with "starting" (before there is a study), "started", "told", "baseline"
            and "verdict".

    Raises:
        SearchFileError, ResumeRefusedError: the input is at fault; nothing was written.
        SearchStoppedError: too many candidates failed.
        PausedError: a signal asked for a pause; everything finished is recorded.
    """
    began = time.monotonic()
    folder = folder or Path(f"{search_file.name}-search")
    plan = make_plan(
        search_file,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_unsafe_code=allow_unsafe_code,
    )
    if Study.is_in(folder):
        study = Study.create_or_resume(folder, storage, plan.search_file, plan.identity())
        if (kept := _kept_verdict(study, plan)) is not None:
            return _result(study, plan, kept, was_complete=True)
    # A new search writes nothing before its engine is up.
    progress("starting", None, plan)
    pool = start_pool(plan, workers or Workers())
    try:
        study = Study.create_or_resume(folder, storage, plan.search_file, plan.identity())
        with study.locked():
            study.keep_note("documents", plan.documents())
            study.keep_note("n_layers", plan.n_layers)
            progress("started", study, plan)
            try:
                search(study, plan, pool, lambda: progress("told", study, plan))
                verdict = judge(study, plan, pool, lambda: progress("baseline", study, plan))
            finally:
                spent = (study.note("seconds_total") or 0) + time.monotonic() - began
                study.keep_note("seconds_total", spent)
    finally:
        pool.close()
    progress("verdict", study, plan)
    return _result(study, plan, verdict, was_complete=False)


def search(study: Study, plan: Plan, pool: Pool, told: Callable[[], None]) -> None:
    """Propose and evaluate candidates until `n_iterations` are finished or time is up."""
    settings = plan.search_file.search
    sampler = make_sampler(settings.sampler, plan.space, settings.seed)
    deadline = time.monotonic() + (settings.timeout_s or float("inf"))
    interrupted = [t for t in study.trials()[: settings.n_iterations] if t.state == TrialState.RUNNING]
    pending = 0
    while True:
        while pending < pool.size and time.monotonic() < deadline:
            if interrupted:
                trial = interrupted.pop(0)
                number, values = trial.number, trial.params
                study.begin_again(number)
            elif (number := len(trials := study.trials())) < settings.n_iterations:
                # The starts come first: they are the recipe a user would have guessed.
                proposal = sampler.propose(number, trials) if number else Proposal(plan.space.starts())
                values = proposal.values
                study.begin(number, proposal, plan.space.distributions())
            else:
                break
            try:
                recipe = plan.space.recipe(values)
            except RecipeError as error:  # choices that each are right may not go together
                study.fail(number, "recipe", str(error), Seconds())
                _stop_if_hopeless(study, settings.max_failed_share)
                continue
            pool.submit(Job(str(number), "trial", recipe, ("search",), (plan.setup.prompting,)))
            pending += 1
        if not pending:
            return
        record(study, plan, pool.wait())
        pending -= 1
        told()
        _stop_if_hopeless(study, settings.max_failed_share)


def record(study: Study, plan: Plan, result: Result) -> None:
    """Tell a trial's result: COMPLETE with its scores, or FAILED with kind and text."""
    number = int(result.job.name)
    if result.failure:
        study.fail(number, *result.failure, result.seconds)
        return
    outcomes = result.outcomes[plan.setup.prompting]["search"]
    scores = plan.tasks.scores(outcomes)
    study.complete(number, plan.tasks.objective(scores), scores, outcomes, result.seconds)
    best = study.best()
    if best is not None and best.number == number:
        write_best(study, plan, best)


def write_best(study: Study, plan: Plan, best: FrozenTrial, verdict: Verdict | None = None) -> None:
    """Keep best.yml current."""
    write_text(
        study.folder / "best.yml", exported(study, plan.space.recipe(best.params), best, plan, verdict)
    )


def exported(
    study: Study, recipe: Recipe, trial: FrozenTrial, plan: Plan, verdict: Verdict | None = None
) -> str:
    """Return a trial's recipe as YAML with its provenance."""
    holdout = verdict.holdout if verdict and verdict.trial == trial.number else {}
    return export_yaml(
        recipe,
        study.name,
        trial.number,
        plan.search_file.search.seed,
        trial.user_attrs["scores"],
        {task: asdict(interval) for task, interval in holdout.items()},
        plan.documents(),
    )


def _stop_if_hopeless(study: Study, max_failed_share: float) -> None:
    trials = study.trials()
    failures = [trial.user_attrs["failure"] for trial in trials if trial.state == TrialState.FAIL]
    n_finished = len(failures) + sum(trial.state == TrialState.COMPLETE for trial in trials)
    if n_finished >= _FEW and len(failures) > max_failed_share * n_finished:
        (kind, text), n = Counter((f["kind"], f["text"]) for f in failures).most_common(1)[0]
        raise SearchStoppedError(
            f"{len(failures)} of {n_finished} candidates failed, more than search.max_failed_share "
            f"{max_failed_share}; the commonest cause ({n} times, at {kind}): {text}"
        )


def judge(study: Study, plan: Plan, pool: Pool, scored: Callable[[], None]) -> Verdict | None:
    """Score baselines and winner on the holdout and compare them; None where every trial failed."""
    best = study.best()
    if best is None:
        return None
    splits: tuple[Split, ...] = SPLITS if plan.search_file.scoring.holdout else ("search",)
    jobs = [replace(job, splits=splits) for job in baseline_jobs(plan.start, plan.setup.prompting)]
    baselines = {
        job.name: outcomes
        for i, job in enumerate(jobs)
        if (outcomes := _kept_outcomes(study, plan, pool, job, f"baseline-{i}", scored))
    }
    recipe = plan.space.recipe(best.params)
    winner: dict[Split, Outcomes] | None = {"search": {}, "holdout": {}}
    if "holdout" in splits:
        job = Job(str(best.number), "winner", recipe, ("holdout",), (plan.setup.prompting,))
        winner = _kept_outcomes(study, plan, pool, job, f"holdout-{best.number}", scored)
    if winner is None:
        _, kind, text = study.note(f"holdout-{best.number} failed")
        raise SearchStoppedError(
            f"the winner, trial {best.number}, could not be scored on the holdout ({kind}: {text}); "
            f"run the same command again to try once more"
        )
    verdict = conclude(plan.tasks, best.number, winner["holdout"], baselines)
    if unscored := [job.name for job in jobs if job.name not in baselines]:
        text = f"{verdict.text}; not compared with {', '.join(unscored)}, which could not be scored"
        verdict = replace(verdict, text=text)
    write_best(study, plan, best, verdict)
    finished = sum(t.state != TrialState.RUNNING for t in study.trials())
    study.keep_note("verdict", {**asdict(verdict), "finished": finished})
    return verdict


def _kept_outcomes(
    study: Study, plan: Plan, pool: Pool, job: Job, file: str, scored: Callable[[], None]
) -> dict[Split, Outcomes] | None:
    """Score a recipe outside the trials, or recall it; None where it cannot be scored.

    Of several promptings the one with the better objective on the last split counts.
    """
    path = study.outcomes_path(file)
    if not path.exists():
        pool.submit(job)
        result = pool.wait()
        if result.failure:
            study.keep_note(f"{file} failed", [job.name, *result.failure])
            return None

        def objective(by_split: Mapping[Split, Outcomes]) -> float:
            return plan.tasks.objective(plan.tasks.scores(by_split[job.splits[-1]]))

        save_outcomes(path, max(result.outcomes.values(), key=objective))
        scored()
    return load_outcomes(path)


def start_pool(plan: Plan, workers: Workers) -> Pool:
    """Start the workers: this process for one, Ray actors for more."""
    if workers.count == 1 and workers.ray_address is None:
        return LocalPool(Worker(plan.setup, plan.tasks, plan.sources))
    from evolve.workers.ray import RayPool

    on_gpu = plan.setup.engine.device.startswith("cuda")
    gpus_each = workers.gpus_each or (1 if on_gpu else 0)
    return RayPool(plan.setup, workers.count, gpus_each, workers.ray_address)


def _result(study: Study, plan: Plan, verdict: Verdict | None, was_complete: bool) -> StudyResult:
    best = study.best()
    recipe = plan.space.recipe(best.params) if best else None
    return StudyResult(study, best, recipe, verdict, was_complete)


def _kept_verdict(study: Study, plan: Plan) -> Verdict | None:
    """Recall the verdict of a search that is complete."""
    note = study.note("verdict")
    best = study.best()
    if note is None or best is None or note["trial"] != best.number:
        return None
    if note["finished"] < plan.search_file.search.n_iterations:
        return None
    return Verdict.recalled(note)
