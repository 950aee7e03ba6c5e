"""A linear recipe over adapters of one base as one adapter: base + B A is what the merge writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_core.combined import NoAdapterError, combined_adapter
from merge_core.errors import RecipeError
from merge_core.merge import merged_tensors
from merge_core.plan import model_alone
from merge_core.recipe import Recipe
from merge_core.sources import Sources

from .adapters import saved_adapter

pytest.importorskip("peft", reason="PEFT writes the adapters")

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_LAYERS = 4
LAYERS = {"filter": "mlp", "value": [0.1, 0.9]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama_builder: Callable[..., Any]) -> Path:
    """A base and adapters of it: of two ranks and scalings, and some that are no low-rank change."""
    folder = tmp_path_factory.mktemp("combined")
    for name, config in {
        "a": {"target_modules": EVERYTHING},
        "b": {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True},
        "dora": {"target_modules": ["q_proj"], "use_dora": True},
        "vocabulary": {"target_modules": ["q_proj", "embed_tokens"]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    }.items():
        attention_bias = name == "bias"
        base = llama_builder(attention_bias=attention_bias)
        base.save_pretrained(folder / ("biased" if attention_bias else "base"))
        saved_adapter(base, folder / name, seed=len(name), **config)
    return folder


def of(folder: Path, method: str = "linear", **further: Any) -> Recipe:
    """A recipe over base+a and base+b with weights by filter and layer."""
    weights = [[LAYERS, {"value": 0.7}], [{"filter": "q_proj", "value": [1.5, 0.2]}, {"value": 0.4}]]
    models = [
        {"model": f"{folder}/base+{folder}/{name}", "parameters": {"weight": weight}}
        for name, weight in zip("ab", weights, strict=True)
    ]
    return Recipe.parse({"merge_method": method, "models": models, "dtype": "float32", **further})


def alone(folder: Path, name: str, base: str = "base") -> Recipe:
    return model_alone(f"{folder}/{base}+{folder}/{name}")


def sums(recipe: Recipe) -> dict[str, Tensor]:
    """Base and the combined adapter's products, by tensor."""
    sources = Sources()
    adapter = combined_adapter(recipe, sources)
    tensors = dict(merged_tensors(model_alone(adapter.base, recipe), sources))
    for module, (a, b) in adapter.factors.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + b @ a
    return tensors


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("task_arithmetic", {"lambda": 0.8}),
        ("task_arithmetic", {"lambda": [1.2, 0.3], "normalize": True}),
    ],
)
def test_base_and_adapter_are_the_merge(models: Path, method: str, parameters: dict[str, Any]) -> None:
    based = {} if method == "linear" else {"base_model": f"{models}/base"}
    recipe = of(models, method, parameters=parameters, **based)
    merged = dict(merged_tensors(recipe, Sources()))
    for name, tensor in sums(recipe).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)


def test_a_base_with_an_adapter_has_what_the_others_leave(models: Path) -> None:
    recipe = of(models, "task_arithmetic", base_model=f"{models}/base+{models}/b")
    merged = dict(merged_tensors(recipe, Sources()))
    for name, tensor in sums(recipe).items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)


def test_ranks_add_up_and_do_not_depend_on_weights(models: Path) -> None:
    recipe = of(models)
    assert combined_adapter(recipe, Sources()).rank == 4 + 3
    data = recipe.as_config()
    data["models"][0]["parameters"]["weight"] = 0.0
    assert combined_adapter(Recipe.parse(data), Sources()).rank == 4 + 3


def test_what_is_saved_peft_loads(models: Path, tmp_path: Path) -> None:
    recipe = of(models)
    combined_adapter(recipe, Sources()).save(tmp_path / "one")
    merged = dict(merged_tensors(recipe, Sources()))
    again = merged_tensors(model_alone(f"{models}/base+{tmp_path}/one"), Sources())
    for name, tensor in again:
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda m: of(m, parameters={"normalize": False}), "sum to"),
        (lambda m: of(m, "ties", base_model=f"{m}/base"), "ties is not linear"),
        (lambda m: of(m, tokenizer_source="union"), "vocabulary is built anew"),
        (lambda m: alone(m, "dora"), r"\(DoRA\)"),
        (lambda m: alone(m, "vocabulary"), "replaces model.embed_tokens.weight as a whole"),
        (lambda m: alone(m, "whole"), "replaces lm_head.weight as a whole"),
        (lambda m: alone(m, "bias", "biased"), "changes the bias"),
        (lambda m: model_alone(f"{m}/base"), "no model of it has an adapter"),
        (
            lambda m: Recipe.parse(
                {
                    "merge_method": "passthrough",
                    "slices": [
                        {"sources": [{"model": f"{m}/base+{m}/a", "layer_range": [i, i + 1]}]}
                        for i in reversed(range(N_LAYERS))
                    ],
                }
            ),
            "is made of other tensors",
        ),
    ],
)
def test_what_is_no_adapter_says_why(models: Path, make: Callable[[Path], Recipe], why: str) -> None:
    with pytest.raises(NoAdapterError, match=why):
        combined_adapter(make(models), Sources())


def test_models_of_two_bases_are_no_adapter(models: Path, llamas: Any) -> None:
    data = of(models).as_config()
    data["models"].append({"model": llamas.x, "parameters": {"weight": 0.1}})
    with pytest.raises(NoAdapterError, match="several bases"):
        combined_adapter(Recipe.parse(data), Sources())


def test_weights_that_sum_to_zero_are_the_merges_own_error(models: Path) -> None:
    data = of(models).as_config()
    for entry, weight in zip(data["models"], (0.5, -0.5), strict=True):
        entry["parameters"]["weight"] = weight
    with pytest.raises(RecipeError, match="sum to zero"):
        combined_adapter(Recipe.parse(data), Sources())
