"""Tiny random models of many families: a base and three fine-tunes, and recipes for them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_core.plan import Sources

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 57,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
GPT_NEOX = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "num_hidden_layers")}
GPT2 = {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 31,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
EXPERTS = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 19}
MIXTRAL = {**EXPERTS, "num_local_experts": 3}
QWEN_MOE = {**EXPERTS, "moe_intermediate_size": 11, "num_experts": 5, "num_experts_per_tok": 2}
# Class of the config, its sizes, and whether mergekit 0.1.5 merges the family as it lies on disk: single
# experts it joins first.
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Llama": ("LlamaConfig", {**SIZES, "tie_word_embeddings": False}, True),
    "Llama, tied": ("LlamaConfig", {**SIZES, "hidden_size": 40, "num_attention_heads": 5,
                                    "tie_word_embeddings": True}, True),
    "Qwen2, tied": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}, True),
    "Qwen3": ("Qwen3Config", {**SIZES, "head_dim": 10, "tie_word_embeddings": False}, True),
    "Gemma, tied": ("GemmaConfig", {**SIZES, "head_dim": 12}, True),
    "GPT-NeoX": ("GPTNeoXConfig", {**GPT_NEOX, "num_hidden_layers": 2}, False),
    "GPT-2": ("GPT2Config", GPT2, False),
    "Mixtral, fused": ("MixtralConfig", MIXTRAL, True),
    "Mixtral, by expert": ("MixtralConfig", MIXTRAL, False),
    "Qwen2-MoE, by expert": ("Qwen2MoeConfig",
                             {**QWEN_MOE, "shared_expert_intermediate_size": 13}, False),
    "Qwen3-MoE, fused": ("Qwen3MoeConfig", {**QWEN_MOE, "head_dim": 8}, True),
}  # fmt: skip
# Size of each fine-tune's move; the same share of it is common to all.
MOVES = {"x": 0.02, "y": 0.01, "z": 0.004}


@dataclass(frozen=True)
class Stored:
    """A family on disk, opened once for all of its recipes.

    Attributes:
        folders: by short name: base, x, y, z.
        tensors: by folder, then by name.
    """

    folders: dict[str, str]
    tensors: dict[str, dict[str, Tensor]]
    sources: Sources = field(default_factory=Sources)


def build_family(folder: Path, name: str, dtype: torch.dtype) -> Stored:
    """Save a family's base and fine-tunes.

    The fine-tune y has the base's first attention, z has one tensor of zeros, and in every model
    the embedding's row 0 is zero. A few entries move by the same amount in all of them.
    """
    import transformers

    config, sizes, _ = FAMILIES[name]
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
    # A tensor for each expert is the original format, all in one that of Transformers 5.
    by_expert = name.endswith("by expert")
    model.to(dtype).save_pretrained(folder / "base", save_original_format=by_expert)
    base = {key: t.float() for key, t in load_file(folder / "base" / "model.safetensors").items()}
    embedding = next(key for key in base if "emb" in key or "wte" in key)
    base[embedding][0] = 0
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    common = {key: noise(tensor) for key, tensor in base.items()}
    models = {"base": base}
    for short, move in MOVES.items():
        tuned: dict[str, Tensor] = {}
        for key, tensor in base.items():
            tuned[key] = tensor + move * (common[key] + noise(tensor))
            tuned[key].view(-1)[::11] = (tensor + 0.02 * common[key]).view(-1)[::11]
        attention = [key for key in base if ".0." in key and "att" in key]
        if short == "y":
            tuned |= {key: base[key] for key in attention}
        if short == "z":
            zero = next(key for key in base if ".1." in key and "att" in key and base[key].dim() > 1)
            tuned[zero] = torch.zeros_like(base[zero])
        tuned[embedding][0] = 0
        models[short] = tuned
    stored = Stored({short: str(folder / short) for short in models}, {})
    for short, tensors in models.items():
        if short != "base":
            shutil.copytree(folder / "base", folder / short)
        cast = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        save_file(cast, folder / short / "model.safetensors", {"format": "pt"})
        stored.tensors[str(folder / short)] = cast
    return stored


# ---- recipes ------------------------------------------------------------------------------------


def by_part(mlp: Any, attention: Any, rest: Any) -> list[dict[str, Any]]:
    """A value for each part of a layer, by filters that fit every family here."""
    return [{"filter": "mlp", "value": mlp}, {"filter": "att", "value": attention}, {"value": rest}]


def case(
    method: str, own: dict[str, dict[str, Any]], base: str | None = None, **shared: Any
) -> dict[str, Any]:
    """A recipe; a trailing underscore in a parameter's name is dropped."""
    config = {
        "merge_method": method,
        "models": [{"model": model, "parameters": parameters} for model, parameters in own.items()],
        "parameters": {key.rstrip("_"): value for key, value in shared.items()},
    }
    return config | ({"base_model": base} if base else {})


WEIGHTS = {
    "x": {"weight": by_part([0.1, 0.9, 0.3], -0.4, 0.7)},
    "y": {"weight": 0.6},
    "z": {"weight": [1.2, 0.2]},
}
# Directions that nearly cancel would show the rounding of mergekit's norms only.
MILD = WEIGHTS | {"x": {"weight": by_part([0.1, 0.9, 0.3], -0.1, 0.7)}}
PAIR = {"x": {"weight": by_part([0.2, 1.7], -0.3, 0.7)}, "y": {"weight": by_part(0.9, 1.5, 0.6)}}
FLAGS = by_part(True, False, [True, False])


