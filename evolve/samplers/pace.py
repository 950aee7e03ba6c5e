"""How long a sampler thinks: some take longer with every trial that they learn from."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, create_trial

from evolve.samplers import Sampler, derived_rng
from evolve.space import SearchSpace

# Less than this a proposal is lost in what a candidate takes.
WORTH_MENTIONING_S = 0.01


def proposing_seconds(
    sampler: Sampler, space: SearchSpace, n_candidates: int, n_objectives: int, n_polish: int = 0
) -> float:
    """Foretell the seconds that all proposals of a search take; 0 where they are quick.

    The sampler is asked halfway through a search of random trials with random values, and for the last
    one, and Simpson's rule does the rest, a first proposal costing nothing. Of those around the best
    one is asked for.

    Args:
        n_polish: how many of the candidates are drawn around the best.
    """
    rng = derived_rng(0)
    distributions = space.distributions()
    trials = [_trial(rng, i, space, distributions, n_objectives) for i in range(n_candidates)]
    n_main = n_candidates - min(n_polish, n_candidates)
    half = n_main // 2
    sampler.propose(half, trials[:half])  # the first one imports
    middle, end = (_seconds(sampler, trials[:n]) for n in (half, max(n_main - 1, 0)))
    each = [(n_main, (4 * middle + end) / 6)]
    if n_polish:
        sampler.propose(n_main, trials[:n_main])  # as above
        each.append((n_candidates - n_main, _seconds(sampler, trials[:-1])))
    return sum(n * seconds for n, seconds in each if seconds > WORTH_MENTIONING_S)


def _seconds(sampler: Sampler, trials: list[FrozenTrial]) -> float:
    began = time.perf_counter()
    sampler.propose(len(trials), trials)
    return time.perf_counter() - began


def _trial(
    rng: np.random.RandomState,
    number: int,
    space: SearchSpace,
    distributions: Mapping[str, BaseDistribution],
    n: int,
) -> FrozenTrial:
    values = {v.name: v.from_unit(rng.rand()) for v in space.variables}
    params = space.active(values)
    trial = create_trial(
        params=params,
        distributions={name: distributions[name] for name in params},
        values=rng.rand(n).tolist(),
        user_attrs={"told": number, "objective_error": 0.1},
    )
    trial.number = number
    return trial
