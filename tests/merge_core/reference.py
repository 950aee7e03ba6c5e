"""Every merge method once more: slow, in float64, whole tensors, thresholds by sorting.

Written from the methods' definitions, to judge the fast ones. The only thing taken from merge_core
is its random numbers, whose hash is a documented constant of the project.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_core.randomness import MaskKey

from .masks import hash31, keep_below


@dataclass(frozen=True)
class Model:
    """One model's tensor with its parameters, and the key of its random numbers."""

    tensor: Tensor
    parameters: dict[str, Any]
    key: MaskKey


@dataclass(frozen=True)
class Exact:
    """What a merge must give.

    Attributes:
        value: float64, shape of the sources.
        size: sum of the magnitudes of the terms that make an entry: what float32 rounds.
        is_open: entries whose choice is not defined: they tie at a threshold, or lie within
            float32's rounding of it, or their votes balance.
    """

    value: Tensor
    size: Tensor
    is_open: Tensor


def defined(method: str, base: Model | None, models: list[Model], shared: dict[str, Any]) -> Exact:
    """Merge one tensor by its definition."""
    like = (base or models[0]).tensor
    xs = [model.tensor.double() for model in models]
    b = base.tensor.double() if base else torch.zeros_like(xs[0])
    weights = [model.parameters.get("weight", 1.0) for model in models]
    is_open = torch.zeros(like.shape, dtype=torch.bool)
    size = b.abs() + sum((abs(w) * x.abs() for w, x in zip(weights, xs, strict=True)))
    if method == "linear":
        divisor = sum(weights) if shared["normalize"] else 1.0
        value, size = sum(w * x for w, x in zip(weights, xs, strict=True)) / divisor, size / abs(divisor)
    elif method == "passthrough":
        value, size = xs[0] * models[0].parameters["scale"], size * 0
    elif method == "slerp":
        value = slerp(b.view(-1), xs[0].view(-1), shared["t"])
        size = 3 * size * (1 + abs(shared["t"]))
    elif method == "nuslerp":
        t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
        vectors = [x - b for x in xs]
        if not shared["nuslerp_flatten"] and like.dim() > 1:
            by_column = shared["nuslerp_row_wise"]
            turned = [v.transpose(0, -1) if by_column else v for v in vectors]
            mixed = torch.empty_like(turned[0])
            for at in itertools.product(*map(range, turned[0].shape[:-1])):
                mixed[at] = nuslerp(turned[0][at], turned[1][at], t)
            value = b + (mixed.transpose(0, -1) if by_column else mixed)
        else:
            value = b + nuslerp(*(v.reshape(-1) for v in vectors), t).view(like.shape)
        size = 3 * (b.abs() + sum(v.abs() for v in vectors)) * (1 + abs(t))
    elif method == "multislerp":
        value = b + multislerp([(x - b).view(-1) for x in xs], weights, shared).view(like.shape)
        size = 3 * size + sum(x.abs() for x in xs)
    elif method == "karcher":
        value, size = karcher([x.view(-1) for x in xs], shared), 3 * size
    elif method == "model_stock":
        rows = shared["filter_wise"] and like.dim() > 1
        parts = [x.reshape(-1, like.shape[-1]) if rows else x.reshape(1, -1) for x in (b, *xs)]
        value = torch.stack([stock(*vectors) for vectors in zip(*parts, strict=True)])
        largest = ((value.view(like.shape) - b) / (sum(xs) / len(xs) - b)).abs().nan_to_num(0, 0, 0)
        size = size * (1 + largest)
    elif method == "nearswap":
        k = (shared["t"] / (xs[0] - b).abs().clamp(min=1e-6)).clamp(0, 1)
        value, size = k * xs[0] + (1 - k) * b, 2 * size
    elif method == "arcee_fusion":
        value, is_open = fusion(b, xs[0])
    elif method == "sce":
        assert base is not None
        value, is_open, slack = sce(b, xs, shared["select_topk"], base.key)
        size = size + 2.0**20 * slack * (value - b).abs()
    elif method in ("ram", "ramplus_tl"):
        value, is_open = ram(b, xs, shared)
    else:
        return task_vectors(method, b, xs, models, shared)
    return Exact(value.view(like.shape), size, is_open.view(like.shape))


