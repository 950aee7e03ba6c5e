"""Optuna's samplers by name, built anew for each proposal so that they keep no state."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Sequence
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
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from evolve.samplers import Proposal, derived_rng
from evolve.space import SearchSpace

# Optuna's own 50 would be half of a usual search in the first generation, which is random.
POPULATION = 16
# Where Optuna keeps the generation of a trial.
_GENERATION = {"nsga2": "NSGAIISampler:generation", "nsga3": "NSGAIIISampler:generation"}


def _build(name: str, seed: int, is_conditional: bool) -> BaseSampler:
    if name == "tpe":
        # Groups of variables that are active together get a density of their own.
        return TPESampler(seed=seed, multivariate=is_conditional or None, group=is_conditional)
    if name == "gp":
        # Scores of few documents are noisy: the process must not go through every one of them.
        return GPSampler(seed=seed, deterministic_objective=False)
    if name == "nsga2":
        return NSGAIISampler(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        return NSGAIIISampler(seed=seed, population_size=POPULATION)
    return RandomSampler(seed=seed)


class _Record(InMemoryStorage):
    """A study that holds recorded trials without a copy of each, and a new one behind them."""

    def __init__(self, past: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._past = past

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self.get_trial(trial_id).number = len(self._past)
        return trial_id

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = [*self._past, *super().get_all_trials(study_id, deepcopy)]
        return trials if states is None else [trial for trial in trials if trial.state in states]


class OptunaSampler:
    """tpe, gp, nsga2, nsga3 or random, for one objective or several.

    Each proposal asks a fresh sampler, seeded by (seed, number, attempt), in a study in memory that
    holds all trials so far, pending ones and constraints included.
    """

    def __init__(self, name: str, space: SearchSpace, seed: int, n_objectives: int = 1) -> None:
        self._name = name
        self._starts = space.starts()
        self._distributions = space.distributions()
        self._seed = seed
        self._n_objectives = n_objectives

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(derived_rng(self._seed, number, attempt).randint(2**31 - 1))
        is_conditional = any(len(trial.params) < len(self._distributions) for trial in trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=_Record(list(self._as_optuna_has_them(trials))),
                sampler=_build(self._name, seed, is_conditional),
                directions=["maximize"] * self._n_objectives,
            )
            trial = study.ask(self._distributions)
        key = _GENERATION.get(self._name)
        drawn = study.get_trials(deepcopy=False)[-1].system_attrs
        return Proposal(dict(trial.params), {"generation": drawn[key]} if key else {})

    def _as_optuna_has_them(self, trials: Sequence[FrozenTrial]) -> Iterator[FrozenTrial]:
        """Give trials the generation that they were drawn in, and values where they have none.

        Known recipes are of the first generation, other candidates that the sampler did not draw of
        the latest. TPE alone learns from trials that lack parameters; for the others what a recipe
        does not read stands at its start.
        """
        key = _GENERATION.get(self._name)
        latest = 0
        for trial in trials:
            made = trial
            if self._name in ("gp", "nsga2", "nsga3") and len(trial.params) < len(self._distributions):
                made = copy(trial)
                made.distributions = self._distributions
                made.params = {**self._starts, **trial.params}
            if key is not None:
                latest = max(latest, trial.user_attrs.get("generation", 0))
                made = copy(made)
                made.system_attrs = {
                    **trial.system_attrs,
                    key: trial.user_attrs.get("generation", latest),
                }
            yield made
