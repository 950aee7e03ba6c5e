"""Mixtures of experts in a real vLLM engine on CPU: reloaded in place, verified, scored as hf does."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from evolve.engines import EngineSettings
from evolve.engines.hf import HfEngine
from merge_core.merge import merged_tensors
from merge_core.plan import Sources, donor, merged_config
from merge_core.recipe import Recipe

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = pytest.mark.vllm
TEXTS = (("cab", "abc"), ("7 3 9", " 9 7"), ("x", "y"))


class Request(NamedTuple):
    """What the adapters read of an lm-eval request."""

    args: tuple[Any, ...]


def mixture(folder: Path, scale: float) -> Recipe:
    """A Mixtral of two models, three experts."""
    experts = [
        {"source_model": str(folder / "a"), "positive_prompts": ["abc"], "residual_scale": scale},
        {"source_model": str(folder / "b"), "positive_prompts": ["123"]},
        {"source_model": str(folder / "b"), "positive_prompts": ["xyz"], "residual_scale": 0.5},
    ]
    return Recipe.parse({"base_model": str(folder / "a"), "experts": experts, "dtype": "float32"})


def joined_mixtrals(folder: Path, weight: float) -> Recipe:
    """A merge of two Mixtrals that Transformers 5 saved in its own format."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    for seed, name in enumerate("mn"):
        if not (folder / name).is_dir():
            torch.manual_seed(seed)
            config = MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=3,
                initializer_range=0.2,
                max_position_embeddings=128,
            )
            MixtralForCausalLM(config).save_pretrained(folder / name, save_original_format=False)
            tokenizer.save_pretrained(folder / name)
    models = [
        {"model": str(folder / name), "parameters": {"weight": share}}
        for name, share in (("m", weight), ("n", 1 - weight))
    ]
    return Recipe.parse({"merge_method": "linear", "models": models, "dtype": "float32"})


@pytest.mark.parametrize("make", [mixture, joined_mixtrals])
def test_experts_are_reloaded_verified_and_scored(
    tied_pair: Path, make: Callable[[Path, float], Recipe]
) -> None:
    """Also the second time, when vLLM's own reload leaves a CPU's experts unpacked."""
    from evolve.engines.vllm import VllmEngine

    sources = Sources(keep=True)
    first = make(tied_pair, 0.7)
    folder = sources.architecture(donor(first)).checkpoint.folder
    options = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 26}
    config = merged_config(first, sources)
    vllm = VllmEngine(EngineSettings(config, folder, options=options))
    hf = HfEngine(EngineSettings(config, folder, options={"max_length": 95, "batch_size": 1}))
    requests = [Request(text) for text in TEXTS]
    found = []
    try:
        for recipe in (first, make(tied_pair, 0.2)):
            vllm.load_recipe(recipe, sources)
            hf.load_recipe(recipe, sources)
            assert vllm.verify(recipe) == []
            found.append([score for score, _ in vllm.lm().loglikelihood(requests)])
            assert found[-1] == pytest.approx([s for s, _ in hf.lm().loglikelihood(requests)], abs=1e-3)
        assert found[0] != pytest.approx(found[1], abs=1e-2)
        # What was loaded last is not what came before.
        assert any("entries differ" in line for line in vllm.verify(first))
        swapped = dict(merged_tensors(first, sources))
        vllm.load(swapped.items())
        assert vllm.verify(first) == []
    finally:
        vllm.close()
