"""CMA-ES in the unit cube of the space, with restarts, tolerant of late, failed and foreign candidates.

Hansen, The CMA Evolution Strategy: A Tutorial, https://arxiv.org/abs/1604.00772. Generations have
no barrier: every `popsize` told candidates update the distribution, whichever generation they were
drawn in, and a worker that is free meanwhile gets another draw of the current distribution.

A run that has converged is followed by one of twice the population from a point drawn anew
(IPOP, Auger and Hansen 2005, https://doi.org/10.1109/CEC.2005.1554902).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evolve.samplers import INSTEAD, Proposal, derived_rng
from evolve.samplers.cma_continuous import Continuous
from evolve.samplers.cma_mixed import Mixed
from evolve.space import SearchSpace, Value

# A quarter of each range: the start's neighbourhood first, the borders within two sigma.
SIGMA0 = 0.25
# A run ends where its steps are smaller than this share of each range: no document sees them.
TOLERANCE = 1e-5
# Indices of generators for what is no candidate: pycma's update, and a run's start.
_TELLING, _STARTING = 1 << 31, (1 << 31) + 1


class Strategy(Protocol):
    """One run of a CMA-ES; candidates are vectors of its own.

    Attributes:
        popsize: candidates a generation.
        has_converged: whether the run has come to its end, for another reason than equal values.
    """

    popsize: int
    has_converged: bool

    def ask(self, rng: np.random.RandomState) -> np.ndarray:
        """Draw a candidate."""

    def values(self, vector: np.ndarray) -> dict[str, Value]:
        """Return the values of every variable that a vector stands for."""

    def tell(
        self, vectors: Sequence[np.ndarray], losses: Sequence[float], rng: np.random.RandomState
    ) -> None:
        """Update the distribution by `popsize` vectors; losses are finite, lower is better."""


class CmaSampler:
    """CMA-ES, replayed from what each trial recorded: run, generation, index, attempt, vector.

    The first run starts at the best known recipe that is told by then; the trial that it is stands
    in the record as "mean", null for the space's starts.

    Args:
        sigma0: first standard deviation, as a share of each range; None = SIGMA0.
        popsize: candidates a generation of the first run; None = 4 + floor(3 ln n), as in the tutorial.
    """

    def __init__(
        self, space: SearchSpace, seed: int, sigma0: float | None = None, popsize: int | None = None
    ) -> None:
        self._space = space
        self._seed = seed
        self._sigma0 = sigma0 or SIGMA0
        self.popsize = popsize or 4 + math.floor(3 * math.log(len(space.variables)))
        self._run = 0
        self._generation = 0
        self._record = _Record()
        self._drawn: set[_Draw] = set()
        self._mean: int | None = None
        self._strategy: Strategy | None = None

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler."""
        self._record.read(trials)
        strategy = self._caught_up(trials)
        index = len(self._record.draws[self._run, self._generation])
        draw = _draw(index, attempt, number)
        vector = strategy.ask(self._rng(*draw))
        self._drawn.add(draw)
        record = {
            "run": self._run,
            "generation": self._generation,
            "index": index,
            "attempt": attempt,
            "vector": vector.tolist(),
            "mean": self._mean,
        }
        return Proposal(strategy.values(vector), {"cma": record})

    def _rng(self, index: int, *later: int) -> np.random.RandomState:
        return derived_rng(self._seed, self._run, self._generation, index, *(later or (0,)))

    def _caught_up(self, trials: Sequence[FrozenTrial]) -> Strategy:
        """Bring the strategy to the state that the recorded trials imply.

        Draws are repeated as well as tells, since pycma remembers the points it drew; in a process
        that proposed them itself there is nothing to repeat.
        """
        if self._strategy is None:
            first = self._record.first
            self._mean = _best(trials) if first is None else first["mean"]
            params = {} if self._mean is None else trials[self._mean].params
            values = {**self._space.starts(), **params}
            start = np.array([v.to_unit(values[v.name]) for v in self._space.variables])
            self._strategy = self._begin(start)
        while True:
            for draw in self._record.draws[self._run, self._generation]:
                if draw not in self._drawn:
                    self._drawn.add(draw)
                    self._strategy.ask(self._rng(*draw))
            # What was drawn in a run before comes too late for this one.
            batch = self._record.told[self._run][self._generation * self._strategy.popsize :]
            if len(batch) < self._strategy.popsize:
                return self._strategy
            self._tell(self._strategy, batch[: self._strategy.popsize])
            self._generation += 1
            self._drawn.clear()
            if self._strategy.has_converged:
                self._run, self._generation = self._run + 1, 0
                start = self._rng(_STARTING).rand(len(self._space.variables))
                self._strategy = self._begin(start)

    def _begin(self, start: np.ndarray) -> Strategy:
        """Begin a run: by pycma where all variables are continuous, else with margin.

        Args:
            start: in the unit cube; shape (variables,).
        """
        variables = self._space.variables
        # pycma needs two variables.
        is_continuous = len(variables) > 1 and all(v.n_values is None for v in variables)
        kind = Continuous if is_continuous else Mixed
        # A number on the border has no neighbourhood on one side; step in a little.
        inside = np.clip(start, 0.02, 0.98)
        start = np.where([v.choices is None for v in variables], inside, start)
        return kind(variables, start, self.popsize << self._run, self._sigma0, TOLERANCE)

    def _tell(self, strategy: Strategy, batch: Sequence[FrozenTrial]) -> None:
        """Tell one generation; a generation that failed whole says nothing."""
        if any(trial.state == TrialState.COMPLETE for trial in batch):
            vectors = [np.array(trial.user_attrs["cma"]["vector"]) for trial in batch]
            # pycma draws when it rescales points from an earlier generation.
            strategy.tell(vectors, losses(batch), self._rng(_TELLING))


