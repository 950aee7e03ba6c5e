"""`RESULT+adapter`: as if the result had been written, and its folder named with the adapter."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from merge_core.adapted import AdaptedCheckpoint
from merge_core.card import hub_ids
from merge_core.errors import CheckpointError, RecipeError
from merge_core.estimate import estimate
from merge_core.merge import merged_tensors, save_merged
from merge_core.plan import Sources, has_own_tokenizer, merged_config, plan_merge
from merge_core.recipe import Recipe

from .adapters import saved_adapter
from .vocabularies import ENGLISH, bpe, save_model

pytest.importorskip("peft", reason="PEFT writes the adapters")

ATTENTION = ["q_proj", "v_proj"]
# Of what the model is a fine-tune, and the adapter's config.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llamas", {"target_modules": [*ATTENTION, "down_proj"]}),
    "dora": ("llamas", {"target_modules": ATTENTION, "use_dora": True}),
    "whole": ("llamas", {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "norm"]}),
    "tied": ("tied", {"target_modules": ["embed_tokens", "o_proj"]}),
    "untying": ("tied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "resizing": (
        "llamas",
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}


@pytest.fixture(scope="module")
def place(llamas: Any, tied_llamas: Any, llama_builder: Any, tmp_path_factory: Any) -> Path:
    """A folder with models llamas-x, ... and adapters, by relative names."""
    root: Path = tmp_path_factory.mktemp("place")
    for family, models in (("llamas", llamas), ("tied", tied_llamas)):
        for name in ("base", "x", "y"):
            (root / f"{family}-{name}").symlink_to(getattr(models, name))
    for name, (family, config) in ADAPTERS.items():
        model = llama_builder(tied=family == "tied")
        if name == "resizing":
            model.resize_token_embeddings(103, mean_resizing=False)
        saved_adapter(model, root / name, **config)
    return root


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own, with what is in `place`."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def half(family: str, weight: float = 0.5, **more: Any) -> dict[str, Any]:
    models = [
        {"model": f"{family}-x", "parameters": {"weight": 1.0}},
        {"model": f"{family}-y", "parameters": {"weight": weight}},
    ]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16", **more}


def with_written_results(recipe: Recipe) -> Recipe:
    """Write each result into a folder of its name, and return the recipe that names the folders."""
    for name, document in recipe.results().items():
        save_merged(Recipe.parse(document.as_config()), name, overwrite=True)
    return Recipe.parse(recipe.model_copy(update={"intermediate": {}}).as_config())


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
        for key in expected
    )


def refuse_difference(recipe: Recipe, here: Path) -> None:
    """Hold both folders side by side: every file but the card and the recipe, and each tensor."""
    save_merged(recipe, here / "out")
    save_merged(with_written_results(recipe), here / "expected")
    assert equal(*(load_file(here / f / "model.safetensors") for f in ("out", "expected")))
    files = [path.name for path in (here / "expected").iterdir()]
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(files)
    for name in set(files) - {"README.md", "mergekit_config.yml", "model.safetensors"}:
        assert (here / "out" / name).read_bytes() == (here / "expected" / name).read_bytes()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_is_the_written_result_with_the_adapter(adapter: str, here: Path) -> None:
    family, _ = ADAPTERS[adapter]
    recipe = Recipe.parse(
        {
            "merge_method": "passthrough",
            "models": [{"model": f"half+{adapter}"}],
            "dtype": "float32",
            "intermediate": {"half": half(family)},
        }
    )
    refuse_difference(recipe, here)
    # And it is not the result alone.
    plain = Recipe.parse({**recipe.as_config(), "models": [{"model": "half"}]})
    assert not equal(dict(merged_tensors(recipe)), dict(merged_tensors(plain)))


RECIPES: dict[str, dict[str, Any]] = {
    "models and base": {
        "merge_method": "ties",
        "base_model": "half+plain",
        "models": [
            {"model": "half", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "half+dora", "parameters": {"weight": 0.7, "density": 0.5}},
            {"model": "llamas-base+plain", "parameters": {"weight": 0.3, "density": 0.5}},
        ],
    },
    "chance": {
        "merge_method": "dare_ties",
        "base_model": "llamas-base",
        "models": [{"model": "half+plain", "parameters": {"weight": 1.0, "density": 0.5}}],
        "random_seed": 3,
    },
    "slices": {
        "merge_method": "slerp",
        "base_model": "half+plain",
        "parameters": {"t": [0.2, 0.7]},
        "slices": [
            {
                "sources": [
                    {"model": "half+plain", "layer_range": [0, 2]},
                    {"model": "half+dora", "layer_range": [1, 3]},
                ]
            },
            {
                "merge_method": "linear",
                "parameters": {"weight": 0.5},
                "sources": [
                    {"model": "half+whole", "layer_range": [2, 4]},
                    {"model": "llamas-x", "layer_range": [0, 2]},
                ],
            },
        ],
    },
    "a result of such a result": {
        "merge_method": "task_arithmetic",
        "base_model": "llamas-base",
        "models": [{"model": "second+dora", "parameters": {"weight": 0.8}}],
    },
}


@pytest.mark.parametrize("case", RECIPES)
def test_it_may_stand_where_a_model_may_stand(case: str, here: Path) -> None:
    second = {
        "merge_method": "slerp",
        "base_model": "half+plain",
        "models": [{"model": "half+plain"}, {"model": "half"}],
        "parameters": {"t": 0.3},
    }
    documents = {"second": second, "half": half("llamas")}  # in any order
    recipe = Recipe.parse({"dtype": "bfloat16", **RECIPES[case], "intermediate": documents})
    refuse_difference(recipe, here)


def test_base_and_experts_of_a_mixture_may_have_adapters(here: Path) -> None:
    models = Path(__file__).resolve().parents[2] / "configs/quickstart/models"
    for name in ("base", "reverse", "sort"):
        (here / name).symlink_to(models / name)
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate(("a", "b")):
        base = AutoModelForCausalLM.from_pretrained(models / "base")
        saved_adapter(base, here / name, seed=seed, target_modules=["q_proj", "up_proj"])
    mixed = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "reverse"}]}
    recipe = Recipe.parse(
        {
            "base_model": "mixed+a",
            "experts": [
                {"source_model": "mixed+b", "positive_prompts": ["reverse abc"]},
                {"source_model": "sort", "positive_prompts": ["sort abc"]},
            ],
            "dtype": "float32",
            "intermediate": {"mixed": mixed},
        }
    )
    refuse_difference(recipe, here)


@pytest.mark.parametrize("source", ["half", "half+ad", "second", "base+ad"])
@pytest.mark.parametrize("is_merged", [True, False])
def test_a_tokenizer_may_be_its(source: str, is_merged: bool, here: Path) -> None:
    tokenizer = bpe(ENGLISH, 40, ["<unk>", "<s>", "</s>"], unk_token="<unk>", eos_token="</s>")
    save_model(here / "base", tokenizer, 0)
    save_model(here / "other", tokenizer, 1)
    tokenizer.add_tokens(["<tool>", "<call>"])
    from transformers import AutoModelForCausalLM

    grown = AutoModelForCausalLM.from_pretrained(here / "base")
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    saved_adapter(grown, here / "ad", **whole)
    tokenizer.save_pretrained(here / "ad")
    documents = {
        "half": {"merge_method": "linear", "models": [{"model": "base"}, {"model": "other"}]},
        "second": {"merge_method": "passthrough", "models": [{"model": "half+ad"}]},
    }
    models = [{"model": "other"}, *([{"model": source}] if is_merged else [])]
    recipe = Recipe.parse(
        {
            "merge_method": "linear",
            "models": [{**entry, "parameters": {"weight": 1.0}} for entry in models],
            "tokenizer_source": source,
            "intermediate": documents if source != "base+ad" else {},
        }
    )
    refuse_difference(recipe, here)
    tokens = json.loads((here / "out/tokenizer.json").read_text())["added_tokens"]
    assert any(token["content"] == "<tool>" for token in tokens) == (source != "half")
    assert json.loads((here / "out/config.json").read_text())["vocab_size"] == len(tokenizer) - 2 * (
        source == "half"
    )


def test_the_tokenizer_is_the_adapters_where_it_brings_one(here: Path) -> None:
    tokenizer = bpe(ENGLISH, 40, ["<unk>", "<s>", "</s>"], unk_token="<unk>", eos_token="</s>")
    save_model(here / "base", tokenizer, 0)
    from transformers import AutoModelForCausalLM

    saved_adapter(
        AutoModelForCausalLM.from_pretrained(here / "base"), here / "ad", target_modules=ATTENTION
    )
    documents = {"made": {"merge_method": "passthrough", "models": [{"model": "base"}]}}
    recipe = Recipe.parse(
        {
            "merge_method": "passthrough",
            "models": [{"model": "made+ad"}],
            "chat_template": "chatml",
            "intermediate": documents,
        }
    )
    plain = Recipe.parse({**recipe.as_config(), "chat_template": None})
    assert not has_own_tokenizer(plain, Sources())
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(here / "ad")
    assert has_own_tokenizer(plain, Sources())
    refuse_difference(recipe, here)
    assert "<tool>" in (here / "out/tokenizer.json").read_text()


def test_candidates_whose_result_changes_do_not_meet_and_leave_nothing(here: Path) -> None:
    """As many casts, statistics and models are there after forty candidates as after two."""
    sources = Sources(keep=True)
    opened: list[weakref.ref[Any]] = []

    def candidate(i: int) -> Recipe:
        return Recipe.parse(
            {
                "merge_method": "ties",
                "base_model": "half",
                "models": [
                    {"model": f"half+{name}", "parameters": {"weight": 0.6, "density": 0.4 + i / 400}}
                    for name in ("plain", "whole")
                ],
                "dtype": "float32",
                "intermediate": {"half": half("llamas", weight=(i // 2) / 50)},
            }
        )

    def held() -> tuple[int, ...]:
        statistics, residence = sources.statistics._known, sources.residence
        return len(statistics), len(residence._places), len(residence._kept), residence._host_left

    some: list[tuple[int, ...]] = []
    for i in range(40):
        recipe = candidate(i)
        names = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"]
        found = dict(merged_tensors(recipe, sources, names))
        if i % 20 in (0, 1):
            assert equal(found, dict(merged_tensors(recipe, names=names)))
        seen = sources.within(recipe).architecture("half+plain").checkpoint
        assert isinstance(seen, AdaptedCheckpoint)
        opened.append(weakref.ref(seen))
        del seen
        some.append(held())
    assert some[1] == some[-1]
    gc.collect()
    assert len({id(ref()) for ref in opened if ref() is not None}) == 1
    # Of two candidates that differ in numbers of the last document alone, the models are the same.
    assert all(one == other for one, other in zip(some[::2], some[1::2], strict=True))


def test_it_is_counted_foretold_and_named(here: Path) -> None:
    recipe = Recipe.parse(
        {"dtype": "bfloat16", **RECIPES["models and base"], "intermediate": {"half": half("llamas")}}
    )
    assert recipe.references() == ["llamas-x", "llamas-y", "llamas-base+plain"]
    assert recipe.adapters() == ["plain", "dora"]
    plan = plan_merge(recipe, Sources())
    assert {model for model, _ in plan.read()} == set(recipe.references())
    needs = estimate(recipe, Sources(), here / "out")
    assert needs.models == ("llamas-x", "llamas-y", "llamas-base+plain", "plain", "dora")
    assert needs.seconds is not None
    save_merged(recipe, here / "out")
    card = (here / "out/README.md").read_text()
    assert "* `dora`" in card
    assert "with `half+plain` as base" in card
    assert hub_ids("org/adapter@main") == ["org/adapter"]


def test_mergekit_multi_makes_the_same(here: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main

    recipe = Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": "llamas-base",
            "models": [{"model": "half+plain", "parameters": {"weight": 0.5}}],
            "dtype": "float32",
            "intermediate": {"half": half("llamas") | {"dtype": "float32"}},
        }
    )
    Path("recipe.yml").write_text(recipe.to_yaml())
    line = ["recipe.yml", "--out-path", "out", "-I", "inner", "--quiet", "--lora-merge-cache", "cache"]
    CliRunner().invoke(main, [*line, "--no-write-model-card"])
    expected = load_file("out/model.safetensors")
    found = dict(merged_tensors(recipe))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


PLAIN = {"merge_method": "linear", "models": [{"model": "llamas-x"}]}
SHORT = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "llamas-x", "layer_range": [0, 2]}]}],
}


@pytest.mark.parametrize(
    ("model", "documents", "said"),
    [
        ("half+", {"half": PLAIN}, r"model 'half\+' names no adapter"),
        ("half+nowhere", {"half": PLAIN}, "'nowhere': no such folder"),
        ("half+llamas-y", {"half": PLAIN}, "'llamas-y' has no adapter_model.safetensors"),
        ("half+plain", {"half": SHORT}, "adapter 'plain': .* has no place in 'half'"),
        ("half+plain", {"half": {**PLAIN, "models": [{"model": "half+plain"}]}}, "half use each other"),
        (
            "half",
            {
                "half": {**PLAIN, "tokenizer_source": "other"},
                "other": {**PLAIN, "base_model": "half+plain"},
            },
            "half, other use each other in a circle",
        ),
    ],
)
def test_what_does_not_fit_is_said(model: str, documents: Any, said: str, here: Path) -> None:
    data = {"merge_method": "passthrough", "models": [{"model": model}], "intermediate": documents}
    with pytest.raises((RecipeError, CheckpointError), match=said) as error:
        merged_tensors(Recipe.parse(data))
    assert "Traceback" not in str(error.value)


def test_a_document_that_is_used_with_an_adapter_is_used(here: Path) -> None:
    documents = [
        {"name": "half", **half("llamas")},
        {"name": "last", "merge_method": "passthrough", "models": [{"model": "half+plain"}]},
    ]
    Path("r.yml").write_text(yaml.safe_dump_all(documents))
    recipe = Recipe.load("r.yml")
    assert (recipe.inputs(), list(recipe.results())) == (["half+plain"], ["half"])
    assert recipe.check() == ([], [])
    by_parts = [{"model": {"model": {"path": "half"}, "lora": {"path": "plain"}}}]
    assert Recipe.parse({**recipe.as_config(), "models": by_parts}) == recipe
    assert merged_config(recipe, Sources())["dtype"] == "bfloat16"
