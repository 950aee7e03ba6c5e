"""The draw: which documents of a task rank candidates, and which are kept for the verdict.

There are two ways. Ours draws by seed and takes the holdout first, so that another `limit` leaves
it as it is. lm-eval's takes the first `limit` documents of each task; the holdout follows them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evolve.search_file import ScoringSettings
from evolve.tasks.asked import asked_split

Split = Literal["search", "holdout", "report"]
"""`report`: the documents of the tasks that are only reported, a task set of its own."""
SPLITS: tuple[Split, ...] = ("search", "holdout")
Documents = Mapping[str, Collection[int]]
"""Some documents: by leaf their numbers."""


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
    def split(self) -> str:
        """The split that it is asked on, as its data set calls it."""
        return asked_split(self.task)

    @property
    def data(self) -> str:
        """Which documents its numbers mean: those of two tasks over one data set are the same."""
        return _data(self.task, len(self.docs))

    @property
    def generates(self) -> bool:
        """Whether the model answers with texts."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")

    def among(self, numbers: Collection[int]) -> Leaf:
        """Return the leaf with some of its documents only."""
        wanted = set(numbers)
        documents: dict[Split, tuple[int, ...]] = {
            split: tuple(number for number in its if number in wanted)
            for split, its in self.documents.items()
        }
        return replace(self, documents=documents)


def draw(
    named: Mapping[str, Sequence[Any]], scoring: ScoringSettings, seed: int
) -> dict[str, tuple[Leaf, ...]]:
    """Split the documents of all entries, at most `limit` for the search and some for the holdout.

    For a group both counts are spread over its leaves in proportion, with at least one search
    document a leaf; lm-eval's way counts `limit` for each leaf, and may leave no holdout. Entries
    over the same documents, such as a group and one of its leaves, share one order of them, so
    that what one keeps for the verdict no other searches on.

    Args:
        named: by what the user named, its lm-eval tasks; leaves of a group are named behind it.

    Returns:
        By name the leaves.
    """
    has_search_first = scoring.draw != "seeded"
    make_shares = _shares_of_the_first if has_search_first else _shares
    shares = [share for name, tasks in named.items() for share in make_shares(name, tasks, scoring)]
    orders: dict[str, list[int]] = {}
    taken: dict[str, int] = {}  # by the split that comes first
    for share in shares:
        if share.data not in orders:
            orders[share.data] = list(range(len(share.docs)))
            if scoring.draw != "first":
                random.Random(f"{seed}:{share.name}:{share.task.task_name}").shuffle(orders[share.data])
        n_first = share.n_search if has_search_first else share.n_holdout
        taken[share.data] = max(taken.get(share.data, 0), n_first)
    leaves: dict[str, list[Leaf]] = {name: [] for name in named}
    for share in shares:
        order, behind = orders[share.data], taken[share.data]
        at: dict[Split, int] = {
            "holdout": behind if has_search_first else 0,
            "search": 0 if has_search_first else behind,
        }
        documents: dict[Split, tuple[int, ...]] = {
            "holdout": tuple(sorted(order[at["holdout"] :][: share.n_holdout])),
            "search": tuple(sorted(order[at["search"] :][: share.n_search])),
        }
        task_name = share.task.task_name
        its_name = share.name if task_name == share.name else f"{share.name}/{task_name}"
        leaves[share.name].append(Leaf(its_name, share.task, documents, share.docs))
    return {name: tuple(its) for name, its in leaves.items()}


@dataclass(frozen=True)
class _Share:
    """How many documents of a leaf are wanted; `data` tells which documents they are."""

    name: str
    task: Any
    docs: Sequence[Mapping[str, Any]]
    data: str
    n_holdout: int
    n_search: int


def _shares(name: str, tasks: Sequence[Any], scoring: ScoringSettings) -> list[_Share]:
    docs = [task.eval_docs for task in tasks]
    sizes = [len(documents) for documents in docs]
    held = _held(scoring.holdout, sizes, [max(n - 1, 0) for n in sizes])
    rest = [n - h for n, h in zip(sizes, held, strict=True)]
    limit = sum(rest) if scoring.limit is None else scoring.limit
    searched = _spread(limit, rest, rest, floor=1)
    return [
        _Share(name, task, its_docs, _data(task, len(its_docs)), h, s)
        for task, its_docs, h, s in zip(tasks, docs, held, searched, strict=True)
    ]


def _shares_of_the_first(name: str, tasks: Sequence[Any], scoring: ScoringSettings) -> list[_Share]:
    """Take `limit` documents of each leaf, and the holdout from what is left."""
    docs = [task.eval_docs for task in tasks]
    sizes = [len(documents) for documents in docs]
    searched = [n if scoring.limit is None else min(scoring.limit, n) for n in sizes]
    held = _held(scoring.holdout, sizes, [n - s for n, s in zip(sizes, searched, strict=True)])
    return [
        _Share(name, task, its_docs, _data(task, len(its_docs)), h, s)
        for task, its_docs, h, s in zip(tasks, docs, held, searched, strict=True)
    ]


def _held(share: float, sizes: Sequence[int], most: Sequence[int]) -> list[int]:
    """Count the holdout of each leaf: a share or a number, at most half of all, and `most` of each."""
    total = sum(sizes)
    wanted = math.floor(share * total) if share < 1 else int(share)
    return _spread(min(wanted, total // 2), sizes, most, floor=0)


def _data(task: Any, n: int) -> str:
    """Tell which documents a task has: data set, split and how many."""
    config = task.config
    if not config.dataset_path:
        return str(task.task_name)
    named = config.dataset_path, config.dataset_name, config.dataset_kwargs
    return repr((*named, asked_split(task), n))


def _spread(count: int, sizes: Sequence[int], most: Sequence[int], floor: int) -> list[int]:
    """Split `count` in proportion to `sizes` (largest remainders), within [floor, most] each.

    The sum exceeds `count` only where `floor` for each does.
    """
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
    # What small ones were raised by, those give back that have most for their size (Sainte-Laguë).
    while sum(given) > count and (above := [i for i, n in enumerate(given) if n > floor]):
        given[max(above, key=lambda i: ((given[i] - 0.5) / sizes[i], i))] -= 1
    return given
