"""A run of CMA-ES with margin, where variables have steps or are categories, or there is only one.

Hamano et al. 2025, CatCMA with Margin, https://arxiv.org/abs/2504.07884, by the package `cmaes`: a
Gaussian over numbers, whose marginals never leave a step without some probability, and a
distribution over the choices of each category.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from cmaes import CatCMAwM

from evolve.space import Value, Variable


class Mixed:
    """CatCMAwM, see Strategy.

    A vector holds the unrounded numbers in the unit cube, continuous ones first, then the index of
    each category's choice.
    """

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
        self._tolerance = tolerance
        pairs = list(zip(variables, start, strict=True))
        continuous = [(v, u) for v, u in pairs if v.n_values is None]
        stepped = [(v, u) for v, u in pairs if v.choices is None and (v.n_values or 0) > 2]
        # As the package advises, what takes two values is a category.
        categories = [(v, u) for v, u in pairs if v.choices is not None or v.n_values == 2]
        self._numbers = [v for v, _ in (*continuous, *stepped)]
        self._categories = [v for v, _ in categories]
        self._n_continuous = len(continuous)
        counts = [v.n_values or 0 for v in self._categories]
        likely = np.zeros((len(counts), max(counts, default=0)))
        for row, n, (v, u) in zip(likely, counts, categories, strict=True):
            row[:n] = (1 - v.steadiness) / (n - 1)
            row[min(int(u * n), n - 1)] = v.steadiness
        self._strategy = CatCMAwM(
            x_space=[[0.0, 1.0]] * len(continuous) or None,
            z_space=[np.linspace(0, 1, v.n_values or 0).tolist() for v, _ in stepped] or None,
            c_space=counts or None,
            population_size=popsize,
            mean=np.array([u for _, u in (*continuous, *stepped)]),
            sigma=sigma,
            cov=np.eye(len(self._numbers)),
            cat_param=likely if counts else None,
            seed=0,
        )

    def ask(self, rng: np.random.RandomState) -> np.ndarray:
        """Draw a candidate."""
        self._strategy.reseed_rng(int(rng.randint(2**31 - 1)))
        drawn = self._strategy.ask()
        numbers = np.zeros(0) if drawn._v_raw is None else drawn._v_raw
        chosen = np.zeros(0) if drawn.c is None else drawn.c.argmax(axis=1)
        return np.concatenate([numbers, chosen])

    def values(self, vector: np.ndarray) -> dict[str, Value]:
        """Return the values of every variable, see Strategy."""
        numbers, chosen = np.split(vector, [len(self._numbers)])
        found = {v.name: v.from_unit(float(u)) for v, u in zip(self._numbers, numbers, strict=True)}
        for variable, index in zip(self._categories, chosen, strict=True):
            found[variable.name] = variable.from_unit((index + 0.5) / (variable.n_values or 1))
        return found

    def tell(
        self, vectors: Sequence[np.ndarray], losses: Sequence[float], rng: np.random.RandomState
    ) -> None:
        """Update the distribution, see Strategy; candidates that are all equal leave it as it is."""
        # The strategy reads ranks, and penalises what lies outside by their spread.
        ranks = np.searchsorted(np.sort(losses), losses)
        if not ranks.any():
            return
        solutions = []
        for vector, rank in zip(vectors, ranks, strict=True):
            numbers, chosen = np.split(vector, [len(self._numbers)])
            one_hot = np.zeros((len(chosen), max((v.n_values or 0 for v in self._categories), default=0)))
            one_hot[np.arange(len(chosen)), chosen.astype(int)] = 1
            raw = numbers if len(numbers) else None
            solutions.append((CatCMAwM.Solution(None, None, one_hot.astype(bool), raw), float(rank)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._strategy.tell(solutions)
        self.has_converged = bool(self._n_continuous) and bool(
            (self._deviations()[: self._n_continuous] < self._tolerance).all()
        )

    def _deviations(self) -> np.ndarray:
        """Return the standard deviation of each number; the package names no public way to them."""
        deviations: np.ndarray = self._strategy._sigma * np.sqrt(np.diag(self._strategy._C))
        return deviations
