"""Fronts, hypervolumes and knees against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evolve.front import (
    N_FIRST,
    front,
    hypervolume,
    hypervolume_over_time,
    knee,
    non_dominated,
    ranking,
    reference_point,
    spread,
)

# Few values, so that points are often equal in an objective, or in all.
SETS = st.integers(1, 4).flatmap(
    lambda d: st.integers(1, 8).flatmap(
        lambda n: arrays(float, (n, d), elements=st.integers(-3, 6).map(lambda v: v / 4))
    )
)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(
        x > y for x, y in zip(a, b, strict=True)
    )


@given(SETS)
def test_the_front_is_what_nothing_dominates(values: np.ndarray) -> None:
    expected = [not any(dominates(other, point) for other in values) for point in values]
    assert non_dominated(values).tolist() == expected


@given(SETS)
def test_a_hypervolume_is_the_volume_of_the_union_by_inclusion_and_exclusion(values: np.ndarray) -> None:
    reference = np.zeros(values.shape[1])
    boxes = np.maximum(values, 0)
    volume = sum(
        (-1) ** (size + 1) * np.min(chosen, axis=0).prod()
        for size in range(1, len(boxes) + 1)
        for chosen in itertools.combinations(boxes, size)
    )
    assert hypervolume(values, reference) == pytest.approx(volume, abs=1e-12)
    over_time = hypervolume_over_time(values, reference)
    assert over_time == sorted(over_time)
    for i, so_far in enumerate(over_time):
        assert so_far == pytest.approx(hypervolume(values[: i + 1], reference), abs=1e-12)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_a_hypervolume_is_optunas(d: int) -> None:
    from optuna._hypervolume import compute_hypervolume

    values = np.random.default_rng(d).random((30, d))
    expected = compute_hypervolume(-values, np.zeros(d))
    assert hypervolume(values, np.zeros(d)) == pytest.approx(expected, rel=1e-12)


@given(SETS)
def test_the_reference_is_worse_than_the_first_and_later_points_do_not_move_it(
    values: np.ndarray,
) -> None:
    reference = reference_point(values)
    assert (reference <= values[:N_FIRST]).all()
    first = np.vstack([values] * N_FIRST)[:N_FIRST]
    assert reference_point(np.vstack([first, values - 9])).tolist() == reference_point(first).tolist()


def test_the_extremes_of_a_front_count() -> None:
    values = np.array([[0.0, 1.0], [1.0, 0.0]])
    reference = reference_point(values)
    assert reference.tolist() == pytest.approx([-0.1, -0.1])
    assert hypervolume(values[:1], reference) == pytest.approx(0.1 * 1.1)


@given(SETS.filter(lambda values: values.shape[1] == 2))
def test_the_knee_of_two_objectives_lies_furthest_from_the_line_through_the_extremes(
    values: np.ndarray,
) -> None:
    front = np.unique(values[non_dominated(values)], axis=0)
    chosen = knee(front, np.zeros(len(front)))
    if len(front) < 3:
        assert chosen == 0
        return
    # Distance to the line through the ends, each objective in units of the front's range.
    unit = (front - front.min(axis=0)) / np.ptp(front, axis=0)
    (x0, y0), (x1, y1) = unit[unit[:, 0].argmin()], unit[unit[:, 0].argmax()]
    across = [(x - x0) * (y0 - y1) - (y0 - y) * (x1 - x0) for x, y in unit]
    if max(across) > 1e-9:
        assert across[chosen] == pytest.approx(max(across), abs=1e-9)
    else:
        assert min(unit[chosen]) == pytest.approx(max(min(point) for point in unit), abs=1e-9)


def test_the_knee_does_not_ask_for_units() -> None:
    front = np.array([[0.0, 1.0], [0.7, 0.6], [0.8, 0.3], [1.0, 0.0]])
    assert knee(front, front.sum(axis=1)) == 1
    assert knee(front * [1000.0, 0.001] + [5.0, -7.0], front.sum(axis=1)) == 1


@pytest.mark.parametrize(
    ("front", "sums", "chosen"),
    [
        ([[0.0, 0.9], [1.0, 0.4]], [0.9, 1.4], 1),
        ([[0.0, 0.9], [1.0, 0.4]], [1.4, 0.9], 0),
        ([[0.0, 0.9], [1.0, 0.4]], [0.9, 0.9 + 1e-12], 0),
        ([[0.5, 0.5], [0.5, 0.5]], [1.0, 1.0], 0),
        ([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], [3.0, 1.0, 1.0, 3.0], 1),
        ([[0.0, 1.0], [0.3, 0.9], [0.9, 0.3], [1.0, 0.0]], [3.0, 0.9, 2.1, 0.0], 2),
    ],
)
def test_of_equals_the_one_with_the_largest_weighted_sum_is_the_knee_then_the_first(
    front: list[list[float]], sums: list[float], chosen: int
) -> None:
    values = np.array(front)
    assert knee(values, sums) == chosen
    assert ranking(values, [0.0] * len(front), sums)[0] == chosen


def test_a_spread_begins_with_knee_and_extremes_and_goes_on_where_nothing_is() -> None:
    angles = np.linspace(0, np.pi / 2, 21)
    front = np.column_stack([np.cos(angles), 1000 * np.sin(angles)])  # it asks for no units
    dominated, violating = [[0.1, 100.0], [0.2, 200.0]], [[2.0, 2000.0]]
    values = np.array([*dominated, *front, *violating])
    violations = [0.0] * 23 + [1.0]
    chosen = [i - 2 for i in spread(values, violations, 9)]
    assert chosen[:3] == [10, 0, 20]
    assert max(np.diff(sorted(chosen))) <= 5
    assert spread(values, violations, 24)[-3:] == [1, 0, 23]


@given(SETS, st.data())
def test_a_spread_is_of_all_the_front_first(values: np.ndarray, data: st.DataObject) -> None:
    violations = data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=len(values)))
    violations = violations[: len(values)]
    order, ranked = spread(values, violations, len(values)), ranking(values, violations)
    members = front(values, violations)
    assert sorted(order) == sorted(ranked)
    assert order[:1] == ranked[:1]
    assert set(order[: len(members)]) == set(members)
    assert spread(values, violations, 2) == order[:2]