def thin(**more: Any) -> dict[str, dict[str, Any]]:
    densities = {"x": by_part(0.2, [0.9, 0.5], 0.7), "y": 0.5, "z": by_part(0.35, 1.0, 0.6)}
    return {name: {**WEIGHTS[name], "density": density, **more} for name, density in densities.items()}


# Shared by the methods that add task vectors: normalized or not, rescaled or not, scaled.
OPTIONS = {
    "normalize": FLAGS,
    "rescale": by_part(False, True, True),
    "lambda_": by_part([0.5, 1.5], 0.8, 1),
}
ALONE = {name: {} for name in MOVES}

CASES: dict[str, dict[str, Any]] = {
    "linear": case("linear", WEIGHTS, normalize=FLAGS),
    "linear, a base among the models": case("linear", WEIGHTS, base="x"),
    "passthrough": case("passthrough", {"x": {"scale": by_part([0.5, 2], -1, 1)}}),
    "slerp": case("slerp", {"x": {}}, "base", t=by_part([0, 0.5, 1], [-0.3, 1.4], 0.6)),
    "slerp, near": case("slerp", {"base": {}, "z": {}}, "base", t=[0.2, 0.7]),
    "nuslerp": case("nuslerp", PAIR, nuslerp_flatten=by_part(False, [False, True], False),
                    nuslerp_row_wise=by_part([True, False], True, True)),
    "nuslerp, base": case("nuslerp", PAIR, "base", nuslerp_flatten=by_part([False, True], False, True),
                          nuslerp_row_wise=by_part(True, [True, False], True)),
    "nuslerp, near": case("nuslerp", {"base": {"weight": 0.3}, "y": {"weight": 1.0}},
                          nuslerp_flatten=FLAGS, nuslerp_row_wise=by_part(False, [True, False], True)),
    "multislerp, near": case("multislerp", {"base": {"weight": 0.3}, "y": {"weight": 1.0}}),
    "multislerp": case("multislerp", MILD, normalize_weights=FLAGS),
    "multislerp, base": case("multislerp", MILD, "base", normalize_weights=FLAGS),
    "karcher": case("karcher", ALONE),
    "karcher, base as input": case("karcher", ALONE, "base", max_iter=2, tol=1e-9),
    "task_arithmetic": case("task_arithmetic", WEIGHTS, "base", **OPTIONS),
    "ties": case("ties", thin(), "base", **OPTIONS),
    "ties, defaults": case("ties", thin(), "base"),
    "dare_linear, whole": case("dare_linear", WEIGHTS, "base", **OPTIONS),
    "dare_ties, whole": case("dare_ties", WEIGHTS, "base", **OPTIONS),
    "breadcrumbs": case("breadcrumbs", thin(gamma=by_part(0.05, 0.3, 0.01)), "base", **OPTIONS),
    "breadcrumbs_ties": case("breadcrumbs_ties", thin(gamma=by_part(0.0, 0.1, 0.01)), "base", **OPTIONS),
    "della, whole": case("della", WEIGHTS, "base", **OPTIONS),
    "della_linear, whole": case("della_linear", WEIGHTS, "base", **OPTIONS),
    "model_stock": case("model_stock", ALONE, "base", filter_wise=FLAGS),
    "nearswap": case("nearswap", {"x": {}}, "base", t=[1e-3, 0.02]),
    "arcee_fusion": case("arcee_fusion", {"x": {}}, "base"),
    "sce": case("sce", ALONE, "base", select_topk=by_part(0.3, [0.9, 0.5], 1.0)),
    "sce, one model": case("sce", {"y": {}}, "base", select_topk=by_part(1.0, 1.0, 0.5)),
    "ram": case("ram", ALONE, "base", epsilon=by_part(0.004, 1e-5, 0.01)),
    "ramplus_tl": case("ramplus_tl", ALONE, "base", r=0.3, alpha=by_part(0.2, 0.7, 5.0), epsilon=0.004),
}  # fmt: skip

_RANDOM = thin(epsilon=by_part(0.1, 0.09, 0.2)) | {"z": {**WEIGHTS["z"], "density": 1.0}}
# Their masks are ours alone, so they are compared with the definition only.
RANDOM_CASES: dict[str, dict[str, Any]] = {
    "dare_linear": case("dare_linear", thin(), "base", **OPTIONS),
    "dare_ties": case("dare_ties", thin(), "base", **OPTIONS),
    "della": case("della", _RANDOM, "base", **OPTIONS),
    "della_linear": case("della_linear", _RANDOM, "base", **OPTIONS),
}


def resolved(config: Any, folders: dict[str, str]) -> Any:
    """Put folders in the place of the short model names."""
    if isinstance(config, dict):
        return {key: resolved(value, folders) for key, value in config.items()}
    if isinstance(config, list):
        return [resolved(value, folders) for value in config]
    return folders.get(config, config) if isinstance(config, str) else config
