"""Laws of the merge methods, on single tensors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from merge_core.errors import CheckpointError, RecipeError
from merge_core.methods import METHODS

TASK_VECTOR = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
task_vector = pytest.mark.parametrize("method", TASK_VECTOR)


def random_tensors(n, dtype=torch.float32, shape=(37, 41), seed=0):
    """Return a base and n fine-tunes: 0.1 randn, and base + 0.02 randn."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)
    tuned = [base + 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in tuned]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


# ---- special cases ------------------------------------------------------------------------------


@dtypes
@task_vector
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_weight_1_of_one_model_returns_that_model(merge_one, method, dtype, normalize):
    base, (x,) = random_tensors(1, dtype)
    merged = merge_one(method, base, [(x, {"weight": 1.0})], normalize=normalize)
    assert merged.dtype == dtype
    assert merged.shape == x.shape
    # base + (x - base) is x, bit for bit, wherever the work dtype holds x - base exactly; elsewhere
    # the difference is off by half a unit in its last place at most, and so is the sum.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    is_exact = (x.to(work) - base.to(work)).double() == x.double() - base.double()
    if dtype == torch.float64:
        is_exact = (x - base).abs() * 2 < base.abs()  # Sterbenz: x and base within a factor of 2
        is_exact &= x.sign() == base.sign()
    assert is_exact.float().mean() > (0.99 if dtype in (torch.bfloat16, torch.float16) else 0.3)
    assert torch.equal(merged[is_exact], x[is_exact])
    size = torch.maximum(base.abs().double(), x.abs().double())
    assert ((merged.double() - x.double()).abs() <= 2 * torch.finfo(work).eps * size).all()


@dtypes
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_linear_with_weight_1_of_one_model_is_that_model_bit_for_bit(merge_one, dtype, normalize):
    _, (x,) = random_tensors(1, dtype)
    assert torch.equal(merge_one("linear", None, [(x, {"weight": 1.0})], normalize=normalize), x)


@dtypes
def test_linear_ignores_models_of_weight_0(merge_one, dtype):
    _, (x, y) = random_tensors(2, dtype)
    assert torch.equal(merge_one("linear", None, [(y, {"weight": 0.0}), (x, {"weight": 1.0})]), x)


def test_linear_without_weights_is_the_plain_average(merge_one):
    _, (x, y) = random_tensors(2)
    assert torch.equal(merge_one("linear", None, [(x, {}), (y, {})]), (x + y) / 2)


@dtypes
def test_passthrough_is_the_source_bit_for_bit(merge_one, dtype):
    _, (x,) = random_tensors(1, dtype)
    x.view(-1)[:2] = torch.tensor([-0.0, math.inf])
    merged = merge_one("passthrough", None, [(x, {})])
    as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(merged.view(as_int), x.view(as_int))


def test_passthrough_multiplies_by_scale(merge_one):
    _, (x,) = random_tensors(1)
    assert torch.equal(merge_one("passthrough", None, [(x, {"scale": -0.3})]), x * -0.3)
    assert not merge_one("passthrough", None, [(x, {"scale": 0.0})]).any()


@dtypes
@task_vector
def test_weight_0_returns_the_base(merge_one, method, dtype):
    base, (x, y) = random_tensors(2, dtype)
    models = [(x, {"weight": 0.0}), (y, {"weight": 0.0, "density": 0.3})]
    for normalize in (False, True):
        assert torch.equal(merge_one(method, base, models, normalize=normalize), base)


@dtypes
@task_vector
def test_lambda_0_returns_the_base(merge_one, method, dtype):
    base, (x, y) = random_tensors(2, dtype)
    models = [(x, {"weight": 0.4}), (y, {"weight": 0.9, "density": 0.3})]
    assert torch.equal(merge_one(method, base, models, lambda_=0.0), base)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
