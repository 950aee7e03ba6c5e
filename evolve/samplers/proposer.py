"""What is tried next: known recipes first, then the sampler's proposals, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from evolve.samplers import INSTEAD, Proposal, Sampler, derived_rng
from evolve.space import SearchSpace, Value
from merge_core.errors import RecipeError

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# How often a sampler is asked anew where a proposal is an earlier candidate, or no valid recipe.
_ATTEMPTS = 8
# How many neighbours of its proposal are drawn then.
_NEIGHBOURS = 1000
# A space of at most so many candidates is searched for what is left.
_COUNTABLE = 100_000
# Keys the generator of neighbours; no attempt has this number.
_NEAR = 1 << 31


class Proposer:
    """A sampler that never repeats itself.

    Args:
        known: recipes to try first, by name; each lies in the space.
        seed: the search's.

    Attributes:
        ending: why nothing more is proposed, once that is so.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: Sampler,
        known: Mapping[str, Mapping[str, Value]],
        seed: int,
    ) -> None:
        self._space = space
        self._sampler = sampler
        self._known = known
        self._seed = seed
        self._seen: set[tuple[Value, ...]] = set()
        self._n_read = 0
        self._is_done = False
        self.ending: str | None = None

    def propose(self, number: int, trials: Sequence[FrozenTrial]) -> Proposal | None:
        """Propose trial `number`, see Sampler, in active values; None where no candidate is left."""
        self._seen.update(self._key(trial.params) for trial in trials[self._n_read :])
        self._n_read = len(trials)
        self.ending = None
        for proposal in self._proposals(number, trials):
            if self._key(proposal.values) not in self._seen and self._is_valid(proposal):
                return proposal
        self.ending = self._why_none()
        return None

    def _why_none(self) -> str:
        if self._is_done:
            return f"the sampler needs no more than the {len(self._seen)} candidates that are scored"
        return (
            f"all {len(self._seen)} candidates of the space are scored"
            if self._is_countable
            else f"beside the {len(self._seen)} candidates that are scored no other was found"
        )

    @property
    def _is_countable(self) -> bool:
        n_points = self._space.n_points
        return n_points is not None and n_points <= _COUNTABLE

    def _proposals(self, number: int, trials: Sequence[FrozenTrial]) -> Iterator[Proposal]:
        """Yield what could be proposed, best first, in active values."""
        for name, values in self._known.items():
            yield Proposal(self._space.active(values), {"known": name})
        first: Proposal | None = None
        self._is_done = False
        for attempt in range(_ATTEMPTS):
            proposal = self._sampler.propose(number, trials, attempt)
            if proposal is None:
                self._is_done = True
                return
            first = first or proposal
            yield replace(proposal, values=self._space.active(proposal.values))
        assert first is not None
        # What was turned down tells, too, what the sampler began with.
        instead = {INSTEAD: dict(first.attributes)} if first.attributes else {}
        for values in self._near(first.values, number):
            yield Proposal(self._space.active(values), instead)
        if self._is_countable:
            names = [variable.name for variable in self._space.variables]
            for point in product(*(variable.all_values() for variable in self._space.variables)):
                yield Proposal(self._space.active(dict(zip(names, point, strict=True))), instead)

    def _near(self, values: Mapping[str, Value], number: int) -> Iterator[dict[str, Value]]:
        """Yield points in which few variables are drawn anew, then more."""
        rng = derived_rng(self._seed, number, _NEAR)
        for i in range(_NEIGHBOURS):
            share = (i + 1) / _NEIGHBOURS
            yield {
                v.name: v.from_unit(rng.rand()) if rng.rand() < share else values[v.name]
                for v in self._space.variables
            }

    def _is_valid(self, proposal: Proposal) -> bool:
        """Tell whether the values make a valid recipe."""
        try:
            self._space.recipe(proposal.values)
        except RecipeError:  # choices that each are right may not go together
            return False
        return True

    def _key(self, values: Mapping[str, Value]) -> tuple[Value, ...]:
        """Return what two equal candidates have in common; values on a step may differ in rounding."""
        return tuple(
            None
            if v.name not in values
            else round((float(values[v.name]) - v.low) / v.step)  # type: ignore[arg-type]
            if v.step is not None
            else values[v.name]
            if v.choices is None
            else repr(values[v.name])  # true is not 1 there
            for v in self._space.variables
        )
