"""What several models' deltas have in common: sce, ram, ramplus_tl."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from merge_core.methods.entrywise import Operands, Values, entries, evaluated, indicator, kept, total
from merge_core.methods.job import TensorJob, row_sums
from merge_core.methods.task_vector import agreeing
from merge_core.sparsify import Kind, largest, mask_of_magnitudes
from merge_core.statistics import Ranks, RankTable, as_it_is


def sce(job: TensorJob) -> Tensor:
    """Select the entries that vary most between models, weigh models by energy, erase minorities.

    Wan et al. 2024, https://arxiv.org/abs/2408.07990, section 3.2: of the variance over the models
    the floor(select_topk x its nonzero count) largest entries are kept; model i weighs
    mean(d_i^2) over the sum of those (equal where that vanishes); entries against the sign of the
    sum are dropped. The divisor is at least 1e-6. Nothing selected gives the base.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    assert job.base is not None
    topk = job.parameters["select_topk"]
    tensors = [source.tensor for source in job.sources]
    kind: Kind = "all"
    values = Values()
    if topk < 1:
        ranks, nonzero = _variances(job)
        k = math.floor(topk * nonzero)
        if k <= 0:
            return as_it_is(job, job.base)
        n = job.like.numel()
        chosen = largest(ranks, n, k, job.base.key)
        kind, values = chosen.kind, chosen.values
    energies = job.statistics.once(
        job, ("energy", kind, values), job.sources, lambda: _energies(job, kind, values)
    )
    whole = sum(energies)
    n_models = len(tensors)
    weights = [e / whole if abs(whole) >= 1e-6 else 1 / n_models for e in energies]
    return entries(job, _agreed, kind, tensors, Values(tuple(weights), values.integers))


def _variance(structure: Any, o: Operands) -> Any:
    """A formula: population variance of the deltas over the models.

    Taken of the differences from the first model, so that where all agree it is exactly zero: such
    entries do not count as varying.
    """
    share = 1.0 / len(o.xs)
    first = o.xs[0]
    differences = [x - first for x in o.xs]
    mean = differences[0] * share
    for difference in differences[1:]:
        mean += difference * share
    variance = None
    for difference in differences:
        difference -= mean
        difference *= difference
        difference *= share
        variance = difference if variance is None else variance.add_(difference)
    return variance


def _variances(job: TensorJob) -> tuple[Ranks, int]:
    """Order of the variances, and how many are not zero."""
    tensors = [source.tensor for source in job.sources]

    def variances() -> Iterator[Tensor]:
        return evaluated(job, _variance, None, tensors, Values())

    def compute() -> tuple[RankTable, int]:
        nonzero = sum(int(variance.count_nonzero()) for variance in variances())
        return RankTable(variances, job.like.numel()), nonzero

    table, nonzero = job.statistics.once(job, "variance", job.sources, compute)
    return Ranks(table, variances), nonzero


def _selected(kind: Any, o: Operands) -> list[Any]:
    """Deltas of the selected entries, zero elsewhere."""
    deltas = [x - o.base for x in o.xs]
    if kind != "all":
        selected = _kept(o)
        deltas = [kept(selected, delta) for delta in deltas]
    return deltas


def _kept(o: Operands) -> Any:
    return mask_of_magnitudes("largest", o, _variance(None, o).to(torch.float32))


def _energy(structure: Any, o: Operands) -> Any:
    """A formula: the square of one model's delta where it is selected."""
    kind, i = structure
    delta = _selected(kind, o)[i]
    return delta * delta


def _energies(job: TensorJob, kind: Any, values: Values) -> list[float]:
    """Mean squares of the selected deltas, one a model."""
    tensors = [source.tensor for source in job.sources]
    n = job.like.numel()
    return [
        math.fsum(
            total
            for squares in evaluated(job, _energy, (kind, i), tensors, values)
            for total in row_sums(squares)
        )
        / n
        for i in range(len(tensors))
    ]


def _agreed(kind: Any, o: Operands) -> Any:
    deltas = _selected(kind, o)
    weights = [o.number() for _ in deltas]
    mixed = divisor = None
    for delta, weight in zip(agreeing(deltas), weights, strict=True):
        share = indicator(torch.ne, delta, 0.0)
        share *= weight
        delta *= weight
        mixed = delta if mixed is None else mixed.add_(delta)
        divisor = share if divisor is None else divisor.add_(share)
    assert mixed is not None
    assert divisor is not None
    return mixed.div_(divisor.clamp(1e-6)).add_(o.base)


def ram(job: TensorJob) -> Tensor:
    """Keep what only one model changed, average what several changed.

    RAM: an entry is active in a model where |d_i| > epsilon; the base gets the mean of its active
    deltas. As in mergekit.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    return _merge_active(job, [1.0] * len(job.sources))


def ramplus_tl(job: TensorJob) -> Tensor:
    """As `ram`, with what only one model changed enlarged where that model shares much.

    lambda_i = 1 + r clamp(rho_i, 0, alpha), rho_i = shared active entries of model i over
    max(its unique ones, epsilon); a tensor at a time. As in mergekit.

    Returns:
        Tensor of the base's shape (*s), in the job's output dtype.
    """
    epsilon, r, alpha = (job.parameters[name] for name in ("epsilon", "r", "alpha"))
    factors = []
    for i in range(len(job.sources)):
        unique, active = job.statistics.once(
            job,
            ("active", i, epsilon),
            job.sources,
            lambda i=i: _counts(job, i),  # type: ignore[misc]
        )
        rho = (active - unique) / max(unique, epsilon)
        factors.append(1 + r * min(max(rho, 0.0), alpha))
    return _merge_active(job, factors)


def _counts(job: TensorJob, i: int) -> tuple[int, int]:
    """Count the entries that only model i changed, and all that it changed."""
    tensors = [source.tensor for source in job.sources]
    values = Values((job.parameters["epsilon"],))
    others = [tensor for j, tensor in enumerate(tensors) if j != i]
    unique = total(job, _is_unique, None, [tensors[i], *others], values)
    return unique, total(job, _is_unique, None, [tensors[i]], values)


def _is_unique(structure: Any, o: Operands) -> Any:
    """1 where the first model is active and no other is."""
    epsilon = o.number()
    first, *others = (indicator(torch.gt, (x - o.base).abs(), epsilon) for x in o.xs)
    for other in others:
        first *= (other * -1.0).add_(1.0)
    return first


def _merge_active(job: TensorJob, factors: list[float]) -> Tensor:
    values = Values((job.parameters["epsilon"], *factors))
    return entries(job, _active, None, [source.tensor for source in job.sources], values)


def _active(structure: Any, o: Operands) -> Any:
    epsilon = o.number()
    shared = alone = count = None
    for x in o.xs:
        delta = x - o.base
        active = indicator(torch.gt, delta.abs(), epsilon)
        delta *= active
        enlarged = delta * o.number()
        shared = delta if shared is None else shared.add_(delta)
        alone = enlarged if alone is None else alone.add_(enlarged)
        count = active if count is None else count.add_(active)
    assert shared is not None
    assert alone is not None
    assert count is not None
    # Where one model is active, the sum of all is its own.
    is_alone = indicator(torch.eq, count, 1.0)
    alone *= is_alone
    shared *= (is_alone * -1.0).add_(1.0)
    shared /= count.clamp(1.0)
    return shared.add_(alone).add_(o.base)
