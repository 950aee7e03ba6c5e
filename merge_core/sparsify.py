"""Density to mask: which entries of a delta are kept, exactly, sorting a delta once a search.

Each delta's magnitudes are sorted once, at the first need, and only a small table is kept, good
for every density: differences of bfloat16 numbers take few distinct magnitudes, and the table then
holds them all. Else it holds every 64th, and the entries between two of them are looked at one by
one. A merge of a single density could do without, a search could not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.methods.job import Source, TensorJob, chunks, row_sums
from merge_core.randomness import MaskKey, keep_below, keep_mask

# The table of a delta whose magnitudes are nearly all different holds one in so many.
_STRIDE = 64


@dataclass(frozen=True)
class Threshold:
    """Entries above `magnitude` are kept; of those equal to it, a share `kept / tied`.

    Attributes:
        magnitude: the threshold, a float32 value.
        kept: how many of the tied entries are wanted.
        tied: how many entries have exactly the threshold's magnitude.
    """

    magnitude: float
    kept: int
    tied: int


@dataclass(frozen=True)
class Kept:
    """Which entries of one delta are kept, and what they are multiplied by.

    `density` >= 1 keeps all, 0 none. With a `threshold` the choice is by magnitude, else random.
    """

    density: float
    key: MaskKey
    threshold: Threshold | None = None
    rescale: float = 1.0

    def mask(self, delta: Tensor, start: int, stop: int) -> Tensor | None:
        """Tell which entries of the chunk [start, stop) are kept; None means all.

        Args:
            delta: unweighted delta of the chunk, shape (stop - start,).

        Returns:
            float32, shape (stop - start,), 1 where kept and 0 elsewhere; or None.
        """
        if self.density >= 1:
            return None
        if self.density <= 0:
            return torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
        if self.threshold is None:
            return keep_mask(self.key, start, stop, self.density, delta.device)
        magnitude = delta.abs().to(torch.float32)
        kept = torch.empty_like(magnitude)
        if self.threshold.kept == self.threshold.tied:
            return torch.ge(magnitude, self.threshold.magnitude, out=kept)
        torch.gt(magnitude, self.threshold.magnitude, out=kept)
        tied = _positions(magnitude, self.threshold.magnitude, self.threshold.magnitude)
        if tied.numel():
            index = tied + start
            chosen = keep_below(self.key, index, self.threshold.kept, self.threshold.tied)
            kept.index_copy_(0, tied, chosen)
        return kept


def _positions(values: Tensor, low: float, high: float) -> Tensor:
    """Return the indices of the values in [low, high], int64, rising."""
    if values.device.type == "cpu":  # numpy finds them ten times faster than torch does
        array = values.numpy()
        inside = array == np.float32(low) if low == high else (array >= low) & (array <= high)
        return torch.from_numpy(np.flatnonzero(inside))
    return ((values >= low) & (values <= high)).nonzero().view(-1)


@dataclass(frozen=True)
class Ranks:
    """Some of a delta's magnitudes in falling order, with their ranks.

    Attributes:
        magnitudes: float32, shape (m,), strictly falling.
        above: how many entries are larger than each; int64, shape (m,).
        n: how many entries the delta has.
        is_complete: whether every distinct magnitude is listed.
    """

    magnitudes: np.ndarray
    above: np.ndarray
    n: int
    is_complete: bool

    @classmethod
    def of(cls, magnitudes: np.ndarray) -> Ranks:
        """Sort a delta's magnitudes, float32 of shape (n,), and keep a table of them."""
        ordered = np.sort(magnitudes)
        n = len(ordered)
        # Rising: each distinct magnitude ends where the next begins.
        ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), n - 1)
        is_complete = len(ends) <= n // _STRIDE
        if not is_complete:
            ends = ends[np.unique(np.searchsorted(ends, np.append(np.arange(0, n, _STRIDE), n - 1)))]
        ends = ends[::-1]
        return cls(ordered[ends], n - 1 - ends, n, is_complete)

    def around(self, k: int) -> tuple[int, float, float]:
        """Find what the table says of the k-th largest magnitude, 1 <= k <= n.

        Returns:
            How many entries are larger than `high`, and low <= magnitude <= high.
        """
        at = int(np.searchsorted(self.above, k)) - 1
        high = float(self.magnitudes[at])
        low = high if self.is_complete else float(self.magnitudes[min(at + 1, len(self.above) - 1)])
        return int(self.above[at]), low, high

    def n_tied(self, k: int) -> int:
        """Count the entries of the k-th largest magnitude, where the table is complete."""
        at = int(np.searchsorted(self.above, k)) - 1
        ends = self.above[at + 1] if at + 1 < len(self.above) else self.n
        return int(ends - self.above[at])


def keep_all(job: TensorJob, source: Source) -> Kept:
    """Keep every entry, whatever the density says."""
    return Kept(1.0, source.key)


