"""CMA-ES by pycma, in the unit cube of the space, tolerant of late and failed candidates.

Hansen, The CMA Evolution Strategy: A Tutorial, https://arxiv.org/abs/1604.00772. Generations have
no barrier: every `popsize` told candidates update the distribution, whichever generation they were
drawn in, and a worker that is free meanwhile gets another draw of the current distribution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evolve.samplers import Proposal, derived_rng
from evolve.space import SearchSpace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma misses matplotlib, which only its plots need
    import cma

# A quarter of each range: the start's neighbourhood first, the borders within two sigma.
SIGMA0 = 0.25
# Keys the generator while pycma updates; no candidate has this index.
_TELLING = 1 << 31


class _Normal:
    """pycma's source of normal numbers: one generator per (generation, index), never the global."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.key(0, 0)

    def key(self, generation: int, index: int) -> None:
        self._rng = derived_rng(self._seed, generation, index)

    def __call__(self, *shape: int) -> Any:
        return self._rng.randn(*shape)


class CmaSampler:
    """pycma, replayed from what each trial recorded: generation, index, vector.

    Args:
        sigma0: first standard deviation, as a share of each range; None = SIGMA0.
        popsize: candidates a generation; None = 4 + floor(3 ln n), as in the tutorial.
    """

    def __init__(
        self, space: SearchSpace, seed: int, sigma0: float | None = None, popsize: int | None = None
    ) -> None:
        self._space = space
        self._normal = _Normal(seed)
        n = len(space.variables)
        self.popsize = popsize or 4 + math.floor(3 * math.log(n))
        starts = space.starts()
        start = [variable.to_unit(starts[variable.name]) for variable in space.variables]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(
                # A start on the border has no neighbourhood on one side; step in a little.
                np.clip(start, 0.02, 0.98),
                sigma0 or SIGMA0,
                {
                    "bounds": [0, 1],
                    "popsize": self.popsize,
                    "randn": self._normal,
                    "seed": np.nan,
                    "verbose": -9,
                    "verb_log": 0,
                    # Scores of few documents are often equal; that is no reason to stop.
                    "tolflatfitness": np.inf,
                },
            )
        self._generation = 0
        self._n_drawn = 0

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal:
        """Propose trial `number`, see Sampler."""
        self._catch_up(trials)
        index = self._n_drawn
        vector = self._draw()
        values = {
            variable.name: variable.from_unit(float(u))
            for variable, u in zip(self._space.variables, vector, strict=True)
        }
        record = {"generation": self._generation, "index": index, "vector": vector.tolist()}
        return Proposal(values, {"cma": record})

    def _draw(self) -> np.ndarray:
        self._normal.key(self._generation, self._n_drawn)
        self._n_drawn += 1
        vector: np.ndarray = self._strategy.ask(1)[0]
        return vector

    def _catch_up(self, trials: Sequence[FrozenTrial]) -> None:
        """Bring pycma to the state that the recorded trials imply.

        Draws are repeated as well as tells, since pycma remembers the points it drew; in a process
        that proposed them itself there is nothing to repeat.
        """
        drawn = [trial for trial in trials if "cma" in trial.user_attrs]
        # A trial killed while it was told carries "told" too, but is not told before it is finished.
        told = [trial for trial in drawn if trial.state.is_finished() and "told" in trial.user_attrs]
        told.sort(key=lambda trial: int(trial.user_attrs["told"]))
        while True:
            n_drawn = sum(t.user_attrs["cma"]["generation"] == self._generation for t in drawn)
            while self._n_drawn < n_drawn:
                self._draw()
            batch = told[self._generation * self.popsize : (self._generation + 1) * self.popsize]
            if len(batch) < self.popsize:
                return
            self._tell(batch)
            self._generation += 1
            self._n_drawn = 0

    def _tell(self, batch: Sequence[FrozenTrial]) -> None:
        """Tell one generation; failed candidates rank last, equally."""
        values = [
            -float(trial.value)
            if trial.state == TrialState.COMPLETE and trial.value is not None
            else math.inf
            for trial in batch
        ]
        if all(math.isinf(value) for value in values):
            return
        vectors = [np.array(trial.user_attrs["cma"]["vector"]) for trial in batch]
        # pycma draws when it rescales points from an earlier generation.
        self._normal.key(self._generation, _TELLING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy.tell(vectors, values)
