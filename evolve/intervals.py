"""Intervals: what another draw of documents could have given.

All are 95% intervals. A single score of 0/1 outcomes has Wilson's, everything else a bootstrap over
documents. Models are compared on the same resampled documents (paired), and so are entries of
`tasks:` that ask the same documents, which thereby vary together. So that a handful of documents
cannot claim certainty,

- for 0/1 outcomes a resample also holds two made-up documents, one that only the first model gets
  right and one that only the second does (Agresti and Min 2005, https://doi.org/10.1002/sim.1781);
- other outcomes' resamples are spread by sqrt(n / (n - 1)) t(n - 1) / z: a bootstrap's variance is
  that of n documents divided by n, and its critical value is the normal one (Hesterberg 2015, "What
  Teachers Should Know About the Bootstrap", section 4.1, https://doi.org/10.1080/00031305.2015.1089789).

Several differences that are looked at together share one critical value, the quantile of the largest
of their bootstrap deviations in units of their standard error (max-t; Westfall and Young 1993,
Resampling-Based Multiple Testing, section 2.5): all intervals of the family hold at once in 95 of
100 searches. Differences that move together cost little. For a family of one it is the percentile
interval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from evolve.errors import TrialTaskError
from evolve.tasks import Outcome, Outcomes, ScoredTask, TaskSet

N_RESAMPLES = 2000
LEVEL = 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_Z = NormalDist().inv_cdf(_TAILS[1])
_DIGITS = 9
# Documents drawn in one array operation.
_AT_ONCE = 1_000_000
_Document = tuple[str, int]
"""What data a document is of, and its number there."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def score_interval(task: ScoredTask, outcomes: Sequence[Outcome], seed: int) -> Interval:
    """Return a task's score with its interval: Wilson's for 0/1 outcomes, else bootstrap."""
    value = task.score(outcomes)
    valued = [outcome for outcome in outcomes if outcome.value is not None]
    if task.averages(valued) and is_binary(task, valued):
        scale = _scale(task, valued)
        return Interval(value, *_wilson(value, float(scale.sum() ** 2 / (scale**2).sum())))
    if len(outcomes) == 1:
        return Interval(value, value, value)
    (resampled,) = _resampled([task], [{task.key: list(outcomes)}], np.random.default_rng(seed)).values()
    return Interval(value, *map(float, np.quantile(resampled.scores[:, 0], _TAILS)))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Return the score interval of a share of n documents (Wilson 1927, JASA 22, 209).

    Args:
        n: where documents have unequal weights w, (sum w)^2 / sum w^2, as many of equal weight as
            have the same variance (Kish 1965, Survey Sampling, section 11.7).
    """
    z2 = _Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_interval(
    task: ScoredTask, one: Sequence[Outcome], other: Sequence[Outcome], seed: int
) -> Interval:
    """Return one model's score minus another's, as the task counts, with its paired interval.

    Args:
        one, other: outcomes of the same documents, in the same order.
    """
    value = task.score(one) - task.score(other)
    sides = [{task.key: list(side)} for side in (one, other)]
    (found,) = _resampled([task], sides, np.random.default_rng(seed)).values()
    return simultaneous(np.array([value]), found.difference(0, 1)[:, None])[0]


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

    Numbers are rounded to 9 digits behind the point: an end that is zero but for a float's last
    digits must be zero, because what is claimed hangs on its sign.

    Args:
        values: the differences as measured; shape (family,).
        samples: the same differences on resampled documents; shape (N_RESAMPLES, family).
    """
    centre, error = samples.mean(axis=0), samples.std(axis=0)
    # A difference that no resample moves has no width, and no say in the critical value.
    deviations = (samples - centre) / np.where(error > 0, error, 1.0)
    low = centre + float(np.quantile(deviations.min(axis=1), _TAILS[0])) * error
    high = centre + float(np.quantile(deviations.max(axis=1), _TAILS[1])) * error
    bounds = (np.round(each, _DIGITS).tolist() for each in (values, low, high))
    return [Interval(*each) for each in zip(*bounds, strict=True)]


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
    found: dict[str, Resampled] = {}
    for together in _sharing_documents(tasks.tasks, sides[0]):
        found |= _resampled(together, sides, rng)
    return found


