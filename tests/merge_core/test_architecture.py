"""What a model is made of, by inspection: families as Transformers saves them, and older files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_core.architecture import Architecture, with_layers
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError
from merge_core.merge import save_merged
from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

WIDE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 37}
LLAMA_LIKE = {**WIDE, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 37, "n_positions": 20},
    "gpt_neox": {**WIDE, "intermediate_size": 24},
    "gemma2": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "phi": {**WIDE, "intermediate_size": 24},
    "phi3": {**LLAMA_LIKE, "pad_token_id": 0},
    "falcon": WIDE,
    "mixtral": {**LLAMA_LIKE, "num_local_experts": 3},
    "qwen3_moe": {**LLAMA_LIKE, "num_experts": 3, "moe_intermediate_size": 8},
    "opt": {**WIDE, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 20},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 37},
    "gpt_bigcode": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 37, "n_positions": 20},
    "starcoder2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "cohere": LLAMA_LIKE,
}


def saved_family(kind: str, folder: Path) -> tuple[str, str]:
    """Save two models of a family with different random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return str(folder / "a"), str(folder / "b")


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> str:
    """Write a checkpoint by hand: names, and shapes or tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    values = {n: v if isinstance(v, torch.Tensor) else torch.randn(*v) for n, v in tensors.items()}
    save_file(values, folder / "model.safetensors")
    return str(folder)


def architecture(folder: str) -> Architecture:
    return Architecture(Checkpoint(folder))


def average(*models: str) -> Recipe:
    return Recipe.parse({"merge_method": "linear", "models": [{"model": model} for model in models]})


@pytest.mark.parametrize("kind", FAMILIES)
def test_any_causal_language_model_merges_without_a_table_of_families(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    a, b = saved_family(kind, tmp_path)
    stored = load_file(Path(a) / "model.safetensors")
    plan = plan_merge(average(a, b), Sources())
    assert {p.name: p.shape for p in plan} == {n: tuple(t.shape) for n, t in stored.items()}
    assert architecture(a).n_layers == 3
    found = architecture(a)
    assert found.token_embedding in found.before
    for p in plan:
        inside = p.name.startswith(found.prefix)
        assert p.t == (int(p.name[len(found.prefix) :].split(".")[0]) / 2 if inside else 0.0)
        assert [(entry.model, entry.name) for entry in p.inputs] == [(a, p.name), (b, p.name)]
    save_merged(average(a, b), tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_fine_tunes_saved_with_and_without_the_bare_models_prefix_fit(tmp_path):
    a, b = saved_family("gpt2", tmp_path)
    tensors = load_file(Path(b) / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    c = written(tmp_path / "c", json.loads((Path(b) / "config.json").read_text()), bare)
    for first, second in ((a, c), (c, a)):
        plan = plan_merge(average(first, second), Sources())
        assert {p.name for p in plan} == set(load_file(Path(first) / "model.safetensors"))
        for p in plan:
            assert p.inputs[0].name == p.name
            assert p.inputs[1].name.removeprefix("transformer.") == p.name.removeprefix("transformer.")


BUFFERS = {
    "gpt2": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 20, 20).tril().bool(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 20, 20),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    },
    "qwen2": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(20, 4),
    },
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_that_are_computed_anew_are_not_merged(tmp_path, kind):
    a, b = saved_family(kind, tmp_path)
    tensors = load_file(Path(b) / "model.safetensors")
    config = json.loads((Path(b) / "config.json").read_text())
    old = written(tmp_path / "old", config, {**tensors, **BUFFERS[kind]})
    for models in ((a, old), (old, a)):
        assert {p.name for p in plan_merge(average(*models), Sources())} == set(tensors)


# ---- models with several stacks -----------------------------------------------------------------

VLM_CONFIG = {
    "model_type": "vlm",
    "architectures": ["VlmForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 2, "vocab_size": 11, "tie_word_embeddings": False},
    "vision_config": {"num_hidden_layers": 3},
}
VLM = {
    **{f"model.vision_tower.blocks.{i}.{n}.weight": (4, 4) for i in range(3) for n in "abcdefg"},
    "model.vision_tower.patch_embed.weight": (4, 3),
    "model.multi_modal_projector.linear_1.weight": (6, 4),
    "model.language_model.embed_tokens.weight": (11, 6),
    **{f"model.language_model.layers.{i}.{n}.weight": (6, 6) for i in range(2) for n in "ab"},
    "model.language_model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}


def test_a_vision_tower_is_merged_as_tensors_outside_the_layers(tmp_path):
    a, b = (written(tmp_path / name, VLM_CONFIG, VLM) for name in "ab")
    found = architecture(a)
    assert found.prefix == "model.language_model.layers."
    assert found.n_layers == 2
    assert found.token_embedding == "model.language_model.embed_tokens.weight"
    assert set(found.after) == {"model.language_model.norm.weight", "lm_head.weight"}
    plan = plan_merge(average(a, b), Sources())
    assert {p.name for p in plan} == set(VLM)
    ts = {p.name: p.t for p in plan}
    assert all(t == 0.0 for name, t in ts.items() if not name.startswith(found.prefix))
    assert ts["model.language_model.layers.1.a.weight"] == 1.0


def test_a_tower_with_as_many_layers_does_not_pass_for_the_language_model(tmp_path):
    names = {n.replace("tower.blocks.2", "tower.other"): s for n, s in VLM.items()}
    assert architecture(written(tmp_path / "a", VLM_CONFIG, names)).prefix == (
        "model.language_model.layers."
    )


def test_a_stack_of_the_declared_depth_is_preferred_to_a_larger_one(tmp_path):
    tensors = {
        "wte.weight": (5, 4),
        **{f"extra.{i}.{n}": (2,) for i in range(7) for n in "abcde"},
        **{f"h.{i}.a": (2,) for i in range(2)},
    }
    assert architecture(written(tmp_path / "a", {"n_layer": 2}, tensors)).prefix == "h."


def test_fused_experts_are_tensors_of_three_dimensions(tmp_path):
    tensors = {
        "model.embed_tokens.weight": (5, 4),
        **{f"model.layers.{i}.mlp.experts.gate_up_proj": (3, 8, 4) for i in range(2)},
        "model.norm.weight": (4,),
    }
    a, b = (written(tmp_path / n, {"num_hidden_layers": 2}, tensors) for n in "ab")
    plan = plan_merge(average(a, b), Sources())
    assert {p.name: p.shape for p in plan}["model.layers.1.mlp.experts.gate_up_proj"] == (3, 8, 4)


# ---- tied heads ---------------------------------------------------------------------------------

TINY = {"model.embed_tokens.weight": (5, 4), "model.layers.0.a.weight": (4, 4), "model.norm.weight": (4,)}


@pytest.mark.parametrize(
    ("config", "stores_head", "ties", "has_head"),
    [
        ({"tie_word_embeddings": True}, False, True, False),
        ({"tie_word_embeddings": True}, True, True, False),  # what it stored is not read
        ({"tie_word_embeddings": False}, True, False, True),
        ({}, False, True, False),  # the family's default is left out of config.json
        ({}, True, False, True),
        ({"text_config": {"num_hidden_layers": 1, "tie_word_embeddings": True}}, True, True, False),
    ],
    ids=str,
)
def test_whether_the_head_is_the_embedding(tmp_path, config, stores_head, ties, has_head):
    tensors = {**TINY, **({"lm_head.weight": (5, 4)} if stores_head else {})}
    found = architecture(written(tmp_path / "a", config, tensors))
    assert (found.ties_embeddings, found.has_head) == (ties, has_head)
    assert ("lm_head.weight" in found.after) == has_head


def test_a_layers_own_output_weight_is_no_head(tmp_path):
    tensors = {**TINY, "model.layers.0.attention.output.weight": (4, 4)}
    found = architecture(written(tmp_path / "a", {"tie_word_embeddings": True}, tensors))
    assert found.info("model.layers.0.attention.output.weight") is not None


def test_position_tables_are_not_the_token_embedding(tmp_path):
    tensors = {"wpe.weight": (9, 4), "wte.weight": (5, 4), "h.0.a": (4,), "ln_f.weight": (4,)}
    found = architecture(written(tmp_path / "a", {"vocab_size": 5}, tensors))
    assert found.token_embedding == "wte.weight"
    assert [n for n in tensors if found.is_vocabulary(n)] == ["wte.weight"]


# ---- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
def test_the_number_of_layers_is_written_where_it_was_read(key):
    config = {key: 4, "layer_types": list("abcd"), "other": 1}
    changed = with_layers(config, [0, 1, 1, 2, 3])
    assert changed == {key: 5, "layer_types": list("abbcd"), "other": 1}
    nested = with_layers({"text_config": config, "top": 2}, [3])
    assert nested == {"text_config": {key: 1, "layer_types": ["d"], "other": 1}, "top": 2}
    assert config[key] == 4


def test_no_numbered_layers_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no numbered layers"):
        architecture(written(tmp_path / "a", {}, {"wte.weight": (5, 4)}))
