"""The random methods: density and expectation as defined and as mergekit 0.1.5 has them.

Masks depend on the models' names as written, so the models have fixed names here: the draws are
the same in every run, and three standard errors are never a matter of luck.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import norm as normal
from scipy.stats import t as student

from merge_core.merge import merged_tensors
from merge_core.recipe import Recipe

from .families import case
from .reference import keep_probabilities

METHODS = ["dare_linear", "dare_ties", "della", "della_linear"]
random_methods = pytest.mark.parametrize("method", METHODS)


def pair(method, **shared):
    """Two models, thinned to different densities."""
    extra = {"epsilon": 0.2} if "della" in method else {}
    own = {"x": {"weight": 0.7, "density": 0.4, **extra}, "y": {"weight": 0.5, "density": 0.6, **extra}}
    return {**case(method, own, "base", **shared), "dtype": "float32"}


def random_pair(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(shape, generator=generator)
    return base, base + 0.02 * torch.randn(shape, generator=generator)


def probabilities(method, delta, density):
    """What the definition says of each entry's chance to be kept, float64."""
    if "dare" in method:
        return torch.full(delta.shape, density, dtype=torch.float64)
    return keep_probabilities(delta.abs(), density, 0.15)


@pytest.mark.parametrize("density", [0.2, 0.37, 0.8])
@random_methods
def test_entries_are_kept_with_their_probability(merge_one, method, density):
    base, x = random_pair((263, 101))
    merged = merge_one(method, base, [(x, {"weight": 1.0, "density": density})], rescale=False)
    kept = (merged != base).double()
    p = probabilities(method, x - base, density)
    variance = p * (1 - p)
    assert abs(float((kept - p).sum())) <= 3 * math.sqrt(variance.sum())
    # The same among large entries, in every fourth column, in the first and the last rows.
    for part in ((x - base).abs() > 0.03, torch.arange(101).expand_as(x) % 4 == 1, *rows(x)):
        assert abs(float((kept - p)[part].sum())) <= 3 * math.sqrt(variance[part].sum())


def rows(like):
    first = torch.zeros(like.shape, dtype=torch.bool)
    first[: len(like) // 2] = True
    return first, ~first


@random_methods
def test_the_delta_is_kept_in_expectation(merge_one, method):
    # Over 40 seeds the mean of (merged - base), unrescaled and divided by the probability p, is
    # the delta: an entry's mean has standard error |delta| sqrt((1 - p) / p / 40).
    density, n_seeds = 0.5, 40
    base, x = (tensor.double() for tensor in random_pair((53, 97)))
    delta = x - base
    p = probabilities(method, delta, density)
    own = [(x, {"weight": 1.0, "density": density})]
    mean = torch.zeros_like(delta)
    for seed in range(n_seeds):
        mean += (merge_one(method, base, own, rescale=False, seed=seed) - base) / p / n_seeds
    z = (mean - delta) / (delta.abs() * ((1 - p) / p / n_seeds).sqrt())
    # The mean of n independent z has standard error 1 / sqrt(n), their mean square sqrt(2 / n).
    n = z.numel()
    assert abs(float((z * delta.sign()).mean())) <= 3 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) <= 3 * math.sqrt(2 / n)


@random_methods
def test_merges_are_distributed_as_mergekits(stored, theirs, monkeypatch, method):
    family = stored("Llama", "float32")
    monkeypatch.chdir(Path(family.folders["base"]).parent)
    base = family.tensors[family.folders["base"]]
    moved = {k: t - base[k] for k, t in family.tensors[family.folders["x"]].items()}
    config = pair(method)

    def summary(tensors):
        """Share of the entries that moved, how far along x's own move, and in all directions."""
        deltas = {name: (tensor - base[name]).double() for name, tensor in tensors.items()}
        n = sum(delta.numel() for delta in deltas.values())
        return torch.tensor(
            [
                sum(int(delta.count_nonzero()) for delta in deltas.values()) / n,
                sum(float((delta * moved[name].sign()).sum()) for name, delta in deltas.items()),
                sum(float((delta**2).sum()) for delta in deltas.values()),
            ]
        )

    seeds = range(12)
    ours = torch.stack(
        [summary(dict(merged_tensors(Recipe.parse({**config, "random_seed": s})))) for s in seeds]
    )
    oracle = torch.stack([summary(theirs(config, random_seed=s)) for s in seeds])
    spread = ((ours.var(dim=0) + oracle.var(dim=0)) / len(seeds)).sqrt()
    z = (ours.mean(dim=0) - oracle.mean(dim=0)) / spread
    # Three standard errors, where these are themselves estimated from few merges.
    assert (z.abs() <= student.isf(normal.sf(3), 2 * len(seeds) - 2)).all(), z


@random_methods
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_are_bit_identical_and_seeds_are_not(stored, monkeypatch, method, dtype):
    family = stored("Qwen3", dtype)
    monkeypatch.chdir(Path(family.folders["base"]).parent)
    config = {**pair(method), "dtype": dtype}
    first = dict(merged_tensors(Recipe.parse(config)))
    torch.manual_seed(99)
    second = dict(merged_tensors(Recipe.parse(config)))
    other = dict(merged_tensors(Recipe.parse({**config, "random_seed": 1})))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
