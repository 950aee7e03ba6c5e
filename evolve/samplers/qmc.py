"""A scrambled Sobol sequence: points that fill the space evenly, whatever was told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from evolve.samplers import Proposal, derived_rng
from evolve.space import SearchSpace


class QmcSampler:
    """Trial i is the i-th point of the sequence in the unit cube (Owen scrambling, by SciPy)."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._seed = seed

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal:
        """Propose trial `number`, see Sampler; where its point is turned down, a random one."""
        point = derived_rng(self._seed, number, attempt).rand(len(self._space.variables))
        if attempt == 0:
            from scipy.stats.qmc import Sobol

            sequence = Sobol(len(self._space.variables), scramble=True, rng=self._seed)
            with warnings.catch_warnings():
                # Its balance asks for a power of two of points, which a search need not have.
                warnings.simplefilter("ignore", UserWarning)
                point = sequence.random(number + 1)[number]
        return Proposal(
            {
                variable.name: variable.from_unit(float(u))
                for variable, u in zip(self._space.variables, point, strict=True)
            }
        )
