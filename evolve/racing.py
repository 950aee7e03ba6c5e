"""Racing: which documents a candidate is asked, and what a part of the documents says of all.

A candidate is first asked a block of documents, a few of each score. A few candidates are asked the
same block; then half of it makes way for new documents, so that a search does not learn one block
by heart, and yet every block hangs together with those before. In the middle of its block a
candidate is dropped if a paired test says that it is worse than the best who was asked the same.
What the sampler sees are estimates of the scores over all documents; their standard errors are
recorded beside them.

At the end the elite is raced on: in rounds ever fewer candidates are asked ever more documents, the
same for all, and who is left is scored on every document. There estimates are smoothed over the space
(`evolve.smoothing`), so that luck with few documents takes nobody far. (Sequential halving: Karnin,
Koren and Somekh 2013, Almost Optimal Exploration in Multi-Armed Bandits. Blocks and paired tests:
Birattari et al. 2002, A Racing Algorithm for Configuring Metaheuristics.)

Estimates. y[c, d], the outcome of candidate c on document d, is taken as a[c] + b[d]: how good the
candidate is over all documents, and how much better than on all of them candidates do on d. b is
learned from the candidates told so far and shrunk towards 0; thus a candidate is not blamed for
the documents that it happened to be asked, and candidates of different generations compare.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from evolve.tasks import Outcomes, ScoredTask

Document = tuple[str, int]
"""A leaf's name, and a document's number there."""
Values = Mapping[str, Mapping[Document, float]]
"""By score and document what a candidate gave; higher or lower is better as the score has it."""

# Documents of a score in a block: this share of them, but at least so many.
BLOCK_SHARE, BLOCK_LEAST = 0.045, 6
# Candidates that are asked the same block.
GENERATION = 4
# Those who were asked a candidate's first half are among so many before it.
_PEERS = 2 * GENERATION
# A candidate is dropped so many standard errors of the paired difference below the best.
DROP_Z = 2.0
# Rounds before the finals: share of all candidates that take part, share of the documents they are
# asked; and the share of all candidates that is then scored on every document. Of a front it is as
# many as the last round has places for, since what is left of it is shown by these alone; and enough
# for the knee and the best of each of four objectives.
ROUNDS = ((1 / 4, 0.12), (1 / 12, 0.3))
FINALISTS, FINALISTS_LEAST = 1 / 30, 3
_OF_A_FRONT_LEAST = 5
# `auto` races searches of at least so many candidates, where it saves most of the documents.
WORTHWHILE_FROM, WORTHWHILE_SHARE = 60, 0.3
# How many candidates that found a document average its ease is shrunk by.
_EASE_PRIOR = 4.0
# How many documents of typical variance a candidate's own variance is pooled with.
_VARIANCE_PRIOR = 8.0
# Mean and variance of an outcome before any is known: those of a fair coin.
_COIN_MEAN, _COIN = 0.5, 0.25


@dataclass(frozen=True)
class Estimate:
    """What a part of the documents says of a score over all of them."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Round:
    """How many candidates take part in a round before the finals, and what they are asked."""

    n_candidates: int
    documents: Mapping[str, Sequence[Document]]


