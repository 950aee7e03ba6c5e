"""Two models, entry by entry: nearswap and arcee_fusion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from merge_core.methods.entrywise import Operands, Values, entries
from merge_core.methods.job import TensorJob, rows_in_chunks
from merge_core.statistics import Ranks


def nearswap(job: TensorJob) -> Tensor:
    """Go from the base towards the other model where they are near, by a step of at most t.

    Alchemonaut's NearSwap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001: with
    k = clamp(t / max(|a - b|, 1e-6), 0, 1) the result is k b + (1 - k) a.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    values = Values((job.parameters["t"],))
    return entries(job, _nearswapped, None, [job.sources[0].tensor], values)


def _nearswapped(structure: Any, o: Operands) -> Any:
    delta = o.xs[0] - o.base
    k = delta.abs().clamp(1e-6).reciprocal().mul_(o.number()).clamp(0.0, 1.0)
    rest = (k * -1.0).add_(1.0)
    return (k * o.xs[0]).add_(rest.mul_(o.base))


def arcee_fusion(job: TensorJob) -> Tensor:
    """Take over from the other model the entries that matter most for its rows' softmax.

    Arcee Fusion, as in mergekit: importance = |b - a| kl, with kl the Kullback-Leibler divergence
    between the softmax (plus 1e-8) of the two rows; entries of importance at least
    median + 1.5 (Q3 - Q1) are taken. Three things differ from mergekit on purpose: divergences are
    in float64, because between models less than a hundredth apart float32's rounding is larger
    than they are, and chose the entries; the quantiles are exact for every size (mergekit samples
    tensors of more than 10^6 entries); the result has the output dtype (float32 there).

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    threshold = job.statistics.once(job, "fusion", job.sources, lambda: _threshold(job))
    assert job.base is not None
    out = torch.empty(job.like.shape, dtype=job.out_dtype, device=job.like.device)
    for target, (a, b, importance) in zip(rows_in_chunks(out), _importance(job), strict=True):
        mixed = a + (b - a) * (importance >= threshold)
        if mixed.isnan().any():
            raise job.not_a_number()
        target.copy_(mixed)
    return out


def _importance(job: TensorJob) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Go over blocks of rows: base and other model in the work dtype, importance in float32.

    Yields:
        Three tensors, each shape (r, m).
    """
    assert job.base is not None
    blocks = (rows_in_chunks(job.base.tensor), rows_in_chunks(job.sources[0].tensor))
    for rows_a, rows_b in zip(*blocks, strict=True):
        a, b = rows_a.to(job.work_dtype), rows_b.to(job.work_dtype)
        p, q = (x.softmax(dim=-1, dtype=torch.float64).add_(1e-8) for x in (b, a))
        divergence = q.div_(p).log_().mul_(p).sum(dim=-1, keepdim=True).neg_()
        yield a, b, ((b - a).abs_() * divergence).to(torch.float32)


def _threshold(job: TensorJob) -> float:
    def importances() -> Iterator[Tensor]:
        for _, _, importance in _importance(job):
            if importance.isnan().any():
                raise job.not_a_number()
            yield importance.view(-1)

    n = job.like.numel()
    ranks = Ranks.of(importances, n)
    q1, median, q3 = (ranks.at(math.floor(q * (n - 1))).magnitude for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (q3 - q1)
