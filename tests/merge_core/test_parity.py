"""Parity with mergekit 0.1.5, run in process on the same files.

In float32 the two programs round at the same places up to the order of a few operations: they
agree within 1e-6 of each tensor's largest magnitude. In bfloat16 mergekit rounds weights, deltas
and sums to bfloat16 on the way and we round once; there the judge is the definition in float64.
Entries that tie at a density threshold are left out of both: mergekit leaves their choice open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_core.merge import merged_tensors, save_merged
from merge_core.methods import METHODS
from merge_core.parameters import look_up
from merge_core.recipe import Recipe

mergekit = pytest.importorskip("mergekit", reason="mergekit is the oracle")


def models(*entries):
    return [{"model": name, "parameters": parameters} for name, parameters in entries]


def source(name, start, end, **parameters):
    return {"model": name, "layer_range": [start, end], "parameters": parameters}


FILTERED = [
    {"filter": "mlp", "value": [0.1, 0.9, 0.3]},
    {"filter": "self_attn", "value": -0.4},
    {"filter": "layernorm", "value": [1.2, 0.2]},
    {"value": 0.7},
]
X3, Y6 = ("x", {"weight": 0.3}), ("y", {"weight": 0.6})
THIN = models(("x", {"weight": 0.3, "density": 0.4}), ("y", {"weight": 0.9, "density": [0.1, 0.8]}))
MIXED = models(
    ("x", {"weight": FILTERED, "density": [{"filter": "mlp", "value": 0.2}, {"value": [0.9, 0.5]}]}),
    ("y", {"weight": -0.6, "density": 0.5}),
)


def case(method, models=None, base=None, slices=None, **parameters):
    parameters = {key.rstrip("_"): value for key, value in parameters.items()}
    config = {"merge_method": method, "base_model": base, "parameters": parameters}
    config |= {"models": models, "slices": slices}
    return {key: value for key, value in config.items() if value}


CASES: dict[str, dict[str, Any]] = {
    "linear": case("linear", models(X3, Y6)),
    "linear, gradient and filters": case("linear", models(("x", {"weight": FILTERED}), Y6)),
    "linear, plain, negative": case("linear", models(X3, ("y", {"weight": -0.6})), normalize=False),
    "linear, base among models": case("linear", models(X3, Y6), base="x"),
    "slerp": case(
        "slerp",
        models(("x", {}), ("y", {})),
        base="x",
        t=[
            {"filter": "mlp", "value": [0, 0.5, 1]},
            {"filter": "self_attn", "value": 0.3},
            {"value": 0.6},
        ],
    ),
    "slerp, base appended": case("slerp", models(("x", {})), base="base", t=[0.2, 0.7]),
    "slerp, another base a slice": case(
        "slerp",
        slices=[
            {"base_model": "x", "sources": [source("x", 0, 2), source("y", 0, 2)]},
            {"base_model": "y", "sources": [source("x", 2, 4), source("y", 2, 4)]},
        ],
        t=0.3,
    ),
    "task_arithmetic": case("task_arithmetic", models(X3, ("y", {"weight": -0.6})), "base", lambda_=1.3),
    "task_arithmetic, normalized": case(
        "task_arithmetic", models(X3, ("y", {"weight": FILTERED})), "base", normalize=True
    ),
    "task_arithmetic, zero sum": case(
        "task_arithmetic", models(X3, ("y", {"weight": -0.3})), "base", normalize=True
    ),
    "task_arithmetic, one slice of layers": case(
        "task_arithmetic",
        base="base",
        slices=[
            {"sources": [source("base", 0, 3), source("x", 0, 3, weight=[0.2, 0.9])]},
            {
                "sources": [source("base", 3, 4), source("y", 2, 3, weight=[0.2, 0.9])],
                "parameters": {"lambda": [0.5, 2.0]},
            },
        ],
        lambda_=0.7,
    ),
    "ties": case("ties", THIN, "base"),
    "ties, plain": case("ties", THIN, "base", normalize=False),
    "ties, filters, negative, lambda, rescale": case("ties", MIXED, "base", lambda_=0.8, rescale=True),
    "ties, plain, negative": case("ties", MIXED, "base", normalize=False, int8_mask=True),
    "ties, boolean gradient": case("ties", THIN, "base", normalize=[True, False], lambda_=[0.5, 1.5]),
    "dare_linear": case("dare_linear", models(X3, Y6), "base"),
    "dare_linear, normalized": case(
        "dare_linear", models(X3, ("y", {"weight": FILTERED})), "base", normalize=True, lambda_=1.4
    ),
    "dare_ties": case("dare_ties", models(X3, ("y", {"weight": -0.6})), "base"),
    "dare_ties, normalized": case("dare_ties", models(X3, Y6), "base", normalize=True, lambda_=0.6),
    "passthrough": case("passthrough", models(("x", {}))),
    "passthrough, slices and scale": case(
        "passthrough",
        slices=[
            {"sources": [source("x", 0, 3)]},
            {
                "sources": [
                    source("y", 1, 4, scale=[{"filter": "o_proj", "value": [0.5, 2]}, {"value": 1.0}])
                ]
            },
        ],
    ),
}


def resolved(config: Any, paths: dict[str, str]) -> Any:
    """Put folders in the place of the short model names."""
    if isinstance(config, dict):
        return {key: resolved(value, paths) for key, value in config.items()}
    if isinstance(config, list):
        return [resolved(value, paths) for value in config]
    return paths.get(config, config) if isinstance(config, str) else config


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Tensor]]:
    """Merge with mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    def merge(config: dict[str, Any]) -> dict[str, Tensor]:
        out = tmp_path_factory.mktemp("mergekit")
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
        return load_file(out / "model.safetensors")

    return merge


