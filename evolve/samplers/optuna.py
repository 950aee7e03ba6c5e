"""Optuna's samplers by name, built anew for each proposal so that they keep no state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import copy

import optuna
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from evolve.samplers import Proposal, derived_rng
from evolve.space import SearchSpace

_BUILDERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    # Scores of few documents are noisy: the process must not go through every one of them.
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=False),
    "nsga2": lambda seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    "nsga3": lambda seed: NSGAIIISampler(seed=seed, population_size=POPULATION),
    "random": lambda seed: RandomSampler(seed=seed),
}
# Optuna's own 50 would be half of a usual search in the first generation, which is random.
POPULATION = 16
# How often a proposal is drawn anew that equals an earlier one.
_ATTEMPTS = 8
# Where Optuna keeps the generation of a trial.
_GENERATION = {"nsga2": "NSGAIISampler:generation", "nsga3": "NSGAIIISampler:generation"}


class OptunaSampler:
    """tpe, gp, nsga2, nsga3 or random.

    Each proposal asks a fresh sampler, seeded by (seed, number), in an in-memory study that holds
    copies of all trials so far, pending ones included.
    """

    def __init__(self, name: str, space: SearchSpace, seed: int, n_objectives: int = 1) -> None:
        self._name = name
        self._directions = [StudyDirection.MAXIMIZE] * n_objectives
        self._distributions = space.distributions()
        self._seed = seed

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal:
        """Propose trial `number`, see Sampler; one that was proposed before is drawn again."""
        known = [trial.params for trial in trials]
        proposals = (self._propose(number, attempt, trials) for attempt in range(_ATTEMPTS))
        # A space of few choices may hold nothing new.
        return next((p for p in proposals if p.values not in known), None) or self._propose(
            number, 0, trials
        )

    def _propose(self, number: int, attempt: int, trials: Sequence[FrozenTrial]) -> Proposal:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(derived_rng(self._seed, number, attempt).randint(2**31 - 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(directions=self._directions, sampler=_BUILDERS[self._name](seed))
            study.add_trials([self._as_optuna_has_it(trial) for trial in trials])
            trial = study.ask(self._distributions)
        key = _GENERATION.get(self._name)
        drawn = study.get_trials(deepcopy=False)[-1].system_attrs
        return Proposal(dict(trial.params), {"generation": drawn[key]} if key else {})

    def _as_optuna_has_it(self, trial: FrozenTrial) -> FrozenTrial:
        """Give a trial the generation that it was drawn in; known recipes are of the first."""
        key = _GENERATION.get(self._name)
        if key is None:
            return trial
        made = copy(trial)
        made.system_attrs = {**trial.system_attrs, key: trial.user_attrs.get("generation", 0)}
        return made
