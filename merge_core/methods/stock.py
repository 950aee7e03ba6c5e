"""Model Stock: how far to go from the base to the models' average, read off the angle between them."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from merge_core.methods.combination import combine
from merge_core.methods.job import TensorJob, rows_in_chunks
from merge_core.statistics import gram


def model_stock(job: TensorJob) -> Tensor:
    """Interpolate between the base and the average of N models at t = N c / (1 + (N - 1) c).

    Jang, Yun and Han 2024, https://arxiv.org/abs/2403.19522, equation 2; c is the mean cosine
    between the models' deltas, of whole tensors, or with `filter_wise` of each row (last
    dimension). Where the denominator vanishes t is 0. Two vectors whose norms multiply to less
    than 1e-6 have the cosine their scalar product over 1e-6.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    n = len(job.sources)
    pairs = list(itertools.combinations(range(n), 2))
    if job.parameters["filter_wise"] and job.like.dim() > 1:
        return _by_row(job, pairs)
    products = gram(job, job.sources)
    cosines = [products[i, j] / max(math.sqrt(products[i, i] * products[j, j]), 1e-6) for i, j in pairs]
    t = float(_share(torch.tensor(cosines, dtype=torch.float64).clamp(-1, 1).mean(), n))
    return combine(job, [t / n] * n)


def _share(cosine: Tensor, n: int) -> Tensor:
    denominator = 1 + (n - 1) * cosine
    vanishes = denominator.abs() < 1e-6
    return torch.where(vanishes, 0.0, n * cosine / denominator.masked_fill(vanishes, 1.0))


def _by_row(job: TensorJob, pairs: list[tuple[int, int]]) -> Tensor:
    assert job.base is not None
    out = torch.empty(job.like.shape, dtype=job.out_dtype, device=job.like.device)
    tensors = [out, job.base.tensor, *(source.tensor for source in job.sources)]
    for target, base_rows, *rows in zip(*map(rows_in_chunks, tensors), strict=True):
        base = base_rows.to(torch.float64)
        deltas = [x.to(torch.float64) - base for x in rows]
        norms = [delta.norm(dim=-1, keepdim=True) for delta in deltas]
        cosines = [
            (deltas[i] * deltas[j]).sum(dim=-1, keepdim=True) / (norms[i] * norms[j]).clamp(min=1e-6)
            for i, j in pairs
        ]
        t = _share(torch.stack(cosines).clamp(-1, 1).mean(dim=0), len(rows))
        mixed = base + t * torch.stack(deltas).mean(dim=0)
        if mixed.isnan().any():
            raise job.not_a_number()
        target.copy_(mixed)
    return out