class Race:
    """What a search knows of its documents, and whom it asks which.

    Args:
        documents: by score all its search documents.
        weights: by score its signed weight in the objective, negative where less is better.
        n_candidates: how many the search has in all.
        seed: orders the documents.
        has_many_objectives: a candidate is then worse than another only if it is so in every score.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Document]],
        weights: Mapping[str, float],
        n_candidates: int,
        seed: int,
        has_many_objectives: bool = False,
    ) -> None:
        # Scores over the same documents share one order of them.
        self._scores = {key: _Score(every, seed) for key, every in documents.items()}
        self._weights = dict(weights)
        self._n_candidates = n_candidates
        self._many = has_many_objectives
        self._told: dict[int, Values] = {}

    def share(self) -> float:
        """Return the share of all document evaluations that racing asks, at most; in (0, 1]."""
        total = sum(len(score.documents) for score in self._scores.values())
        before = sum(score.block_size for score in self._scores.values()) / total
        share = before
        for part, asked in ROUNDS:  # a round asks its candidates what the round before did not
            share += self.n_of(part) / self._n_candidates * max(0.0, asked - before)
            before = max(before, asked)
        return min(1.0, share + self.n_finalists / self._n_candidates)

    def is_worthwhile(self) -> bool:
        """Tell whether `racing: auto` should race."""
        return self._n_candidates >= WORTHWHILE_FROM and self.share() <= WORTHWHILE_SHARE

    # ---- during the search ----------------------------------------------------------------------

    def blocks(self, number: int) -> list[dict[str, list[Document]]]:
        """Return what candidate `number` is asked: by score, in two halves, between which it may drop."""
        whole = {key: score.block(number // GENERATION) for key, score in self._scores.items()}
        return [
            {key: block[: len(block) - len(block) // 2] for key, block in whole.items()},
            {key: block[len(block) - len(block) // 2 :] for key, block in whole.items()},
        ]

    def values(self, number: int, outcomes: Outcomes, n_halves: int = 2) -> Values:
        """Return what candidate `number` gave on the first halves of its block, or on all of it.

        A document in the block of one score is asked for every score of its leaf; where scores have
        other documents each, that may be one outside their own block, where nobody else was asked it.
        """
        halves = self.blocks(number)[:n_halves]
        own = {key: {document for half in halves for document in half[key]} for key in self._scores}
        return {
            key: {document: value for document, value in its.items() if document in own[key]}
            for key, its in values_of(outcomes).items()
        }

    def is_hopeless(self, number: int, values: Values) -> bool:
        """Tell whether a candidate is worse on its documents so far than the best who was asked them.

        The test is one-sided and paired: z = mean difference / its standard error, with variances
        pooled with a coin's, since the documents are few.
        """
        recent = range(max(0, number - _PEERS), number)
        peers = [self._told[peer] for peer in recent if peer in self._told]
        peers = [peer for peer in peers if all(values[key].keys() <= peer[key].keys() for key in values)]
        if self._many:
            return any(
                all(self._z({key: its}, peer) < -DROP_Z for key, its in values.items()) for peer in peers
            )
        best = max(peers, key=lambda peer: self._sum(peer, values), default=None)
        return best is not None and self._z(values, best) < -DROP_Z

    def _sum(self, peer: Values, asked: Values) -> float:
        """Return a peer's objective on the documents of another candidate."""
        return sum(
            self._weights[key] * math.fsum(peer[key][document] for document in its) / len(its)
            for key, its in asked.items()
            if its
        )

    def _z(self, values: Values, other: Values) -> float:
        difference = variance = 0.0
        for key, its in ((key, its) for key, its in values.items() if its):
            pairs = np.array([value - other[key][document] for document, value in its.items()])
            spread = ((pairs - pairs.mean()) ** 2).sum() + _EASE_PRIOR * _COIN
            # Of many objectives each counts alone: by its weight's sign, which a zero has, too.
            weight = math.copysign(1.0, self._weights[key]) if self._many else self._weights[key]
            difference += weight * float(pairs.mean())
            variance += weight**2 * float(spread) / (len(pairs) + _EASE_PRIOR) / len(pairs)
        return difference / math.sqrt(variance) if variance else 0.0

    def estimates(self, values: Values) -> dict[str, Estimate]:
        """Estimate each score over all its documents."""
        return {key: score.estimate(values[key]) for key, score in self._scores.items()}

    def tell(self, number: int, values: Values) -> None:
        """Learn from a candidate how easy the documents are."""
        self._told[number] = values
        for key, score in self._scores.items():
            score.learn(values[key])

    def recorded(self, number: int, values: Values) -> dict[str, list[list[float]]]:
        """Spell a candidate's values for its record: by score [place in its block, value], in order."""
        places = self._places(number)
        return {
            key: [[places[key].index(document), value] for document, value in its.items()]
            for key, its in values.items()
        }

    def recalled(self, number: int, recorded: Mapping[str, Sequence[Sequence[float]]]) -> Values:
        """Read what `recorded` spelled."""
        places = self._places(number)
        return {
            key: {places[key][int(place)]: value for place, value in its} for key, its in recorded.items()
        }

    def _places(self, number: int) -> dict[str, list[Document]]:
        first, second = self.blocks(number)
        return {key: first[key] + second[key] for key in first}

    # ---- before the finals ----------------------------------------------------------------------

    def rounds(self) -> list[Round]:
        """Return the rounds before the finals, in their order.

        Documents that all candidates agreed on so far are asked last: they tell nobody apart.
        """
        orders = {key: score.by_disagreement() for key, score in self._scores.items()}
        return [
            Round(
                self.n_of(part),
                {key: order[: math.ceil(share * len(order))] for key, order in orders.items()},
            )
            for part, share in ROUNDS
        ]

    @property
    def n_finalists(self) -> int:
        """How many candidates are scored on every document at the end."""
        if not self._many:
            return self.n_of(FINALISTS)
        return min(self._n_candidates, max(_OF_A_FRONT_LEAST, self.n_of(ROUNDS[-1][0])))

    def n_of(self, part: float) -> int:
        """Return how many candidates a share of all of them is."""
        return min(self._n_candidates, max(FINALISTS_LEAST, round(part * self._n_candidates)))


