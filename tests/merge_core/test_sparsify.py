"""Density to mask: exactly the largest entries, exactly as many as asked for."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_core.methods.entrywise import operands
from merge_core.methods.job import CHUNK
from merge_core.sparsify import Kept, keep_at_random, keep_largest
from merge_core.sparsify import mask as mask_of_kind
from merge_core.statistics import delta_ranks

DENSITIES = [1e-9, 0.001, 0.01, 0.1, 0.3, 0.5, 0.77, 0.9, 0.999, 1 - 1e-12]


class Threshold(NamedTuple):
    magnitude: float
    kept: int
    tied: int


def threshold_of(job, k):
    """What our ranks say of the k-th largest magnitude."""
    n = job.like.numel()
    rank = delta_ranks(job, job.sources[0]).at(n - k)
    return Threshold(rank.magnitude, rank.through - (n - k), rank.through - rank.below)


def mask_in(job, kept, start, stop):
    """The mask of a chunk, as booleans."""
    source = job.sources[0]
    if kept.kind in ("all", "none"):
        return torch.full((stop - start,), kept.kind == "all")
    o = operands(job, [source.tensor], kept.values, start, stop)
    return mask_of_kind(kept.kind, o, o.xs[0] - o.base).bool()


def wanted_count(density, n):
    return max(1, math.floor(density * n))


def slow_threshold(delta, k):
    """Sort everything: the k-th largest magnitude, how many equal it, how many of those fit."""
    magnitudes = sorted(delta.abs().to(torch.float32).view(-1).tolist(), reverse=True)
    at_k = magnitudes[k - 1]
    return Threshold(
        at_k, k - sum(value > at_k for value in magnitudes), sum(value == at_k for value in magnitudes)
    )


def distinct(n, seed=0):
    """Random signs and magnitudes, no two of the same magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = 2.0 ** torch.linspace(-20, 3, n, dtype=torch.float64)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    values = (magnitude * sign)[torch.randperm(n, generator=generator)].to(torch.float32)
    assert values.abs().unique().numel() == n
    return values


def few_values(n, seed=0):
    """Differences as bfloat16 models have them: few values, each many times."""
    generator = torch.Generator().manual_seed(seed)
    return (
        (0.01 * torch.randn(n, generator=generator)).bfloat16().mul(8).round().div(8).bfloat16().float()
    )


def gaussian(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def mask_of(job_of, delta, density, method="ties", **keywords):
    """Return the mask of a delta from a zero base, whole, as booleans."""
    job = job_of(
        method,
        torch.zeros_like(delta),
        [(delta, {"weight": 1.0, "density": density})],
        rescale=False,
        **keywords,
    )
    keep = {"ties": keep_largest, "dare_linear": keep_at_random}[method]
    return mask_in(job, keep(job, job.sources[0]), 0, delta.numel())


TENSORS = {
    "distinct": distinct(2311),
    "gaussian": torch.randn(1789, generator=torch.Generator().manual_seed(3)),
    "gaussian bf16": gaussian(2311),
    "few values": torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0])[
        torch.randint(0, 5, (1013,), generator=torch.Generator().manual_seed(4))
    ],
    "all equal": torch.full((301,), -0.25),
    "mostly zero": torch.cat((torch.zeros(500), gaussian(7))),
    "denormal": distinct(97) * 2.0**-130,
    "large": distinct(97) * 2.0**120,
    "one": torch.tensor([-3.0]),
    "two": torch.tensor([1.0, -1.0]),
    "three": torch.tensor([0.0, 2.0, -1.0]),
}
tensors = pytest.mark.parametrize("delta", TENSORS.values(), ids=TENSORS.keys())


@tensors
@pytest.mark.parametrize("density", DENSITIES)
def test_thresholds_are_those_of_sorting(job_of, delta, density):
    job = job_of("ties", torch.zeros_like(delta), [(delta, {"weight": 1.0, "density": density})])
    k = wanted_count(density, delta.numel())
    assert threshold_of(job, k) == slow_threshold(delta, k)


@pytest.mark.parametrize("density", DENSITIES)
def test_without_ties_exactly_k_entries_are_kept_and_they_are_the_largest(job_of, density):
    delta = TENSORS["distinct"]
    k = wanted_count(density, delta.numel())
    mask = mask_of(job_of, delta, density)
    assert int(mask.sum()) == k
    largest = delta.abs().argsort(descending=True)[:k]
    assert mask[largest].all()


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["gaussian bf16", "few values", "all equal"])
def test_of_tied_entries_the_wanted_share_is_kept(job_of, name, density):
    delta = TENSORS[name]
    k = wanted_count(density, delta.numel())
    at_k, wanted, tied = (lambda t: (t.magnitude, t.kept, t.tied))(slow_threshold(delta, k))
    mask = mask_of(job_of, delta, density)
    assert mask[delta.abs() > at_k].all(), "all above the threshold"
    assert not mask[delta.abs() < at_k].any(), "none below it"
    # Each tied entry is kept with probability wanted / tied: four standard deviations of a binomial.
    share = wanted / tied
    spread = 4 * math.sqrt(tied * share * (1 - share))
    assert abs(int(mask[delta.abs() == at_k].sum()) - wanted) <= spread


