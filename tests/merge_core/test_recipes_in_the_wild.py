"""Recipes of the shapes that people publish are read as they are, and say what mergekit reads in them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from merge_core.methods import METHODS
from merge_core.recipe import Recipe

# name: (text, methods, base of the first part, models of the first part, unread parameters)
WILD: dict[str, tuple[str, list[str], str | None, list[str], int]] = {
    "frankenmerge": (
        """
        slices:
          - sources:
              - model: org/a
                layer_range: [0, 16]
          - sources:
              - model: org/b
                layer_range: [8, 24]
          - sources:
              - model: org/a
                layer_range: [17, 32]
        merge_method: passthrough
        dtype: float16
        """,
        ["passthrough"],
        None,
        ["org/a"],
        0,
    ),
    "a tall frankenmerge of many short slices": (
        """
        slices:
        - sources:
          - model: Xwin-LM/Xwin-LM-70B-V0.1
            layer_range: [0, 16]
        - sources:
          - model: Sao10K/Euryale-1.3-L2-70B
            layer_range: [8, 24]
        - sources:
          - model: Xwin-LM/Xwin-LM-70B-V0.1
            layer_range: [17, 32]
        - sources:
          - model: Sao10K/Euryale-1.3-L2-70B
            layer_range: [25, 32]
        merge_method: passthrough
        dtype: float16
        """,
        ["passthrough"],
        None,
        ["Xwin-LM/Xwin-LM-70B-V0.1"],
        0,
    ),
    "a model without its middle layers": (
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 16]}]
          - sources: [{model: org/a, layer_range: [24, 32]}]
        merge_method: passthrough
        dtype: bfloat16
        """,
        ["passthrough"],
        None,
        ["org/a"],
        0,
    ),
    "self-stack that silences outputs": (
        """
        slices:
        - sources:
          - {model: org/a, layer_range: [0, 24]}
        - sources:
          - model: org/a
            layer_range: [8, 24]
            parameters:
              scale:
                - filter: o_proj
                  value: 0.0
                - filter: down_proj
                  value: 0.0
                - value: 1.0
        merge_method: passthrough
        dtype: bfloat16
        """,
        ["passthrough"],
        None,
        ["org/a"],
        0,
    ),
    "layer-wise slerp": (
        """
        slices:
          - sources:
              - model: org/a
                layer_range: [0, 32]
              - model: org/b
                layer_range: [0, 32]
        merge_method: slerp
        base_model: org/a
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5 # fallback for rest of tensors
        dtype: float16
        """,
        ["slerp"],
        "org/a",
        ["org/a", "org/b"],
        0,
    ),
    "slerp of whole models, head and norms by name": (
        """
        models:
          - model: org/a
          - model: org/b
        merge_method: slerp
        base_model: org/b
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.25, 0.5, 0.75, 1]}
            - {filter: mlp, value: [1, 0.75, 0.5, 0.25, 0]}
            - {filter: lm_head, value: [0.7]}
            - {filter: input_layernorm, value: [0.25, 1]}
            - value: [0.5]
        dtype: bfloat16
        """,
        ["slerp"],
        "org/b",
        ["org/a", "org/b"],
        0,
    ),
    "slerp without a base": (
        """
        models: [{model: org/a}, {model: org/b}]
        merge_method: slerp
        parameters: {t: 0.5}
        """,
        ["slerp"],
        "org/a",
        ["org/a", "org/b"],
        0,
    ),
    "dare_ties of three, base listed": (
        """
        models:
          - model: mistralai/Mistral-7B-v0.1
            # No parameters necessary for base model
          - model: org/a
            parameters:
              density: 0.53
              weight: 0.4
          - model: org/b
            parameters:
              density: 0.53
              weight: 0.3
          - model: org/c
            parameters:
              density: 0.53
              weight: 0.3
        merge_method: dare_ties
        base_model: mistralai/Mistral-7B-v0.1
        parameters:
          int8_mask: true
        dtype: bfloat16
        """,
        ["dare_ties"],
        "mistralai/Mistral-7B-v0.1",
        ["mistralai/Mistral-7B-v0.1", "org/a", "org/b", "org/c"],
        0,
    ),
    "ties with gradients": (
        """
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: garage-bAInd/Platypus2-13B
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: WizardLM/WizardMath-13B-V1.0
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: TheBloke/Llama-2-13B-fp16
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
        ["ties"],
        "TheBloke/Llama-2-13B-fp16",
        [
            "psmathur/orca_mini_v3_13b",
            "garage-bAInd/Platypus2-13B",
            "WizardLM/WizardMath-13B-V1.0",
            "TheBloke/Llama-2-13B-fp16",
        ],
        0,
    ),
    "ties with a weighted base": (
        """
        models:
          - {model: org/base, parameters: {weight: 1}}
          - {model: org/a, parameters: {weight: 1, density: 1}}
        merge_method: ties
        base_model: org/base
        parameters: {density: 1, normalize: true, int8_mask: true}
        dtype: bfloat16
        """,
        ["ties"],
        "org/base",
        ["org/base", "org/a"],
        0,
    ),
    "task arithmetic that forgets": (
        """
        base_model: org/base
        merge_method: task_arithmetic
        models:
          - model: org/a
            parameters:
              weight: 1.2
          - model: org/unwanted
            parameters:
              weight: -0.4
        parameters: {lambda: "7e-1"}
        out_dtype: torch.bfloat16
        dtype: float32
        """,
        ["task_arithmetic"],
        "org/base",
        ["org/a", "org/unwanted", "org/base"],
        0,
    ),
    "linear": (
        """
        models:
          - model: org/a
            parameters:
              weight: 1.0
          - model: org/b@main
            parameters:
              weight: 0.3
        merge_method: linear
        dtype: float16
        """,
        ["linear"],
        None,
        ["org/a", "org/b@main"],
        0,
    ),
    "linear with another method's parameters": (
        """
        models:
          - {model: org/a, parameters: {weight: 0.5, density: 0.5}}
          - {model: org/b, parameters: {weight: 0.5, density: 0.5}}
        merge_method: linear
        parameters: {int8_mask: true, normalize: true}
        """,
        ["linear"],
        None,
        ["org/a", "org/b"],
        3,
    ),
    "model_stock": (
        """
        models: [{model: org/a}, {model: org/b}, {model: org/c}]
        base_model: org/base
        merge_method: model_stock
        dtype: bfloat16
        parameters: {filter_wise: false}
        """,
        ["model_stock"],
        "org/base",
        ["org/a", "org/b", "org/c", "org/base"],
        0,
    ),
    "della in modules": (
        """
        merge_method: della
        base_model: org/base
        modules:
          default:
            slices:
            - sources:
              - layer_range: [0, 28]
                model: org/a
                parameters: {density: 0.5, epsilon: 0.1, weight: 0.5}
              - layer_range: [0, 28]
                model: org/b
                parameters: {density: 0.5, epsilon: 0.1, weight: 0.5}
              - layer_range: [0, 28]
                model: org/base
            parameters: {lambda: 1.1}
        parameters: {normalize: true, int8_mask: true}
        """,
        ["della"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        0,
    ),
    "breadcrumbs_ties": (
        """
        merge_method: breadcrumbs_ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
          - {model: org/b, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
        """,
        ["breadcrumbs_ties"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        0,
    ),
    "arcee_fusion": (
        """
        models: [{model: org/a}]
        merge_method: arcee_fusion
        base_model: org/base
        dtype: bfloat16
        """,
        ["arcee_fusion"],
        "org/base",
        ["org/a", "org/base"],
        0,
    ),
    "nearswap": (
        """
        models: [{model: org/a}]
        merge_method: nearswap
        base_model: org/base
        parameters: {t: [0.02, 0.005]}
        """,
        ["nearswap"],
        "org/base",
        ["org/a", "org/base"],
        0,
    ),
    "dare_linear with parameters of ties and della": (
        """
        models:
          - {model: org/a, parameters: {weight: 0.6, density: 0.5, epsilon: 0.05, gamma: 0.01}}
          - {model: org/b, parameters: {weight: 0.4, density: 0.5, normalize: true}}
        merge_method: dare_linear
        base_model: org/base
        parameters: {t: 0.5, int8_mask: true, normalize: false, lambda: 1.05}
        dtype: bfloat16
        """,
        ["dare_linear"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        4,
    ),
    "sce": (
        """
        merge_method: sce
        base_model: org/base
        models: [{model: org/a}, {model: org/b}]
        parameters: {select_topk: 0.1, int8_mask: true}
        """,
        ["sce"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        0,
    ),
    "karcher": (
        """
        merge_method: karcher
        base_model: org/a
        models: [{model: org/b}, {model: org/c}]
        parameters: {max_iter: 1000, tol: 1e-9}
        """,
        ["karcher"],
        None,
        ["org/b", "org/c", "org/a"],
        0,
    ),
    "nuslerp of two without a base": (
        """
        merge_method: nuslerp
        models:
          - {model: org/a, parameters: {weight: [1, 0.3]}}
          - {model: org/b, parameters: {weight: 0.6}}
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        """,
        ["nuslerp"],
        None,
        ["org/a", "org/b"],
        0,
    ),
    "tokenizer union": (
        """
        models:
          - model: org/a
            parameters:
              weight: 0.5
              density: 0.6
          - model: org/b
            parameters:
              weight: 0.5
              density: 0.6
        merge_method: ties
        base_model: org/base
        parameters:
          normalize: true
          int8_mask: true
        tokenizer_source: union
        dtype: bfloat16
        """,
        ["ties"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        0,
    ),
    "references as mappings": (
        """
        merge_method: linear
        models:
          - model: {model: {path: org/a, revision: v1}}
            parameters: {weight: 1}
          - model:
              model: {path: org/b}
              lora: {path: org/lora, revision: null}
            parameters: {weight: 1}
        """,
        ["linear"],
        None,
        ["org/a@v1", "org/b+org/lora"],
        0,
    ),
    "a method a slice": (
        """
        slices:
          - sources: [{model: org/a, layer_range: [0, 8]}]
            merge_method: passthrough
          - sources:
              - {model: org/a, layer_range: [8, 24]}
              - {model: org/b, layer_range: [8, 24]}
            merge_method: slerp
            parameters: {t: [0, 1]}
          - sources: [{model: org/b, layer_range: [24, 32], parameters: {weight: 0.5, density: 0.5}}]
            merge_method: ties
            base_model: org/base
        """,
        ["passthrough", "slerp", "ties"],
        None,
        ["org/a"],
        0,
    ),
    "models and slices": (
        """
        merge_method: dare_ties
        base_model: org/base
        models:
          - {model: org/a, parameters: {weight: 0.5, density: 0.5}}
          - {model: org/b, parameters: {weight: 0.3}}
        slices:
          - sources: [{model: org/a, layer_range: [0, 8]}, {model: org/b, layer_range: [0, 8]}]
          - sources:
              - {model: org/a, layer_range: [8, 16], parameters: {weight: 0.9}}
              - {model: org/b, layer_range: [8, 16]}
        """,
        ["dare_ties"],
        "org/base",
        ["org/a", "org/b", "org/base"],
        0,
    ),
}


@pytest.mark.parametrize(("text", "methods", "base", "models", "n_unread"), WILD.values(), ids=WILD)
def test_a_published_recipe_is_read(text, methods, base, models, n_unread):
    data = yaml.safe_load(text)
    recipe = Recipe.parse(data, strict=n_unread == 0)
    faults, warnings = recipe.check()
    assert faults == []
    assert len(warnings) == n_unread
    assert recipe.methods() == methods
    first = recipe.parts()[0]
    assert first.base == base
    assert [source.model for source in first.sources] == models


@pytest.mark.parametrize("text", [entry[0] for entry in WILD.values()], ids=WILD)
def test_a_published_recipe_survives_its_own_yaml(tmp_path, text):
    recipe = Recipe.parse(yaml.safe_load(text), strict=False)
    assert Recipe.parse(recipe.as_config(), strict=False) == recipe
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yml", strict=False) == recipe


# name: (text, models in order, notes)
MIXTURES: dict[str, tuple[str, list[str], int]] = {
    "four specialists, negative prompts too": (
        """
        base_model: mlabonne/Marcoro14-7B-slerp
        experts:
          - source_model: openchat/openchat-3.5-1210
            positive_prompts:
            - "chat"
            - "assistant"
            - "tell me"
            - "explain"
            - "I want"
          - source_model: beowolx/CodeNinja-1.0-OpenChat-7B
            positive_prompts: ["code", "python", "javascript", "programming", "algorithm"]
          - source_model: maywell/PiVoT-0.1-Starling-LM-RP
            positive_prompts: ["storywriting", "write", "scene", "story", "character"]
            negative_prompts: ["mathematics", "code"]
          - source_model: WizardLM/WizardMath-7B-V1.1
            positive_prompts: ["reason", "math", "mathematics", "solve", "count"]
        """,
        [
            "mlabonne/Marcoro14-7B-slerp",
            "openchat/openchat-3.5-1210",
            "beowolx/CodeNinja-1.0-OpenChat-7B",
            "maywell/PiVoT-0.1-Starling-LM-RP",
            "WizardLM/WizardMath-7B-V1.1",
        ],
        0,
    ),
    "a method that says so, gates of embeddings": (
        """
        merge_method: moe
        base_model: org/base
        gate_mode: cheap_embed
        dtype: bfloat16
        experts_per_token: 2
        experts:
          - {source_model: org/a, positive_prompts: [""]}
          - {source_model: org/b, positive_prompts: ["b"], residual_scale: 0.5}
        """,
        ["org/base", "org/a", "org/b"],
        0,
    ),
    "one model many times, to be trained": (
        """
        base_model: org/base
        gate_mode: random
        dtype: bfloat16
        experts: [{source_model: org/base}, {source_model: org/base}]
        """,
        ["org/base"],
        2,
    ),
    "a mixture of merges": (
        """
        base_model: soup
        experts:
          - {source_model: soup, positive_prompts: [a]}
          - {source_model: org/b, positive_prompts: [b]}
        intermediate:
          soup: {merge_method: linear, models: [{model: org/base}, {model: org/a}]}
        """,
        ["org/base", "org/a", "org/b"],
        0,
    ),
}


@pytest.mark.parametrize(("text", "models", "n_notes"), MIXTURES.values(), ids=MIXTURES)
def test_a_published_mixture_is_read(tmp_path, text, models, n_notes):
    recipe = Recipe.parse(yaml.safe_load(text))
    faults, warnings = recipe.check()
    assert faults == []
    assert len(warnings) == n_notes
    assert recipe.references() == models
    (tmp_path / "r.yml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "r.yml") == recipe


def test_all_references_of_a_recipe_are_known_base_first():
    found = {
        name: Recipe.parse(yaml.safe_load(entry[0]), False).references() for name, entry in WILD.items()
    }
    assert found["frankenmerge"] == ["org/a", "org/b"]
    assert found["dare_ties of three, base listed"][0] == "mistralai/Mistral-7B-v0.1"
    assert found["a method a slice"] == ["org/a", "org/b", "org/base"]
    assert found["karcher"] == ["org/a", "org/b", "org/c"]


# The table as mergekit 0.1.5 gives it: base, inputs, shared parameters, each model's; None = required.
_TASK: dict[str, Any] = {"normalize": False, "lambda": 1.0, "int8_mask": False, "rescale": False}
_OWN: dict[str, Any] = {"weight": None, "density": 1.0}
_MANY = float("inf")
TABLE: dict[str, tuple[str, tuple[float, float], dict[str, Any], dict[str, Any]]] = {
    "linear": ("ignored", (1, _MANY), {"normalize": True}, {"weight": 1.0}),  # mergekit: required
    "slerp": ("required", (1, 1), {"t": None}, {}),
    "nuslerp": (
        "optional",
        (2, 2),
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        {"weight": None},
    ),
    "multislerp": ("optional", (1, _MANY), {"normalize_weights": True, "eps": 1e-8}, {"weight": None}),
    "karcher": ("input", (1, _MANY), {"max_iter": 10, "tol": 1e-5}, {}),
    "passthrough": ("ignored", (1, 1), {}, {"scale": 1.0}),
    "task_arithmetic": ("required", (1, _MANY), _TASK, _OWN),
    "ties": ("required", (1, _MANY), {**_TASK, "normalize": True}, _OWN),
    "dare_linear": ("required", (1, _MANY), {**_TASK, "rescale": True}, _OWN),
    "dare_ties": ("required", (1, _MANY), {**_TASK, "rescale": True}, _OWN),
    "breadcrumbs": ("required", (1, _MANY), _TASK, {**_OWN, "gamma": 0.01}),
    "breadcrumbs_ties": ("required", (1, _MANY), _TASK, {**_OWN, "gamma": 0.01}),
    "della": (
        "required",
        (1, _MANY),
        {**_TASK, "normalize": True, "rescale": True},
        {**_OWN, "epsilon": 0.15},
    ),
    "della_linear": ("required", (1, _MANY), {**_TASK, "rescale": True}, {**_OWN, "epsilon": 0.15}),
    "model_stock": ("required", (2, _MANY), {"filter_wise": False}, {}),
    "nearswap": ("required", (1, 1), {"t": None}, {}),
    "arcee_fusion": ("required", (1, 1), {}, {}),
    "sce": ("required", (1, _MANY), {"int8_mask": False, "select_topk": 1.0}, {}),
    "ram": ("required", (1, _MANY), {"epsilon": 1e-5}, {}),
    "ramplus_tl": ("required", (1, _MANY), {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, {}),
}


def test_the_table_of_methods_is_mergekits():
    assert METHODS.keys() == TABLE.keys()
    for name, method in METHODS.items():
        base, n_models, shared, per_model = TABLE[name]
        assert (method.base, method.n_models) == (base, n_models)
        for found, expected in ((method.shared, shared), (method.per_model, per_model)):
            assert {key: p.default for key, p in found.items()} == expected, name
            assert {key for key, p in found.items() if p.required} == {
                key for key, default in expected.items() if default is None
            }


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_and_parameter_says_what_it_is(method):
    assert method.summary
    assert "\n" not in method.summary
    assert method.source.startswith("https://")
    for parameter in method.parameters.values():
        assert parameter.help
        assert len(parameter.help) < 80
        if parameter.default is not None:
            assert not parameter.faults("p", parameter.default)
        assert not parameter.faults("p", parameter.default if parameter.default else parameter.example)


def test_the_methods_that_draw_masks_are_known():
    drawing = {name for name, method in METHODS.items() if method.is_random}
    assert drawing == {"dare_linear", "dare_ties", "della", "della_linear"}
