"""Intervals: what another draw of documents could have given.

All are 95% intervals. A single score of 0/1 outcomes has Wilson's, everything else a bootstrap over
documents. Models are compared on the same resampled documents (paired). For 0/1 outcomes a resample
also holds two made-up documents, one that only the first model gets right and one that only the
second does (Agresti and Min 2005, https://doi.org/10.1002/sim.1781), so that a handful of equal
documents cannot claim certainty.

Several differences that are looked at together share one critical value, the quantile of the largest
of their bootstrap deviations in units of their standard error (max-t; Westfall and Young 1993,
Resampling-Based Multiple Testing, section 2.5): all intervals of the family hold at once in 95 of
100 searches. Differences that move together cost little. For a family of one it is the percentile
interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evolve.errors import TrialTaskError
from evolve.tasks import Outcome, Outcomes, ScoredTask, TaskSet

N_RESAMPLES = 2000
LEVEL = 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
# Documents drawn in one array operation.
_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def score_interval(task: ScoredTask, outcomes: Sequence[Outcome], seed: int) -> Interval:
    """Return a task's score with its interval: Wilson's for 0/1 outcomes, else bootstrap."""
    value = task.score(outcomes)
    if task.averages(outcomes) and task.weight_by_size is not False and is_binary(task, outcomes):
        from scipy.stats import binomtest

        n_right = round(sum(float(outcome.value) for outcome in outcomes))
        bounds = binomtest(n_right, len(outcomes)).proportion_ci(LEVEL, method="wilson")
        return Interval(value, float(bounds.low), float(bounds.high))
    samples = _aggregated(task, [outcomes], np.random.default_rng(seed))[:, 0]
    return Interval(value, *map(float, np.quantile(samples, _TAILS)))


def difference_interval(
    task: ScoredTask, one: Sequence[Outcome], other: Sequence[Outcome], seed: int
) -> Interval:
    """Return one model's score minus another's, as the task counts, with its paired interval.

    Args:
        one, other: outcomes of the same documents, in the same order.
    """
    value = task.score(one) - task.score(other)
    samples = resampled(task, [one, other], np.random.default_rng(seed)).difference(0, 1)
    return simultaneous(np.array([value]), samples[:, None])[0]


def gain_interval(tasks: TaskSet, winner: Outcomes, baseline: Outcomes) -> Interval:
    """Return the winner's objective minus the baseline's, with its paired interval.

    Args:
        winner, baseline: outcomes of the same documents, in the same order.
    """
    value = tasks.objective(tasks.scores(winner)) - tasks.objective(tasks.scores(baseline))
    samples = resampled_gains(tasks, resampled_tasks(tasks, [winner, baseline]), 0, 1)
    return simultaneous(np.array([value]), samples[:, None])[0]


def simultaneous(values: np.ndarray, samples: np.ndarray) -> list[Interval]:
    """Return intervals that all hold at once, with one critical value a side (max-t).

    Args:
        values: the differences as measured; shape (family,).
        samples: the same differences on resampled documents; shape (N_RESAMPLES, family).
    """
    centre, error = samples.mean(axis=0), samples.std(axis=0)
    # A difference that no resample moves has no width, and no say in the critical value.
    deviations = (samples - centre) / np.where(error > 0, error, 1.0)
    low = centre + float(np.quantile(deviations.min(axis=1), _TAILS[0])) * error
    high = centre + float(np.quantile(deviations.max(axis=1), _TAILS[1])) * error
    return [Interval(*map(float, bounds)) for bounds in zip(values, low, high, strict=True)]


def mcnemar(one: Sequence[Outcome], other: Sequence[Outcome]) -> float:
    """Return the two-sided p-value of McNemar's exact test: a fair coin for documents that differ.

    Args:
        one, other: 0/1 outcomes of the same documents, in the same order (McNemar 1947,
            https://doi.org/10.1007/BF02295996).
    """
    from scipy.stats import binomtest

    pairs = [(a.value, b.value) for a, b in zip(one, other, strict=True) if a.value != b.value]
    return float(binomtest(sum(a > b for a, b in pairs), len(pairs)).pvalue) if pairs else 1.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust a family of p-values by Holm's steps (1979, https://www.jstor.org/stable/4615733).

    Args:
        p_values: None where there was no test.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for step, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - step) * p))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Resampled:
    """Scores of several models, one task, on the same resampled documents.

    Attributes:
        scores: shape (N_RESAMPLES, models).
        made_up: what the two made-up documents add to a difference; shape (N_RESAMPLES,).
    """

    scores: np.ndarray
    made_up: np.ndarray

    def difference(self, one: int, other: int) -> np.ndarray:
        """Return one model's score minus another's; shape (N_RESAMPLES,)."""
        difference: np.ndarray = self.scores[:, one] - self.scores[:, other] + self.made_up
        return difference


def resampled_tasks(tasks: TaskSet, sides: Sequence[Outcomes]) -> dict[str, Resampled]:
    """Resample the documents of every task, the same ones for all models; by task key.

    Args:
        sides: a model's outcomes each, of the same documents in the same order.
    """
    rng = np.random.default_rng(tasks.seed)
    states: dict[tuple[str, ...], Any] = {}
    found = {}
    for task in tasks.tasks:
        # Two metrics of one task are two views of the same documents: draw the same ones for both.
        leaves = tuple(leaf.name for leaf in task.leaves)
        draws = rng
        if leaves in states:
            draws = np.random.default_rng()
            draws.bit_generator.state = states[leaves]
        else:
            states[leaves] = rng.bit_generator.state
        found[task.key] = resampled(task, [side[task.key] for side in sides], draws)
    return found


def resampled_gains(tasks: TaskSet, by_task: dict[str, Resampled], one: int, other: int) -> np.ndarray:
    """Return one model's objective minus another's; shape (N_RESAMPLES,)."""
    gains: np.ndarray = sum(
        (task.sign * task.weight * by_task[task.key].difference(one, other) for task in tasks.tasks),
        start=np.zeros(N_RESAMPLES),
    )
    return gains


def resampled(
    task: ScoredTask, sides: Sequence[Sequence[Outcome]], rng: np.random.Generator
) -> Resampled:
    """Score several models on the same resampled documents of one task.

    Args:
        sides: a model's outcomes each.
    """
    nothing = np.zeros(N_RESAMPLES)
    if not all(task.averages(side) for side in sides):
        return Resampled(_aggregated(task, sides, rng), nothing)
    values = np.column_stack([contributions(task, side) for side in sides])
    made_up = 2 if all(is_binary(task, side) for side in sides) else 0
    n = len(values) + made_up
    rows = max(1, _AT_ONCE // n)
    scores, differences = [], []
    for done in range(0, N_RESAMPLES, rows):
        counts = _counts(rng.integers(0, n, (min(rows, N_RESAMPLES - done), n)))
        scores.append(counts[:, : len(values)] @ values / n)
        if made_up:
            differences.append((counts[:, -2] - counts[:, -1]) / n)
    return Resampled(np.concatenate(scores), np.concatenate(differences) if made_up else nothing)


def _counts(drawn: np.ndarray) -> np.ndarray:
    """Count how often each document was drawn; both of shape (resamples, n)."""
    rows, n = drawn.shape
    places = drawn + n * np.arange(rows)[:, None]
    return np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def contributions(task: ScoredTask, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Scale each document's value so that the task's score is the plain mean; shape (n,)."""
    values = np.array([float(outcome.value) for outcome in outcomes])
    if task.weight_by_size is not False:
        return values
    sizes: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        sizes[outcome.leaf] += 1
    n, n_leaves = len(outcomes), len(sizes)
    scale = np.array([n / (n_leaves * sizes[outcome.leaf]) for outcome in outcomes])
    scaled: np.ndarray = values * scale
    return scaled


def is_binary(task: ScoredTask, outcomes: Sequence[Outcome]) -> bool:
    """Tell whether a task's outcomes are hits and misses."""
    return task.may_be_share and all(outcome.value in (0, 1) for outcome in outcomes)


def _aggregated(
    task: ScoredTask, sides: Sequence[Sequence[Outcome]], rng: np.random.Generator
) -> np.ndarray:
    """Score resampled documents with the task's own aggregation, the same documents a side.

    Where a task scores fewer resamples, or some cannot be scored (an aggregation may fail where one
    class is missing), those that were are drawn from again.

    Returns:
        Scores; shape (N_RESAMPLES, sides).
    """
    by_leaf: dict[str, list[int]] = defaultdict(list)
    for i, outcome in enumerate(sides[0]):
        by_leaf[outcome.leaf].append(i)
    scored = []
    for _ in range(task.n_resamples):
        drawn = [i for members in by_leaf.values() for i in rng.choice(members, len(members))]
        try:
            scored.append([task.score([side[i] for i in drawn]) for side in sides])
        except TrialTaskError:
            continue
    if not scored:
        raise TrialTaskError(f"{task.key}: none of {task.n_resamples} resamples can be scored")
    samples = np.array(scored)
    if len(samples) < N_RESAMPLES:
        samples = samples[rng.integers(0, len(samples), N_RESAMPLES)]
    return samples