def test_tied_entries_are_kept_evenly_over_the_tensor(job_of):
    n = 40_000
    mask = mask_of(job_of, torch.ones(n), 0.25).float()
    # Ten blocks of 4000 entries; sd of a block's share is sqrt(.25 * .75 / 4000) = 0.0068.
    assert ((mask.view(10, -1).mean(dim=1) - 0.25).abs() < 4 * 0.0069).all()


@tensors
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_masks_nest_as_density_grows(job_of, delta, method):
    masks = [mask_of(job_of, delta, density, method) for density in DENSITIES]
    for small, large in itertools.pairwise(masks):
        assert not (small & ~large).any()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_density_0_keeps_none_and_1_keeps_all(job_of, method, density):
    mask = mask_of(job_of, TENSORS["gaussian"], density, method)
    assert mask.all() if density else not mask.any()


def test_entries_in_float64_are_ranked_too(job_of):
    delta = distinct(501).double()
    mask = mask_of(job_of, delta, 0.3)
    assert int(mask.sum()) == 150
    assert mask[delta.abs().argsort(descending=True)[:150]].all()


def test_a_mask_is_the_same_in_pieces(job_of):
    delta = gaussian(5003)
    job = job_of("ties", torch.zeros_like(delta), [(delta, {"weight": 1.0, "density": 0.37})])
    kept = keep_largest(job, job.sources[0])
    whole = mask_in(job, kept, 0, 5003)
    edges = [0, 1, 1000, 1003, 4999, 5003]
    pieces = [mask_in(job, kept, a, b) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 17])
def test_thresholds_cross_chunks(job_of, n):
    delta = gaussian(n)
    job = job_of("ties", torch.zeros_like(delta), [(delta, {"weight": 1.0, "density": 0.3})])
    k = wanted_count(0.3, n)
    found = threshold_of(job, k)
    magnitudes = np.sort(delta.abs().numpy())[::-1]
    assert found.magnitude == magnitudes[k - 1]
    assert found.tied == int((magnitudes == found.magnitude).sum())
    assert found.kept == k - int((magnitudes > found.magnitude).sum())


def test_statistics_kept_between_merges_serve_every_density(job_of):
    delta = TENSORS["gaussian bf16"]
    job = job_of("ties", torch.zeros_like(delta), [(delta, {"weight": 1.0})])
    for k in (700, 3, 700, 2311, 1, 1200):
        assert threshold_of(job, k) == slow_threshold(delta, k)


@pytest.mark.parametrize("density", [0.1, 0.37, 0.9])
@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_rescale_restores_the_l1_norm_of_the_delta(job_of, method, density):
    delta = distinct(2311).double()
    models = [(delta, {"weight": 1.0, "density": density})]
    job = job_of(method, torch.zeros_like(delta), models, rescale=True)
    kept = {"ties": keep_largest, "dare_linear": keep_at_random}[method](job, job.sources[0])
    after = (delta.abs() * mask_in(job, kept, 0, delta.numel())).sum()
    # Magnitudes are summed in units of 2^-30 of the largest.
    assert float(after) * kept.rescale == pytest.approx(float(delta.abs().sum()), rel=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-11])
def test_rescale_leaves_a_delta_near_zero_alone(job_of, size):
    delta = torch.full((100,), size)
    job = job_of(
        "ties", torch.zeros_like(delta), [(delta, {"weight": 1.0, "density": 0.5})], rescale=True
    )
    assert keep_largest(job, job.sources[0]).rescale == 1.0


def test_a_density_that_keeps_all_gives_no_mask(job_of):
    job = job_of("ties", torch.zeros(3), [(torch.ones(3), {"weight": 1.0, "density": 1.0})])
    assert keep_largest(job, job.sources[0]) == Kept("all")


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
coarse = st.integers(-3, 3).map(lambda i: i / 2)


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(finite | coarse, min_size=1, max_size=40),
    density=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_any_tensor_and_density_give_the_sorted_threshold_and_its_mask(job_of, values, density):
    delta = torch.tensor(values, dtype=torch.float32)
    job = job_of("ties", torch.zeros_like(delta), [(delta, {"weight": 1.0, "density": density})])
    kept = keep_largest(job, job.sources[0])
    threshold = threshold_of(job, wanted_count(density, len(values)))
    assert threshold == slow_threshold(delta, wanted_count(density, len(values)))
    mask = mask_in(job, kept, 0, len(values))
    assert mask[delta.abs() > threshold.magnitude].all()
    assert not mask[delta.abs() < threshold.magnitude].any()
    if threshold.kept == threshold.tied:
        assert int(mask.sum()) == wanted_count(density, len(values))
