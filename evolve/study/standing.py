"""How a search stands, kept as trials are told: counts, the best, the Pareto front.

After each candidate this is asked for; ranking all of them anew would take longer the more there are.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Mapping

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from evolve.front import knee


class Standing:
    """What `evolve.front.ranking` and `evolve.front.front` say first, of the trials added so far.

    Attributes:
        states: how many trials finished in each state.
        latest: the trial told last.
        n_documents: that the trials were asked, as far as they say.
        front: the trials that meet every constraint and that no such one dominates, by number; with
            one value the best alone, of equals the first.
    """

    def __init__(self) -> None:
        self.states: Counter[TrialState] = Counter()
        self.latest: FrozenTrial | None = None
        self.n_documents = 0
        self.front: list[FrozenTrial] = []
        self._values = np.zeros((0, 0))
        self._nearest: FrozenTrial | None = None
        self._leader: FrozenTrial | None = None

    @property
    def n_finished(self) -> int:
        """How many trials are told."""
        return self.states.total()

    def add(self, trial: FrozenTrial) -> None:
        """Take up a finished trial; in any order, the latest last."""
        self.states[trial.state] += 1
        self.latest = trial
        self.n_documents += trial.user_attrs.get("documents", 0)
        if trial.state != TrialState.COMPLETE:
            return
        if total_violation(trial):
            nearest = self._nearest
            if nearest is None or _distance(trial) < _distance(nearest):
                self._nearest = trial
            return
        values = np.array([trial.values])
        if self.front:
            at_least, at_most = self._values >= values, self._values <= values
            if (at_least.all(axis=1) & ~at_most.all(axis=1)).any():
                return
            stays = np.asarray(~at_most.all(axis=1) | at_least.all(axis=1))
            if values.shape[1] == 1 and stays.any():  # an equal of the one best
                if self.front[0].number < trial.number:
                    return
                stays[:] = False
            if not stays.all():
                self.front = [member for member, is_in in zip(self.front, stays, strict=True) if is_in]
                self._values = self._values[stays]
        place = bisect([member.number for member in self.front], trial.number)
        self.front.insert(place, trial)
        self._values = np.insert(self._values.reshape(-1, values.shape[1]), place, values, axis=0)
        self._leader = None

    def leader(self) -> FrozenTrial | None:
        """Return the best of all: the front's knee, else the nearest to meeting the constraints."""
        if not self.front:
            return self._nearest
        if self._leader is None:
            sums = [member.user_attrs["objective"] for member in self.front]
            self._leader = self.front[0 if self._values.shape[1] == 1 else knee(self._values, sums)]
        return self._leader


def _distance(trial: FrozenTrial) -> tuple[float, float, int]:
    """Order trials that violate constraints; with several values as they come."""
    assert trial.values is not None
    value = -trial.values[0] if len(trial.values) == 1 else 0.0
    return total_violation(trial), value, trial.number


def total_violation(trial: FrozenTrial) -> float:
    """By how much a trial violates the constraints in all; 0 where it meets them."""
    return sum(max(0.0, violation) for violation in trial.constraints.values())


def is_violating(violations: Mapping[str, float] | None) -> bool:
    """Tell whether a constraint is not met, of what `Study.violations` returns."""
    return any(violation > 0 for violation in (violations or {}).values())