class _Score:
    """The documents of one score: their order and their ease.

    Attributes:
        documents: all of them, in an order drawn by seed.
        block_size: how many of them a candidate is asked first.
    """

    def __init__(self, documents: Sequence[Document], seed: int) -> None:
        self.documents = sorted(documents)
        random.Random(seed).shuffle(self.documents)
        self._index = {document: i for i, document in enumerate(self.documents)}
        n = len(self.documents)
        self.block_size = min(n, max(BLOCK_LEAST, round(BLOCK_SHARE * n)))
        self._residuals = np.zeros(n)
        self._n_asked = np.zeros(n)
        self._lowest, self._highest = np.full(n, np.inf), np.full(n, -np.inf)
        self._squares = self._n_squares = self._total = 0.0

    def block(self, generation: int) -> list[Document]:
        """Return a generation's block; the next one begins with its second half."""
        n, begin = len(self.documents), generation * (self.block_size // 2)
        return [self.documents[(begin + i) % n] for i in range(self.block_size)]

    def by_disagreement(self) -> list[Document]:
        """Return the documents, those last that several candidates were asked and agreed on."""
        agreed = (self._n_asked > 1) & (self._lowest == self._highest)
        return [self.documents[i] for i in np.argsort(agreed, kind="stable")]

    def _ease(self) -> np.ndarray:
        ease = self._residuals / (self._n_asked + _EASE_PRIOR)
        centred: np.ndarray = ease - ease.mean()
        return centred

    def _arrays(self, values: Mapping[Document, float]) -> tuple[np.ndarray, np.ndarray]:
        asked = np.array([self._index[document] for document in values])
        return asked, np.array(list(values.values()), float)

    def estimate(self, values: Mapping[Document, float]) -> Estimate:
        """Estimate the mean over all documents.

        Of a candidate without values that is what the others gave. A task may give few documents one.
        """
        typical = (self._squares + _VARIANCE_PRIOR * _COIN) / (self._n_squares + _VARIANCE_PRIOR)
        if not values:
            mean = self._total / self._n_squares if self._n_squares else _COIN_MEAN
            return Estimate(mean, math.sqrt(typical))
        asked, given = self._arrays(values)
        n, n_all = len(given), len(self.documents)
        if n == n_all:
            return Estimate(float(given.mean()), 0.0)
        residuals = given - self._ease()[asked]
        spread = ((residuals - residuals.mean()) ** 2).sum() + _VARIANCE_PRIOR * typical
        # What was asked is known: the error is that of the rest (finite population correction).
        variance = float(spread) / (n + _VARIANCE_PRIOR) / n * (1 - n / n_all)
        return Estimate(float(residuals.mean()), math.sqrt(variance))

    def learn(self, values: Mapping[Document, float]) -> None:
        """Learn from one candidate's values."""
        if not values:
            return
        asked, given = self._arrays(values)
        residuals = given - (given - self._ease()[asked]).mean()
        self._residuals[asked] += residuals
        self._n_asked[asked] += 1
        self._lowest[asked] = np.minimum(self._lowest[asked], given)
        self._highest[asked] = np.maximum(self._highest[asked], given)
        self._squares += float(((residuals - self._ease()[asked]) ** 2).sum())
        self._n_squares += len(asked)
        self._total += float(given.sum())


def race_over(
    tasks: Sequence[ScoredTask], n_candidates: int, seed: int, has_many_objectives: bool
) -> Race | None:
    """Make the race of a search; None where a score is no mean over documents.

    Args:
        tasks: what the sampler follows.
    """
    if not all(task.is_raced for task in tasks):
        return None
    documents = {
        task.key: [(leaf.name, number) for leaf in task.leaves for number in leaf.documents["search"]]
        for task in tasks
    }
    weights = {task.key: task.sign * task.weight for task in tasks}
    return Race(documents, weights, n_candidates, seed, has_many_objectives)


def values_of(outcomes: Outcomes) -> Values:
    """Return outcomes as a race takes them."""
    return {
        key: {(o.leaf, o.document): float(o.value) for o in every if o.value is not None}
        for key, every in outcomes.items()
    }
