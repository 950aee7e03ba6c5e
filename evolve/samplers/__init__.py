"""Samplers: from the record of trials to the values of the next candidate.

A proposal is a pure function of (seed, trial number, attempt, record of trials), so that a search
that was killed goes on as if it had not been. No sampler state is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evolve.space import SearchSpace, Value

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Proposal:
    """Values of every variable, and what the sampler wants recorded with the trial (JSON)."""

    values: dict[str, Value]
    attributes: Mapping[str, Any] = field(default_factory=dict)


INSTEAD = "instead_of"
"""The attribute under which a candidate keeps those of the proposal that it stands for, which was turned
down: whoever resumes the search knows from there what the sampler had begun with."""


class Sampler(Protocol):
    """Proposes candidates; `Proposer` sees to it that none is proposed twice."""

    def propose(self, number: int, trials: Sequence[FrozenTrial], attempt: int = 0) -> Proposal | None:
        """Propose trial `number`.

        Args:
            number: the trial's number in the study, from 0.
            trials: all trials so far, by number; finished ones carry "told", the order in which
                they were told. Values are maximised; a trial lacks the parameters that its recipe
                does not read. From call to call the record only grows.
            attempt: counts the proposals for this trial that were turned down.

        Returns:
            None where it has no more to propose until a candidate that is under way is told.
        """


def derived_rng(seed: int, *parts: int) -> np.random.RandomState:
    """Return a generator of its own for (seed, parts), independent of every other."""
    sequence = np.random.SeedSequence([seed, *parts])
    return np.random.RandomState(sequence.generate_state(8))


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
    if name == "greedy_soup":
        from evolve.samplers.greedy_soup import GreedySoup

        return GreedySoup(space)
    if name == "qmc":
        from evolve.samplers.qmc import QmcSampler

        return QmcSampler(space, seed)
    from evolve.samplers.optuna import OptunaSampler

    return OptunaSampler(name, space, seed, n_objectives)
