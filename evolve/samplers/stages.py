"""Stages of a search: rounds after the first shift its basis, the last candidates polish the best.

Both look at the candidates found so far instead of the whole space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evolve.front import ranking
from evolve.samplers import INSTEAD, Proposal, Sampler, derived_rng, make_sampler
from evolve.search_file import SearchSettings
from evolve.smoothing import MOST_SMOOTHED, coordinates, smoothed
from evolve.space import SearchSpace, Value, Variable

if TYPE_CHECKING:
    from merge_core.recipe import Recipe

# Elites that span a round's basis, and how far beyond them a round looks.
N_ELITES = 5
BEYOND = 0.5
# Of so many of the best candidates the centre is taken where scores are estimates, and how far from it
# candidates are drawn, as a share of how far the best lie from it themselves.
N_CENTRED = 20
SPREAD = 0.5
# The first steps of the local search, as a share of each range.
SIGMA0 = 0.1
# Steps grow after a success and shrink after a failure such that one success in five keeps them
# (Kern et al. 2004, https://doi.org/10.1023/B:NACO.0000023416.59689.4e, section 2.1).
_GROWTH, _SHRINKAGE = math.exp(0.8), math.exp(-0.2)


def sampler_of(settings: SearchSettings, space: SearchSpace, n_objectives: int) -> Sampler:
    """Build the sampler of a search, with the stages that it asks for."""

    def build(over: SearchSpace, seed: int) -> Sampler:
        return make_sampler(
            settings.sampler,
            over,
            seed,
            n_objectives,
            sigma0=settings.sigma0,
            population_size=settings.population_size,
        )

    main = build(space, settings.seed)
    if settings.rounds == 1 and not settings.n_polish:
        return main
    has_estimates = settings.racing == "always" and n_objectives == 1
    around_best = (AroundElite if has_estimates else LocalSearch)(space, settings.seed)
    n, rounds, polish = settings.n_iterations, settings.rounds, settings.n_polish
    return StagedSampler(main, build, around_best, space, settings.seed, n, rounds, polish)


class StagedSampler:
    """The main sampler, then basis shifts round by round, then what looks around the best.

    Args:
        main: proposes the first round.
        shifted: builds the sampler of a round over a space of its own.
        around_best: proposes the last candidates.
        n_candidates: of the whole search.
        n_rounds: how many rounds share the candidates evenly.
        n_polish: how many candidates at the end are drawn around the best.
    """

    def __init__(
        self,
        main: Sampler,
        shifted: Callable[[SearchSpace, int], Sampler],
        around_best: Sampler,
        space: SearchSpace,
        seed: int,
        n_candidates: int,
        n_rounds: int,
        n_polish: int,
    ) -> None:
        self._main = main
        self.popsize = getattr(main, "popsize", None)
        self._n_before_polish = max(0, n_candidates - n_polish)
        self._round_size = max(1, math.ceil(self._n_before_polish / n_rounds))
        self._around_best = around_best
        self._shifts = [BasisShift(shifted, space, seed, i) for i in range(1, n_rounds)]

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal | None:
        """Propose trial `number`, see Sampler; what no stage can begin with is the main sampler's."""
        n_complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
        sampler: Sampler = self._main
        if n_complete and number >= self._n_before_polish:
            sampler = self._around_best
        elif n_complete > 1 and self._shifts and number >= self._round_size:
            sampler = self._shifts[min(number // self._round_size, len(self._shifts)) - 1]
        return sampler.propose(number, trials, attempt)


class BasisShift:
    """A round over combinations of the best candidates so far.

    With elites e0, e1 ... as points of the unit cube, e0 the best, a candidate is
    e0 + sum over k of u[k] * (e[k] - e0), clipped to the cube; u lies in [-BEYOND, 1 + BEYOND].
    For methods that are linear in their weights these are the merges of the elites, made as merges of
    the models themselves (the shift of basis of EvoGM, https://arxiv.org/abs/2605.29295). Categories
    are those of the best. The elites stand in each trial's record, so that whoever goes on has them.
    """

    def __init__(
        self,
        shifted: Callable[[SearchSpace, int], Sampler],
        space: SearchSpace,
        seed: int,
        round_number: int,
    ) -> None:
        self._space = space
        self._build = shifted
        self._seed = int(derived_rng(seed, round_number).randint(2**31 - 1))
        self._round = round_number
        self._elites: list[int] = []
        self._sampler: Sampler | None = None

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal | None:
        """Propose trial `number`, see Sampler."""
        own = [t for t in trials if t.user_attrs.get("shift", {}).get("round") == self._round]
        if self._sampler is None:
            self._elites = self._recorded_elites(trials) or _best(trials)[:N_ELITES]
            self._sampler = self._build(_Span(len(self._elites) - 1), self._seed)
        inner = self._sampler.propose(number, [self._in_span(trial) for trial in own], attempt)
        if inner is None:
            return None
        points = [_unit(self._space, trials[elite].params) for elite in self._elites]
        u = [inner.values[name] for name in _Span.names(len(points) - 1)]
        point = (
            points[0]
            + sum(
                float(share) * (other - points[0])  # type: ignore[arg-type]
                for share, other in zip(u, points[1:], strict=True)
            )
        )
        record = {"round": self._round, "elites": self._elites, "u": u, "inner": dict(inner.attributes)}
        best = trials[self._elites[0]].params
        return Proposal(_values(self._space, np.clip(point, 0, 1), best), {"shift": record})

    def _recorded_elites(self, trials: Sequence[FrozenTrial]) -> list[int]:
        """Return the elites that the round began with; none where it begins now."""
        for trial in trials:
            for attributes in (trial.user_attrs, trial.user_attrs.get(INSTEAD, {})):
                shift = attributes.get("shift", {})
                if shift.get("round") == self._round:
                    elites: list[int] = shift["elites"]
                    return elites
        return []

    def _in_span(self, trial: FrozenTrial) -> FrozenTrial:
        """Return a trial as the round's own sampler proposed it."""
        shift = trial.user_attrs["shift"]
        span = _Span(len(shift["u"]))
        made = copy(trial)
        made.distributions = span.distributions()
        made.params = dict(zip(made.distributions, shift["u"], strict=True))
        made.user_attrs = {**trial.user_attrs, **shift["inner"]}
        return made


class _Span(SearchSpace):
    """The space of a round: a share of each elite but the best."""

    def __init__(self, n: int) -> None:
        super().__init__()
        names = self.names(n)
        self.variables = [Variable(name, -BEYOND, 1 + BEYOND, start=0.0) for name in names]

    @staticmethod
    def names(n: int) -> list[str]:
        return [f"elite[{i + 1}]" for i in range(n)]

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        raise NotImplementedError("a share of elites is no recipe; the search's own space makes it")

    def values(self, recipe: Recipe) -> dict[str, Value]:
        raise NotImplementedError("a share of elites is no recipe; the search's own space makes it")


class LocalSearch:
    """Small steps from the best candidate: a (1+1) evolution strategy, categories as they are.

    Steps are normal in the unit cube and reflected at its sides. Their size follows from what the
    local candidates told so far have brought.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler."""
        best = _best(trials)[0]
        sigma = SIGMA0
        for trial in trials:
            # A local candidate succeeded if later ones began at it, or could.
            if "polish" in trial.user_attrs and trial.state.is_finished():
                before = [t for t in trials[: trial.number] if t.state == TrialState.COMPLETE]
                succeeded = _best([*before, trial])[0] == trial.number
                sigma = min(0.5, sigma * (_GROWTH if succeeded else _SHRINKAGE))
        rng = derived_rng(self._seed, number, attempt)
        point = _unit(self._space, trials[best].params)
        moved = point + sigma * rng.randn(len(point))
        reflected = np.abs(moved) % 2
        point = np.minimum(reflected, 2 - reflected)
        values = _values(self._space, point, trials[best].params)
        return Proposal(values, {"polish": {"from": best, "sigma": sigma}})


class AroundElite:
    """Draws around the centre of the best candidates, for scores that are estimates.

    Of estimates the best one is luck in part; the centre of many good candidates is not. With x[1],
    x[2] ... x[n] the best candidates by estimates smoothed over the space (`evolve.smoothing`), as points
    of the unit cube, and w[i] in proportion to log(n + 1/2) - log(i) (CMA-ES, Hansen 2016,
    https://arxiv.org/abs/1604.00772, eq. 49), the first candidate is m = sum of w[i] x[i]. The others
    are normal around m with SPREAD times the elite's weighted standard deviation in each variable, cut
    to the cube. Categories are those of the best; the elite is of candidates that have the same.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler."""
        elite = self._elite(trials)
        points = np.array([_unit(self._space, trial.params) for trial in elite])
        weights = np.log(len(elite) + 0.5) - np.log(np.arange(1, len(elite) + 1))
        weights /= weights.sum()
        point = weights @ points
        if attempt or any("polish" in trial.user_attrs for trial in trials):
            rng = derived_rng(self._seed, number, attempt)
            deviations = np.sqrt(weights @ (points - point) ** 2)
            point = np.clip(point + SPREAD * deviations * rng.randn(len(point)), 0, 1)
        numbers = [trial.number for trial in elite]
        return Proposal(_values(self._space, point, elite[0].params), {"polish": {"around": numbers}})

    def _elite(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the best candidates by smoothed estimates, the best first."""
        complete = [trials[number] for number in _best(trials)][:MOST_SMOOTHED]
        smooth = smoothed(
            np.array([coordinates(self._space.variables, trial.params) for trial in complete]),
            np.array([trial.values[0] for trial in complete]),
            np.array([trial.user_attrs.get("objective_error", 0.0) for trial in complete]),
        )
        violations = [_violation(trial) for trial in complete]
        ranked = [complete[i] for i in ranking(smooth[:, None], violations)]
        categories = [variable.name for variable in self._space.variables if variable.choices is not None]

        def chosen(trial: FrozenTrial) -> list[Value]:
            return [trial.params.get(name) for name in categories]

        return [trial for trial in ranked if chosen(trial) == chosen(ranked[0])][:N_CENTRED]


def _best(trials: Sequence[FrozenTrial]) -> list[int]:
    """Return the numbers of the completed trials, the best first; see `evolve.front.ranking`."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    values = np.array([trial.values for trial in complete])
    violations = [_violation(trial) for trial in complete]
    return [complete[i].number for i in ranking(values, violations)]


def _violation(trial: FrozenTrial) -> float:
    return sum(max(0.0, violation) for violation in trial.constraints.values())


def _unit(space: SearchSpace, params: Mapping[str, Value]) -> np.ndarray:
    """Return a candidate as a point of the unit cube; what it does not read stands at its start."""
    values = {**space.starts(), **params}
    return np.array([variable.to_unit(values[variable.name]) for variable in space.variables])


def _values(space: SearchSpace, point: np.ndarray, like: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values of a point, with the categories of another candidate."""
    values = {**space.starts(), **like}
    return {
        variable.name: values[variable.name]
        if variable.choices is not None
        else variable.from_unit(float(u))
        for variable, u in zip(space.variables, point, strict=True)
    }
