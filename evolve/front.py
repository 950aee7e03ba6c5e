"""Which candidates are best: Pareto fronts, their hypervolume and knee. Values are maximised.

Candidates that meet every constraint stand before those that do not, which are ordered by their
total violation (Deb 2000, https://doi.org/10.1016/S0045-7825(99)00389-8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The reference point is fixed by so many trials, which hold the known recipes and a first look around.
N_FIRST = 10


@dataclass(frozen=True)
class Hypervolume:
    """How much of the space of values a front dominates.

    Attributes:
        reference: the point it is measured from, see `reference_point`.
        value: now.
        over_time: after each finished trial, in the order in which they were told.
    """

    reference: list[float]
    value: float
    over_time: list[float]


def ranking(
    values: np.ndarray, violations: Sequence[float], sums: Sequence[float] | None = None
) -> list[int]:
    """Return the indices of candidates, the best first; of equals the first.

    With one value the highest leads; with several the front's knee, then the front, then the rest.

    Args:
        values: shape (candidates, objectives).
        violations: the total of each; 0 where every constraint is met.
        sums: the weighted sum of each, which chooses among equal knees; None = the first is chosen.
    """
    members = set(front(values, violations))
    if not len(values) or values.shape[1] == 1:
        return sorted(range(len(values)), key=lambda i: (violations[i], -values[i, 0], i))
    in_order = sorted(members)
    weighted = np.zeros(len(values)) if sums is None else np.asarray(sums)
    middle = in_order[knee(values[in_order], weighted[in_order])] if members else None
    return sorted(range(len(values)), key=lambda i: (violations[i], i != middle, i not in members, i))


def spread(values: np.ndarray, violations: Sequence[float], n: int) -> list[int]:
    """Return the indices of `n` candidates that stand for all, in an order of which every part does.

    With one value that is `ranking`. With several the front comes first: its knee, the best of each
    objective, then ever the one furthest from those before; after it the front of the rest, likewise.

    Args:
        values, violations: see `ranking`.
    """
    if not len(values) or values.shape[1] == 1:
        return ranking(values, violations)[:n]
    order: list[int] = []
    left = np.arange(len(values))
    total = np.asarray(violations)
    while len(order) < n and (members := front(values[left], total[left].tolist())):
        order += [int(left[members[i]]) for i in _spread_front(values[left[members]])]
        left = np.delete(left, members)
    return [*order, *sorted(left.tolist(), key=lambda i: (violations[i], i))][:n]


def _spread_front(values: np.ndarray) -> list[int]:
    """Return the indices of a front's members, in the order of `spread`."""
    worst, best = values.min(axis=0), values.max(axis=0)
    share = (values - worst) / np.where(best > worst, best - worst, 1)
    # Of several that are the best in an objective, the one that is better in the others.
    extremes = [int(np.lexsort((share.sum(axis=1), one))[-1]) for one in share.T]
    first = dict.fromkeys([knee(values, np.zeros(len(values))), *extremes])
    order: list[int] = []
    distance = np.full(len(values), np.inf)
    while len(order) < len(values):
        i = next((i for i in first if i not in order), int(distance.argmax()))
        order.append(i)
        distance = np.minimum(distance, np.linalg.norm(share - share[i], axis=1))
        distance[i] = -1
    return order


