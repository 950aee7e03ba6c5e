"""Means along great circles: slerp, nuslerp, multislerp, karcher.

Whole tensors are the vectors. A point on the sphere through given vectors is a weighted sum of
them, so each method computes, in float64, the sum's coefficients from the vectors' scalar products
(their Gram matrix, which no parameter changes), and the tensors themselves are read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from merge_core.errors import RecipeError
from merge_core.methods.combination import combine
from merge_core.methods.job import CHUNK, TensorJob
from merge_core.statistics import as_it_is, gram

# Above this cosine the arc is nearly a line, and sin(theta) would amplify rounding.
_PARALLEL = 0.9995


def slerp(job: TensorJob) -> Tensor:
    """Interpolate from the base (t = 0) to the other model (t = 1) along the arc between them.

    Shoemake 1985, https://doi.org/10.1145/325165.325242:
    result = sin((1-t) theta)/sin(theta) a + sin(t theta)/sin(theta) b, with theta the angle
    between a and b; nearly parallel tensors (|cos theta| > 0.9995) are interpolated linearly.
    Norms of at most 1e-8 count as 1.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.
    """
    assert job.base is not None
    pair = job.without_base([job.base, *job.sources])
    products = gram(pair, pair.sources)
    norms = [norm if norm > 1e-8 else 1.0 for norm in np.sqrt(np.diag(products))]
    cosine = max(-1.0, min(1.0, products[0, 1] / (norms[0] * norms[1])))
    return combine(pair, _arc(job.parameters["t"], cosine, abs(cosine) > _PARALLEL))


def _arc(t: float, cosine: float, is_line: bool) -> tuple[float, float]:
    """Return the shares of two vectors at t of the arc between them."""
    if is_line:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def nuslerp(job: TensorJob) -> Tensor:
    """Interpolate between two models, or between their deltas from a base, at t = w_1 / (w_0 + w_1).

    As in mergekit; t is 0.5 where the weights sum to nearly zero. `nuslerp_flatten` takes whole
    tensors as vectors, else each row (last dimension), or with `nuslerp_row_wise` each column
    (first dimension). Parallel vectors are interpolated linearly.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.
    """
    weights = [source.parameters["weight"] for source in job.sources]
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    if not job.parameters["nuslerp_flatten"] and job.like.dim() > 1:
        return _nuslerp_rows(job, t, job.parameters["nuslerp_row_wise"])
    products = gram(job, job.sources)
    norms = np.maximum(np.sqrt(np.diag(products)), 1e-7)
    cosine = max(-1.0, min(1.0, products[0, 1] / (norms[0] * norms[1])))
    return combine(job, _arc(t, cosine, 1 - cosine**2 <= 1e-16))


def _nuslerp_rows(job: TensorJob, t: float, by_column: bool) -> Tensor:
    out = torch.empty(job.like.shape, dtype=job.out_dtype, device=job.like.device)
    tensors = [source.tensor for source in job.sources]
    base = [job.base.tensor] if job.base else []
    for target, *parts in zip(
        *(_vectors(tensor, by_column) for tensor in (out, *tensors, *base)), strict=True
    ):
        wide = [part.to(torch.float64) for part in parts]
        v0, v1 = (x - wide[2] for x in wide[:2]) if base else wide[:2]
        norms = [v.norm(dim=-1, keepdim=True).clamp(min=1e-7) for v in (v0, v1)]
        cosine = ((v0 / norms[0]) * (v1 / norms[1])).sum(dim=-1, keepdim=True).clamp(-1, 1)
        is_line = 1 - cosine**2 <= 1e-16
        theta = cosine.acos()
        sine = theta.sin().masked_fill(is_line, 1.0)
        share0 = torch.where(is_line, 1 - t, ((1 - t) * theta).sin() / sine)
        share1 = torch.where(is_line, t, (t * theta).sin() / sine)
        mixed = share0 * v0 + share1 * v1
        if base:
            mixed += wide[2]
        if mixed.isnan().any():
            raise job.not_a_number()
        target.copy_(mixed)
    return out


def _vectors(tensor: Tensor, by_column: bool) -> Iterator[Tensor]:
    """Cut a tensor into blocks whose last dimension is a vector; views, to be written through."""
    turned = tensor.transpose(0, -1) if by_column else tensor
    each = max(1, turned.numel() // max(1, turned.shape[0]))
    yield from torch.split(turned, max(1, CHUNK // each))


def multislerp(job: TensorJob) -> Tensor:
    """Average directions on the sphere, by weight, and lengths by the same weights.

    Goddard's barycentre by one tangent step, as in mergekit: m = sum_i w_i u_i / |...| of the unit
    vectors u_i, each projected to the tangent plane at m, their weighted sum T taken back to the
    sphere. As T is the part of sum_i w_i u_i that is orthogonal to m, it is zero but for rounding,
    and the result is m sum_i w_i n_i with n_i the norms. With a base, vectors are deltas.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.

    Raises:
        RecipeError: weights that sum to zero under normalize_weights; more than two vectors that
            cancel each other.
    """
    eps = job.parameters["eps"]
    weights = np.array([source.parameters["weight"] for source in job.sources])
    if len(job.sources) == 1:
        return as_it_is(job, job.sources[0])
    if job.parameters["normalize_weights"]:
        if abs(weights.sum()) < 1e-8:
            raise RecipeError(
                f"weight of {job.name}: the weights {weights.tolist()} sum to zero, and "
                f"normalize_weights divides by their sum; change a weight"
            )
        weights = weights / weights.sum()
    products = gram(job, job.sources)
    norms = np.sqrt(np.diag(products))
    shares = weights / (norms + eps)
    length = math.sqrt(max(0.0, shares @ products @ shares))
    if length < eps:
        if len(weights) > 2:
            raise RecipeError(
                f"weight of {job.name}: the models' directions cancel each other under the weights "
                f"{weights.tolist()}, so they have no mean; change a weight"
            )
        return combine(job, weights.tolist())
    return combine(job, (shares / length * math.cos(eps) * (weights @ norms)).tolist())


def karcher(job: TensorJob) -> Tensor:
    """Find the mean direction of all models on the sphere (Riemannian centre of mass), equally weighted.

    Karcher 1977, https://doi.org/10.1002/cpa.3160300502: at most `max_iter` steps along the mean
    of the tangents, until a step is shorter than `tol`. The length is the mean norm. Tensors with
    a norm of at most `tol` have no direction; all zero gives zero.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.
    """
    tol = job.parameters["tol"]
    products = gram(job, job.sources)
    norms = np.sqrt(np.diag(products))
    valid = norms > tol
    if not valid.any():
        return combine(job, [0.0] * len(norms))
    inverse = np.where(valid, 1 / np.where(valid, norms, 1.0), 0.0)
    unit = products * np.outer(inverse, inverse)
    alphas = valid / valid.sum()
    # The mean direction as a sum of unit vectors, with these coefficients.
    mean = alphas.copy()
    length = _length(mean, unit)
    mean = mean / length if length >= tol else np.eye(len(norms))[np.flatnonzero(valid)[0]]
    for _ in range(int(job.parameters["max_iter"])):
        dots = np.clip(unit @ mean, -1, 1)
        theta = np.arccos(dots)
        moves = valid & (theta >= tol)
        factors = np.where(moves, alphas * theta / np.sin(np.where(moves, theta, 1.0)), 0.0)
        tangent = factors - (factors @ dots) * mean
        length = _length(tangent, unit)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        if (norm := _length(mean, unit)) > tol:
            mean = mean / norm
    return combine(job, (mean * inverse * norms.mean()).tolist())


def _length(coefficients: np.ndarray, products: np.ndarray) -> float:
    return math.sqrt(max(0.0, float(coefficients @ products @ coefficients)))
