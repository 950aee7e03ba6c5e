"""What a search will take: seconds, disk and money, from what a few candidates took.

Pure arithmetic. `evolve.rehearsal` measures the pace, and counts what a plan has in store.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """Seconds for a number of documents: a line."""

    fixed_s: float
    per_document_s: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Scoring:
        """Return the line through the outermost of (documents, seconds); one point: through 0.

        Where it would begin below 0 or fall, the largest point counts alone.
        """
        (few, few_s), (many, many_s) = min(points), max(points)
        if many > few:
            slope = (many_s - few_s) / (many - few)
            fixed = few_s - slope * few
            if slope >= 0 and fixed >= 0:
                return cls(fixed, slope)
        return cls(0.0, many_s / many if many else 0.0)

    def seconds(self, documents: float) -> float:
        """Return the seconds that so many documents take; 0 for none."""
        return self.fixed_s + documents * self.per_document_s if documents else 0.0


@dataclass(frozen=True)
class Pace:
    """What was measured; seconds of wall clock, of one worker where nothing else is said.

    Attributes:
        start_up_s: from the start of the command until the engine is up.
        first_s: until each worker has finished its first candidate, which reads and ranks tensors.
        merge_s, load_s, score_s: of a later candidate.
        other_s: the rest of its time: its proposal, its record.
        by_signal: scoring as candidates are scored.
        by_metric: scoring by the tasks' own metrics, as finalists and baselines are.
        proposing_s: what the sampler takes in all beyond what it took for the candidates measured.
        trial_bytes: a later candidate's part of the folder.
        document_bytes: a document's part of a file of outcomes.
        folder_bytes: what is written once.
    """

    start_up_s: float
    first_s: float
    merge_s: float
    load_s: float
    score_s: float
    other_s: float
    by_signal: Scoring
    by_metric: Scoring
    proposing_s: float
    trial_bytes: float
    document_bytes: float
    folder_bytes: float

    @property
    def candidate_s(self) -> float:
        """A later candidate, from its proposal to its record."""
        return self.merge_s + self.load_s + self.score_s + self.other_s


@dataclass(frozen=True)
class Amounts:
    """What a search has in store.

    Attributes:
        n_candidates: all of the search.
        n_workers: how many evaluate candidates, and all that comes after, at once.
        timeout_s: no candidate is begun after so many seconds.
        rounds: before the finals, candidates and the documents new to each of them.
        n_finalists: candidates scored by metric on the search documents.
        search, holdout, reported: documents of the splits.
        baselines: for each the number of ways in which it is prompted.
        n_shortlisted: candidates scored on the holdout.
        n_repetitions: scorings of the winner for the noise floor.
    """

    n_candidates: int
    n_workers: int
    timeout_s: float | None
    rounds: tuple[tuple[int, float], ...]
    n_finalists: int
    search: int
    holdout: int
    reported: int
    baselines: tuple[int, ...]
    n_shortlisted: int
    n_repetitions: int


@dataclass(frozen=True)
class Forecast:
    """What a search will take, part by part; seconds of wall clock, bytes."""

    start_up_s: float
    search_s: float
    rounds_s: float
    finals_s: float
    baselines_s: float
    shortlist_s: float
    noise_s: float
    disk_bytes: float

    @property
    def total_s(self) -> float:
        """The whole command."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the seconds by part, in the order in which the search comes to them."""
        return {
            "start_up": self.start_up_s,
            "search": self.search_s,
            "rounds": self.rounds_s,
            "finals": self.finals_s,
            "baselines": self.baselines_s,
            "shortlist": self.shortlist_s,
            "noise": self.noise_s,
        }

    def gpu_hours(self, n_gpus: float) -> float:
        """Return the GPU hours, all GPUs being held from the start to the end."""
        return n_gpus * self.total_s / 3600


def foretell(pace: Pace, amounts: Amounts) -> Forecast:
    """Add up a search from the pace of its first candidates."""
    n_later = max(0, amounts.n_candidates - amounts.n_workers)
    search_s = pace.first_s + n_later * pace.candidate_s / amounts.n_workers + pace.proposing_s
    # Those that are under way when time is up are finished.
    stops_s = (amounts.timeout_s or float("inf")) + pace.candidate_s
    job_s = pace.merge_s + pace.load_s + pace.other_s
    judged = amounts.holdout or amounts.search

    def at_once(n: int) -> float:
        """Return the share of their seconds one by one that `n` jobs take, as each waits for a worker."""
        return math.ceil(n / amounts.n_workers) / n if n else 0.0

    def by_metric(n: int, documents: int) -> float:
        return n * (job_s + pace.by_metric.seconds(documents)) if documents else 0.0

    everywhere = amounts.search + amounts.holdout + amounts.reported
    n_written = (
        sum(n * documents for n, documents in amounts.rounds)
        + amounts.n_finalists * amounts.search
        + len(amounts.baselines) * everywhere
        + amounts.n_shortlisted * amounts.holdout
        + amounts.reported
        + amounts.n_repetitions * judged
    )
    # The shortlist is judged beside the baselines, the winner's further tasks beside its repetitions.
    judging = at_once(len(amounts.baselines) + amounts.n_shortlisted)
    repeating = at_once(amounts.n_repetitions + bool(amounts.reported))
    return Forecast(
        start_up_s=pace.start_up_s,
        search_s=min(search_s, max(stops_s, pace.first_s)),
        rounds_s=sum(
            at_once(n) * n * (job_s + pace.by_signal.seconds(new)) for n, new in amounts.rounds if new
        ),
        finals_s=at_once(amounts.n_finalists) * by_metric(amounts.n_finalists, amounts.search),
        baselines_s=judging
        * sum(
            job_s + n_promptings * pace.by_metric.seconds(everywhere)
            for n_promptings in amounts.baselines
        ),
        shortlist_s=judging * by_metric(amounts.n_shortlisted, amounts.holdout)
        + repeating * by_metric(1, amounts.reported),
        noise_s=repeating * by_metric(amounts.n_repetitions, judged),
        disk_bytes=pace.folder_bytes
        + amounts.n_candidates * pace.trial_bytes
        + n_written * pace.document_bytes,
    )