def front(values: np.ndarray, violations: Sequence[float]) -> list[int]:
    """Return the indices of the candidates that meet every constraint and that no such one dominates.

    With one value that is the best alone, of equals the first. See `ranking`.
    """
    feasible = np.flatnonzero(np.asarray(violations) == 0)
    if not len(feasible):
        return []
    if values.shape[1] == 1:
        return [int(feasible[values[feasible, 0].argmax()])]
    return [int(i) for i in feasible[non_dominated(values[feasible])]]


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Tell which points no other dominates; equal points do not dominate one another.

    Args:
        values: shape (points, objectives).

    Returns:
        Shape (points,), bool.
    """
    points, which = np.unique(values, axis=0, return_inverse=True)
    found = np.zeros(len(points), bool)
    front = points[:0]
    for i in range(len(points) - 1, -1, -1):  # no point is dominated by one that comes later
        if not (front >= points[i]).all(axis=1).any():
            found[i] = True
            front = np.vstack([front, points[i]])
    is_on_front: np.ndarray = found[which.ravel()]
    return is_on_front


def reference_point(values: np.ndarray) -> np.ndarray:
    """Return the point that the hypervolume is measured from; shape (objectives,).

    Each objective's worst among the first N_FIRST points, less a tenth of its range there, so that
    the extremes of a front count (Ishibuchi et al. 2018, https://doi.org/10.1162/evco_a_00226). Once
    so many are told it stays, so that the hypervolume of a study only grows.

    Args:
        values: in the order in which they were told; shape (points, objectives), at least one.
    """
    first = values[:N_FIRST]
    worst = first.min(axis=0)
    reference: np.ndarray = worst - 0.1 * (first.max(axis=0) - worst)
    return reference


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume of what the points dominate, down to the reference; exact.

    Each point adds what it dominates beyond the points after it (While, Bradstreet and Barone 2012,
    https://doi.org/10.1109/TEVC.2010.2077298).

    Args:
        values: shape (points, objectives); what is not better than the reference in all adds nothing.
        reference: shape (objectives,).
    """
    sides = values - reference
    sides = np.unique(sides[(sides > 0).all(axis=1)], axis=0)
    return _volume(sides[non_dominated(sides)])


def _volume(sides: np.ndarray) -> float:
    """Return the volume of a union of boxes that share the corner 0, none inside another."""
    if len(sides) < 2:
        return float(sides.prod(axis=1).sum())
    sides = sides[np.argsort(sides[:, 0])]
    if sides.shape[1] == 2:  # a staircase: widths grow, heights shrink
        widths = np.diff(sides[:, 0], prepend=0.0)
        return float(widths @ sides[:, 1])
    return sum(_added(side, sides[i + 1 :]) for i, side in enumerate(sides))


def _added(side: np.ndarray, others: np.ndarray) -> float:
    """Return what one box adds to the union of others."""
    shared = np.unique(np.minimum(others, side), axis=0)
    return float(side.prod()) - _volume(shared[non_dominated(shared)])


def hypervolume_over_time(values: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return the hypervolume after each point; it never falls. NaN stands for what does not count.

    Args:
        values: in the order in which they were told; shape (points, objectives).
        reference: shape (objectives,).
    """
    volumes: list[float] = []
    volume, front = 0.0, np.zeros((0, values.shape[1]))
    for side in np.asarray(values, float) - reference:
        if (side > 0).all() and not (front >= side).all(axis=1).any():
            volume += _added(side, front)
            front = np.vstack([front[~(side >= front).all(axis=1)], side])
        volumes.append(volume)
    return volumes


def knee(front: np.ndarray, sums: Sequence[float] | np.ndarray) -> int:
    """Return the index of the point where giving up any objective pays least.

    With every objective normalised to [0, 1] over the front, it is the point furthest above the
    hyperplane through the unit points, which for two objectives is the line through the front's
    extremes (Das 1999, https://doi.org/10.1007/BF01195985). Where none lies above it, the front has
    no knee: then it is the point whose worst objective is best. Of equals, such as two extremes alone,
    it is the one with the largest weighted sum; of equals in that, too, the first.

    Args:
        front: shape (points, objectives), none dominated, at least one.
        sums: the weighted sum of each.
    """
    worst, best = front.min(axis=0), front.max(axis=0)
    varies = best > worst
    height = np.zeros(len(front))
    if varies.any():
        share = (front[:, varies] - worst[varies]) / (best - worst)[varies]
        # To nine digits: rounding is no reason to prefer one of equals.
        height = np.round(share.sum(axis=1) - 1, 9)
        if height.max() <= 0:
            height = np.round(share.min(axis=1), 9)
    return int(np.where(height == height.max(), np.round(sums, 9), -np.inf).argmax())
