"""A mixture of experts as a model of another recipe: as if it had been written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge_core.moe.router as router
from merge_core.estimate import estimate
from merge_core.experts import MIXTRAL, respelled
from merge_core.merge import load_merged, merged_tensors, save_merged
from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

MODELS = Path(__file__).resolve().parents[2] / "configs/quickstart/models"
Documents = dict[str, dict[str, Any]]


def mixture(base: str, other: str, gate_mode: str = "hidden", **own: Any) -> dict[str, Any]:
    experts = [
        {"source_model": base, "positive_prompts": ["reverse abc"], **own},
        {"source_model": other, "positive_prompts": ["sort abc"], "negative_prompts": ["reverse abc"]},
    ]
    return {"base_model": base, "experts": experts, "gate_mode": gate_mode, "dtype": "bfloat16"}


def recipe_of(documents: Documents, method: str = "linear", weight: float = 0.7, **more: Any) -> Recipe:
    models = [
        {"model": "one", "parameters": {"weight": weight}},
        {"model": "two", "parameters": {"weight": 0.5}},
    ]
    data = {"merge_method": method, "models": models, "dtype": "bfloat16", **more}
    return Recipe.parse({**data, "intermediate": documents})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in MODELS.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
        for key in expected
    )


def with_written_results(recipe: Recipe) -> Recipe:
    """Write each result into a folder of its name, and return the recipe that names the folders."""
    for name, document in recipe.results().items():
        save_merged(Recipe.parse(document.as_config()), name)
    return Recipe.parse(recipe.model_copy(update={"intermediate": {}}).as_config())


HALF = {"merge_method": "linear", "models": [{"model": "base"}, {"model": "reverse"}]}
CASES: dict[str, tuple[Documents, dict[str, Any]]] = {
    "linear": ({"one": mixture("base", "sort"), "two": mixture("reverse", "largest")}, {}),
    "ties of noisy ones": (
        {"one": mixture("base", "sort", noise_scale=0.01), "two": mixture("base", "sort", "random")},
        {"method": "ties", "base_model": "two", "parameters": {"density": 0.6}},
    ),
    "of another result": (
        {"two": mixture("half", "sort", "cheap_embed"), "half": HALF, "one": mixture("half", "sort")},
        {"chat_template": "chatml"},
    ),
    "a result of mixtures": (
        {
            "one": mixture("base", "sort"),
            "three": mixture("base", "reverse"),
            "two": {"merge_method": "slerp", "base_model": "one", "parameters": {"t": 0.3}}
            | {"models": [{"model": "one"}, {"model": "three"}]},
        },
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merge_of_mixtures_is_that_of_the_mixtures_written(case: str, here: Path) -> None:
    documents, more = CASES[case]
    recipe = recipe_of(documents, **more)
    assert Recipe.parse(recipe.as_config()) == recipe
    (here / "again.yml").write_text(recipe.to_yaml())
    assert Recipe.load("again.yml") == recipe
    save_merged(recipe, here / "out")
    save_merged(with_written_results(recipe), here / "expected")
    assert equal(*(load_file(here / folder / "model.safetensors") for folder in ("out", "expected")))
    files = [path.name for path in (here / "expected").iterdir()]
    assert sorted(path.name for path in (here / "out").iterdir()) == sorted(files)
    for name in set(files) - {"README.md", "mergekit_config.yml", "model.safetensors"}:
        assert (here / "out" / name).read_bytes() == (here / "expected" / name).read_bytes()
    card = (here / "out/README.md").read_text()
    assert "- moe\n" in card
    assert "`one` is a [mixture]" in card
    assert load_merged(recipe).config.model_type == "mixtral"


def test_prompts_are_run_once_for_all_candidates_that_run_the_same_base(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[str] = []
    run = router.prompt_rows

    def counted(recipe: Any, prompts: Any, sources: Sources) -> Any:
        bases.append(recipe.base_model)
        return run(recipe, prompts, sources)

    monkeypatch.setattr(router, "prompt_rows", counted)
    sources = Sources(keep=True)
    for i, scale in enumerate((0.5, 1.0, 1.5)):
        documents = {
            "one": mixture("base", "sort", residual_scale=scale),
            "two": mixture("half", "sort"),
            "half": {**HALF, "parameters": {"weight": [1.0 + (i == 2), 1.0]}},
        }
        recipe = recipe_of(documents, weight=scale)
        assert equal(dict(merged_tensors(recipe, sources)), dict(merged_tensors(recipe, Sources())))
    # Three fresh merges of both bases; of those that go on, `half` changed once.
    assert sorted(bases) == ["base"] * (3 + 1) + ["half"] * (3 + 2)


def test_a_mixture_merges_with_one_whose_experts_are_joined(here: Path) -> None:
    """As if both lay on the disk; whichever comes first."""
    from transformers import AutoModelForCausalLM

    save_merged(Recipe.parse(mixture("base", "sort")), here / "single")
    AutoModelForCausalLM.from_pretrained("single").save_pretrained(here / "joined")
    # It may have saved them one by one again; in memory they are joined.
    joined = load_merged(Recipe.parse(mixture("base", "sort"))).state_dict()
    save_file({name: t.contiguous() for name, t in joined.items()}, "joined/model.safetensors")
    assert any(name.endswith("gate_up_proj") for name in load_file("joined/model.safetensors"))
    expected = dict(respelled(load_file("joined/model.safetensors").items(), MIXTRAL))
    assert expected.keys() == load_file("single/model.safetensors").keys()
    twice = {"merge_method": "linear", "models": [{"model": "joined"}, {"model": "single"}]}
    for documents in (
        {"one": mixture("base", "sort"), "two": {**twice, "dtype": "bfloat16"}},
        {"one": {**twice, "models": [{"model": "joined"}]}, "two": mixture("base", "sort")},
    ):
        recipe = recipe_of(documents, "ties", base_model="single", parameters={"density": 0.5})
        found = dict(merged_tensors(recipe))
        needs = estimate(recipe, Sources(), here / "out")
        assert needs.n_tensors == len(found)
        assert equal(found, dict(merged_tensors(with_written_results(recipe))))
        for name in recipe.results():
            shutil.rmtree(name)


def test_an_estimate_knows_what_it_takes(here: Path) -> None:
    recipe = recipe_of(CASES["of another result"][0])
    needs = estimate(recipe, Sources(), here / "out")
    assert needs.models == ("base", "reverse", "sort")
    assert needs.n_tensors == len(plan_merge(recipe, Sources()))
    assert needs.seconds is not None
    assert needs.seconds < 60