@dtypes
def test_density_0_returns_the_base(merge_one, method, dtype):
    base, (x, y) = random_tensors(2, dtype)
    models = [(x, {"weight": 0.4, "density": 0.0}), (y, {"weight": 0.9, "density": 0.0})]
    for rescale in (False, True):
        assert torch.equal(merge_one(method, base, models, rescale=rescale), base)


@dtypes
@pytest.mark.parametrize(
    ("thinned", "whole"), [("dare_linear", "task_arithmetic"), ("dare_ties", "ties")]
)
def test_density_1_is_a_no_op(merge_one, thinned, whole, dtype):
    base, (x, y) = random_tensors(2, dtype)
    models = [(x, {"weight": 0.4}), (y, {"weight": -0.9, "density": 1.0})]
    for normalize, rescale in itertools.product((False, True), repeat=2):
        shared = {"normalize": normalize, "rescale": rescale}
        assert torch.equal(
            merge_one(thinned, base, models, **shared), merge_one(whole, base, models, **shared)
        )


@dtypes
@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_ties_with_one_model_and_full_density_is_task_arithmetic(merge_one, method, dtype):
    base, (x,) = random_tensors(1, dtype)
    for weight, lambda_ in itertools.product((0.37, -1.2), (1.0, 0.7)):
        models = [(x, {"weight": weight})]
        assert torch.equal(
            merge_one(method, base, models, normalize=False, lambda_=lambda_),
            merge_one("task_arithmetic", base, models, lambda_=lambda_),
        )


def test_task_arithmetic_takes_no_notice_of_density(merge_one):
    base, (x, y) = random_tensors(2)
    whole = merge_one("task_arithmetic", base, [(x, {"weight": 0.4}), (y, {"weight": 0.9})])
    models = [(x, {"weight": 0.4, "density": 0.1}), (y, {"weight": 0.9, "density": 0.0})]
    assert torch.equal(merge_one("task_arithmetic", base, models, rescale=True), whole)


@task_vector
def test_int8_mask_changes_nothing(merge_one, method):
    base, (x, y) = random_tensors(2)
    models = [(x, {"weight": 0.4, "density": 0.5}), (y, {"weight": -0.9, "density": 0.5})]
    assert torch.equal(
        merge_one(method, base, models, int8_mask=True), merge_one(method, base, models, int8_mask=False)
    )


@dtypes
@task_vector
def test_models_equal_to_the_base_return_the_base(merge_one, method, dtype):
    base, _ = random_tensors(0, dtype)
    models = [(base.clone(), {"weight": 0.7, "density": 0.5})] * 2
    assert torch.equal(merge_one(method, base, models), base)


@dtypes
@pytest.mark.parametrize("parallel", [False, True], ids=["apart", "parallel"])
def test_slerp_ends_at_its_models_bit_for_bit(merge_one, dtype, parallel):
    base, (x,) = random_tensors(1, dtype)
    x = base * 2 if parallel else x.flip(0)
    assert torch.equal(merge_one("slerp", base, [(x, {})], t=0.0), base)
    assert torch.equal(merge_one("slerp", base, [(x, {})], t=1.0), x)


def test_slerp_reversed_is_slerp_from_the_other_end(merge_one):
    base, (x,) = random_tensors(1)
    x = x.flip(1)
    torch.testing.assert_close(
        merge_one("slerp", base, [(x, {})], t=0.3),
        merge_one("slerp", x, [(base, {})], t=0.7),
        atol=1e-7,
        rtol=1e-5,  # two roundings of the shares and of the products
    )


# ---- the order of models ------------------------------------------------------------------------

