"""A search in memory: proposals of a sampler, told as evolve/loop.py tells them, without storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from evolve.samplers import Proposal, Sampler, make_sampler
from evolve.samplers.proposer import Proposer
from evolve.space import SearchSpace, Space, Value

Values = Mapping[str, Value]
Told = float | Sequence[float] | None


def weights(n: int, low: float = 0.0, high: float = 1.0, **extra: object) -> Space:
    """A space of n weights."""
    models = [
        {"model": f"m{i}", "parameters": {"weight": {"low": low, "high": high, **extra}}}
        for i in range(n)
    ]
    return Space({"merge_method": "task_arithmetic", "base_model": "base", "models": models})


def numbers(values: Values) -> np.ndarray:
    """Return the numbers of a candidate; shape (variables,)."""
    return np.array(list(values.values()), dtype=float)


def search(
    space: SearchSpace,
    f: Callable[[Values], Told],
    n: int,
    sampler: str | Callable[[], Sampler] = "cma",
    seed: int = 0,
    *,
    known: Mapping[str, Values] | None = None,
    renew: int | None = None,
    pending: int = 0,
    until: Callable[[FrozenTrial], bool] = lambda trial: False,
    n_objectives: int = 1,
    **options: object,
) -> list[FrozenTrial]:
    """Run a search of n candidates; fewer where the space has no more.

    Args:
        sampler: its name, or what builds it.
        f: gives what is maximised, several values or one; None is a failure.
        renew: after so many candidates the sampler is built anew, as a resume does.
        pending: so many candidates are always under way, and the second oldest is told first.
        until: ends the search after a trial.
        options: of make_sampler.
    """
    trials: list[FrozenTrial] = []
    distributions = space.distributions()
    proposer: Proposer | None = None
    n_told = 0
    waiting: list[FrozenTrial] = []

    def tell(trial: FrozenTrial) -> None:
        nonlocal n_told
        value = f(trial.params)
        trial.user_attrs["told"] = n_told
        n_told += 1
        trial.state = TrialState.FAIL if value is None else TrialState.COMPLETE
        trial.values = None if value is None else list(np.atleast_1d(np.asarray(value, float)))

    for number in range(n):
        if proposer is None or (renew and number % renew == 0):
            if isinstance(sampler, str):
                made = make_sampler(sampler, space, seed, n_objectives, **options)  # type: ignore[arg-type]
            else:
                made = sampler()
            proposer = Proposer(space, made, known or {}, seed)
        proposal = proposer.propose(number, trials)
        if proposal is None:
            break
        trials.append(running(number, proposal, distributions))
        waiting.append(trials[-1])
        if len(waiting) > pending:
            tell(waiting.pop(min(1, pending)))
            if until(trials[-1]):
                break
    for trial in waiting:
        tell(trial)
    return trials


def running(
    number: int, proposal: Proposal, distributions: Mapping[str, BaseDistribution]
) -> FrozenTrial:
    """Return a trial as the study begins it."""
    trial = create_trial(
        params=dict(proposal.values),
        distributions={name: distributions[name] for name in proposal.values},
        state=TrialState.RUNNING,
        user_attrs=dict(proposal.attributes),
    )
    trial.number = number
    return trial
