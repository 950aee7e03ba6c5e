"""Weighted sums of whole tensors: linear and passthrough."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.combination import combine
from merge_core.methods.job import TensorJob
from merge_core.statistics import as_it_is


def linear(job: TensorJob) -> Tensor:
    """Average the models: sum_i w_i x_i, divided by sum_i w_i under `normalize`.

    Wortsman et al. 2022, https://arxiv.org/abs/2203.05482. Weights that sum to zero, which give
    NaN in mergekit, are an error under `normalize`.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.

    Raises:
        RecipeError: `normalize` with weights that sum to zero.
    """
    weights = [source.parameters["weight"] for source in job.sources]
    if not job.parameters["normalize"]:
        return combine(job, weights)
    return combine(job, weights, divisor_of(job.name, weights))


def divisor_of(name: str, weights: Sequence[float]) -> float:
    """Return what `normalize` divides a tensor's weighted sum by: the sum of its weights.

    Raises:
        RecipeError: they sum to zero.
    """
    total = sum(weights)
    if abs(total) < 1e-8:
        raise RecipeError(
            f"weight of {name}: the weights {list(weights)} sum to zero, and normalize divides by "
            f"their sum; change a weight or set normalize: false"
        )
    return total


def passthrough(job: TensorJob) -> Tensor:
    """Return the only source's tensor, times `scale`.

    Returns:
        Tensor of the source's shape (*s), in the job's output dtype.
    """
    (source,) = job.sources
    scale = source.parameters["scale"]
    if scale == 1.0:
        return as_it_is(job, source)
    return combine(job, [scale])
