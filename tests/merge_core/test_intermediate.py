"""Recipes that use each other's results: as if each had been written, and as mergekit-multi does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_core.errors import CheckpointError, RecipeError
from merge_core.intermediate import MergedCheckpoint
from merge_core.merge import merged_tensors, save_merged
from merge_core.plan import Sources, merged_config, origin
from merge_core.recipe import Recipe

TEXT = """
name: half
merge_method: linear
models:
  - {{model: {x}, parameters: {{weight: 1.0}}}}
  - {{model: {y}, parameters: {{weight: 0.5}}}}
dtype: bfloat16
---
# The result that is wanted.
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: whole, parameters: {{weight: 0.7}}}}
  - {{model: half, parameters: {{weight: 0.5}}}}
dtype: float32
---
name: whole
merge_method: slerp
base_model: half
models: [{{model: half}}, {{model: {y}}}]
parameters: {{t: [0.2, 0.6]}}
dtype: float32
"""


@pytest.fixture(scope="module")
def file(llamas: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("multi") / "recipe.yml"
    path.write_text(TEXT.format(base=llamas.base, x=llamas.x, y=llamas.y))
    return path


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
        for key in expected
    )


def test_a_merge_of_results_is_that_of_the_results_written(file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(file)
    text = file.read_text()
    for name in recipe.results():
        save_merged(recipe.result(name), tmp_path / name)
        text = text.replace(f"model: {name}", f"model: {tmp_path / name}")
    (tmp_path / "written.yml").write_text(text)
    expected = dict(merged_tensors(Recipe.load(tmp_path / "written.yml")))
    assert list(recipe.results()) == ["half", "whole"]
    assert equal(dict(merged_tensors(recipe)), expected)
    sources = Sources(keep=True)
    for _ in range(2):  # kept results too
        assert equal(dict(merged_tensors(recipe, sources)), expected)


def test_the_result_is_that_of_mergekit_multi(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from click.testing import CliRunner
    from mergekit.scripts.multimerge import main

    out, inner = tmp_path / "out", tmp_path / "inner"
    # There is no tokenizer to copy, which it finds out after it has written the weights.
    CliRunner().invoke(main, [str(file), "--out-path", str(out), "-I", str(inner), "--quiet"])
    recipe = Recipe.load(file)
    for folder, found in [
        (out, dict(merged_tensors(recipe))),
        (inner / "half", dict(merged_tensors(recipe.result("half")))),
        (inner / "whole", dict(merged_tensors(recipe.result("whole")))),
    ]:
        expected = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            difference = (found[key].float() - tensor.float()).abs().max()
            assert float(difference) <= 1e-6 * float(tensor.float().abs().max()), key


def test_a_result_is_never_written_nor_opened_twice(file: Path) -> None:
    recipe, sources = Recipe.load(file), Sources()
    seen = sources.within(recipe)
    before = seen.architecture("whole").checkpoint
    assert isinstance(before, MergedCheckpoint)
    assert seen.architecture("whole").checkpoint is before
    changed = Recipe.parse({**recipe.as_config(), "dtype": "bfloat16"})
    assert (
        sources.within(changed).architecture("whole").checkpoint is before
    )  # its own recipe is the same
    inner = recipe.as_config()
    inner["intermediate"]["half"]["dtype"] = "float32"
    assert sources.within(Recipe.parse(inner)).architecture("whole").checkpoint is not before


def test_a_result_that_stays_the_same_is_merged_once_for_all_candidates(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sources, merged = Recipe.load(file).as_config(), Sources(keep=True), []
    read = MergedCheckpoint.read

    def counted(self: MergedCheckpoint, name: str) -> torch.Tensor:
        merged.append((self.reference, name))
        return read(self, name)

    monkeypatch.setattr(MergedCheckpoint, "read", counted)
    for weight in (0.3, 0.6, 0.9):
        config["models"][0]["parameters"]["weight"] = weight
        recipe = Recipe.parse(config)
        merged_config(recipe, sources)
        list(merged_tensors(recipe, sources))
    assert {name for name, _ in merged} == {"half", "whole"}
    assert len(set(merged)) == len(merged)


def test_what_is_let_pass_is_let_pass_in_results_too(llamas: Any, tmp_path: Path) -> None:
    shutil.copytree(llamas.x, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    both = [{"model": model, "parameters": {"weight": 1.0}} for model in (llamas.y, f"{tmp_path}/other")]
    recipe = Recipe.parse(
        {
            "merge_method": "passthrough",
            "models": [{"model": "mixed"}],
            "intermediate": {"mixed": {"merge_method": "linear", "models": both}},
        }
    )
    with pytest.raises(CheckpointError, match="insist with allow_crimes"):
        save_merged(recipe, tmp_path / "out")
    save_merged(recipe, tmp_path / "out", allow_crimes=True)
    assert (
        load_file(tmp_path / "out/model.safetensors").keys()
        == dict(merged_tensors(recipe, allow_crimes=True)).keys()
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_candidates_with_other_results_do_not_meet(file: Path, workers: int) -> None:
    """Ranks, casts and plans of one candidate's results are not taken for another's.

    Nor are they by another worker, which shares casts of what lies on the disk.
    """
    config = Recipe.load(file).as_config()
    shared_as = None if workers == 1 else f"test-{os.getpid()}"
    several = [Sources(keep=True, shared_as=shared_as) for _ in range(workers)]
    config["merge_method"] = "ties"
    for entry in config["models"]:
        entry["parameters"]["density"] = 0.5
    for i, weight in enumerate((0.1, 0.9, 0.1)):
        config["intermediate"]["half"]["models"][0]["parameters"]["weight"] = weight
        recipe, sources = Recipe.parse(config), several[i % workers]
        assert equal(dict(merged_tensors(recipe, sources)), dict(merged_tensors(recipe)))
    for sources in several:
        sources.close()


def test_config_tokenizer_and_models_are_those_on_disk(file: Path, llamas: Any) -> None:
    recipe = Recipe.load(file)
    assert recipe.references() == [llamas.base, llamas.x, llamas.y]
    stacked = Recipe.parse(
        {
            "merge_method": "passthrough",
            "models": [{"model": "tall"}],
            "intermediate": {
                "tall": {
                    "merge_method": "passthrough",
                    "dtype": "bfloat16",
                    "slices": [
                        {"sources": [{"model": llamas.x, "layer_range": [0, 4]}]},
                        {"sources": [{"model": llamas.x, "layer_range": [1, 3]}]},
                    ],
                }
            },
        }
    )
    assert origin(stacked) == llamas.x
    config = merged_config(stacked, Sources())
    assert (config["num_hidden_layers"], config["dtype"]) == (6, "bfloat16")
    tensors = dict(merged_tensors(stacked))
    assert tensors["model.layers.5.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_mixture_of_results_is_that_of_the_results_written(
    tmp_path: Path,
) -> None:
    """The router too: its prompts are run by the result."""
    models = Path(__file__).resolve().parents[2] / "configs/quickstart/models"
    half = {"merge_method": "linear", "models": [{"model": f"{models}/{n}"} for n in ("base", "reverse")]}
    experts = [{"source_model": f"{models}/sort", "positive_prompts": ["sort abc"]}]

    def mixture(base: str, **more: Any) -> Recipe:
        own = {"source_model": base, "positive_prompts": ["reverse abc"]}
        return Recipe.parse({"base_model": base, "experts": [own, *experts], "dtype": "float32", **more})

    recipe = mixture("half", intermediate={"half": half})
    save_merged(recipe.result("half"), tmp_path / "half")
    written = mixture(str(tmp_path / "half"))
    assert equal(dict(merged_tensors(recipe)), dict(merged_tensors(written)))


def test_the_yaml_reads_back_and_every_document_keeps_its_place(file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(file)
    (tmp_path / "again.yml").write_text(recipe.to_yaml())
    assert recipe.to_yaml().count("\n---\n") == 2
    assert Recipe.load(tmp_path / "again.yml") == recipe
    assert Recipe.parse(recipe.as_config()) == recipe


ONE = "merge_method: linear\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{ONE}---\n{ONE}", "2 documents have no name"),
        (f"name: a\n{ONE}---\nname: a\n{ONE}", "name is 'a', as another's"),
        (f"name: 3\n{ONE}---\n{ONE}", "name is 3; it must be text"),
        (f"name: b\n{ONE}---\n[1]", "document 2 is [1]; each must be a mapping"),
        (f"name: b\n{ONE}---\nname: c\n{ONE}", "b and c is used by no other"),
        (f"name: a\n{ONE}---\n{ONE}", "intermediate results a use each other in a circle"),
        (
            f"name: b\nbase_model: a\nexperts: [{{source_model: a}}]\nexperts_per_token: 1\n---\n{ONE}",
            "intermediate.b.experts[0].positive_prompts is missing",
        ),
        (
            f"name: b\nbase_model: a\nexperts: [{{source_modle: a}}]\n---\n{ONE}modles: []\n",
            "intermediate.b.experts[0].source_modle: unknown key",
        ),
        (
            f"name: b\nbase_model: a\nexperts: [{{source_model: a}}]\nmodels: []\n---\n{ONE}",
            "intermediate.b.models has no place beside experts",
        ),
        (f"name: b@1\n{ONE}---\n{ONE}", "intermediate has the name 'b@1'"),
        (
            f"name: b\nmerge_method: lineal\nmodels: [{{model: a}}]\n---\n{ONE}",
            "intermediate.b.merge_method is 'lineal'",
        ),
        (f"name: b\n{ONE}modles: []\n---\n{ONE}", "intermediate.b.modles: unknown key 'modles'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "r.yml")
    assert said in str(error.value)


def test_where_all_have_names_the_one_nobody_uses_is_wanted(tmp_path: Path) -> None:
    use = "merge_method: linear\nmodels: [{model: b}]\n"
    (tmp_path / "r.yml").write_text(f"name: b\n{ONE}---\nname: c\n{use}")
    recipe = Recipe.load(tmp_path / "r.yml")
    assert (recipe.inputs(), list(recipe.intermediate)) == (["b"], ["b"])
    (tmp_path / "one.yml").write_text(f"name: alone\n{ONE}")
    assert not Recipe.load(tmp_path / "one.yml").intermediate


def test_a_result_nobody_uses_is_noted(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(f"name: b\n{ONE}---\n{ONE}")
    notes = Recipe.load(tmp_path / "r.yml").check()[1]
    assert any("intermediate.b is used by no other" in line for line in notes)


def test_a_result_that_does_not_fit_says_where(llamas: Any) -> None:
    recipe = Recipe.parse(
        {
            "merge_method": "linear",
            "models": [{"model": "r"}],
            "intermediate": {
                "r": {
                    "merge_method": "passthrough",
                    "slices": [{"sources": [{"model": llamas.x, "layer_range": [0, 9]}]}],
                }
            },
        }
    )
    with pytest.raises(CheckpointError, match=r"intermediate\.r: slices\[0\].* it has 4 layers"):
        merged_tensors(recipe)