def keep_largest(job: TensorJob, source: Source) -> Kept:
    """Keep the k = max(1, floor(density n)) entries of largest magnitude; 0 keeps none.

    Of entries that tie at the threshold, the wanted share is chosen by the mask hash: spread
    evenly over the tensor, the same everywhere. mergekit leaves that choice undefined.
    """
    density = source.parameters["density"]
    if not 0 < density < 1:
        return Kept(density, source.key)
    k = max(1, math.floor(density * source.tensor.numel()))
    kept = Kept(density, source.key, job.statistics.threshold(job, source, k))
    return _rescaled(job, source, kept)


def keep_at_random(job: TensorJob, source: Source) -> Kept:
    """Keep each entry with probability `density`, by the counter-based hash."""
    density = source.parameters["density"]
    if not 0 < density < 1:
        return Kept(density, source.key)
    return _rescaled(job, source, Kept(density, source.key))


def _rescaled(job: TensorJob, source: Source, kept: Kept) -> Kept:
    """Set the factor |d|_1 / |d kept|_1 where the recipe asks to rescale (not near zero)."""
    if not job.parameters["rescale"]:
        return kept
    before: list[float] = []
    after: list[float] = []
    for start, stop, delta in _delta_chunks(job, source):
        mask = kept.mask(delta, start, stop)
        magnitude = delta.abs()
        before += row_sums(magnitude)
        after += row_sums(magnitude if mask is None else magnitude * mask)
    if math.fsum(before) < 1e-7 or math.fsum(after) < 1e-7:
        return kept
    return replace(kept, rescale=math.fsum(before) / math.fsum(after))


def _delta_chunks(job: TensorJob, source: Source) -> Iterator[tuple[int, int, Tensor]]:
    assert job.base is not None
    base, x = job.base.tensor.reshape(-1), source.tensor.reshape(-1)
    for start, stop in chunks(x.numel()):
        delta = x[start:stop].to(job.work_dtype) - base[start:stop].to(job.work_dtype)
        yield start, stop, delta


class StatisticsCache:
    """Order statistics of deltas, kept between merges of the same sources.

    One table of ranks a (base, model, tensor) is built at the first need; the threshold found last
    is remembered, so a fixed density costs nothing per candidate.
    """

    def __init__(self) -> None:
        self._ranks: dict[tuple[str, ...], Ranks] = {}
        self._thresholds: dict[tuple[str, ...], tuple[int, Threshold]] = {}
        self._is_zero: dict[tuple[str, ...], bool] = {}

    @staticmethod
    def _name(job: TensorJob, source: Source) -> tuple[str, ...]:
        assert job.base is not None
        names = (job.base.model, job.base.input_name, source.model, source.input_name)
        return (*names, str(job.base.tensor.dtype), str(source.tensor.dtype))

    def is_zero(self, job: TensorJob, source: Source) -> bool:
        """Tell whether the model's tensor equals the base's in every entry."""
        assert job.base is not None
        name = self._name(job, source)
        if name not in self._is_zero:
            self._is_zero[name] = torch.equal(job.base.tensor, source.tensor)
        return self._is_zero[name]

    def threshold(self, job: TensorJob, source: Source, k: int) -> Threshold:
        """Find the k-th largest magnitude of source minus base, 1 <= k <= n."""
        name = self._name(job, source)
        known = self._thresholds.get(name)
        if known is None or known[0] != k:
            known = self._thresholds[name] = (k, self._find(job, source, k))
        return known[1]

    def _ranked(self, job: TensorJob, source: Source) -> Ranks:
        name = self._name(job, source)
        if name not in self._ranks:
            magnitudes = torch.cat(
                [delta.abs_().to(torch.float32) for _, _, delta in _delta_chunks(job, source)]
            )
            if magnitudes.isnan().any():
                raise CheckpointError(
                    f"tensor {source.input_name} of {source.model}: entries minus the base's are not "
                    f"numbers (NaN), so they cannot be ranked by size; use a model without NaN"
                )
            self._ranks[name] = Ranks.of(magnitudes.cpu().numpy())
        return self._ranks[name]

    def _find(self, job: TensorJob, source: Source, k: int) -> Threshold:
        ranks = self._ranked(job, source)
        above, low, high = ranks.around(k)
        if ranks.is_complete:
            return Threshold(high, k - above, ranks.n_tied(k))
        members = []
        for _, _, delta in _delta_chunks(job, source):
            magnitude = delta.abs_().to(torch.float32)
            members.append(magnitude[_positions(magnitude, low, high)])
        found = torch.cat(members).cpu().numpy()
        magnitude_at_k = np.partition(found, above - k)[above - k]
        larger = above + int((found > magnitude_at_k).sum())
        tied = int((found == magnitude_at_k).sum())
        return Threshold(float(magnitude_at_k), k - larger, tied)