MODELS = [
    {"weight": 0.4, "density": 0.6},
    {"weight": -0.7, "density": 0.9},
    {"weight": 1.1, "density": 0.3},
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("method", ["linear", *TASK_VECTOR])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_permuting_models_with_their_weights_changes_nothing(merge_one, method, order, normalize):
    # In float64, where only an exactly balanced vote could depend on the order of a sum.
    base, tuned = random_tensors(3, torch.float64)
    own = [{"weight": p["weight"]} if method == "linear" else p for p in MODELS]
    base = None if method == "linear" else base

    def merged(order):
        models = [(tuned[i], own[i]) for i in order]
        names = [f"m{i}" for i in order]
        return merge_one(method, base, models, names=names, normalize=normalize)

    torch.testing.assert_close(merged(order), merged(range(3)), atol=1e-14, rtol=1e-12)


# ---- by hand ------------------------------------------------------------------------------------


def test_linear_by_hand(merge_one):
    a, b = tensor(1, 2, 3), tensor(3, -2, 0)
    # (1*a + 3*b) = [1+9, 2-6, 3+0]; divided by 1 + 3 under normalize
    models = [(a, {"weight": 1.0}), (b, {"weight": 3.0})]
    assert merge_one("linear", None, models, normalize=False).tolist() == [10, -4, 3]
    assert merge_one("linear", None, models).tolist() == [2.5, -1, 0.75]


def test_task_arithmetic_by_hand(merge_one):
    base, a, b = tensor(1, 1, 1), tensor(3, 1, 0), tensor(1, 5, -1)
    # deltas [2, 0, -1] and [0, 4, -2]; times 2 and 0.5: [4, 0, -2] + [0, 2, -1] = [4, 2, -3]
    models = [(a, {"weight": 2.0}), (b, {"weight": 0.5})]
    assert merge_one("task_arithmetic", base, models).tolist() == [5, 3, -2]
    # lambda 2: 1 + [8, 4, -6]
    assert merge_one("task_arithmetic", base, models, lambda_=2.0).tolist() == [9, 5, -5]
    # normalize divides by 2 + 0.5: [4, 2, -3] / 2.5 = [1.6, 0.8, -1.2]
    normalized = merge_one("task_arithmetic", base, models, normalize=True)
    torch.testing.assert_close(normalized, tensor(2.6, 1.8, -0.2), atol=1e-6, rtol=0)


def test_normalize_with_weights_that_sum_to_zero_leaves_the_sum_of_deltas_undivided(merge_one):
    base, a, b = tensor(0, 0, 0), tensor(2, 0, -1), tensor(0, 4, 2)
    # deltas times 1 and -1: [2, -4, -3]; |1 - 1| < 1e-8, so the divisor is 1, as in mergekit
    models = [(a, {"weight": 1.0}), (b, {"weight": -1.0})]
    assert merge_one("task_arithmetic", base, models, normalize=True).tolist() == [2, -4, -3]


def test_ties_by_hand(merge_one):
    base, a, b = tensor(1, 1, 1), tensor(4, 2, 0), tensor(2, -4, 3)
    # Weighted deltas: 1 * [3, 1, -1] and 2 * [1, -5, 2] = [2, -10, 4].
    # Sums [5, -9, 3], signs [+, -, +]. Agreeing: both; b; b, so [5, -10, 4].
    # Divisors under normalize: [1 + 2, 2, 2], so [5/3, -5, 2].
    models = [(a, {"weight": 1.0}), (b, {"weight": 2.0})]
    assert merge_one("ties", base, models, normalize=False).tolist() == [6, -9, 5]
    torch.testing.assert_close(
        merge_one("ties", base, models), tensor(1 + 5 / 3, -4, 3), atol=1e-6, rtol=0
    )


def test_ties_counts_a_balanced_vote_as_positive_and_zeros_as_no_vote(merge_one):
    base, a, b = tensor(0, 0, 0), tensor(2, 0, -2), tensor(-2, 3, 0)
    # Sums [0, 3, -2]: the balanced vote is positive, so a's 2 stays. Divisors [1, 1, 1]: an entry
    # that is exactly zero agrees with nothing, so it does not count.
    models = [(a, {"weight": 1.0}), (b, {"weight": 1.0})]
    assert merge_one("ties", base, models).tolist() == [2, 3, -2]


def test_ties_takes_the_sign_after_weighting(merge_one):
    base, a, b = tensor(0, 0, 0), tensor(1, 2, -3), tensor(2, 1, 1)
    # -1 * a = [-1, -2, 3] against 1 * b = [2, 1, 1]. Sums [1, -1, 4].
    # Agreeing: b; -a; both: [2, -2, 4]. Divisors [1, -1, 1 - 1 = 0 -> 1]: [2, 2, 4].
    models = [(a, {"weight": -1.0}), (b, {"weight": 1.0})]
    assert merge_one("ties", base, models, normalize=False).tolist() == [2, -2, 4]
    assert merge_one("ties", base, models, normalize=True).tolist() == [2, 2, 4]


def test_ties_keeps_the_largest_entries_by_hand(merge_one):
    base, a = tensor(1, 1, 1), tensor(2, -3, 3)
    # delta [1, -4, 2]; density 0.67 of 3 keeps floor(2.01) = 2 entries: [0, -4, 2]
    models = [(a, {"weight": 1.0, "density": 0.67})]
    assert merge_one("ties", base, models).tolist() == [1, -3, 3]
    # density 0.3 of 3 would keep floor(0.9) = 0; at least one stays: [0, -4, 0]
    models = [(a, {"weight": 1.0, "density": 0.3})]
    assert merge_one("ties", base, models).tolist() == [1, -3, 1]
    # rescale: |delta|_1 before / after = 7 / 4
    assert merge_one("ties", base, models, rescale=True).tolist() == [1, 1 - 4 * 7 / 4, 1]


def test_slerp_by_hand(merge_one):
    a, b = tensor(1, 0, 0), tensor(0, 2, 0)
    # Perpendicular: theta = 90 degrees, sin(theta) = 1. t = 1/3: sin(60) a + sin(30) b, not normed.
    merged = merge_one("slerp", a, [(b, {})], t=1 / 3)
    torch.testing.assert_close(merged, tensor(math.sqrt(3) / 2, 2 * 0.5, 0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 0, 0), (3, 0, 0), (1.5, 0, 0)),  # parallel: a line, 0.75 * 1 + 0.25 * 3
        ((1, 0, 0), (-1, 0, 0), (0.5, 0, 0)),  # opposite: also a line, 0.75 - 0.25
        ((0, 0, 0), (4, 0, 0), (0, 0, 0)),  # norm 0 counts as 1, cosine 0: sin(0.25 * 90) * b
        ((0, 0, 0), (0, 0, 0), (0, 0, 0)),
    ],
    ids=["parallel", "opposite", "zero", "both zero"],
)
def test_slerp_of_degenerate_tensors_by_hand(merge_one, a, b, expected):
    if a == (0, 0, 0):
        expected = tuple(math.sin(math.pi / 8) * v for v in b)
    merged = merge_one("slerp", tensor(*a), [(tensor(*b), {})], t=0.25)
    torch.testing.assert_close(merged, tensor(*expected), atol=1e-6, rtol=0)


