"""What intervals hold for: few documents, entries over the same ones, groups, missing values."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evolve.intervals import gain_interval, score_interval, simultaneous
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import Outcome, TaskSet
from evolve.tasks.scored import ScoredTask

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tasks() -> TaskSet:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    return TaskSet([TaskSpec(name="qs_sort"), TaskSpec(name="qs_largest")], scoring, 0)


def among(tasks: TaskSet, *entries: ScoredTask) -> TaskSet:
    """The set with other entries over its tasks."""
    found = copy.copy(tasks)
    found.tasks = list(entries)
    return found


def outcomes(leaf: str, values: np.ndarray) -> list[Outcome]:
    return [Outcome(leaf, i, float(value)) for i, value in enumerate(values)]


def test_an_end_that_is_zero_is_zero() -> None:
    """Sums of tenths miss it by a float's last digits, either way."""
    rng = np.random.default_rng(0)
    ends = []
    for _ in range(300):
        samples = rng.binomial(22, rng.uniform(0.05, 0.5), (400, 1)) / 22 - rng.integers(0, 12) / 22
        (interval,) = simultaneous(samples.mean(axis=0), samples)
        ends += [interval.low, interval.high]
    assert 0.0 in ends
    assert all(abs(end) > 1e-3 for end in ends if end)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_few_documents_claim_no_more_than_many(tasks: TaskSet, n: int) -> None:
    rng = np.random.default_rng(n)
    one = among(tasks, tasks.tasks[0])
    claimed = 0
    for _ in range(400):
        sides = [{"qs_sort": outcomes("qs_sort", rng.normal(size=n))} for _ in range(2)]
        claimed += gain_interval(one, sides[0], sides[1]).low > 0
    assert claimed <= 0.05 * 400  # 2.5% nominal; a bootstrap as it is claims 13% of three documents


def test_one_document_of_one_model_has_its_value() -> None:
    scoring = ScoringSettings(task_paths=[str(ROOT / "tasks")])
    (task,) = TaskSet([TaskSpec(name="qs_sort")], scoring, 0).tasks
    found = score_interval(task, outcomes("qs_sort", np.array([3.5])), 0)
    assert (found.value, found.low, found.high) == (3.5, 3.5, 3.5)


def width(tasks: TaskSet, **sides: list[tuple[str, np.ndarray, np.ndarray]]) -> float:
    """The interval's width, by entry the leaves with what winner and baseline have there."""
    winner, baseline = (
        {
            key: [outcome for leaf, *both in leaves for outcome in outcomes(leaf, both[side])]
            for key, leaves in sides.items()
        }
        for side in (0, 1)
    )
    gain = gain_interval(tasks, winner, baseline)
    return gain.high - gain.low


def test_entries_over_the_same_documents_vary_together(tasks: TaskSet) -> None:
    """Errors add up as those of the sum of what each document gives."""
    rng = np.random.default_rng(1)
    one, other = ((rng.random((2, 300)) < 0.5).astype(float) for _ in range(2))
    sort, largest = tasks.tasks

    # Two metrics of one task, of which one is no hit or miss.
    second = replace(sort, key="second")
    both = width(
        among(tasks, sort, second),
        qs_sort=[("qs_sort", one[0], other[0])],
        second=[("qs_sort", 0.9 * one[0], 0.9 * other[0])],
    )
    right = 2 * 1.96 * 1.9 * (one[0] - other[0]).std() / 300**0.5
    assert both == pytest.approx(right, rel=0.06)

    # Two tasks, and a group of both.
    group = replace(
        sort, key="group", weight=2.0, leaves=(*sort.leaves, *largest.leaves), weight_by_size=True
    )
    leaves = [("qs_sort", one[0], other[0]), ("qs_largest", one[1], other[1])]
    three = width(
        among(tasks, sort, largest, group), qs_sort=leaves[:1], qs_largest=leaves[1:], group=leaves
    )
    # weight 1 of a task and half of 2 of the group: 2 a document's difference, over 300
    right = 2 * 1.96 * 2 * np.hypot(*((one[i] - other[i]).std() for i in range(2))) / 300**0.5
    assert three == pytest.approx(right, rel=0.06)


def test_one_entry_alone_is_as_it_is_among_others(tasks: TaskSet) -> None:
    """The first in the order draws first, whatever follows."""
    rng = np.random.default_rng(2)
    one, other = (rng.random((2, 100)) for _ in range(2))
    sort, largest = tasks.tasks
    silent = replace(largest, weight=0.0)
    alone = width(among(tasks, sort), qs_sort=[("qs_sort", one[0], other[0])])
    beside = width(
        among(tasks, sort, silent),
        qs_sort=[("qs_sort", one[0], other[0])],
        qs_largest=[("qs_largest", one[1], other[1])],
    )
    assert alone == beside


def test_a_macro_average_has_wilsons_interval_of_as_many_equal_documents(tasks: TaskSet) -> None:
    task = tasks.tasks[0]
    values = np.array([1.0] * 20 + [0.0] * 10)
    plain = score_interval(task, outcomes("qs_sort", values), 0)
    leaves = tuple(replace(task.leaves[0], name=f"g/{i}") for i in range(30))
    macro = replace(task, leaves=leaves, weight_by_size=False)
    each = [Outcome(f"g/{i}", 0, value) for i, value in enumerate(values)]
    assert score_interval(macro, each, 0) == plain
    # Two leaves, of which the smaller one's documents count four times as much.
    sizes = [outcomes("g/0", values[:24]), outcomes("g/1", values[24:])]
    uneven = score_interval(macro, [outcome for leaf in sizes for outcome in leaf], 0)
    n = 30**2 / (24 * (30 / 48) ** 2 + 6 * (30 / 12) ** 2)
    p, z2 = 20 / 24 / 2, 1.959964**2
    half = np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    assert uneven.high - uneven.low == pytest.approx(2 * half, rel=1e-5)


def test_documents_without_a_value_do_not_make_a_score_sure(tasks: TaskSet) -> None:
    task = tasks.tasks[0]
    some = [Outcome("qs_sort", i, None if i % 2 else 1.0) for i in range(20)]
    found = score_interval(task, some, 0)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 10), rel=1e-5)
