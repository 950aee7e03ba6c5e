"""The whole story of a search: propose, evaluate, record, and at the end the verdict.

plan = make_plan(SearchFile.load("search.yml"))
result = run(plan.search_file, folder=Path("my-search"))
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from evolve.budget import Budget, budget_faults, n_gpus
from evolve.errors import SearchFileError, SearchStoppedError, TrialError, disk_faults_told
from evolve.export import keep_current
from evolve.finals import are_needed, finals
from evolve.heats import Heats
from evolve.judge import base_scores, judge, kept_verdict
from evolve.plan import Plan, make_plan
from evolve.record_check import check_points
from evolve.samplers.proposer import Proposer
from evolve.samplers.stages import sampler_of
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.under_way import UnderWay, nobody_waits
from evolve.verdict import Verdict
from evolve.workers import Pool
from evolve.workers.start import Workers, start_pool
from evolve.workers.tries import MAX_RETRIES
from evolve.workers.worker import Result
from merge_core.recipe import Recipe

Progress = Callable[[str, Study | None, Plan], None]
# Before so many candidates have finished, a share of failures says little.
_FEW = 5


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
    artifacts: Path | None = None,
    workers: Workers | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_unsafe_code: bool = False,
    progress: Progress = lambda event, study, plan: None,
    under_way: UnderWay = nobody_waits,
    say: UnderWay = nobody_waits,
) -> StudyResult:
    """Run a search, or go on with it, up to `n_iterations` candidates in total.

    Args:
        search_file: what to search.
        folder: the storage path, by default NAME-search; made, or resumed where it holds this search.
        storage: URL of another storage than folder/study.db.
        artifacts: a folder that all hosts of this search see, where outcomes are kept too.
        progress: called with "starting" (before there is a study), "started", "base" (scored, where a
            constraint refers to it), "answered" (nothing of the result is recorded yet), "told",
            "exhausted" (nothing is left to propose), "ended" (at a limit of the search), "final",
            "baseline" and "verdict".
        under_way: told what is being done before there is a study: downloads, data sets.
        say: told of workers that are lost and candidates that are tried again.

    Raises:
        SearchFileError, ResumeRefusedError: the input is at fault; nothing was written.
        SearchStoppedError: too many candidates failed.
        WorkersLostError, StorageError: nothing can go on; everything finished is recorded.
        PausedError: a signal asked for a pause; everything finished is recorded.
    """
    began = time.monotonic()
    folder = folder or Path(f"{search_file.name}-search")
    if artifacts is not None and not artifacts.is_dir():
        raise SearchFileError(f"--artifacts is {artifacts}, which is no folder; make it or name another")
    if (earlier := Study.earlier_file(folder, storage)) is not None:
        search_file = search_file.settled(earlier)
    plan = make_plan(
        search_file,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_unsafe_code=allow_unsafe_code,
        under_way=under_way,
    )
    if faults := budget_faults(plan):
        raise SearchFileError(faults)

    def open_study() -> AbstractContextManager[Study]:
        identity, n_values = plan.identity(), len(plan.objectives.names)
        return Study.create_or_resume(folder, storage, plan.search_file, identity, n_values, artifacts)

    with ExitStack() as opened:
        opened.enter_context(disk_faults_told(folder))
        study = opened.enter_context(open_study()) if Study.is_in(folder) else None
        apart: list[int] = []
        if study is not None:
            check_points(folder, study.trials(), plan.space)
            if (kept := kept_verdict(study, plan)) is not None:
                return _result(study, plan, kept, was_complete=True)
            apart = suspects(study)
        for number in apart:
            say(f"candidate {number} was under way whenever the search ended; it gets a process apart")
        # A new search writes nothing before its engine is up.
        progress("starting", None, plan)
        workers = workers or Workers()
        gpus, had_gpus = n_gpus(plan, workers), time.monotonic()
        pool = start_pool(plan, workers, say, bool(apart))
        opened.callback(pool.close)
        memory = pool.memory(plan.references(), plan.start.dtype)
        study = study or opened.enter_context(open_study())
        study.keep_notes(
            {
                "documents": plan.documents(),
                "metrics": plan.metrics(),
                # What an earlier run was allowed stays said.
                "notices": list(dict.fromkeys([*(study.note("notices") or ()), *plan.notices()])),
                "n_layers": plan.n_layers,
                "memory": asdict(memory),
            }
        )
        budget = Budget(study, plan, gpus, began, had_gpus)

        def show(event: str) -> None:
            if event != "answered":  # now and then, so that any end leaves behind what was spent
                budget.keep()
            progress(event, study, plan)

        show("started")
        base = base_scores(study, plan, pool, lambda: show("base"))
        heats = Heats(study, plan, base)
        search(study, plan, pool, heats, budget, show)
        if are_needed(plan):
            finals(study, plan, pool, heats, budget, lambda: show("final"))
            keep_current(study, plan, has_new_scores=True)
        verdict = judge(study, plan, pool, lambda: show("baseline"))
        show("verdict")
    return _result(study, plan, verdict, was_complete=False)


def search(
    study: Study,
    plan: Plan,
    pool: Pool,
    heats: Heats,
    budget: Budget,
    show: Callable[[str], None],
) -> None:
    """Propose and evaluate candidates until `n_iterations` are finished, none is left, or a limit is met.

    Args:
        heats: what a candidate is asked, in one job or several.
        budget: what may be spent; an interrupted candidate was begun within it.
    """
    settings = plan.search_file.search
    sampler = sampler_of(settings, plan.space, len(plan.objectives.names))
    proposer = Proposer(plan.space, sampler, plan.known, settings.seed)
    keep_current(study, plan)
    interrupted = [t for t in study.trials()[: settings.n_iterations] if t.state == TrialState.RUNNING]
    pending = 0
    while True:
        ending = None
        while pending < pool.size:
            number = len(trials := study.trials())
            waits = pool.by_generation and pending and number % pool.size == 0
            if not interrupted and (number >= settings.n_iterations or waits):
                break
            if (ending := budget.refusal()) is not None:
                break
            if interrupted:
                trial = interrupted.pop(0)
                number, values = trial.number, trial.params
                n_lost = min(int(trial.user_attrs["attempts"]), MAX_RETRIES) if pool.size == 1 else 0
                study.begin_again(number)
            elif proposal := proposer.propose(number, trials):
                values, n_lost = proposal.values, 0
                study.begin(number, proposal, plan.space)
            else:
                break
            budget.begin(number)
            job = heats.begin(number, plan.space.recipe(values))
            pool.submit(replace(job, n_lost=n_lost))
            pending += 1
        if not pending:
            if proposer.ending:
                study.keep_note("exhausted", proposer.ending)
                show("exhausted")
            elif ending:
                budget.close(ending)
                show("ended")
            return
        result = pool.wait()
        show("answered")
        if result.n_tries > 1:
            study.begin_again(int(result.job.name), result.n_tries - 1)
        if (more := heats.more(result)) is not None:
            pool.submit(more)
            continue
        record(study, plan, heats, heats.whole(result))
        budget.end(int(result.job.name))
        pending -= 1
        show("told")
        _stop_if_hopeless(study, settings.max_failed_share)


def suspects(study: Study) -> list[int]:
    """List interrupted trials that may have killed the search: they were under way each time it ended.

    A kill from outside is held against nobody, but from inside it looks the same. So such a trial is
    evaluated in another process, where its end would be seen.
    """
    return [
        trial.number
        for trial in study.trials()
        if trial.state == TrialState.RUNNING and int(trial.user_attrs["attempts"]) >= MAX_RETRIES
    ]


def record(study: Study, plan: Plan, heats: Heats, result: Result) -> None:
    """Tell a trial's result: COMPLETE with what the sampler follows, or FAILED with kind and text."""
    number = int(result.job.name)
    if result.failure:
        study.fail(number, *result.failure, result.seconds)
        return
    outcomes = result.outcomes[plan.setup.prompting]["search"]
    try:
        scores, errors = heats.scores(outcomes)
    except TrialError as error:  # a function of the user's own may fail now and then
        study.fail(number, error.kind, str(error), result.seconds)
        return
    rating = plan.objectives.rate(scores, heats.base, errors)
    recorded = heats.recorded(number, outcomes)
    if result.as_adapter:
        recorded["scored_as"] = "adapter"
    study.complete(number, rating, scores, outcomes, result.seconds, errors, recorded)
    heats.tell(number, outcomes)
    keep_current(study, plan)


def _stop_if_hopeless(study: Study, max_failed_share: float) -> None:
    n_failed, n_finished = study.n_failed, study.n_finished
    if n_finished >= _FEW and n_failed > max_failed_share * n_finished:
        raise SearchStoppedError(
            f"{n_failed} of {n_finished} candidates failed, more than search.max_failed_share "
            f"{max_failed_share}; {commonest_failure(study.trials())}"
        )


def commonest_failure(trials: Sequence[FrozenTrial]) -> str:
    """Say why most of the failed trials failed."""
    failures = [t.user_attrs["failure"] for t in trials if t.state == TrialState.FAIL]
    if not failures:
        return "none failed"
    (kind, text), n = Counter((f["kind"], f["text"]) for f in failures).most_common(1)[0]
    return f"the commonest cause ({n} times, at {kind}): {text}"


def _result(study: Study, plan: Plan, verdict: Verdict | None, was_complete: bool) -> StudyResult:
    best = study.best()
    recipe = plan.space.recipe(best.params) if best else None
    return StudyResult(study, best, recipe, verdict, was_complete)