def _sharing_documents(tasks: Sequence[ScoredTask], outcomes: Outcomes) -> list[list[ScoredTask]]:
    """Part the entries into those that share documents, directly or by another's."""
    parts: list[tuple[list[ScoredTask], set[_Document]]] = []
    for task in tasks:
        documents = set(_documents(task, outcomes[task.key]))
        sharing = [part for part in parts if part[1] & documents]
        together = [each for part, _ in sharing for each in part]
        parts = [part for part in parts if part not in sharing]
        parts.append(([*together, task], documents.union(*(own for _, own in sharing))))
    return [part for part, _ in parts]


def _documents(task: ScoredTask, outcomes: Sequence[Outcome]) -> list[_Document]:
    """Tell which documents outcomes are of: a group and its leaf alone may ask the same."""
    data = {leaf.name: leaf.data for leaf in task.leaves}
    return [(data[outcome.leaf], outcome.document) for outcome in outcomes]


def resampled_gains(tasks: TaskSet, by_task: dict[str, Resampled], one: int, other: int) -> np.ndarray:
    """Return one model's objective minus another's; shape (N_RESAMPLES,)."""
    gains: np.ndarray = sum(
        (task.sign * task.weight * by_task[task.key].difference(one, other) for task in tasks.tasks),
        start=np.zeros(N_RESAMPLES),
    )
    return gains


