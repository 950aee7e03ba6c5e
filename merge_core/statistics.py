"""What is known of whole tensors, kept between merges of the same sources.

A candidate changes weights and densities, not the models: order statistics of the deltas, their
norms and angles are computed at the first need and remembered.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from merge_core.methods.entrywise import Operands, Values, evaluated
from merge_core.methods.job import Source, TensorJob, row_sums, rows_in_chunks

_T = TypeVar("_T")
# A table of ranks lists at most so many magnitudes, chosen from a sample of so many entries.
_MARKS, _SAMPLE = 1 << 11, 1 << 16
# How many of the gaps between two marks are kept sorted.
_GAPS = 32


class StatisticsCache:
    """Results by what they were computed from.

    Args:
        array_bytes: how much memory results of the size of a tensor may take; the rest of them is
            computed anew each time.
    """

    def __init__(self, array_bytes: int = 0) -> None:
        self._known: dict[Any, Any] = {}
        self._array_bytes = array_bytes

    def once(self, job: TensorJob, what: Any, sources: Sequence[Source], compute: Callable[[], _T]) -> _T:
        """Compute a statistic of the job's base and these sources, or recall it.

        Args:
            what: names the statistic, with every parameter that it depends on.
        """
        key = self._key(job, what, sources)
        if key not in self._known:
            self._known[key] = compute()
        result: _T = self._known[key]
        return result

    def array(
        self, job: TensorJob, what: Any, sources: Sequence[Source], compute: Callable[[], Tensor]
    ) -> Tensor:
        """As `once`, for a result of the size of a tensor: kept only while there is room."""
        key = self._key(job, what, sources)
        if key in self._known:
            known: Tensor = self._known[key]
            return known
        result = compute()
        if result.nbytes <= self._array_bytes:
            self._array_bytes -= result.nbytes
            self._known[key] = result
        return result

    def forget(self, model: str) -> None:
        """Drop what is known of a model whose tensors are not wanted again."""
        for key in list(self._known):
            _, base, _, *sources = key
            if any(identity is not None and identity[0] == model for identity in (base, *sources)):
                known = self._known.pop(key)
                if isinstance(known, Tensor):
                    self._array_bytes += known.nbytes

    @staticmethod
    def _key(job: TensorJob, what: Any, sources: Sequence[Source]) -> Any:
        base = job.base.identity if job.base else None
        return (what, base, job.work_dtype, *(source.identity for source in sources))


@dataclass(frozen=True)
class Rank:
    """The entries of one magnitude, in rising order of all: from rank `below` to `through`."""

    magnitude: float
    below: int
    through: int


Magnitudes = Callable[[], Iterable[Tensor]]


class RankTable:
    """The order of a tensor's magnitudes, exact for any rank, without sorting the tensor.

    Marks, magnitudes found in a sample, cut the range into bins whose entries are counted in one
    pass, chunk by chunk. Differences of bfloat16 numbers take few magnitudes, and the marks are
    nearly all of them: a rank is then looked up. Else the few entries between two marks are
    collected and sorted, at the first need. The tensor itself is not held: it may have been made for
    one merge only.

    Args:
        magnitudes: goes over the tensor, chunk by chunk; each float32, shape (m,), no NaN.
        n: how many entries there are.
    """

    def __init__(self, magnitudes: Magnitudes, n: int) -> None:
        step = n // _SAMPLE | 1  # odd, so as not to meet the same column in every row
        marks = np.unique(np.concatenate([chunk[::step].copy() for chunk in _arrays(magnitudes)]))
        if len(marks) > _MARKS:
            marks = marks[np.linspace(0, len(marks) - 1, _MARKS).astype(np.int64)]
        self._marks = marks
        self._below = np.zeros(len(marks), np.int64)
        self._through = np.zeros(len(marks), np.int64)
        for chunk in _arrays(magnitudes):
            ordered = np.sort(chunk)
            self._below += np.searchsorted(ordered, marks, "left")
            self._through += np.searchsorted(ordered, marks, "right")
        self._gaps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def at(self, rank: int, magnitudes: Magnitudes) -> Rank:
        """Find the magnitude of a rank in rising order, 0 <= rank < n.

        Args:
            magnitudes: of the same tensor as at first.
        """
        at = int(self._through.searchsorted(rank, "right"))
        if at < len(self._marks) and self._below[at] <= rank:
            return Rank(float(self._marks[at]), int(self._below[at]), int(self._through[at]))
        gap = self._gap(at, magnitudes)
        start = int(self._through[at - 1]) if at else 0
        value = gap[rank - start]
        below, through = np.searchsorted(gap, value, "left"), np.searchsorted(gap, value, "right")
        return Rank(float(value), start + int(below), start + int(through))

    def _gap(self, at: int, magnitudes: Magnitudes) -> np.ndarray:
        """Sort the entries that lie between two marks."""
        gap = self._gaps.get(at)
        if gap is None:
            low = self._marks[at - 1] if at else np.float32(-np.inf)
            high = self._marks[at] if at < len(self._marks) else np.float32(np.inf)
            found = [chunk[(chunk > low) & (chunk < high)] for chunk in _arrays(magnitudes)]
            gap = np.sort(np.concatenate(found))
            with self._lock:  # a layer that occurs twice is merged by two threads
                self._gaps[at] = gap
                if len(self._gaps) > _GAPS:
                    self._gaps.popitem(last=False)
        return gap


def _arrays(magnitudes: Magnitudes) -> Iterator[np.ndarray]:
    return (chunk.cpu().numpy() for chunk in magnitudes())


@dataclass(frozen=True)
class Ranks:
    """A table beside the tensor that it was made of."""

    table: RankTable
    magnitudes: Magnitudes

    @classmethod
    def of(cls, magnitudes: Magnitudes, n: int) -> Ranks:
        """Make the table, too."""
        return cls(RankTable(magnitudes, n), magnitudes)

    def at(self, rank: int) -> Rank:
        """Find the magnitude of a rank in rising order, 0 <= rank < n."""
        return self.table.at(rank, self.magnitudes)


def delta_ranks(job: TensorJob, source: Source) -> Ranks:
    """Return the order of a delta's magnitudes, taken as float32.

    Raises:
        CheckpointError: the delta has NaN, which has no rank.
    """

    def magnitudes() -> Iterable[Tensor]:
        return evaluated(job, magnitude, None, [source.tensor], Values())

    n = job.like.numel()
    table = job.statistics.once(job, "ranks", [source], lambda: RankTable(magnitudes, n))
    return Ranks(table, magnitudes)


def magnitude(structure: Any, o: Operands) -> Any:
    """A formula: the magnitude of a delta."""
    return (o.xs[0] - o.base).abs()


def row_ranks(job: TensorJob, source: Source) -> Tensor:
    """Rank a delta's magnitudes in their rows, along the last dimension.

    Returns:
        Twice the rank from 0 upwards, so that entries of equal magnitude can share their mean;
        uint16 or int32, shape (n,).
    """

    def ranks() -> Tensor:
        assert job.base is not None
        width = source.tensor.shape[-1] if source.tensor.dim() else 1
        kind = np.uint16 if 2 * width < 1 << 16 else np.int32
        twice = np.empty(source.tensor.numel(), kind)
        start = 0
        for x, base in zip(rows_in_chunks(source.tensor), rows_in_chunks(job.base.tensor), strict=True):
            delta = x.to(job.work_dtype) - base.to(job.work_dtype)
            rows = delta.abs_().cpu().numpy()
            _twice_the_ranks(rows, twice[start : start + rows.size].reshape(rows.shape))
            start += rows.size
        return torch.from_numpy(twice).to(job.like.device)

    return job.statistics.array(job, "row_ranks", [source], ranks)


def _twice_the_ranks(rows: np.ndarray, twice: np.ndarray) -> None:
    order = np.argsort(rows, axis=1)
    ordered = np.sort(rows, axis=1)
    is_first = np.ones(rows.shape, bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=is_first[:, 1:])
    at = np.arange(rows.shape[1], dtype=np.int32)
    first = np.maximum.accumulate(np.where(is_first, at, np.int32(0)), axis=1)
    is_last = np.ones(rows.shape, bool)
    is_last[:, :-1] = is_first[:, 1:]
    last = np.where(is_last, at, np.int32(rows.shape[1]))
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    np.put_along_axis(twice, order, (first + last).astype(twice.dtype), axis=1)


def is_zero(job: TensorJob, source: Source) -> bool:
    """Tell whether a model's tensor equals the base's in every entry."""
    assert job.base is not None
    base = job.base.tensor
    return job.statistics.once(job, "is_zero", [source], lambda: torch.equal(base, source.tensor))


def as_it_is(job: TensorJob, source: Source) -> Tensor:
    """Return a source's tensor in the output dtype.

    Raises:
        CheckpointError: it has entries that are not numbers.
    """
    refuse_nan(job, source)
    return source.tensor.to(job.out_dtype)


def refuse_nan(job: TensorJob, source: Source) -> None:
    """Look once whether a source's tensor has entries that are not numbers.

    Raises:
        CheckpointError: it has.
    """

    def has_nan() -> bool:
        flat = source.tensor.reshape(-1)
        sums = (flat[start:stop].sum(dtype=job.work_dtype) for start, stop in job.chunks())
        # A sum of chunks sees a NaN at the speed of memory; infinite entries may make one, too.
        return math.isnan(sum(map(float, sums))) and bool(flat.isnan().any())

    if job.statistics.once(job, "has_nan", [source], has_nan):
        raise job.not_a_number()


def largest_magnitude(job: TensorJob, source: Source) -> float:
    """Return the largest magnitude of a delta."""
    return job.statistics.once(
        job,
        "largest",
        [source],
        lambda: max(float(m.max()) for m in evaluated(job, magnitude, None, [source.tensor], Values())),
    )


def gram(job: TensorJob, vectors: Sequence[Source]) -> np.ndarray:
    """Return the scalar products of the tensors, or of their deltas where the job has a base.

    Returns:
        float64, shape (len(vectors), len(vectors)); the tensors are taken as vectors, whole.
    """

    def compute() -> np.ndarray:
        sums: dict[tuple[int, int], list[float]] = {
            (i, j): [] for i in range(len(vectors)) for j in range(i + 1)
        }
        base = job.base.tensor.reshape(-1) if job.base else None
        flat = [source.tensor.reshape(-1) for source in vectors]
        for start, stop in job.chunks():
            parts = [x[start:stop].to(job.work_dtype) for x in flat]
            if base is not None:
                b = base[start:stop].to(job.work_dtype)
                parts = [part - b for part in parts]
            for (i, j), rows in sums.items():
                rows += row_sums(parts[i] * parts[j])
        products = np.empty((len(vectors), len(vectors)))
        for (i, j), rows in sums.items():
            products[i, j] = products[j, i] = math.fsum(rows)
        if np.isnan(products).any():
            raise job.not_a_number()
        return products

    return job.statistics.once(job, "gram", vectors, compute)
