"""A run of CMA-ES by pycma, where all variables are continuous."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from evolve.space import Value, Variable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pycma misses matplotlib, which only its plots need
    import cma

# pycma's reasons to stop that equal or noisy scores alone cannot bring about.
_CONVERGED = {"tolx", "tolfacupx", "tolupsigma", "conditioncov", "noeffectaxis", "noeffectcoord"}


class _Normal:
    """pycma's source of normal numbers: the generator of the draw, never the global one."""

    def __init__(self) -> None:
        self.rng = np.random.RandomState(0)

    def __call__(self, *shape: int) -> Any:
        return self.rng.randn(*shape)


class Continuous:
    """pycma, see Strategy; vectors lie in the unit cube, shape (variables,)."""

    def __init__(
        self,
        variables: Sequence[Variable],
        start: np.ndarray,
        popsize: int,
        sigma: float,
        tolerance: float,
    ) -> None:
        self.popsize = popsize
        self.has_converged = False
        self._variables = variables
        self._normal = _Normal()
        options = {
            "bounds": [0, 1],
            "popsize": popsize,
            "randn": self._normal,
            "seed": np.nan,
            "verbose": -9,
            "verb_log": 0,
            "tolx": tolerance,
            # Candidates are drawn one by one; pycma mirrors some of a generation below six.
            "CMA_mirrors": 0,
            # Scores of few documents are often equal; that is no reason to stop.
            "tolflatfitness": np.inf,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy = cma.CMAEvolutionStrategy(start, sigma, options)

    def ask(self, rng: np.random.RandomState) -> np.ndarray:
        """Draw a candidate; pycma remembers it."""
        self._normal.rng = rng
        vector: np.ndarray = self._strategy.ask(1)[0]
        return vector

    def values(self, vector: np.ndarray) -> dict[str, Value]:
        """Return the values of every variable, see Strategy."""
        return {v.name: v.from_unit(float(u)) for v, u in zip(self._variables, vector, strict=True)}

    def tell(
        self, vectors: Sequence[np.ndarray], losses: Sequence[float], rng: np.random.RandomState
    ) -> None:
        """Update the distribution, see Strategy."""
        self._normal.rng = rng
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy.tell(list(vectors), list(losses))
            self.has_converged = bool(_CONVERGED & set(self._strategy.stop()))
