"""Searches and merges of recipes that use each other's results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from evolve.cli import main
from evolve.errors import ResumeRefusedError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import run
from evolve.search_file import SearchFile
from evolve.space import Space, Value
from merge_core.merge import save_merged
from merge_core.recipe import Recipe

from ..merge_core.adapters import saved_adapter

ROOT = Path(__file__).resolve().parents[2]
MODELS = "configs/quickstart/models"
SEARCH = f"""
name: skills
merge_method: {{choices: [task_arithmetic, dare_linear]}}
base_model: {MODELS}/base
models:
  - model: {MODELS}/reverse
    parameters: {{weight: {{low: 0.0, high: 1.0}}, density: {{low: 0.5, high: 1.0}}}}
  - {{model: {MODELS}/sort, parameters: {{weight: 0.5}}}}
dtype: bfloat16
---
merge_method: slerp
base_model: skills
models: [{{model: skills}}, {{model: {MODELS}/largest}}]
parameters: {{t: {{low: 0.0, high: 1.0}}}}
dtype: float32
tasks: [qs_reverse, qs_largest]
search: {{n_iterations: 5, sampler: random}}
scoring: {{limit: 10, holdout: 10}}
"""
ADAPTED = """
name: skills
merge_method: dare_ties
base_model: {models}/base
models:
  - model: {models}/reverse
    parameters: {{weight: {{low: 0.5, high: 1.5}}, density: {{low: 0.5, high: 1.0}}}}
  - {{model: {models}/sort, parameters: {{weight: 0.5, density: 0.8}}}}
dtype: bfloat16
---
merge_method: linear
models:
  - {{model: skills, parameters: {{weight: 1.0}}}}
  - model: {{choices: ["skills+{adapters}/a", "skills+{adapters}/b"]}}
    parameters: {{weight: {{low: 0.0, high: 0.2}}}}
dtype: float32
tasks: [qs_reverse]
search: {{n_iterations: 4, sampler: random}}
scoring: {{limit: 6, holdout: 0}}
"""
MIXED = f"""
name: one
base_model: {MODELS}/base
experts:
  - {{source_model: {MODELS}/reverse, positive_prompts: [reverse abc]}}
  - source_model: {MODELS}/sort
    positive_prompts: [sort abc]
    residual_scale: {{low: 0.5, high: 1.5}}
---
name: two
base_model: {MODELS}/base
experts:
  - {{source_model: {MODELS}/reverse, positive_prompts: [reverse xyz]}}
  - {{source_model: {MODELS}/largest, positive_prompts: [largest xyz]}}
---
merge_method: linear
models:
  - {{model: one, parameters: {{weight: {{low: 0.2, high: 1.0}}}}}}
  - {{model: two, parameters: {{weight: 0.5}}}}
