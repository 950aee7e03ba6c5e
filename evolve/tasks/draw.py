"""The draw: which documents of a task rank candidates, and which are kept for the verdict."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from evolve.search_file import ScoringSettings

Split = Literal["search", "holdout"]
SPLITS: tuple[Split, ...] = ("search", "holdout")


@dataclass(frozen=True)
class Leaf:
    """One lm-eval task and the documents drawn from it.

    Attributes:
        name: the task's name, behind its group's where it belongs to one: `mmlu/mmlu_anatomy`.
        task: the lm-eval task.
        documents: sorted numbers by split.
        docs: the task's documents, by number. lm-eval makes them anew at each look.
    """

    name: str
    task: Any
    documents: Mapping[Split, tuple[int, ...]]
    docs: Sequence[Mapping[str, Any]] = field(repr=False, compare=False)

    @property
    def generates(self) -> bool:
        """Whether the model answers with texts."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")


def draw(name: str, tasks: Sequence[Any], scoring: ScoringSettings, seed: int) -> tuple[Leaf, ...]:
    """Split each task's documents by seed: holdout first, then at most `limit` for the search.

    For a group both counts are spread over its leaves in proportion, with at least one search
    document a leaf.

    Args:
        name: what the user named; leaves of a group are named behind it.
        tasks: lm-eval tasks, one a leaf.
    """
    docs = [task.eval_docs for task in tasks]
    sizes = [len(documents) for documents in docs]
    total = sum(sizes)
    share = scoring.holdout
    wanted = math.floor(share * total) if share < 1 else int(share)
    held = _spread(min(wanted, total // 2), sizes, [max(n - 1, 0) for n in sizes], floor=0)
    rest = [n - h for n, h in zip(sizes, held, strict=True)]
    limit = sum(rest) if scoring.limit is None else scoring.limit
    searched = _spread(limit, rest, rest, floor=1)
    leaves = []
    for task, its_docs, n, h, s in zip(tasks, docs, sizes, held, searched, strict=True):
        order = list(range(n))
        random.Random(f"{seed}:{name}:{task.task_name}").shuffle(order)
        documents: dict[Split, tuple[int, ...]] = {
            "holdout": tuple(sorted(order[:h])),
            "search": tuple(sorted(order[h : h + s])),
        }
        its_name = name if task.task_name == name else f"{name}/{task.task_name}"
        leaves.append(Leaf(its_name, task, documents, its_docs))
    return tuple(leaves)


def _spread(count: int, sizes: Sequence[int], most: Sequence[int], floor: int) -> list[int]:
    """Split `count` in proportion to `sizes` (largest remainders), within [floor, most] each."""
    total = sum(sizes)
    if total == 0:
        return [0] * len(sizes)
    count = min(count, sum(most))
    exact = [count * n / total for n in sizes]
    given = [min(max(math.floor(x), floor), m) for x, m in zip(exact, most, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(exact[i] - math.floor(exact[i])), i))
    while sum(given) < count:
        for i in by_remainder:
            if sum(given) < count and given[i] < most[i]:
                given[i] += 1
    return given