def test_dare_linear_keeps_or_drops_whole_entries(merge_one):
    base, (x,) = random_tensors(1)
    merged = merge_one("dare_linear", base, [(x, {"weight": 1.0, "density": 0.4})], rescale=False)
    whole = merge_one("task_arithmetic", base, [(x, {"weight": 1.0})])
    kept = merged != base
    assert torch.equal(merged[kept], whole[kept])
    assert 0.3 < kept.float().mean() < 0.5


def test_dare_rescales_to_the_l1_norm_of_the_delta(merge_one):
    base, (x,) = random_tensors(1, torch.float64)
    merged = merge_one("dare_linear", base, [(x, {"weight": 1.0, "density": 0.4})])
    torch.testing.assert_close((merged - base).abs().sum(), (x - base).abs().sum(), rtol=1e-10, atol=0)


# ---- errors and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (0.5, -0.5 + 1e-10)], ids=str)
def test_linear_refuses_to_divide_by_weights_that_sum_to_zero(merge_one, weights):
    _, (x, y) = random_tensors(2)
    models = [(x, {"weight": weights[0]}), (y, {"weight": weights[1]})]
    with pytest.raises(RecipeError, match=r"weight of t: .*sum to zero.*normalize: false"):
        merge_one("linear", None, models)
    assert merge_one("linear", None, models, normalize=False).isfinite().all()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["linear", "slerp", "passthrough", *TASK_VECTOR])
