"""Several models against several baselines, on the same documents, with one certainty for all of it.

A member's *gain* is its distance to the best baseline: the smallest of its distances to all. Both
choices that are made on these documents are covered:

- *Which member.* For each baseline the lower ends hold for all members at once, so the member that
  is picked is covered too.
- *Which baseline is best.* A gain's lower end is the lowest of those to all baselines, the truly
  best one's among them, which needs no further adjustment; the upper ends hold for all pairs at
  once (multiple comparisons with the best, Hsu 1984, Annals of Statistics 12, 1136).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from evolve.intervals import (
    Interval,
    holm,
    is_binary,
    mcnemar,
    resampled_gains,
    resampled_tasks,
    simultaneous,
)
from evolve.noise import Noise
from evolve.power import documents_needed
from evolve.tasks import Outcomes, TaskSet


@dataclass(frozen=True)
class Difference:
    """A member's score minus a baseline's on one task, as the task counts.

    Attributes:
        p_value: McNemar's exact test; None where outcomes are not 0/1. Interval and test are
            adjusted for all members, baselines and tasks that are compared.
        is_better: whether the interval lies on the better side of zero, and the difference beyond
            the noise; None where that cannot be told.
    """

    value: float
    low: float
    high: float
    p_value: float | None
    is_better: bool | None


class Comparison:
    """All members against all baselines, resampled together.

    Args:
        tasks: give scores, weights and the seed.
        members, baselines: outcomes of the same documents, in the same order; at least one of each.
    """

    def __init__(
        self, tasks: TaskSet, members: Mapping[int, Outcomes], baselines: Mapping[str, Outcomes]
    ) -> None:
        self._tasks = tasks
        self._trials = list(members)
        self._names = list(baselines)
        self._sides = [*members.values(), *baselines.values()]
        self._resampled = resampled_tasks(tasks, self._sides)
        # Member after member, each with every baseline; a column of samples each.
        self._pairs = [
            (one, len(members) + other) for one in range(len(members)) for other in range(len(baselines))
        ]
        self._objectives = [tasks.objective(tasks.scores(side)) for side in self._sides]
        self._values = np.array(
            [self._objectives[one] - self._objectives[other] for one, other in self._pairs]
        )
        self._samples = np.column_stack(
            [resampled_gains(tasks, self._resampled, *pair) for pair in self._pairs]
        )

    def best_baseline(self) -> str:
        """Name the baseline with the best objective; of equals the first."""
        objectives = self._objectives[len(self._trials) :]
        return self._names[objectives.index(max(objectives))]

    def gains(self) -> dict[int, Interval]:
        """Return each member's gain over the best baseline."""
        intervals = simultaneous(self._values, self._samples)
        highs = np.array([interval.high for interval in intervals]).reshape(self._lows.shape)
        values = np.array([interval.value for interval in intervals]).reshape(self._lows.shape)
        return {
            trial: Interval(*(float(of[i].min()) for of in (values, self._lows, highs)))
            for i, trial in enumerate(self._trials)
        }

    @cached_property
    def _lows(self) -> np.ndarray:
        """Lower ends of all distances, those to one baseline a family; shape (members, baselines)."""
        lows = np.empty((len(self._trials), len(self._names)))
        for i in range(len(self._names)):
            of_one = slice(i, None, len(self._names))
            intervals = simultaneous(self._values[of_one], self._samples[:, of_one])
            lows[:, i] = [interval.low for interval in intervals]
        return lows

    def documents_needed(self, trial: int, n: int) -> int | None:
        """Return how many documents would show a member's distances to all baselines.

        Args:
            n: how many these are.

        Returns:
            None where all are shown, or one is no gain.
        """
        needed = []
        for name, low in zip(self._names, self._lows[self._trials.index(trial)], strict=True):
            place = self._place(trial, name)
            value, error = float(self._values[place]), float(self._samples[:, place].std())
            if value <= 0:
                return None
            if low <= 0 and error:
                needed.append(documents_needed(n, value, error, (value - float(low)) / error))
        return max(needed, default=None)

    def differences(self, trial: int, baseline: str, noise: Noise | None = None) -> dict[str, Difference]:
        """Return a member's differences to one baseline, by task.

        Args:
            noise: how far a task's score moves when the member is scored again.
        """
        found = {}
        for task in self._tasks.tasks:
            interval, p_value = self._by_task[task.key][self._place(trial, baseline)]
            changes = noise.tasks.get(task.key, {}).values() if noise else ()
            floor = max((abs(change.difference) for change in changes), default=0.0)
            is_told = not interval.low <= 0 <= interval.high and abs(interval.value) > floor
            is_better = (interval.value > 0) == task.higher_is_better if is_told else None
            found[task.key] = Difference(interval.value, interval.low, interval.high, p_value, is_better)
        return found

    def _place(self, trial: int, baseline: str) -> int:
        return self._trials.index(trial) * len(self._names) + self._names.index(baseline)

    @cached_property
    def _by_task(self) -> dict[str, list[tuple[Interval, float | None]]]:
        """Intervals and p-values of all pairs on all tasks, one family; by task, in order of pairs."""
        values, samples, p_values = [], [], []
        for task in self._tasks.tasks:
            sides = [side[task.key] for side in self._sides]
            scores = [task.score(side) for side in sides]
            has_hits = all(is_binary(task, side) for side in sides)
            for one, other in self._pairs:
                values.append(scores[one] - scores[other])
                samples.append(self._resampled[task.key].difference(one, other))
                p_values.append(mcnemar(sides[one], sides[other]) if has_hits else None)
        family = zip(
            simultaneous(np.array(values), np.column_stack(samples)), holm(p_values), strict=True
        )
        return {task.key: list(islice(family, len(self._pairs))) for task in self._tasks.tasks}
