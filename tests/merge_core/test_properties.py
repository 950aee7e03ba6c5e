"""Laws of all methods: the order of models, densities and weights of 1, pieces, threads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_core.errors import RecipeError
from merge_core.merge import merged_tensors
from merge_core.methods import METHODS, job, spherical
from merge_core.plan import Sources
from merge_core.recipe import Recipe

from .families import CASES, RANDOM_CASES, resolved

SYMMETRIC = [name for name, method in METHODS.items() if method.n_models[1] > 2]
FAMILY = {  # thinned to density 1 these are all the same
    "sum": ["task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"],
    "vote": ["ties", "dare_ties", "breadcrumbs_ties", "della"],
}
TASK_VECTOR = [name for names in FAMILY.values() for name in names]
# Function-scoped fixtures here only build things; they keep nothing between examples.
law = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
weights = st.floats(0.05, 2.0) | st.floats(-2.0, -0.05)
shapes = st.sampled_from([(1,), (7,), (1, 5), (13, 1), (31, 17), (3, 11, 5)])


def moved(n, shape, seed, dtype=torch.float32, move=0.02):
    generator = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = [base + move * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in tuned]


def own(method: str, weight: float = 1.0, density: float = 0.5, **more: Any) -> dict[str, Any]:
    """A model's parameters, as far as the method has them."""
    values = {"weight": weight, "density": density, "gamma": 0.05, "epsilon": 0.2, **more}
    return {name: value for name, value in values.items() if name in METHODS[method].per_model}


def shared(method: str, **values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.rstrip("_") in METHODS[method].shared}


def bits(tensor):
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


# ---- the order of models ------------------------------------------------------------------------


