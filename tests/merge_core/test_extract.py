"""Adapters extracted from models: exact at full rank, best at any other, loaded by PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.extract import Extracted, ExtractOptions, extract, low_rank, save_adapter
from merge_core.merge import merged_tensors
from merge_core.plan import model_alone
from merge_core.recipe import Recipe

FULL = ExtractOptions(max_rank=1000, embed_lora=True)


def extracted(model: str, base: str, folder: Path, options: ExtractOptions) -> Extracted:
    found = extract(model_alone(model), model_alone(base), options)
    save_adapter(found, folder, base)
    return found


def merged(reference: str) -> dict[str, Tensor]:
    return dict(merged_tensors(model_alone(reference)))


@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Qwen2, tied", "GPT-2"])
@pytest.mark.parametrize("embed_lora", [True, False])
def test_at_full_rank_the_adapter_gives_the_model_back(name, embed_lora, stored, tmp_path):
    folders = stored(name, "float32").folders
    options = ExtractOptions(max_rank=1000, embed_lora=embed_lora)
    found = extracted(folders["x"], folders["base"], tmp_path / "x", options)
    assert found.error < 1e-4
    expected = merged(folders["x"])
    back = merged(f"{folders['base']}+{tmp_path / 'x'}")
    assert back.keys() == expected.keys()
    for key, tensor in back.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "GPT-2"])
def test_peft_loads_the_adapter_whole_and_merges_it_to_the_same(name, stored, tmp_path, recwarn):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folders = stored(name, "float32").folders
    extracted(folders["x"], folders["base"], tmp_path / "x", ExtractOptions(max_rank=3))
    base = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "x")
    assert not [w for w in recwarn if "missing" in str(w.message) or "unexpected" in str(w.message)]
    expected = model.merge_and_unload().state_dict()
    for key, tensor in merged(f"{folders['base']}+{tmp_path / 'x'}").items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (33, 33)])
def test_factors_are_the_best_of_their_rank(shape):
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(change.double())
    for rank in (1, 7, 33):
        u, s, v = low_rank(change, rank)
        torch.testing.assert_close(s.double(), expected[:rank], rtol=1e-5, atol=1e-5)
        left = (change - u * s @ v.T).double().square().sum()
        torch.testing.assert_close(left, expected[rank:].square().sum(), rtol=1e-4, atol=1e-6)


def test_large_matrices_are_cut_nearly_as_well(monkeypatch):
    monkeypatch.setattr("merge_core.extract._EXACT", 0)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(300, 200, generator=generator) * torch.logspace(0, -2, 200)
    u, s, v = low_rank(change, 16)
    best = torch.linalg.svdvals(change.double())[16:].square().sum().sqrt()
    assert (change - u * s @ v.T).norm() < 1.0001 * best
    before = torch.random.get_rng_state()
    assert torch.equal(low_rank(change, 16)[0], u)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_small_singular_values_are_dropped(stored, tmp_path):
    folders = stored("Llama", "float32").folders
    options = ExtractOptions(max_rank=20, sv_epsilon=0.15)
    found = extracted(folders["x"], folders["base"], tmp_path / "x", options)
    base, model = merged(folders["base"]), merged(folders["x"])
    for module, rank in found.ranks.items():
        values = torch.linalg.svdvals(model[f"{module}.weight"] - base[f"{module}.weight"])
        assert rank == min(20, int((values > 0.15).sum()))
    assert len(set(found.ranks.values())) > 1
    merged(f"{folders['base']}+{tmp_path / 'x'}")  # ranks and rank_pattern agree


def test_modules_are_chosen_and_saved_whole_by_name(stored, tmp_path):
    folders = stored("Llama", "float32").folders
    options = ExtractOptions(
        max_rank=2,
        include=[r"layers\.[01]\."],
        exclude=["mlp"],
        save_modules=["k_proj"],
        skip_undecomposable=True,
        distribute_scale=False,
    )
    found = extracted(folders["x"], folders["base"], tmp_path / "x", options)
    layers = [f"model.layers.{i}.self_attn." for i in (0, 1)]
    changed = {
        name.removesuffix(".weight")
        for name, tensor in merged(folders["x"]).items()
        if not torch.equal(tensor, merged(folders["base"])[name])
    }
    assert set(found.ranks) == {f"{at}{m}_proj" for at in layers for m in "qvo"} & changed
    assert set(found.whole) == {f"{at}k_proj" for at in layers} & changed
    for name, tensor in found.tensors.items():
        if name.endswith("lora_B.weight"):  # orthonormal: the scale is in A
            torch.testing.assert_close(tensor.T @ tensor, torch.eye(2), rtol=0, atol=1e-5)
    back = merged(f"{folders['base']}+{tmp_path / 'x'}")
    whole = f"{layers[1]}k_proj.weight"
    assert torch.equal(back[whole], merged(folders["x"])[whole])


def test_a_merge_is_extracted_from_its_recipe(stored, tmp_path):
    folders = stored("Llama", "float32").folders
    entries = [{"model": folders[m], "parameters": {"weight": 0.5}} for m in "xy"]
    recipe = Recipe.parse(
        {"merge_method": "task_arithmetic", "base_model": folders["base"], "models": entries}
    )
    found = extract(recipe, model_alone(folders["base"]), FULL)
    save_adapter(found, tmp_path / "merge", folders["base"])
    expected = dict(merged_tensors(recipe))
    for key, tensor in merged(f"{folders['base']}+{tmp_path / 'merge'}").items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


def test_models_that_differ_in_more_than_numbers_are_refused(stored, llamas):
    folders = stored("Llama", "float32").folders
    with pytest.raises(CheckpointError, match=r"differ in|same tensors"):
        extract(model_alone(llamas.x), model_alone(folders["base"]), FULL)
    slices = [{"sources": [{"model": folders["x"], "layer_range": [0, 1]}]}]
    shorter = Recipe.parse({"merge_method": "passthrough", "slices": slices})
    with pytest.raises(CheckpointError, match=r"the recipe's result and its base .* same tensors"):
        extract(shorter, model_alone(folders["base"]), FULL)
    with pytest.raises(CheckpointError, match="has no change"):
        extract(model_alone(folders["base"]), model_alone(folders["base"]), FULL)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--embed-lora"]])
def test_the_error_is_mergekits_at_equal_rank(options, stored, tmp_path):
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from click.testing import CliRunner
    from mergekit.scripts.extract_lora import main

    folders = stored("Llama", "float32").folders
    names = {"--model": folders["x"], "--base-model": folders["base"], "--out-path": str(tmp_path / "a")}
    arguments: list[Any] = [item for pair in names.items() for item in pair]
    result = CliRunner().invoke(main, [*arguments, "--max-rank", "4", *options])
    assert result.exit_code == 0, result.output
    ours = ExtractOptions(max_rank=4, embed_lora=bool(options))
    extracted(folders["x"], folders["base"], tmp_path / "ours", ours)
    expected = merged(folders["x"])
    theirs = merged(f"{folders['base']}+{tmp_path / 'a'}")
    mine = merged(f"{folders['base']}+{tmp_path / 'ours'}")
    for name, tensor in expected.items():
        a, b = (float((found[name] - tensor).norm()) for found in (theirs, mine))
        assert b <= a * 1.0001 + 1e-6, name
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors")