dtype: float32
tasks: [qs_reverse]
search: {{n_iterations: 3, sampler: random}}
scoring: {{limit: 6, holdout: 6}}
"""
NAMES = [
    "t",
    "intermediate.skills.merge_method",
    "intermediate.skills.models[0].weight",
    "intermediate.skills.models[0].density",
]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> SearchFile:
    path = tmp_path_factory.mktemp("search") / "search.yml"
    path.write_text(SEARCH)
    return SearchFile.load(path)


@given(st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES)))
def test_ranges_of_every_document_are_variables(search: SearchFile, unit: list[float]) -> None:
    space = Space(search.template)
    assert [variable.name for variable in space.variables] == NAMES
    values: dict[str, Value] = {
        v.name: v.from_unit(u) for v, u in zip(space.variables, unit, strict=True)
    }
    assert space.values(space.recipe(values)) == space.active(values)


def test_a_search_over_adapters_on_a_result_ships_as_scored(tmp_path: Path) -> None:
    """The result changes with every candidate, and the adapter with some."""
    pytest.importorskip("peft", reason="PEFT writes the adapters")
    for seed, name in enumerate(("a", "b")):
        base = AutoModelForCausalLM.from_pretrained(f"{MODELS}/base")
        saved_adapter(base, tmp_path / name, seed, target_modules=["q_proj", "down_proj"])
    (tmp_path / "search.yml").write_text(ADAPTED.format(models=MODELS, adapters=tmp_path))
    search = SearchFile.load(tmp_path / "search.yml")
    result = run(search, folder=tmp_path / "s")
    assert [trial.state for trial in result.study.trials()] == [TrialState.COMPLETE] * 4
    best, recipe = result.best, Recipe.load(tmp_path / "s/best.yml")
    assert best is not None
    assert recipe == result.recipe
    assert recipe.adapters()
    save_merged(recipe, tmp_path / "out")
    for model in (tmp_path / "s/best.yml", tmp_path / "out"):
        (scored,) = evaluate_models([str(model)], EvalOptions(like=tmp_path / "s"))
        assert scored["scores"] == best.user_attrs["scores"]
    # Another adapter of that name makes another search.
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(ResumeRefusedError, match="checkpoints"):
        run(search, folder=tmp_path / "s")


@pytest.mark.slow
def test_a_search_over_results_resumes_and_ships_as_scored(search: SearchFile, tmp_path: Path) -> None:
    run(search.changed(search={"n_iterations": 2}), folder=tmp_path / "s")
    result = run(search, folder=tmp_path / "s")
    assert [trial.state for trial in result.study.trials()] == [TrialState.COMPLETE] * 5
    assert len({str(trial.params) for trial in result.study.trials()}) == 5
    best = tmp_path / "s/best.yml"
    assert "mergekit-multi" in best.read_text()
    assert Recipe.load(best) == result.recipe
    assert result.best is not None
    save_merged(Recipe.load(best), tmp_path / "out")
    for model in (best, tmp_path / "out"):
        (scored,) = evaluate_models([str(model)], EvalOptions(like=tmp_path / "s"))
        assert scored["scores"] == result.best.user_attrs["scores"]


@pytest.mark.slow
def test_a_search_over_a_merge_of_mixtures_ships_as_scored(tmp_path: Path) -> None:
    (tmp_path / "search.yml").write_text(MIXED)
    search = SearchFile.load(tmp_path / "search.yml")
    names = [variable.name for variable in Space(search.template).variables]
    assert names == ["models[0].weight", "intermediate.one.experts[1].residual_scale"]
    result = run(search, folder=tmp_path / "s")
    assert [trial.state for trial in result.study.trials()] == [TrialState.COMPLETE] * 3
    best = tmp_path / "s/best.yml"
    assert "mergekit-multi does not know experts" in best.read_text()
    save_merged(Recipe.load(best), tmp_path / "out")
    assert result.best is not None
    for model in (best, tmp_path / "out"):
        (scored,) = evaluate_models([str(model)], EvalOptions(like=tmp_path / "s"))
        assert scored["scores"] == result.best.user_attrs["scores"]


def test_the_command_writes_results_too_where_it_is_told(
    tmp_path: Path, llamas: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"name: half\nmerge_method: dare_linear\nbase_model: {llamas.base}\n"
        f"models: [{{model: {llamas.x}, parameters: {{weight: 1, density: 0.5}}}}]\n---\n"
        f"merge_method: passthrough\nmodels: [{{model: half}}]\n"
    )
    line = ["evolve", "merge", str(recipe), str(tmp_path / "out"), "--random-seed", "3"]
    monkeypatch.setattr(sys, "argv", [*line, "-I", str(tmp_path / "inner")])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None), capfd.readouterr().err
    assert f"wrote {tmp_path / 'inner/half'}" in capfd.readouterr().out
    inner, out = (load_file(tmp_path / folder / "model.safetensors") for folder in ("inner/half", "out"))
    assert all((inner[name] == out[name]).all() for name in out)
    seeded = Recipe.load(tmp_path / "out/mergekit_config.yml")
    assert seeded.intermediate["half"].random_seed == 3
    card = (tmp_path / "out/README.md").read_text()
    assert "[dare_linear]" in card
    assert llamas.x in card