@pytest.mark.parametrize("method", SYMMETRIC)
@law
@given(data=st.data())
def test_models_permuted_with_their_weights_give_the_same(merge_one, method, data):
    n = data.draw(st.integers(2, 3))
    order = data.draw(st.permutations(range(n)))
    # Positive weights: sums that nearly cancel would magnify rounding.
    values = data.draw(st.lists(st.floats(0.05, 2.0), min_size=n, max_size=n))
    base, tuned = moved(n, data.draw(shapes), data.draw(st.integers(0, 99)), torch.float64)
    parameters = shared(method, normalize=data.draw(st.booleans()), filter_wise=True, lambda_=1.3)

    def merged(order):
        models = [(tuned[i], own(method, values[i])) for i in order]
        names = [f"m{i}" for i in order]
        has_base = METHODS[method].base in ("required", "optional")
        return merge_one(method, base if has_base else None, models, names=names, **parameters)

    torch.testing.assert_close(merged(order), merged(range(n)), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", ["linear", *TASK_VECTOR, "ram"])
@law
@given(pair=st.tuples(weights, weights), seed=st.integers(0, 99), normalize=st.booleans())
def test_two_models_swapped_give_the_same_bits(merge_one, method, pair, seed, normalize):
    base, tuned = moved(2, (31, 17), seed)

    def merged(order):
        models = [(tuned[i], own(method, pair[i])) for i in order]
        names = [f"m{i}" for i in order]
        values = shared(method, normalize=normalize and abs(sum(pair)) > 1e-3)
        return merge_one(method, None if method == "linear" else base, models, names=names, **values)

    assert equal(merged((0, 1)), merged((1, 0)))


# ---- parameters that do nothing -----------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
@law
@given(
    values=st.lists(weights, min_size=1, max_size=3),
    shape=shapes,
    seed=st.integers(0, 99),
    normalize=st.booleans(),
    rescale=st.booleans(),
)
def test_density_1_thins_nothing(merge_one, kind, values, shape, seed, normalize, rescale):
    base, tuned = moved(len(values), shape, seed)
    results = [
        merge_one(
            method,
            base,
            [(x, own(method, w, density=1.0)) for x, w in zip(tuned, values, strict=True)],
            normalize=normalize,
            rescale=rescale,
        )
        for method in FAMILY[kind]
    ]
    assert all(equal(result, results[0]) for result in results[1:])


# What makes each method return one of its models, and how it is asked.
RETURNS: dict[str, tuple[int, dict[str, Any]]] = {
    "linear": (1, {}),
    "passthrough": (1, {}),
    "slerp": (1, {"t": 1.0}),
    "nuslerp": (2, {}),  # the weights are 0 and 1
    "multislerp": (1, {}),
    "karcher": (1, {}),
    **{name: (1, {}) for name in TASK_VECTOR},
    "model_stock": (-2, {}),  # twice the same model: the cosine is 1
    "nearswap": (1, {"t": 10.0}),
    "sce": (1, {}),
    "ram": (1, {"epsilon": 0.0}),
    "ramplus_tl": (1, {"epsilon": 0.0, "r": 0.0}),
}


def test_every_method_but_fusion_has_a_case():
    assert set(METHODS) - set(RETURNS) == {"arcee_fusion"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", RETURNS)
@law
@given(shape=shapes, seed=st.integers(0, 99))
def test_one_model_of_weight_1_is_returned(merge_one, method, dtype, shape, seed):
    n, values = RETURNS[method]
    base, tuned = moved(abs(n), shape, seed, dtype)
    if n < 0:
        tuned = [tuned[0], tuned[0].clone()]
    models = [(x, own(method, float(x is tuned[-1]), density=1.0)) for x in tuned]
    has_base = METHODS[method].base in ("required", "optional")
    merged = merge_one(method, base if has_base else None, models, **values)
    if method in ("linear", "passthrough", "slerp", "multislerp", "nearswap"):
        assert equal(merged, tuned[-1])
    # base + (x - base) is x but for the last bit; a rounded float32 is x again in bfloat16.
    eps = torch.finfo(torch.float32).eps
    size = torch.maximum(base.abs(), tuned[-1].abs()).double().clamp(min=1e-3)
    error = (merged.double() - tuned[-1].double()).abs()
    assert (error <= (4 * eps if dtype == torch.float32 else 2.0**-8) * size).all()
    if dtype == torch.bfloat16:
        assert (merged == tuned[-1]).double().mean() > 0.9


# ---- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_chunk_length_changes_no_bit(monkeypatch, job_of, method, dtype):
    # Chunks are whole rows of 4096 entries, over which sums are taken.
    base, tuned = moved(int(min(3, METHODS[method].n_models[1])), (137, 113), 5, dtype)
    models = [(x, own(method, 0.4 + i)) for i, x in enumerate(tuned)]
    has_base = METHODS[method].base in ("required", "optional")
    variants = [{"t": 0.4, "select_topk": 0.3, "rescale": True}]
    if method in ("nuslerp", "model_stock"):
        for flat, by_row in itertools.product((False, True), repeat=2):
            variants.append({"nuslerp_flatten": flat, "nuslerp_row_wise": by_row, "filter_wise": by_row})
    for values, compiles in itertools.product(variants, (False, True)):
        results = []
        for n in (1 << 18, 4096, 3 * 4096):
            monkeypatch.setattr(job, "CHUNK", n)
            monkeypatch.setattr(spherical, "CHUNK", n)
            one = job_of(method, base if has_base else None, models, **shared(method, **values))
            results.append(METHODS[method].function()(replace(one, compiles=compiles)))
        assert equal(results[0], results[1])
        assert equal(results[0], results[2])


@pytest.mark.parametrize("name", [*CASES, *RANDOM_CASES])
def test_threads_and_subsets_change_no_byte(stored, n_threads, name):
    family = stored("Qwen3", "bfloat16")
    config = {**resolved((CASES | RANDOM_CASES)[name], family.folders), "dtype": "bfloat16"}
    recipe = Recipe.parse(config)
    n_threads(1)
    whole = dict(merged_tensors(recipe, Sources()))
    wanted = list(whole)[3::7]
    part = dict(merged_tensors(recipe, Sources(), names=set(wanted)))
    assert list(part) == wanted
    assert all(equal(part[key], whole[key]) for key in wanted)
    n_threads(3)
    threaded = dict(merged_tensors(recipe, Sources()))
    assert list(threaded) == list(whole)
    assert all(equal(threaded[key], whole[key]) for key in whole)


def test_multislerp_of_vectors_that_cancel_is_an_error(merge_one):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    models = [(x, {"weight": 1.0}), (-x, {"weight": 1.0}), (x * 0, {"weight": 1.0})]
    with pytest.raises(RecipeError, match="cancel"):
        merge_one("multislerp", None, models, normalize_weights=False)
