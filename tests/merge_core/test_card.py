"""The model card: what its front matter says, and that nothing local leaks into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

from merge_core.card import hub_ids, model_card
from merge_core.methods import METHODS
from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

from .adapters import saved_adapter

WHOLE = {"parameters": {"weight": 1.0}}


@pytest.fixture
def card_of(tmp_path: Path, llamas: Any) -> Callable[..., str]:
    """Write the card of a linear merge of models whose own cards have these front matters."""

    def write(*fronts: Mapping[str, Any] | str | None, text: str | None = None, **changes: Any) -> str:
        models = []
        for i, front in enumerate(fronts):
            folder = tmp_path / f"m{i}"
            shutil.copytree(llamas.x, folder)
            if front is not None:
                head = (
                    front if isinstance(front, str) else f"---\n{yaml.safe_dump(dict(front))}---\n# m\n"
                )
                (folder / "README.md").write_text(head)
            models.append({"model": str(folder), "parameters": {"weight": 1.0}})
        recipe = Recipe.parse({"merge_method": "linear", "models": models, **changes}, strict=False)
        sources = Sources()
        plan = plan_merge(recipe, sources)
        return model_card(recipe, sources, plan, "merged", text or recipe.to_yaml())

    return write


def front_of(card: str) -> dict[str, Any]:
    front = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def test_the_hub_client_reads_the_card(card_of: Callable[..., str]) -> None:
    data = ModelCard(card_of({"license": "mit"}, {"license": "mit"})).data
    assert data.library_name == "transformers"
    assert data.tags == ["mergekit", "merge"]
    assert data.license == "mit"


def test_local_folders_stay_out_of_the_front_matter(card_of: Callable[..., str], tmp_path: Path) -> None:
    card = card_of(None, None)
    assert "base_model" not in front_of(card)
    assert str(tmp_path) not in card.split("---\n")[1]
    assert f"`{tmp_path}/m0`" in card


@pytest.mark.parametrize(
    ("fronts", "expected", "sentence"),
    [
        ([{"license": "mit"}, {"license": "mit"}], "mit", "All models state mit."),
        ([{"license": "mit"}, None], "mit", "none stated"),
        ([{"license": "mit"}, {"license": "apache-2.0"}], "other", "apache-2.0"),
        ([{"license": ["mit", "gpl"]}, {"license": ["mit", "gpl"]}], "mit, gpl", "mit, gpl"),
        ([None, None], None, "state none"),
        (["---\n: [broken\n---\n", "no front matter"], None, "state none"),
        (["---\nlicense: mit", "---\n- a\n---\n"], None, "state none"),
    ],
    ids=["same", "one silent", "different", "lists", "none", "broken", "unfinished"],
)
def test_the_licence_is_the_sources_own(
    card_of: Callable[..., str], fronts: list[Any], expected: str | None, sentence: str
) -> None:
    card = card_of(*fronts)
    assert front_of(card).get("license") == expected
    assert sentence in card


def test_a_licence_by_name_keeps_name_and_link(card_of: Callable[..., str]) -> None:
    stated = {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma"}
    assert front_of(card_of(stated, stated)).items() >= stated.items()


@pytest.mark.parametrize("on", ["a model", "a result"])
def test_an_adapters_own_licence_counts(llamas: Any, tmp_path: Path, on: str) -> None:
    adapter = tmp_path / "adapter"
    saved_adapter(LlamaForCausalLM.from_pretrained(llamas.x), adapter)
    (adapter / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# a\n")
    model = tmp_path / "m"
    shutil.copytree(llamas.x, model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n# m\n")
    reference = f"{model if on == 'a model' else 'first'}+{adapter}"
    first = {"name": "first", "merge_method": "linear", "models": [{"model": str(model), **WHOLE}]}
    last = {"merge_method": "linear", "models": [{"model": reference, **WHOLE}]}
    written = tmp_path / "recipe.yml"
    written.write_text(yaml.safe_dump_all([last] if on == "a model" else [first, last]))
    recipe = Recipe.load(written)
    sources = Sources()
    card = model_card(recipe, sources, plan_merge(recipe, sources), "merged", "text")
    assert front_of(card)["license"] == "other"
    assert f"each of which holds for its part: `{model}`: mit; `{adapter}`: cc-by-nc-4.0." in card


def test_the_body_says_method_recipe_and_versions(card_of: Callable[..., str]) -> None:
    text = "# by hand\nmerge_method: linear\n"
    card = card_of(None, None, text=text)
    assert f"[linear]({METHODS['linear'].source})" in card
    assert f"```yaml\n{text}```" in card
    assert "torch" in card


def test_a_recipe_with_a_fence_does_not_end_the_block(card_of: Callable[..., str]) -> None:
    text = "# ```\nmerge_method: linear\n"
    assert f"~~~~~~yaml\n{text}~~~~~~" in card_of(None, None, text=text)


def test_what_was_left_out_is_named(llamas: Any, tmp_path: Path) -> None:
    first = {"model": llamas.x, "layer_range": [0, 3]}
    recipe = Recipe.parse(
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [first]}],
            "parameters": {"wieght": 1},
        },
        strict=False,
    )
    sources = Sources()
    card = model_card(recipe, sources, plan_merge(recipe, sources), "cut", recipe.to_yaml())
    left_out = card.split("## What was left out")[1]
    assert "`model.layers.3." in left_out
    assert " more" in left_out
    assert "wieght" in left_out


def test_hub_ids_of_references(llamas: Any) -> None:
    assert hub_ids("org/a") == ["org/a"]
    assert hub_ids("org/a@v1") == ["org/a"]
    assert hub_ids("org/a@v1+org/lora@x") == ["org/a", "org/lora"]
    assert hub_ids(llamas.x) == []
    assert hub_ids(f"{llamas.x}+org/lora") == ["org/lora"]