def test_the_result_is_rounded_once_to_out_dtype(merge_one, method, out_dtype):
    base, (x,) = random_tensors(1)
    base = None if method in ("linear", "passthrough") else base
    own = {"slerp": {}, "passthrough": {"scale": 0.7}}.get(method, {"weight": 0.7})
    shared = {"t": 0.3} if method == "slerp" else {}
    wide = merge_one(method, base, [(x, own)], out_dtype=torch.float32, **shared)
    merged = merge_one(method, base, [(x, own)], out_dtype=out_dtype, **shared)
    assert merged.dtype == out_dtype
    assert torch.equal(merged, wide.to(out_dtype))


@pytest.mark.parametrize("method", ["linear", "slerp", "passthrough", *TASK_VECTOR])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (2, 0)], ids=str)
def test_any_shape_is_kept_and_sources_stay_as_they_were(merge_one, method, shape):
    base, (x,) = random_tensors(1, shape=shape)
    before = base.clone(), x.clone()
    base_or_none = None if method in ("linear", "passthrough") else base
    own = {"slerp": {}, "passthrough": {"scale": 0.7}}.get(method, {"weight": 0.7})
    if method in TASK_VECTOR:
        own["density"] = 0.5
    merged = merge_one(method, base_or_none, [(x, own)], **({"t": 0.3} if method == "slerp" else {}))
    assert merged.shape == shape
    assert torch.equal(base, before[0])
    assert torch.equal(x, before[1])


@task_vector
def test_a_base_and_a_model_of_different_dtypes_merge(merge_one, method):
    base, (x,) = random_tensors(1)
    merged = merge_one(
        method, base, [(x.bfloat16(), {"weight": 1.0, "density": 1.0})], out_dtype=torch.float32
    )
    torch.testing.assert_close(merged, x.bfloat16().float(), atol=1e-7, rtol=1e-6)


def with_bad_entries(bad):
    base, (x,) = random_tensors(1)
    x.view(-1)[::50] = bad
    return base, x


@pytest.mark.parametrize("compiles", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("bad_at", [slice(None, None, 50), 7], ids=["many", "one"])
@pytest.mark.parametrize("in_base", [False, True], ids=["model", "base"])
@pytest.mark.parametrize("method", METHODS)
def test_an_entry_that_is_not_a_number_is_one_clear_error(job_of, method, in_base, bad_at, compiles):
    """Also where the method would drop it, as the sparsified do with half of the entries."""
    table = METHODS[method]
    base, (x, y) = random_tensors(2)
    for bad in (base,) if in_base else (x,):
        bad.view(-1)[bad_at] = math.nan
    own = {name: 0.5 for name in table.per_model if name in ("weight", "density")}
    own |= {"epsilon": 0.2} if "epsilon" in table.per_model else {}
    if table.base == "ignored":
        x = base if in_base else x
    models = [(x, own), (y, own)][: int(min(2, table.n_models[1]))]
    shared = {"t": 0.5} if "t" in table.shared else {}
    job = job_of(method, None if table.base in ("ignored", "input") else base, models, **shared)
    if in_base and table.base == "input":
        pytest.skip("has no base")
    with pytest.raises(CheckpointError, match=r"tensor t of (m0|base): \d+ of its .* NaN"):
        table.function()(replace(job, compiles=compiles))