_Draw = tuple[int, ...]


def _draw(index: int, attempt: int, number: int) -> _Draw:
    """Return what a draw's random numbers hang on.

    Where a trial's attempts were all turned down, the next one has the same index, and must not draw
    the same again.
    """
    return (index, attempt, number) if attempt else (index,)


class _Record:
    """What the sampler's own trials say; each trial is read once when it is there, once when told.

    Attributes:
        first: the record of the first of them, or of what was turned down before.
        draws: of every candidate, see `_draw`, by (run, generation) it was drawn in.
        told: the trials told, in that order, by the run they were drawn in.
    """

    def __init__(self) -> None:
        self.first: dict[str, Any] | None = None
        self.draws: defaultdict[tuple[int, int], list[_Draw]] = defaultdict(list)
        self.told: defaultdict[int, list[FrozenTrial]] = defaultdict(list)
        self._n_read = 0
        self._running: list[int] = []

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Take up what is new since the last call."""
        for place in range(self._n_read, len(trials)):
            attributes = trials[place].user_attrs
            self.first = self.first or attributes.get("cma") or attributes.get(INSTEAD, {}).get("cma")
            if record := attributes.get("cma"):
                draw = _draw(record["index"], record["attempt"], trials[place].number)
                self.draws[record["run"], record["generation"]].append(draw)
                self._running.append(place)
        self._n_read = len(trials)
        # A trial killed while it was told carries "told" too, but is not told before it is finished.
        running = [trials[place] for place in self._running]
        told = [t for t in running if t.state.is_finished() and "told" in t.user_attrs]
        for trial in sorted(told, key=lambda trial: int(trial.user_attrs["told"])):
            self.told[trial.user_attrs["cma"]["run"]].append(trial)
        self._running = [
            p for p, t in zip(self._running, running, strict=True) if not t.state.is_finished()
        ]


def losses(batch: Sequence[FrozenTrial]) -> list[float]:
    """Return what is minimised, finite: feasible ones by value, then others by violation, then failures.

    The feasibility rules of Deb 2000, https://doi.org/10.1016/S0045-7825(99)00389-8.
    """
    complete = [trial for trial in batch if trial.state == TrialState.COMPLETE]
    feasible = [-float(t.values[0]) for t in complete if _violation(t) <= 0]
    worst = max(feasible, default=0.0)
    behind = 1 + worst + max((_violation(trial) for trial in complete), default=0.0)
    return [
        behind
        if trial.state != TrialState.COMPLETE
        else worst + _violation(trial)
        if _violation(trial) > 0
        else -float(trial.values[0])
        for trial in batch
    ]


def _violation(trial: FrozenTrial) -> float:
    return sum(max(0.0, violation) for violation in trial.constraints.values())


def _best(trials: Sequence[FrozenTrial]) -> int | None:
    """Return the number of the best trial that is told, of equals the first."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not complete:
        return None
    ranked = losses(complete)
    return complete[ranked.index(min(ranked))].number
