"""Optuna's samplers by name, built anew for each proposal so that they keep no state."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
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
from optuna.samplers._ga import BaseGASampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from evolve.samplers import Proposal, derived_rng
from evolve.space import SearchSpace

# Optuna's own 50 would be half of a usual search in the first generation, which is random.
POPULATION = 16
# Keys the generators that select parents; no trial has this number.
_SELECTING = 1 << 31


class _Genetic(BaseGASampler):
    """A genetic sampler that is told the parents of past generations, the first one's apart."""

    parents: Sequence[list[FrozenTrial]] = ()

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        if 1 <= generation <= len(self.parents):
            return self.parents[generation - 1]
        return super().get_parent_population(study, generation)


class _Nsga2(_Genetic, NSGAIISampler): ...


class _Nsga3(_Genetic, NSGAIIISampler): ...


# Where they keep the generation of a trial.
_GENERATION = {"nsga2": _Nsga2._get_generation_key(), "nsga3": _Nsga3._get_generation_key()}


def _build(name: str, seed: int, is_conditional: bool) -> BaseSampler:
    if name == "tpe":
        # Groups of variables that are active together get a density of their own.
        return TPESampler(seed=seed, multivariate=is_conditional or None, group=is_conditional)
    if name == "gp":
        # Scores of few documents are noisy: the process must not go through every one of them.
        return GPSampler(seed=seed, deterministic_objective=False)
    if name == "nsga2":
        return _Nsga2(seed=seed, population_size=POPULATION)
    if name == "nsga3":
        return _Nsga3(seed=seed, population_size=POPULATION)
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
    holds all trials so far, pending ones and constraints included. What follows from the record alone
    is kept from proposal to proposal.
    """

    def __init__(self, name: str, space: SearchSpace, seed: int, n_objectives: int = 1) -> None:
        self._name = name
        self._seed = seed
        self._n_objectives = n_objectives
        self._distributions = space.distributions()
        self._stepped = [variable for variable in space.variables if variable.step is not None]
        self._record = _Rewritten(name, space)
        self._parents: list[list[FrozenTrial]] = []

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(derived_rng(self._seed, number, attempt).randint(2**31 - 1))
        past = [] if self._name == "random" else self._record.read(trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = _build(self._name, seed, self._record.is_conditional)
            study = optuna.create_study(
                storage=_Record(past), sampler=sampler, directions=["maximize"] * self._n_objectives
            )
            if isinstance(sampler, _Genetic):
                self._select_parents(study)
                sampler.parents = self._parents
            trial = study.ask(self._distributions)
        key = _GENERATION.get(self._name)
        drawn = study.get_trials(deepcopy=False)[-1].system_attrs
        values = dict(trial.params)
        for variable in self._stepped:  # a Gaussian process misses it by a float's last digits
            values[variable.name] = variable.from_unit(variable.to_unit(values[variable.name]))
        return Proposal(values, {"generation": drawn[key]} if key else {})

    def _select_parents(self, study: optuna.Study) -> None:
        """Select the parents of every generation that no trial can change any more.

        A fresh sampler would do it for each proposal, from the first generation on, and go deeper with
        each than Python lets it. Selection that draws does so by the generation.
        """
        for generation in range(len(self._parents) + 1, self._record.n_settled + 1):
            seed = int(derived_rng(self._seed, _SELECTING, generation).randint(2**31 - 1))
            selecting = _build(self._name, seed, False)
            assert isinstance(selecting, _Genetic)
            selecting.parents = self._parents
            self._parents.append(selecting.get_parent_population(study, generation))


class _Rewritten:
    """Recorded trials as Optuna's samplers want them, rewritten when they begin and when they are told.

    Genetic samplers want the generation that each was drawn in: known recipes are of the first, other
    candidates that the sampler did not draw of the latest. TPE alone learns from trials that lack
    parameters; for the others what a recipe does not read stands at its start.

    Attributes:
        is_conditional: whether a trial lacks parameters.
        n_settled: the latest generation whose forebears are all finished.
    """

    def __init__(self, name: str, space: SearchSpace) -> None:
        self._starts = space.starts()
        self._distributions = space.distributions()
        self._fills = name in ("gp", "nsga2", "nsga3")
        self._key = _GENERATION.get(name)
        self._trials: list[FrozenTrial] = []
        self._generations: list[int] = []
        self._running: list[int] = []
        self._latest = 0
        self.is_conditional = False

    def read(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Take up what is new since the last call; return all trials, by number."""
        for place in range(len(self._trials), len(trials)):
            trial = trials[place]
            drawn_in = trial.user_attrs.get("generation")
            self._latest = max(self._latest, drawn_in or 0)
            self._generations.append(self._latest if drawn_in is None else drawn_in)
            self.is_conditional |= len(trial.params) < len(self._distributions)
            self._trials.append(trial)
            self._running.append(place)
        for place in self._running:
            self._trials[place] = self._rewritten(trials[place], place)
        self._running = [place for place in self._running if not trials[place].state.is_finished()]
        return self._trials

    @property
    def n_settled(self) -> int:
        under_way = [self._generations[place] for place in self._running]
        return min([self._latest, *under_way])

    def _rewritten(self, trial: FrozenTrial, place: int) -> FrozenTrial:
        made = trial
        if self._fills and len(trial.params) < len(self._distributions):
            made = copy(trial)
            made.distributions = self._distributions
            made.params = {**self._starts, **trial.params}
        if self._key is not None:
            made = copy(made)
            made.system_attrs = {**trial.system_attrs, self._key: self._generations[place]}
        return made
