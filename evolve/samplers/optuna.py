"""Optuna's samplers by name, built anew for each proposal so that they keep no state."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from evolve.samplers import Proposal, derived_rng
from evolve.space import Space


class OptunaSampler:
    """tpe or random.

    Each proposal asks a fresh sampler, seeded by (seed, number), in an in-memory study that holds
    copies of all trials so far, pending ones included.
    """

    def __init__(self, name: str, space: Space, seed: int) -> None:
        self._name = name
        self._distributions = space.distributions()
        self._seed = seed

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(derived_rng(self._seed, number).randint(2**31 - 1))
        if self._name == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal:
        """Propose trial `number`, see Sampler."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=self._sampler(number))
        study.add_trials(trials)
        trial = study.ask(self._distributions)
        return Proposal(dict(trial.params))
