"""Density to mask: which entries of a delta are kept, exactly, and by what they are rescaled.

Of entries that tie at a threshold, the wanted share is chosen by the mask hash: spread evenly over
the tensor, the same everywhere. mergekit leaves that choice undefined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.entrywise import Operands, Values, bits, indicator, kept, negative, total
from merge_core.methods.job import Source, TensorJob
from merge_core.randomness import MaskKey, above, hash_words, last_kept
from merge_core.statistics import Ranks, delta_ranks, largest_magnitude, row_ranks

Kind = Literal["all", "none", "random", "largest", "band", "ranked"]
Sparsifier = Callable[[TensorJob, Source], "Kept"]
_EVERY = (1 << 31) - 1
# Sums of magnitudes are taken in units of the largest one over this, as integers.
_UNITS = 1 << 30


@dataclass(frozen=True)
class Kept:
    """Which entries of one delta are kept, and what they are multiplied by.

    Attributes:
        kind: all; none; random: by hash; largest: above a threshold, and some of those at it;
            band: between two thresholds, and some of those at each; ranked: by hash, with a
            probability that grows with the rank in a row.
        values: the kind's thresholds, hash keys and limits, in the order `mask` asks for them.
        rescale: factor of the kept entries.
    """

    kind: Kind
    values: Values = field(default_factory=Values)
    rescale: float = 1.0


def mask(kind: Kind, o: Operands, delta: Any) -> Any:
    """Tell which entries of a chunk are kept; for use in a formula.

    Args:
        delta: unweighted delta of the chunk, shape (n,).

    Returns:
        int32, shape (n,), -1 where kept and 0 elsewhere.
    """
    if kind == "ranked":
        slope, first, k0, k1 = o.number(), o.number(), o.integer(), o.integer()
        bound = o.array().to(torch.float64) * slope + first
        hashed = hash_words(k0, k1, o.index, o.index_high).to(torch.float64)
        return indicator(torch.lt, hashed, bound).to(torch.int32) * -1
    if kind == "random":
        k0, k1, last = o.integer(), o.integer(), o.integer()
        return ~above(hash_words(k0, k1, o.index, o.index_high), last)
    return mask_of_magnitudes(kind, o, delta.abs().to(torch.float32))


def mask_of_magnitudes(kind: Kind, o: Operands, magnitude: Any) -> Any:
    """Tell which entries of a chunk are kept by their magnitude, float32, shape (n,): -1, else 0."""
    size = bits(magnitude)
    k0, k1, low, last = o.integer(), o.integer(), o.integer(), o.integer()
    within = ~_beyond(o, size - low, k0, k1, last)
    if kind == "band":
        high, last = o.integer(), o.integer()
        within &= ~_beyond(o, size * -1 + high, k0, k1, last)
    return within


def _beyond(o: Operands, inside: Any, k0: Any, k1: Any, last: Any) -> Any:
    """Tell which entries lie outside a threshold (-1, else 0): negative `inside`, or, of those on
    it, a hash above `last`."""
    if not isinstance(inside, Tensor):
        return negative(inside + above(hash_words(k0, k1, o.index, o.index_high), last))
    if last < _EVERY:  # few entries: only their hashes are computed
        at = _zeros(inside)
        inside[at] = above(hash_words(k0, k1, o.index[at], o.index_high), last)
    return negative(inside)


def _zeros(values: Tensor) -> Tensor:
    """Return the indices of entries that are zero, int64, rising."""
    if values.device.type == "cpu":  # numpy finds them ten times faster than torch does
        return torch.from_numpy(np.flatnonzero(values.numpy() == 0))
    return (values == 0).nonzero().view(-1)


def _size(magnitude: float) -> int:
    """Return the bits of a float32 magnitude, which are in the order of the magnitudes."""
    return int(np.float32(magnitude).view(np.int32))


def keep_all(job: TensorJob, source: Source) -> Kept:
    """Keep every entry, whatever the density says."""
    return Kept("all")


def _kept_whole(density: float) -> Kept | None:
    """Return what densities outside (0, 1) keep: everything, or nothing."""
    if density >= 1:
        return Kept("all")
    return Kept("none") if density <= 0 else None


def keep_largest(job: TensorJob, source: Source) -> Kept:
    """Keep the k = max(1, floor(density n)) entries of largest magnitude; 0 keeps none."""
    density, n = source.parameters["density"], source.tensor.numel()
    if whole := _kept_whole(density):
        return whole
    k = max(1, math.floor(density * n))
    return _rescaled(job, source, largest(delta_ranks(job, source), n, k, source.key))


def largest(ranks: Ranks, n: int, k: int, key: MaskKey) -> Kept:
    """Keep the k largest of n magnitudes; of those that tie, the ones of lowest hash."""
    rank = ranks.at(n - k)
    last = last_kept(rank.through - (n - k), rank.through - rank.below)
    return Kept("largest", Values((), (*key.words(), _size(rank.magnitude), last)))


def keep_without_outliers(job: TensorJob, source: Source) -> Kept:
    """Drop the floor(gamma n) largest entries and keep the next max(1, floor(density n)).

    Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795, section 3. Where too few entries
    are left below the outliers, outliers fill up the number, as in mergekit 0.1.5.
    """
    density, n = source.parameters["density"], source.tensor.numel()
    if whole := _kept_whole(density):
        return whole
    k = max(1, math.floor(density * n))
    first = max(0, n - k - math.floor(source.parameters["gamma"] * n))
    ranks = delta_ranks(job, source)
    low, high = ranks.at(first), ranks.at(first + k - 1)
    # Entries at one and the same threshold are one group, of which k are wanted.
    at_low = low.through - (low.below if low == high else first)
    at_high = k if low == high else first + k - high.below
    integers = (
        *source.key.words(),
        *(_size(low.magnitude), last_kept(at_low, low.through - low.below)),
        *(_size(high.magnitude), last_kept(at_high, high.through - high.below)),
    )
    return _rescaled(job, source, Kept("band", Values((), integers)))


def keep_at_random(job: TensorJob, source: Source) -> Kept:
    """Keep each entry with probability `density`, by the counter-based hash."""
    density = source.parameters["density"]
    if whole := _kept_whole(density):
        return whole
    last = last_kept(*float(density).as_integer_ratio())
    return _rescaled(job, source, Kept("random", Values((), (*source.key.words(), last))))


def keep_by_rank(job: TensorJob, source: Source) -> Kept:
    """Keep each entry with a probability that rises with its rank in its row (DELLA).

    Deep, Bhardwaj and Poria 2024, https://arxiv.org/abs/2406.11617, MagPrune: from density -
    epsilon for the smallest of a row to density + epsilon for the largest. Rows run along the
    last dimension. Entries of equal magnitude share their mean rank, which is what any fair order
    of them gives on average; a row of one entry has probability `density` (mergekit fails there).

    Raises:
        RecipeError: probabilities would leave (0, 1).
    """
    density, epsilon = source.parameters["density"], source.parameters["epsilon"]
    if whole := _kept_whole(density):
        return whole
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise RecipeError(
            f"epsilon of {job.name} is {epsilon:g} with density {density:g}; density - epsilon and "
            f"density + epsilon must lie in (0, 1), lower epsilon"
        )
    width = source.tensor.shape[-1] if source.tensor.dim() else 1
    # Bounds of the hash: probabilities in units of 2^-31. Twice the rank runs to 2 (width - 1).
    first, slope = (density - epsilon, epsilon / (width - 1)) if width > 1 else (density, 0.0)
    numbers = (slope * (_EVERY + 1), first * (_EVERY + 1))
    values = Values(numbers, source.key.words(), (row_ranks(job, source),))
    return _rescaled(job, source, Kept("ranked", values))


def _rescaled(job: TensorJob, source: Source, kept: Kept) -> Kept:
    """Set the factor |d|_1 / |d kept|_1 where the recipe asks to rescale (not near zero)."""
    if not job.parameters["rescale"]:
        return kept
    largest = largest_magnitude(job, source)
    if not 0 < largest < math.inf:
        return kept
    scale = _UNITS / 2.0 ** math.frexp(largest)[1]
    before = job.statistics.once(job, "l1", [source], lambda: _l1(job, source, Kept("all"), scale))
    after = _l1(job, source, kept, scale)
    if before / scale < 1e-7 or after / scale < 1e-7:
        return kept
    return replace(kept, rescale=before / after)


def _l1(job: TensorJob, source: Source, kept: Kept, scale: float) -> int:
    """Sum the magnitudes that are kept, in units of 1 / scale."""
    values = replace(kept.values, numbers=(*kept.values.numbers, scale))
    return total(job, _kept_magnitude, kept.kind, [source.tensor], values)


def _kept_magnitude(kind: Any, o: Operands) -> Any:
    delta = o.xs[0] - o.base
    if kind == "all":
        return delta.abs() * o.number()
    return kept(mask(kind, o, delta), delta.abs()) * o.number()