# ---- arcs ---------------------------------------------------------------------------------------


def arc(a: Tensor, b: Tensor, t: float, cosine: float, is_line: bool) -> Tensor:
    if is_line:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / math.sin(theta)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    norms = [float(v.norm()) if v.norm() > 1e-8 else 1.0 for v in (a, b)]
    cosine = max(-1.0, min(1.0, float((a / norms[0]) @ (b / norms[1]))))
    return arc(a, b, t, cosine, abs(cosine) > 0.9995)


def nuslerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    cosine = float((a / a.norm().clamp(min=1e-7)) @ (b / b.norm().clamp(min=1e-7)))
    cosine = max(-1.0, min(1.0, cosine))
    return arc(a, b, t, cosine, 1 - cosine**2 <= 1e-16)


def multislerp(vectors: list[Tensor], weights: list[float], shared: dict[str, Any]) -> Tensor:
    eps = shared["eps"]
    if len(vectors) == 1:
        return vectors[0]
    if shared["normalize_weights"]:
        weights = [w / sum(weights) for w in weights]
    norms = [v.norm() for v in vectors]
    units = [v / (n + eps) for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    if mean.norm() < eps:
        assert len(vectors) == 2
        return sum(w * v for w, v in zip(weights, vectors, strict=True))
    mean = mean / mean.norm()
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    tau = tangent.norm() + eps
    direction = mean * tau.cos() + tangent * tau.sin() / tau
    return direction * sum(n * w for n, w in zip(norms, weights, strict=True))


def karcher(vectors: list[Tensor], shared: dict[str, Any]) -> Tensor:
    tol = shared["tol"]
    units = [v / v.norm() for v in vectors if v.norm() > tol]
    if not units:
        return torch.zeros_like(vectors[0])
    u = sum(units) / len(units)
    u = u / u.norm() if u.norm() >= tol else units[0]
    for _ in range(int(shared["max_iter"])):
        step = torch.zeros_like(u)
        for unit in units:
            dot = float((unit @ u).clamp(-1, 1))
            theta = math.acos(dot)
            if theta >= tol:
                step += theta / math.sin(theta) * (unit - dot * u) / len(units)
        length = step.norm()
        if length < tol:
            break
        u = length.cos() * u + length.sin() * step / length
        u = u / u.norm()
    return u * sum(v.norm() for v in vectors) / len(vectors)


def stock(base: Tensor, *xs: Tensor) -> Tensor:
    n = len(xs)
    cosines = []
    for x, y in itertools.combinations([x - base for x in xs], 2):
        cosines.append(float((x @ y / (x.norm() * y.norm()).clamp(min=1e-6)).clamp(-1, 1)))
    c = sum(cosines) / len(cosines)
    denominator = 1 + (n - 1) * c
    t = n * c / denominator if abs(denominator) >= 1e-6 else 0.0
    return t * sum(xs) / n + (1 - t) * base


# ---- selection ----------------------------------------------------------------------------------


def choose(group: Tensor, wanted: int, key: MaskKey) -> tuple[Tensor, Tensor]:
    """Choose `wanted` of the entries of a group, by hash; tell which entries that left open."""
    size = int(group.sum())
    if wanted >= size:
        return group, torch.zeros_like(group)
    drawn = keep_below(key, torch.arange(group.numel()), wanted, size).bool().view(group.shape)
    return group & drawn, group


def band(magnitude: Tensor, first: int, k: int, key: MaskKey, near: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the k entries from rank `first` on, in rising order; those within `near` of an end tie."""
    ordered = magnitude.view(-1).sort().values
    low, high = ordered[first], ordered[first + k - 1]
    at_low, at_high = (magnitude - low).abs() <= near, (magnitude - high).abs() <= near
    if bool((at_low & at_high).any()):
        inside = (magnitude > low) & (magnitude < high) & ~at_low & ~at_high
        kept, is_open = choose(at_low | at_high, k - int(inside.sum()), key)
        return inside | kept, is_open & (magnitude > 0)
    inside = (magnitude > low) & (magnitude < high) & ~at_low & ~at_high
    below_low = int(((magnitude < low) & ~at_low).sum())
    below_high = int(((magnitude < high) & ~at_high).sum())
    kept_low, open_low = choose(at_low, below_low + int(at_low.sum()) - first, key)
    kept_high, open_high = choose(at_high, first + k - below_high, key)
    return inside | kept_low | kept_high, (open_low | open_high) & (magnitude > 0)


def thinned(method: str, delta: Tensor, model: Model, rescale: bool) -> tuple[Tensor, Tensor]:
    """Sparsify a delta; return it with the entries that are open."""
    density, n = model.parameters["density"], delta.numel()
    is_open = torch.zeros(delta.shape, dtype=torch.bool)
    if method == "task_arithmetic" or density >= 1:
        return delta, is_open
    if density <= 0:
        return torch.zeros_like(delta), is_open
    magnitude = delta.abs().float()
    index = torch.arange(n)
    exact = torch.zeros(())
    if method.startswith("dare"):
        kept = keep_below(model.key, index, *density.as_integer_ratio()).bool().view(delta.shape)
    elif method.startswith("della"):
        probability = keep_probabilities(magnitude, density, model.parameters["epsilon"])
        u = hash31(model.key, index).double().view(delta.shape) / 2**31
        kept, is_open = u < probability, (u - probability).abs() < 2.0**-30
    else:
        k = max(1, math.floor(density * n))
        gamma = model.parameters.get("gamma", 0.0)
        first = max(0, n - k - math.floor(gamma * n))
        kept, is_open = band(magnitude, first, k, model.key, exact)
    before, after = float(delta.abs().sum()), float((delta * kept).abs().sum())
    factor = before / after if rescale and before >= 1e-7 and after >= 1e-7 else 1.0
    return delta * kept * factor, is_open


def keep_probabilities(magnitude: Tensor, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for a row's smallest entry to density + epsilon for its largest."""
    rows = magnitude.reshape(-1, magnitude.shape[-1])
    m = rows.shape[1]
    if m == 1:
        return torch.full(magnitude.shape, density, dtype=torch.float64)
    below = (rows[:, None, :] < rows[:, :, None]).sum(-1)
    through = (rows[:, None, :] <= rows[:, :, None]).sum(-1) - 1
    share = (below + through).double() / 2 / (m - 1)  # equal entries share their mean rank
    return (density - epsilon + 2 * epsilon * share).view(magnitude.shape)


# ---- task vectors -------------------------------------------------------------------------------


def vote(terms: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Tell which entries have the sign of the sum, and where float32 might take the other sign."""
    total, size = sum(terms), sum(term.abs() for term in terms)
    sign = torch.where(total >= 0, 1.0, -1.0)
    return [term.sign() == sign for term in terms], (total.abs() <= 2.0**-20 * size) & (size > 0)


def task_vectors(
    method: str, base: Tensor, xs: list[Tensor], models: list[Model], shared: dict[str, Any]
) -> Exact:
    is_open = torch.zeros(base.shape, dtype=torch.bool)
    weights = [model.parameters["weight"] for model in models]
    terms = []
    for x, model in zip(xs, models, strict=True):
        delta, tied = thinned(method, x - base, model, shared["rescale"])
        terms.append(delta * model.parameters["weight"])
        is_open |= tied
    size = sum(term.abs() for term in terms)
    if method.endswith("ties") or method == "della":
        agrees, balanced = vote(terms)
        is_open |= balanced
        mixed = sum(term * agree for term, agree in zip(terms, agrees, strict=True))
        divisor = sum(agree.double() * w for agree, w in zip(agrees, weights, strict=True))
        divisor = torch.where(divisor == 0, 1.0, divisor)
    else:
        mixed = sum(terms)
        divisor = torch.tensor(sum(weights) if abs(sum(weights)) >= 1e-8 else 1.0)
    if shared["normalize"]:
        mixed, size = mixed / divisor, size / divisor.abs()
    return Exact(base + shared["lambda"] * mixed, base.abs() + abs(shared["lambda"]) * size, is_open)


# ---- consensus and fusion -----------------------------------------------------------------------


def sce(base: Tensor, xs: list[Tensor], topk: float, key: MaskKey) -> tuple[Tensor, Tensor, float]:
    """Return the result, what is open, and by which share the open entries may change the weights."""
    deltas = torch.stack([x - base for x in xs])
    is_open = torch.zeros(base.shape, dtype=torch.bool)
    slack = 0.0
    if topk < 1:
        variance = deltas.var(dim=0, correction=0)
        variance[(deltas == deltas[0]).all(dim=0)] = 0
        k = math.floor(topk * int(variance.count_nonzero()))
        if k == 0:
            return base, is_open, 0.0
        # What float32 makes of the variance is off by the deltas' rounding.
        near = 2.0**-20 * (deltas.abs().amax(dim=0) * variance.sqrt() + variance)
        kept, is_open = band(variance, base.numel() - k, k, key, near)
        whole_deltas, deltas = deltas, deltas * kept
        slack = max(float((d**2)[is_open].sum() / (d**2).sum().clamp(min=1e-12)) for d in whole_deltas)
    energies = [float((d**2).mean()) for d in deltas]
    whole = sum(energies)
    weights = [e / whole if whole >= 1e-6 else 1 / len(xs) for e in energies]
    agrees, balanced = vote(list(deltas))
    mixed = sum(d * w * m for d, w, m in zip(deltas, weights, agrees, strict=True))
    divisor = sum(w * m.double() for w, m in zip(weights, agrees, strict=True)).clamp(min=1e-6)
    return base + mixed / divisor, is_open | balanced, 2 * slack


def ram(base: Tensor, xs: list[Tensor], shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    epsilon = shared["epsilon"]
    deltas = [x - base for x in xs]
    is_open = sum(((d.abs() - epsilon).abs() < 2.0**-22 * epsilon) for d in deltas).bool()
    actives = [d.abs() > epsilon for d in deltas]
    count = sum(active.int() for active in actives)
    value = base.clone()
    for delta, active in zip(deltas, actives, strict=True):
        unique, common = active & (count == 1), active & (count > 1)
        factor = 1.0
        if "r" in shared:
            rho = int(common.sum()) / max(int(unique.sum()), epsilon)
            factor = 1 + shared["r"] * min(max(rho, 0.0), shared["alpha"])
        value += delta * unique * factor + delta * common / count.clamp(min=1)
    return value, is_open


def fusion(a: Tensor, b: Tensor, noise: float = 1e-3) -> tuple[Tensor, Tensor]:
    p, q = b.softmax(dim=-1) + 1e-8, a.softmax(dim=-1) + 1e-8
    importance = (b - a).abs() * (p * (p / q).log()).sum(dim=-1, keepdim=True)
    ordered = importance.view(-1).sort().values
    q1, median, q3 = (ordered[math.floor(q * (a.numel() - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (q3 - q1)
    # mergekit has a row's divergence, a sum of float32 terms of both signs, to few digits only.
    is_open = ((importance - threshold).abs() <= noise * threshold.abs()) & (a != b)
    return a + (b - a) * (importance >= threshold), is_open
