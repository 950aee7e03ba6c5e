"""The whole story of a search: propose, evaluate, record, and at the end the verdict.

plan = make_plan(SearchFile.load("search.yml"))
result = run(plan.search_file, folder=Path("my-search"))
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial

from evolve.budget import Budget
from evolve.candidates import Candidates
from evolve.export import keep_current
from evolve.finals import finals
from evolve.heats import Heats
from evolve.judge import base_scores, judge, kept_verdict
from evolve.plan import Plan
from evolve.search_file import SearchFile
from evolve.session import Place, Progress, opened, settled_plan
from evolve.study import Study
from evolve.under_way import UnderWay, nobody_waits
from evolve.verdict import Verdict
from evolve.workers import Pool
from evolve.workers.start import Workers
from merge_core.recipe import Recipe


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
    folder: Path | str | None = None,
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
    place = Place.of(search_file, folder, storage, artifacts)
    plan = settled_plan(
        search_file,
        place,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_unsafe_code=allow_unsafe_code,
        under_way=under_way,
    )
    with opened(plan, place, began, progress) as session:
        if (resumed := session.resumed) and (verdict := kept_verdict(resumed, plan)):
            return _result(resumed, plan, verdict, was_complete=True)
        study, pool, budget = session.begin(workers or Workers(), say)
        base = base_scores(study, plan, pool, lambda: session.show("base"))
        heats = Heats(study, plan, base)
        search(study, plan, pool, heats, budget, session.show)
        if plan.needs_finals:
            finals(study, plan, pool, heats, budget, lambda: session.show("final"))
            keep_current(study, plan, has_new_scores=True)
        verdict = judge(study, plan, pool, lambda: session.show("baseline"))
        session.show("verdict")
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
    candidates = Candidates(study, plan, pool, heats, budget)
    keep_current(study, plan)
    while True:
        while candidates.n_pending < pool.size and (job := candidates.begin()) is not None:
            pool.submit(job)
        if not candidates.n_pending:
            if (event := candidates.ending()) is not None:
                show(event)
            return
        result = pool.wait()
        show("answered")
        if (further := candidates.further(result)) is not None:
            pool.submit(further)
            continue
        candidates.tell(result)
        keep_current(study, plan)
        show("told")
        candidates.stop_if_hopeless()


def _result(study: Study, plan: Plan, verdict: Verdict | None, was_complete: bool) -> StudyResult:
    best = study.best()
    recipe = plan.space.recipe(best.params) if best else None
    return StudyResult(study, best, recipe, verdict, was_complete)
