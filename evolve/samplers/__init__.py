"""Samplers: from the record of trials to the values of the next candidate.

A proposal is a pure function of (seed, trial number, record of trials), so that a search that was
killed goes on as if it had not been. No sampler state is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evolve.errors import SearchFileError
from evolve.space import SearchSpace, Value

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Proposal:
    """Values of every variable, and what the sampler wants recorded with the trial (JSON)."""

    values: dict[str, Value]
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    """Proposes candidates."""

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal:
        """Propose trial `number`.

        Args:
            number: the trial's number in the study, from 0.
            trials: all trials so far, by number; finished ones carry "told", the order in which
                they were told. Values are maximised.
        """


def derived_rng(seed: int, *parts: int) -> np.random.RandomState:
    """Return a generator of its own for (seed, parts), independent of every other."""
    sequence = np.random.SeedSequence([seed, *parts])
    return np.random.RandomState(sequence.generate_state(8))


def resolve_sampler(name: str, space: SearchSpace, n_objectives: int = 1) -> tuple[str, str]:
    """Choose the sampler for `auto`.

    Returns:
        Name, and why in one clause.

    Raises:
        SearchFileError: the sampler cannot have so many objectives.
    """
    if name == "cma" and n_objectives > 1:
        raise SearchFileError(
            f"search.sampler is cma, which has one objective, and search.objective pareto has "
            f"{n_objectives} here; use nsga2, tpe or gp"
        )
    if name != "auto":
        return name, "as asked"
    if n_objectives > 1:
        return "nsga2", f"{n_objectives} objectives"
    categories = [v.name for v in space.variables if v.choices is not None]
    if len(space.variables) < 2:
        return "tpe", "one variable"
    if categories:
        return "tpe", f"{len(categories)} of {len(space.variables)} variables are categories"
    return "cma", f"{len(space.variables)} numeric variables"


def make_sampler(
    name: str,
    space: SearchSpace,
    seed: int,
    n_objectives: int = 1,
    *,
    sigma0: float | None = None,
    population_size: int | None = None,
) -> Sampler:
    """Build a sampler by its resolved name; the last two are cma's."""
    if name == "cma":
        from evolve.samplers.cma import CmaSampler

        return CmaSampler(space, seed, sigma0, population_size)
    if name == "qmc":
        from evolve.samplers.qmc import QmcSampler

        return QmcSampler(space, seed)
    from evolve.samplers.optuna import OptunaSampler

    return OptunaSampler(name, space, seed, n_objectives)
