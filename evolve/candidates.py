"""Candidates as trials: which is evaluated next, and what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from optuna.trial import FrozenTrial, TrialState

from evolve.budget import Budget
from evolve.errors import SearchStoppedError, TrialError
from evolve.heats import Heats
from evolve.plan import Plan
from evolve.samplers.proposer import Proposer
from evolve.samplers.stages import sampler_of
from evolve.study import Study
from evolve.workers import Pool
from evolve.workers.tries import MAX_RETRIES
from evolve.workers.worker import Job, Result

# Before so many candidates have finished, a share of failures says little.
_FEW = 5


class Candidates:
    """The trials of a search: interrupted ones first, then what is proposed, within its limits.

    Attributes:
        n_pending: how many are under way.
    """

    def __init__(self, study: Study, plan: Plan, pool: Pool, heats: Heats, budget: Budget) -> None:
        self._study, self._plan, self._pool = study, plan, pool
        self._heats, self._budget = heats, budget
        self._settings = settings = plan.search_file.search
        sampler = sampler_of(settings, plan.space, len(plan.objectives.names))
        self._proposer = Proposer(plan.space, sampler, plan.known, settings.seed)
        trials = study.trials()[: settings.n_iterations]
        self._interrupted = [trial for trial in trials if trial.state == TrialState.RUNNING]
        self._refusal: str | None = None
        self._exhausted: str | None = None
        self.n_pending = 0

    def begin(self) -> Job | None:
        """Begin the next trial in the record; return its first job, None where none may begin now."""
        number, n_lost = len(trials := self._study.trials()), 0
        # A generation is proposed when the whole of the last one is told.
        waits = self._pool.by_generation and self.n_pending and number % self._pool.size == 0
        self._refusal = self._exhausted = None
        if not self._interrupted and (number >= self._settings.n_iterations or waits):
            return None
        if (refusal := self._budget.refusal()) is not None:
            self._refusal = refusal
            return None
        if self._interrupted:
            trial = self._interrupted.pop(0)
            number, values = trial.number, trial.params
            if self._pool.size == 1:
                n_lost = min(int(trial.user_attrs["attempts"]), MAX_RETRIES)
            self._study.begin_again(number)
        elif (proposal := self._proposer.propose(number, trials)) is not None:
            values = proposal.values
            self._study.begin(number, proposal, self._plan.space)
        else:
            self._exhausted = self._proposer.ending
            return None
        self._budget.begin(number)
        self.n_pending += 1
        return replace(self._heats.begin(number, self._plan.space.recipe(values)), n_lost=n_lost)

    def further(self, result: Result) -> Job | None:
        """Return the next job of a candidate that is asked more; count further attempts at this one."""
        if result.n_tries > 1:
            self._study.begin_again(int(result.job.name), result.n_tries - 1)
        return self._heats.more(result)

    def tell(self, result: Result) -> None:
        """Tell a trial: COMPLETE with what the sampler follows, or FAILED with kind and text."""
        number = int(result.job.name)
        self._record(number, self._heats.whole(result))
        self._budget.end(number)
        self.n_pending -= 1

    def _record(self, number: int, result: Result) -> None:
        if result.failure:
            self._study.fail(number, *result.failure, result.seconds)
            return
        outcomes = result.outcomes[self._plan.setup.prompting]["search"]
        try:
            scores, errors = self._heats.scores(number, outcomes)
        except TrialError as error:  # a function of the user's own may fail now and then
            self._study.fail(number, error.kind, str(error), result.seconds)
            return
        rating = self._plan.objectives.rate(scores, self._heats.base, errors)
        recorded = self._heats.recorded(number, outcomes)
        if result.as_adapter:
            recorded["scored_as"] = "adapter"
        self._study.complete(number, rating, scores, outcomes, result.seconds, errors, recorded)
        self._heats.tell(number, outcomes)

    def ending(self) -> str | None:
        """Keep why nothing more is begun before `n_iterations`: "exhausted" or "ended"; else None."""
        if self._exhausted:
            self._study.keep_note("exhausted", self._exhausted)
            return "exhausted"
        if self._refusal:
            self._budget.close(self._refusal)
            return "ended"
        return None

    def stop_if_hopeless(self) -> None:
        """Raise SearchStoppedError where more than `max_failed_share` of the trials failed."""
        n_failed, n_finished = self._study.n_failed, self._study.n_finished
        share = self._settings.max_failed_share
        if n_finished >= _FEW and n_failed > share * n_finished:
            raise SearchStoppedError(
                f"{n_failed} of {n_finished} candidates failed, more than search.max_failed_share "
                f"{share}; {commonest_failure(self._study.trials())}"
            )


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


def commonest_failure(trials: Sequence[FrozenTrial]) -> str:
    """Say why most of the failed trials failed."""
    failures = [t.user_attrs["failure"] for t in trials if t.state == TrialState.FAIL]
    if not failures:
        return "none failed"
    (kind, text), n = Counter((f["kind"], f["text"]) for f in failures).most_common(1)[0]
    return f"the commonest cause ({n} times, at {kind}): {text}"