def tied_entries(name: str, recipe: Recipe, tensors: dict[str, dict[str, Tensor]]) -> Tensor:
    """Tell which entries tie at the density threshold of a model, and so may be kept or not."""
    base = tensors[str(recipe.base_model)][name].float().view(-1)
    tied = torch.zeros(base.numel(), dtype=torch.bool)
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    for entry in recipe.models or ():
        density = look_up(
            "density", METHODS["ties"].per_model["density"], (entry.parameters,), name, layer / 3
        )
        if density >= 1:
            continue
        magnitude = (tensors[entry.model][name].float().view(-1) - base).abs()
        k = max(1, math.floor(density * base.numel()))
        at_k = magnitude.sort(descending=True).values[k - 1]
        if int((magnitude >= at_k).sum()) != k:
            tied |= magnitude == at_k
    return tied


@pytest.fixture(scope="module")
def loaded(llamas, bf16_llamas) -> dict[str, dict[str, Tensor]]:
    """Every tensor of every model, by folder and name."""
    from safetensors.torch import load_file

    folders = [folder for family in (llamas, bf16_llamas) for folder in vars(family).values()]
    return {folder: load_file(Path(folder) / "model.safetensors") for folder in folders}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_float32_merges_agree_with_mergekit(theirs, llamas, loaded, config):
    config = {**resolved(config, vars(llamas)), "dtype": "float32"}
    recipe = Recipe.parse(config)
    expected, found = theirs(config), dict(merged_tensors(recipe))
    assert set(found) == set(expected)
    n_left_out = n_entries = 0
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        difference = (found[name] - tensor).abs().view(-1)
        n_entries += difference.numel()
        if recipe.merge_method == "ties":
            tied = tied_entries(name, recipe, loaded)
            difference[tied] = 0
            n_left_out += int(tied.sum())
            if recipe.parameters.get("rescale"):
                # mergekit's float32 sum of magnitudes is itself good to 1e-6 only.
                difference *= 0.5
        assert float(difference.max()) <= 1e-6 * float(tensor.abs().max()), name
    assert n_left_out <= 1e-3 * n_entries


# ---- bfloat16 -----------------------------------------------------------------------------------

BF16_CASES = [
    "linear, gradient and filters",
    "slerp",
    "task_arithmetic",
    "task_arithmetic, normalized",
    "ties",
    "ties, filters, negative, lambda, rescale",
    "ties, plain, negative",
    "dare_linear",
    "dare_ties, normalized",
    "passthrough",
]