def _resampled(
    tasks: Sequence[ScoredTask], sides: Sequence[Outcomes], rng: np.random.Generator
) -> dict[str, Resampled]:
    """Score several models on the same resampled documents of entries that share some; by key.

    Where a task scores fewer resamples, or some cannot be scored (an aggregation may fail where one
    class is missing), those that were are drawn from again.

    Raises:
        TrialTaskError: no resample can be scored.
    """
    places: dict[_Document, int] = {}
    scorers = []
    for task in tasks:
        documents = _documents(task, sides[0][task.key])
        at = np.array([places.setdefault(document, len(places)) for document in documents])
        scorers.append(_scorer(task, at, [side[task.key] for side in sides]))
    made_up = 2 if any(scorer.is_binary for scorer in scorers) else 0
    n = len(places) + made_up
    n_resamples = min(scorer.n_resamples for scorer in scorers)
    rows = max(1, _AT_ONCE // n)
    parts: list[list[np.ndarray]] = [[] for _ in scorers]
    for done in range(0, n_resamples, rows):
        counts = _counts(rng.integers(0, n, (min(rows, n_resamples - done), n)))
        real, invented = counts[:, : len(places)], counts[:, len(places) :]
        for part, scorer in zip(parts, scorers, strict=True):
            part.append(scorer.scored(real, invented))
    scored = [np.concatenate(part) for part in parts]
    is_scored = np.logical_and.reduce([np.isfinite(each).all(axis=1) for each in scored])
    if not is_scored.any():
        keys = ", ".join(task.key for task in tasks)
        raise TrialTaskError(f"{keys}: none of {n_resamples} resamples can be scored")
    scored = [each[is_scored] for each in scored]
    if len(scored[0]) < N_RESAMPLES:
        again = rng.integers(0, len(scored[0]), N_RESAMPLES)
        scored = [each[again] for each in scored]
    return {
        task.key: scorer.resampled(samples)
        for task, scorer, samples in zip(tasks, scorers, scored, strict=True)
    }


@dataclass(frozen=True)
class _Mean:
    """Scores resamples of an entry whose score is a mean.

    Attributes:
        at: by outcome, which of the resampled documents it is of; shape (n,).
        values: shape (n, models).
        is_binary: whether they are hits and misses.
    """

    at: np.ndarray
    values: np.ndarray
    is_binary: bool
    n_resamples: int = N_RESAMPLES

    def scored(self, counts: np.ndarray, invented: np.ndarray) -> np.ndarray:
        """Return scores, and what made-up documents add to a difference; shape (rows, models + 1).

        Args:
            counts: how often each document was drawn; shape (rows, documents).
            invented: the same of the two made-up ones; shape (rows, 2).
        """
        own = counts[:, self.at]
        total = own.sum(axis=1) + (invented.sum(axis=1) if self.is_binary else 0.0)
        difference = invented[:, 0] - invented[:, 1] if self.is_binary else np.zeros(len(own))
        with np.errstate(invalid="ignore"):  # none of its documents may be drawn
            scores: np.ndarray = np.column_stack([own @ self.values, difference]) / total[:, None]
        return scores

    def resampled(self, samples: np.ndarray) -> Resampled:
        scores, made_up = samples[:, :-1], samples[:, -1]
        return Resampled(scores if self.is_binary else _spread(scores, len(self.at)), made_up)


@dataclass(frozen=True)
class _Aggregated:
    """Scores resamples of an entry with its own aggregation.

    Attributes:
        at: as for `_Mean`.
        sides: a model's outcomes each.
    """

    task: ScoredTask
    at: np.ndarray
    sides: Sequence[Sequence[Outcome]]
    is_binary: bool = False

    @property
    def n_resamples(self) -> int:
        return min(N_RESAMPLES, self.task.n_resamples)

    def scored(self, counts: np.ndarray, invented: np.ndarray) -> np.ndarray:
        """Return scores, not a number where a resample has none; shape (rows, models)."""
        return np.array([self._score(row) for row in counts[:, self.at].astype(int)])

    def _score(self, counts: np.ndarray) -> list[float]:
        drawn: list[int] = np.repeat(np.arange(len(counts)), counts).tolist()
        try:
            return [self.task.score([side[i] for i in drawn]) for side in self.sides]
        except TrialTaskError:
            return [math.nan] * len(self.sides)

    def resampled(self, samples: np.ndarray) -> Resampled:
        return Resampled(_spread(samples, len(self.at)), np.zeros(len(samples)))


def _scorer(task: ScoredTask, at: np.ndarray, sides: Sequence[Sequence[Outcome]]) -> _Mean | _Aggregated:
    if not all(task.averages(side) for side in sides):
        return _Aggregated(task, at, sides)
    values = np.column_stack([contributions(task, side) for side in sides])
    return _Mean(at, values, all(is_binary(task, side) for side in sides))


def _spread(scores: np.ndarray, n: int) -> np.ndarray:
    """Spread resampled scores as far as n documents may lie off; shape (resamples, models).

    Of one document nothing is known but its value: a difference to another model's may as well have
    the other sign.
    """
    from scipy.stats import t

    if n == 1:
        signed: np.ndarray = np.where(np.arange(len(scores)) % 2, 1.0, -1.0)[:, None] * scores
        return signed
    factor = math.sqrt(n / (n - 1)) * float(t.ppf(_TAILS[1], n - 1)) / _Z
    centre = scores.mean(axis=0)
    spread: np.ndarray = centre + factor * (scores - centre)
    return spread


def _counts(drawn: np.ndarray) -> np.ndarray:
    """Count how often each document was drawn; both of shape (resamples, n)."""
    rows, n = drawn.shape
    places = drawn + n * np.arange(rows)[:, None]
    return np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def contributions(task: ScoredTask, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Scale each document's value so that the task's score is the plain mean; shape (n,)."""
    values = np.array([float(outcome.value) for outcome in outcomes])
    scaled: np.ndarray = values * _scale(task, outcomes)
    return scaled


def _scale(task: ScoredTask, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Weigh documents as the task does, with a mean of 1; shape (n,)."""
    if task.weight_by_size is not False:
        return np.ones(len(outcomes))
    sizes = Counter(outcome.leaf for outcome in outcomes)
    return np.array([len(outcomes) / (len(sizes) * sizes[outcome.leaf]) for outcome in outcomes])


def is_binary(task: ScoredTask, outcomes: Sequence[Outcome]) -> bool:
    """Tell whether a task's outcomes are hits and misses."""
    return task.may_be_share and all(outcome.value in (0, 1) for outcome in outcomes)
