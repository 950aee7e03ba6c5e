"""The noise floor: what changes when the same candidate is scored again.

The winner is merged, loaded and scored twice more, the second time with its requests in another
order. An engine that computes the same every time changes nothing. Where rounding depends on which
requests meet in a batch, a few documents change, and a gain no larger than that shows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evolve.tasks import Outcomes, Split, TaskSet


@dataclass(frozen=True)
class Change:
    """One task scored again, against its recorded scoring.

    Attributes:
        changed: share of documents whose outcome differs, in [0, 1].
        difference: the score now minus the score recorded.
    """

    changed: float
    difference: float


@dataclass(frozen=True)
class Noise:
    """How far scorings of one candidate differ.

    Attributes:
        split: on which documents.
        n_documents: how many they are, over all tasks.
        floor: the most that the objective moved by in a repetition; tasks that moved in opposite
            directions do not cancel.
        tasks: by task, the change in each repetition: "again", "reordered".
    """

    split: Split
    n_documents: int
    floor: float
    tasks: dict[str, dict[str, Change]]

    @classmethod
    def recalled(cls, data: Mapping[str, Any]) -> Noise:
        """Rebuild from what `asdict` made of it."""
        tasks = {
            task: {name: Change(**change) for name, change in changes.items()}
            for task, changes in data["tasks"].items()
        }
        return cls(data["split"], data["n_documents"], data["floor"], tasks)


def measured(
    tasks: TaskSet, split: Split, recorded: Outcomes, repetitions: Mapping[str, Outcomes]
) -> Noise:
    """Compare repetitions with the recorded scoring, document by document.

    Args:
        tasks: give scores and weights.
        split: on which documents all were scored.
        recorded: outcomes as they count.
        repetitions: by name the outcomes of the same documents, in the same order.
    """
    changes: dict[str, dict[str, Change]] = {}
    floor = 0.0
    scores = tasks.scores(recorded)
    for name, outcomes in repetitions.items():
        moved = 0.0
        for task in tasks.tasks:
            pairs = list(zip(recorded[task.key], outcomes[task.key], strict=True))
            difference = task.score(outcomes[task.key]) - scores[task.key]
            share = sum(_timeless(a.value) != _timeless(b.value) for a, b in pairs) / len(pairs)
            changes.setdefault(task.key, {})[name] = Change(share, difference)
            moved += task.weight * abs(difference)
        floor = max(floor, moved)
    documents = {(o.leaf, o.document) for outcomes in recorded.values() for o in outcomes}
    return Noise(split, len(documents), floor, changes)


def _timeless(value: Any) -> Any:
    """Leave the clock out of what a function of the user's own was given."""
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, Mapping) else value