def exact(
    recipe: Recipe, name: str, tensors: dict[str, dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in float64, from the sources as cast to bfloat16.

    Returns:
        value; the sum of the magnitudes of its terms; which entries are open (ties at a threshold,
        votes that balance within float32's rounding, or the factor's under rescale).
    """
    method = METHODS[recipe.merge_method]
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    entries = [entry for entry in recipe.models or () if entry.model != recipe.base_model]
    if method.base == "ignored":
        entries = list(recipe.models or ())
    own = [
        {
            key: look_up(key, parameter, (entry.parameters, recipe.parameters), name, layer / 3)
            for key, parameter in method.per_model.items()
        }
        for entry in entries
    ]
    shared = {
        key: look_up(key, parameter, (recipe.parameters,), name, layer / 3)
        for key, parameter in method.shared.items()
    }
    x = [tensors[entry.model][name].bfloat16().double().view(-1) for entry in entries]
    is_open = torch.zeros(x[0].numel(), dtype=torch.bool)
    weights = [parameters.get("weight", 1.0) for parameters in own]
    if recipe.merge_method == "passthrough":
        return x[0] * own[0]["scale"], x[0].abs(), is_open
    if recipe.merge_method == "linear":
        divisor = sum(weights) if shared["normalize"] else 1.0
        terms = [tensor * weight / divisor for tensor, weight in zip(x, weights, strict=True)]
        return sum(terms), sum(term.abs() for term in terms), is_open
    base = tensors[str(recipe.base_model)][name].bfloat16().double().view(-1)
    if recipe.merge_method == "slerp":
        t = shared["t"]
        cosine = float(base @ x[0] / (base.norm() * x[0].norm()))
        theta = math.acos(min(1.0, max(-1.0, cosine)))
        if abs(cosine) > 0.9995:
            shares = 1 - t, t
        else:
            shares = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
        terms = [shares[0] * base, shares[1] * x[0]]
        return terms[0] + terms[1], terms[0].abs() + terms[1].abs(), is_open
    deltas = []
    for tensor, parameters in zip(x, own, strict=True):
        delta = tensor - base
        if recipe.merge_method == "ties" and parameters["density"] < 1:
            magnitude = delta.abs().float()
            k = max(1, math.floor(parameters["density"] * delta.numel()))
            at_k = magnitude.sort(descending=True).values[k - 1]
            kept = magnitude >= at_k
            factor = 1.0
            if int(kept.sum()) != k:
                is_open |= magnitude == at_k
            if shared["rescale"]:
                wanted = magnitude.double().sort(descending=True).values[:k]
                factor = float(delta.abs().sum() / wanted.sum())
            delta = delta * kept * factor
        deltas.append(delta)
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    total = sum(weighted)
    size = sum(delta.abs() for delta in weighted)
    if recipe.merge_method.endswith("ties"):
        close = 0.02 if shared["rescale"] else 1e-5
        is_open |= (total.abs() < close * size) & (total != 0)
        sign = torch.where(total >= 0, 1.0, -1.0)
        agrees = [delta.sign() == sign for delta in weighted]
        total = sum(delta * agree for delta, agree in zip(weighted, agrees, strict=True))
        divisor = sum(agree * weight for agree, weight in zip(agrees, weights, strict=True))
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor.double())
    else:
        divisor = torch.tensor(sum(weights) if abs(sum(weights)) >= 1e-8 else 1.0)
    if shared["normalize"]:
        total, size = total / divisor, size / divisor.abs()
    return base + shared["lambda"] * total, base.abs() + abs(shared["lambda"]) * size, is_open


def unit_in_the_last_place(value: Tensor) -> Tensor:
    """Return the spacing of bfloat16 numbers (8 significant bits) at the magnitude of a value."""
    exponent = torch.frexp(value).exponent.double()
    return torch.where(value == 0, 0.0, 2.0 ** (exponent - 8))


@pytest.mark.parametrize("name", BF16_CASES)
@pytest.mark.parametrize("stored", ["bf16_llamas", "llamas"], ids=["bf16 files", "f32 files"])
def test_bfloat16_merges_are_the_exact_value_rounded_once(request, loaded, name, stored):
    family = request.getfixturevalue(stored)
    recipe = Recipe.parse({**resolved(CASES[name], vars(family)), "dtype": "bfloat16"})
    n_open = n_entries = 0
    for tensor_name, tensor in merged_tensors(recipe):
        assert tensor.dtype == torch.bfloat16
        value, size, is_open = exact(recipe, tensor_name, loaded)
        error = (tensor.double().view(-1) - value).abs()
        # Rounding once costs half a bfloat16 unit at the exact value's magnitude; where terms
        # cancel, float32 arithmetic loses a share of the terms' magnitude on top. (The factor of
        # rescale depends on which of the tied entries are kept.)
        rescales = bool(recipe.parameters.get("rescale"))
        bound = unit_in_the_last_place(value) / 2 + (0.02 if rescales else 2.0**-21) * size
        worst = (error - bound)[~is_open]
        assert float(worst.max()) <= 0, tensor_name
        n_open += int(is_open.sum())
        n_entries += value.numel()
    # Ties are many in bfloat16, votes that balance exactly (d_x = -2 d_y) are not rare.
    limit = {"ties": 0.1, "dare_ties": 0.02}.get(recipe.merge_method, 0)
    assert n_open <= limit * n_entries


# ---- dare below density 1 -----------------------------------------------------------------------


# Masks depend on the model's name as written, so these use fixed names: the draws are always the same.


@pytest.mark.parametrize("density", [0.1, 0.37, 0.8])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_share_of_its_density(merge_one, llamas, loaded, method, density):
    n_kept = n = 0
    for seed, name in enumerate(loaded[llamas.base]):
        base, x = loaded[llamas.base][name], loaded[llamas.x][name]
        own = [(x, {"weight": 1.0, "density": density})]
        merged = merge_one(method, base, own, rescale=False, seed=seed)
        differs = base != x
        n_kept += int((merged != base)[differs].sum())
        n += int(differs.sum())
    assert n > 50_000
    assert abs(n_kept / n - density) <= 3 * math.sqrt(density * (1 - density) / n)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_delta_in_expectation(merge_one, llamas, loaded, method):
    # Over 40 seeds the mean of (merged - base), unrescaled and divided by the density p, is the
    # delta: an entry's mean has standard error |delta| sqrt((1 - p) / p / 40).
    density, n_seeds = 0.5, 40
    name = "model.layers.1.mlp.up_proj.weight"
    base, x = loaded[llamas.base][name].double(), loaded[llamas.x][name].double()
    delta = x - base
    own = [(x, {"weight": 1.0, "density": density})]
    mean = torch.zeros_like(delta)
    for seed in range(n_seeds):
        mean += (merge_one(method, base, own, rescale=False, seed=seed) - base) / density / n_seeds
    z = (mean - delta) / (delta.abs() * math.sqrt((1 - density) / density / n_seeds))
    # The mean of n independent z has standard error 1 / sqrt(n), their mean square sqrt(2 / n).
    n = z.numel()
    assert abs(float((z * delta.sign()).mean())) <= 3 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) <= 3 * math.sqrt(2 / n)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dare_is_bit_identical_between_two_runs_and_not_between_two_seeds(llamas, method, dtype):
    entries = models(("x", {"weight": 0.7, "density": 0.4}), ("y", {"weight": 0.5, "density": 0.6}))
    config = {**resolved(case(method, entries, "base"), vars(llamas)), "dtype": dtype}
    first = dict(merged_tensors(Recipe.parse(config)))
    torch.manual_seed(99)
    second = dict(merged_tensors(Recipe.parse(config)))
    other = dict(merged_tensors(Recipe.parse({**config, "random_seed": 1})))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ties", "slerp", "passthrough, slices and scale"])
def test_as_config_merges_the_same_in_mergekit(theirs, llamas, name):
    config = {**resolved(CASES[name], vars(llamas)), "dtype": "float32"}
    ours = Recipe.parse(config).as_config()
    expected, found = theirs(config), theirs(ours)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_the_written_config_has_mergekits_layers_and_dtype(llamas, tmp_path):
    import json

    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = resolved(CASES["passthrough, slices and scale"], vars(llamas))
    config = {**config, "dtype": "bfloat16"}
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), options)
    save_merged(Recipe.parse(config), tmp_path / "ours")
    found, expected = (
        json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")
    )
    assert found["num_hidden_layers"] == expected["num_hidden_layers"] == 6
    assert found["hidden_size"] == expected["hidden_size"]
    theirs_dtype = expected.get("dtype") or expected.get("torch_dtype")
    assert (found.get("dtype") or found.get("torch_dtype")) == theirs_dtype == "bfloat16"
