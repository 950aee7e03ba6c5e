"""Sums of task vectors: task_arithmetic, ties, dare_*, breadcrumbs*, della*.

One computation with two options: how each delta is thinned (by magnitude, at random, by rank, not
at all) and whether the models elect one sign per entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from merge_core.methods.entrywise import Operands, Values, bits, entries, indicator, kept, negative
from merge_core.methods.job import TensorJob
from merge_core.sparsify import (
    Sparsifier,
    keep_all,
    keep_at_random,
    keep_by_rank,
    keep_largest,
    keep_without_outliers,
    mask,
)
from merge_core.statistics import as_it_is, is_zero, refuse_nan


def task_arithmetic(job: TensorJob) -> Tensor:
    """Add weighted deltas to the base: x_b + lambda sum_i w_i d_i.

    Ilharco et al. 2023, https://arxiv.org/abs/2212.04089, section 2. `density` is accepted and
    has no effect, as in mergekit.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_all, elects_sign=False)


def ties(job: TensorJob) -> Tensor:
    """Trim each delta to its largest entries, elect one sign per entry, merge those that agree.

    Yadav et al. 2023, https://arxiv.org/abs/2306.01708, Algorithm 1. As in mergekit, weights
    multiply before the election; the paper's mean is the case of equal weights.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_largest, elects_sign=True)


def dare_linear(job: TensorJob) -> Tensor:
    """Drop entries of each delta at random, rescale the rest, add the weighted sum.

    Yu et al. 2024, https://arxiv.org/abs/2311.03099, equation 3; the rescaling factor is
    mergekit's (L1 norm before over after), not 1 / density.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_at_random, elects_sign=False)


def dare_ties(job: TensorJob) -> Tensor:
    """Drop entries at random as `dare_linear`, then elect signs as `ties`.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_at_random, elects_sign=True)


def breadcrumbs(job: TensorJob) -> Tensor:
    """Drop the smallest entries of each delta and a share `gamma` of the largest, add the rest.

    Davari and Belilovsky 2023, https://arxiv.org/abs/2312.06795, equation 2.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_without_outliers, elects_sign=False)


def breadcrumbs_ties(job: TensorJob) -> Tensor:
    """Thin as `breadcrumbs`, then elect signs as `ties`.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge(job, keep_without_outliers, elects_sign=True)


def della(job: TensorJob) -> Tensor:
    """Drop entries at random, small ones more often (MagPrune), elect signs as `ties`.

    Deep, Bhardwaj and Poria 2024, https://arxiv.org/abs/2406.11617, section 3; the rescaling
    factor is mergekit's (L1 norm before over after), not 1 / p of each entry.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.

    Raises:
        RecipeError: density and epsilon leave no probability in (0, 1).
    """
    return _merge(job, keep_by_rank, elects_sign=True)


def della_linear(job: TensorJob) -> Tensor:
    """Thin as `della`, add the weighted sum.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.

    Raises:
        RecipeError: density and epsilon leave no probability in (0, 1).
    """
    return _merge(job, keep_by_rank, elects_sign=False)


def _merge(job: TensorJob, sparsify: Sparsifier, elects_sign: bool) -> Tensor:
    assert job.base is not None
    active = [source for source in job.sources if not is_zero(job, source)]
    if not active:
        return as_it_is(job, job.base)
    kept = [sparsify(job, source) for source in active]
    # A model that keeps nothing votes nowhere, but its weight counts in the plain divisor.
    thinned = [pair for pair in zip(active, kept, strict=True) if pair[1].kind != "none"]
    if not thinned:
        return as_it_is(job, job.base)
    for source, keep in thinned:
        # Where an entry may be dropped unseen; orders of magnitudes have been looked at already.
        if keep.kind in ("random", "ranked") or (elects_sign and keep.kind == "all"):
            refuse_nan(job, source)
    normalize, scale = job.parameters["normalize"], job.parameters["lambda"]
    weights = sum(source.parameters["weight"] for source in job.sources)
    numbers: tuple[float, ...] = ()
    for source, keep in thinned:
        weight = source.parameters["weight"]
        numbers += (*keep.values.numbers, weight * keep.rescale)
        numbers += (weight,) if elects_sign and normalize else ()
    if normalize and not elects_sign:
        numbers += (weights if abs(weights) >= 1e-8 else 1.0,)
    structure = (tuple(keep.kind for _, keep in thinned), elects_sign, normalize, scale != 1.0)
    values = Values(
        (*numbers, scale),
        tuple(word for _, keep in thinned for word in keep.values.integers),
        tuple(array for _, keep in thinned for array in keep.values.arrays),
    )
    return entries(job, _mixed, structure, [source.tensor for source, _ in thinned], values)


def _mixed(structure: Any, o: Operands) -> Any:
    kinds, elects_sign, normalize, scales = structure
    deltas, weights = [], []
    for kind, x in zip(kinds, o.xs, strict=True):
        delta = x - o.base
        if kind != "all":
            delta = kept(mask(kind, o, delta), delta)
        delta *= o.number()
        deltas.append(delta)
        if elects_sign and normalize:
            weights.append(o.number())
    if elects_sign:
        mixed = elected(deltas, weights)
    else:
        mixed = deltas[0]
        for delta in deltas[1:]:
            mixed += delta
        if normalize:
            mixed /= o.number()
    if scales:
        mixed *= o.number()
    return mixed.add_(o.base)


def elected(deltas: list[Any], weights: list[Any]) -> Any:
    """Sum the entries whose sign is the sum's sign; divide by their weights, if any are given.

    Entries that are exactly zero count in no divisor.

    Args:
        deltas: weighted, each shape (n,); overwritten.
        weights: one a delta, or none.

    Returns:
        Shape (n,).
    """
    mixed = divisor = None
    for i, delta in enumerate(agreeing(deltas)):
        if weights:
            share = indicator(torch.ne, delta, 0.0)
            share *= weights[i]
            divisor = share if divisor is None else divisor.add_(share)
        mixed = delta if mixed is None else mixed.add_(delta)
    assert mixed is not None
    if divisor is not None:
        divisor += indicator(torch.eq, divisor, 0.0)
        mixed /= divisor
    return mixed


def agreeing(deltas: list[Any]) -> list[Any]:
    """Set entries to zero whose sign is not their sum's; a sum of zero counts as positive.

    Args:
        deltas: each shape (n,); overwritten.
    """
    if len(deltas) == 1:
        return deltas
    sum_of_all = deltas[0] + deltas[1]
    for delta in deltas[2:]:
        sum_of_all += delta
    sign = bits(sum_of_all)
    # The sign of an exclusive or says whether two signs differ.
    return [kept(~negative(bits(delta) ^ sign), delta) for delta in deltas]
