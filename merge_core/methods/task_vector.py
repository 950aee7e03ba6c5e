"""Sums of task vectors: task_arithmetic, ties, dare_linear, dare_ties.

One computation with two options: how each delta is thinned (by magnitude, at random, not at all)
and whether the models elect one sign per entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from merge_core.methods.job import Source, TensorJob, by_chunks
from merge_core.sparsify import Kept, keep_all, keep_at_random, keep_largest

Sparsifier = Callable[[TensorJob, Source], Kept]


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


def _merge(job: TensorJob, sparsify: Sparsifier, elects_sign: bool) -> Tensor:
    assert job.base is not None
    active = [source for source in job.sources if not job.statistics.is_zero(job, source)]
    if not active:
        return job.base.tensor.to(job.out_dtype)
    base = job.base.tensor.reshape(-1)
    flat = [source.tensor.reshape(-1) for source in active]
    weights = [source.parameters["weight"] for source in active]
    kept = [sparsify(job, source) for source in active]
    normalize, scale = job.parameters["normalize"], job.parameters["lambda"]
    # A model that equals the base votes nowhere, but its weight counts in the plain divisor.
    total = sum(source.parameters["weight"] for source in job.sources)
    divisor = total if abs(total) >= 1e-8 else 1.0

    def compute(start: int, stop: int) -> Tensor:
        b = base[start:stop].to(job.work_dtype)
        deltas = []
        for x, weight, keep in zip(flat, weights, kept, strict=True):
            delta = x[start:stop].to(job.work_dtype) - b
            mask = keep.mask(delta, start, stop)
            if mask is not None:
                delta *= mask
            deltas.append(delta.mul_(weight * keep.rescale))
        if elects_sign:
            mixed = _elect(deltas, weights, normalize)
        else:
            mixed = deltas[0]
            for delta in deltas[1:]:
                mixed += delta
            if normalize:
                mixed /= divisor
        if scale != 1.0:
            mixed *= scale
        return mixed.add_(b)

    return by_chunks(job, compute)


def _elect(deltas: list[Tensor], weights: list[float], normalize: bool) -> Tensor:
    """Sum the entries whose sign is the sum's sign; divide by their weights under `normalize`.

    A sum of zero counts as positive; entries that are exactly zero never agree.

    Args:
        deltas: weighted, each shape (n,); not kept.
        weights: one a delta.

    Returns:
        Shape (n,).
    """
    total: Tensor = sum(deltas[1:], deltas[0])
    # Signs as +1 and -1: torch multiplies floats many times faster than it selects by booleans.
    sign = torch.copysign(torch.ones((), dtype=total.dtype, device=total.device), total)
    mixed = divisor = None
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).relu_()
        if normalize:
            voted = agreeing.sign().mul_(weight)
            divisor = voted if divisor is None else divisor.add_(voted)
        mixed = agreeing if mixed is None else mixed.add_(agreeing)
    assert mixed is not None
    if divisor is not None:
        nobody = torch.eq(divisor, 0, out=torch.empty_like(divisor))
        mixed /= divisor.add_(nobody)
    return mixed.mul_(sign)
