"""What is scored: an entry of `tasks:`, its metric, its direction, and how documents add up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from evolve.errors import TrialTaskError, boundary
from evolve.tasks.draw import Documents, Leaf, Split
from evolve.tasks.outcome import AnsweredDocument, Outcome

Answered = Mapping[tuple[str, int], AnsweredDocument]
"""What a model answered, by leaf and document."""


@dataclass(frozen=True)
class ScoredTask:
    """One entry of `tasks:`: what is scored, on which leaves, by which metric.

    Attributes:
        key: how the score is called.
        weight: share in the objective, not negative.
        metric, filter: which of the task's values counts.
        leaves: one for a plain task, several for a group.
        higher_is_better: the metric's own direction, or what the entry's sign says.
        weight_by_size: how a group averages its leaves; None for a plain task.
    """

    key: str
    weight: float
    metric: str
    filter: str
    leaves: tuple[Leaf, ...]
    higher_is_better: bool
    weight_by_size: bool | None = None

    is_asked: ClassVar[bool] = True
    """Whether the leaves' own requests must be answered for it."""
    may_be_share: ClassVar[bool] = True
    """Whether values that are all 0 or 1 are hits and misses."""
    n_resamples: ClassVar[int] = 2000
    """How often an interval scores resampled documents."""

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.higher_is_better else -1

    @property
    def runs_code(self) -> bool:
        """Whether scoring executes what a model wrote."""
        return any(getattr(leaf.task, "UNSAFE_CODE", False) for leaf in self.leaves)

    @property
    def is_against_metric(self) -> bool:
        """Whether the worse end of the metric is asked for, as a signed entry may."""
        own = self.leaves[0].task.higher_is_better().get(self.metric)
        return own is not None and bool(own) != self.higher_is_better

    @cached_property
    def _is_mean(self) -> bool:
        from lm_eval.api.metrics import mean

        return all(self._aggregation(leaf) is mean for leaf in self.leaves)

    def averages(self, outcomes: Sequence[Outcome]) -> bool:
        """Tell whether each leaf's score is the plain mean of its documents' values."""
        return self._is_mean and all(outcome.value is not None for outcome in outcomes)

    @property
    def is_raced(self) -> bool:
        """Whether a part of the documents tells of all: the score is their values' plain mean."""
        return self.is_asked and self._is_mean and self.weight_by_size is not False

    def among(self, documents: Documents) -> Self:
        """Return the entry over some of its documents; leaves that have none of them go."""
        leaves = [leaf.among(documents[leaf.name]) for leaf in self.leaves if leaf.name in documents]
        return replace(self, leaves=tuple(leaves))

    def _aggregation(self, leaf: Leaf) -> Callable[[list[Any]], Any]:
        from lm_eval.api.metrics import mean

        # A metric that only shows in the results is averaged, as in lm-eval.
        found: Callable[[list[Any]], Any] = leaf.task.aggregation().get(self.metric, mean)
        return found

    def score(self, outcomes: Sequence[Outcome]) -> float:
        """Aggregate outcomes by the task's own functions.

        Raises:
            TrialTaskError: the metric fails, or its value is not finite.
        """
        by_leaf: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            by_leaf[outcome.leaf].append(outcome)
        scores, sizes = [], []
        # A small holdout may leave a group's small leaf without documents.
        for leaf in (leaf for leaf in self.leaves if by_leaf[leaf.name]):
            values = [outcome.value for outcome in by_leaf[leaf.name] if outcome.value is not None]
            if not values:
                raise self._no_value(leaf.name, by_leaf[leaf.name])
            with boundary(TrialTaskError, f"aggregating {self.metric} of {leaf.name}"):
                scores.append(float(self._aggregation(leaf)(values)))
            if not math.isfinite(scores[-1]):
                raise self._not_finite(leaf.name, scores[-1], by_leaf[leaf.name])
            sizes.append(len(by_leaf[leaf.name]))
        if self.weight_by_size is None:
            return scores[0]
        from lm_eval.api.metrics import aggregate_subtask_metrics

        return float(aggregate_subtask_metrics(scores, sizes, self.weight_by_size))

    def _not_finite(self, name: str, score: float, outcomes: Sequence[Outcome]) -> TrialTaskError:
        """Say of a score that is no number, and of the first document that makes it so."""
        text = f"{name}: the score is {score}, not a finite number; {self.metric} "
        for outcome in outcomes:
            value = outcome.value
            if isinstance(value, float) and not math.isfinite(value):
                return TrialTaskError(f"{text}gives document {outcome.document} {value}")
        return TrialTaskError(f"{text}aggregates {len(outcomes)} documents to that")

    def _no_value(self, name: str, outcomes: Sequence[Outcome]) -> TrialTaskError:
        text = f"{name}: no document has a value of {self.metric},{self.filter}"
        if there := sorted({key for outcome in outcomes for key in outcome.others}):
            text += f", only of {'; '.join(there):.200}; name one of these as the entry's metric, with a "
            text += "direction"
        return TrialTaskError(text)

    def outcomes(self, split: Split, answered: Answered) -> list[Outcome]:
        """Pick this entry's value of each document.

        Raises:
            TrialTaskError: an objective fails.
        """
        own = f"{self.metric},{self.filter}"
        found = []
        for leaf in self.leaves:
            for number in leaf.documents[split]:
                others = dict(answered[leaf.name, number].values)
                if own in others and others[own] is None:
                    raise TrialTaskError(
                        f"{leaf.name}, document {number}: {self.metric} gave None, not a value"
                    )
                found.append(Outcome(leaf.name, number, others.pop(own, None), others, own))
        return found

    def n_documents(self, split: Split) -> int:
        """Count the documents of a split."""
        return sum(len(leaf.documents[split]) for leaf in self.leaves)
