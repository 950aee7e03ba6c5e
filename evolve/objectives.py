"""What a sampler sees of a candidate: the values to maximise, and how far constraints are violated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from evolve.search_file import SearchSettings, Signal
from evolve.tasks import TaskSet
from merge_core.errors import nearest


@dataclass(frozen=True)
class Rating:
    """What is recorded of a candidate beside its scores.

    Attributes:
        values: what the sampler maximises, in the order of Objectives.names.
        objective: the weighted sum of the scores, maximised.
        error: its standard error, where scores are estimates from a part of the documents; else 0.
        violations: by constraint, in units of the score; at most 0 where it is met.
    """

    values: list[float]
    objective: float
    error: float = 0.0
    violations: dict[str, float] = field(default_factory=dict)

    @property
    def total_violation(self) -> float:
        """By how much the constraints are violated in all; 0 where they are met."""
        return sum(max(0.0, violation) for violation in self.violations.values())


class Objectives:
    """From a candidate's scores to what the sampler sees, as `search.objective` says.

    Args:
        tasks: the entries of `tasks:`.
        settings: objective, signal and constraints.
        signal: followed instead of the settings'.

    Attributes:
        names: one a value: the entries' keys under `pareto`, else the weighted sum alone.
    """

    def __init__(self, tasks: TaskSet, settings: SearchSettings, signal: Signal | None = None) -> None:
        self._tasks = tasks
        self._signal = signal or settings.followed
        self._followed = tasks.following(self._signal)
        self._is_pareto = settings.objective == "pareto"
        self._constraints = settings.constraints
        self.names = [task.key for task in tasks.tasks] if self._is_pareto else ["weighted sum"]

    @property
    def needs_base(self) -> bool:
        """Whether a constraint is relative to the base model's scores."""
        return any(constraint.not_below == "base" for constraint in self._constraints)

    def rate(
        self,
        scores: Mapping[str, float],
        base: Mapping[str, float] | None = None,
        standard_errors: Mapping[str, float] | None = None,
    ) -> Rating:
        """Return everything that follows from a candidate's scores.

        Args:
            base: see `violations`.
            standard_errors: of scores that are estimates.
        """
        return Rating(
            self.values(scores),
            self._followed.objective(scores),
            self._followed.objective_error(standard_errors or {}),
            self.violations(scores, base),
        )

    def values(self, scores: Mapping[str, float]) -> list[float]:
        """Return what the sampler maximises; lower-is-better scores count negative.

        Under `pareto` that is one value an entry: what is followed of it, unweighted; metric and
        likelihood are added under `both`.
        """
        if not self._is_pareto:
            return [self._followed.objective(scores)]
        signed = {task.key: task.sign * scores[task.key] for task in self._followed.tasks}
        return [sum(signed.get(key, 0.0) for key in keys) for keys in self._keys()]

    def _keys(self) -> list[tuple[str, ...]]:
        """Return for each entry the scores that may be followed of it."""
        if self._signal == "metric":
            return [(task.key,) for task in self._tasks.tasks]
        likelihoods = self._tasks.likelihoods
        return [
            (task.key, likelihoods[task.key].key) if task.key in likelihoods else (task.key,)
            for task in self._tasks.tasks
        ]

    def violations(
        self, scores: Mapping[str, float], base: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Return by constraint how far it is violated, in units of the score; at most 0 where met.

        Args:
            base: the base model's scores on the same documents, where `needs_base`.
        """
        signs = {task.key: task.sign for task in self._tasks.tasks}
        found = {}
        for constraint in self._constraints:
            key, limit = constraint.task, constraint.not_below
            bound = (base or {})[key] if limit == "base" else limit
            # To nine digits: 0.5 - 0.02 is 0.48, whatever binary fractions make of it.
            found[str(constraint)] = round(signs[key] * (bound - scores[key]) - constraint.by, 9)
        return found


def constraint_faults(settings: SearchSettings, tasks: TaskSet, base_model: str | None) -> list[str]:
    """List constraints on what is not scored, and those that need a base where there is none."""
    keys = [task.key for task in tasks.tasks]
    scored = [task.key for task in tasks.following(settings.followed).tasks]
    faults = []
    for i, constraint in enumerate(settings.constraints):
        entry = f"search.constraints[{i}]"
        if constraint.task not in keys:
            faults.append(
                f"{entry}.task is {constraint.task!r}, which is no entry of tasks:; "
                f"{nearest(constraint.task, keys)}"
            )
        elif constraint.task not in scored:
            faults.append(
                f"{entry}.task is {constraint.task!r}, whose metric is not scored while search.signal is "
                f"{settings.signal}; use signal: both, or metric"
            )
        if constraint.not_below == "base" and base_model is None:
            faults.append(
                f"{entry}.not_below is base, but the recipe has no base_model; write a score in its "
                f"place, or add base_model"
            )
    return faults
