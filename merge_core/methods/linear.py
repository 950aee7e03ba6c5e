"""Weighted sums of whole tensors: linear and passthrough."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.job import TensorJob, by_chunks


def linear(job: TensorJob) -> Tensor:
    """Average the models: sum_i w_i x_i, divided by sum_i w_i under `normalize`.

    Wortsman et al. 2022, https://arxiv.org/abs/2203.05482. Accumulates fused, in the order of the
    recipe. Weights that sum to zero, which give NaN in mergekit, are an error under `normalize`.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.
    """
    weights = [source.parameters["weight"] for source in job.sources]
    total = sum(weights)
    if job.parameters["normalize"] and abs(total) < 1e-8:
        raise RecipeError(
            f"weight of {job.name}: the weights {weights} sum to zero, and normalize divides by "
            f"their sum; change a weight or set normalize: false"
        )
    flat = [source.tensor.reshape(-1) for source in job.sources]

    def compute(start: int, stop: int) -> Tensor:
        mixed = torch.zeros(stop - start, dtype=job.work_dtype, device=job.like.device)
        for x, weight in zip(flat, weights, strict=True):
            mixed.add_(x[start:stop].to(job.work_dtype), alpha=weight)
        return mixed.div_(total) if job.parameters["normalize"] else mixed

    return by_chunks(job, compute)


def passthrough(job: TensorJob) -> Tensor:
    """Return the only source's tensor, times `scale`.

    Returns:
        Tensor of the source's shape (*s), in the job's output dtype.
    """
    (source,) = job.sources
    scale = source.parameters["scale"]
    if scale == 1.0:
        return source.tensor.to(job.out_dtype)
    flat = source.tensor.reshape(-1)
    return by_chunks(job, lambda start, stop: flat[start:stop].to(job.work_dtype) * scale)
