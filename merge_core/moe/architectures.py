"""Which mixtures of experts can be made, of which dense models, and what their config.json says.

A mixture takes everything but the MLPs from the base, so only architectures that compute the rest
as the base does can come out: with experts that are all the base's own MLP they give its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.architecture import Architecture, text_config
from merge_core.errors import RecipeError
from merge_core.experts import MIXTRAL, QWEN, Spelling
from merge_core.moe.recipe import MoeRecipe

Config = dict[str, Any]
# The matrices of a dense MLP, below a layer: gate, up, down.
DENSE_MLP = (".mlp.gate_proj.weight", ".mlp.up_proj.weight", ".mlp.down_proj.weight")
_QKV_BIASES = tuple(f".self_attn.{part}_proj.bias" for part in "qkv")
_LLAMA = (
    *(f".self_attn.{part}_proj.weight" for part in "qkvo"),
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
)
_QWEN3 = (*_LLAMA, ".self_attn.q_norm.weight", ".self_attn.k_norm.weight")


@dataclass(frozen=True)
class MixtureArchitecture:
    """A mixture that can be made.

    Attributes:
        name: how `architecture:` calls it.
        model_type, class_name: Transformers' names.
        takes: model types of base and experts.
        has_shared: whether it has exactly one shared expert; else it has none.
        spelling: names of router and experts.
        rest: what of a layer is taken from the base, below the layer's number.
        zeros: what of that is zero where the base lacks it.
        config: what config.json says beside the base's.
        unties: whether its head is always a tensor of its own.
    """

    name: str
    model_type: str
    class_name: str
    takes: tuple[str, ...]
    has_shared: bool
    spelling: Spelling
    rest: tuple[str, ...]
    config: Callable[[Config, int], Config]
    zeros: tuple[str, ...] = ()
    unties: bool = False

    def misfits(self, recipe: MoeRecipe, base: Architecture) -> Iterator[str]:
        """Say why a recipe's mixture is none of these; nothing where it is one."""
        config = text_config(base.checkpoint.config)
        if config.get("model_type") not in self.takes:
            yield f"takes {' or '.join(self.takes)} models, the base is {config.get('model_type')}"
            return
        if self.has_shared and len(recipe.shared_experts) != 1:
            yield f"has exactly one shared expert, the recipe has {len(recipe.shared_experts)}"
        if not self.has_shared and recipe.shared_experts:
            yield "has no shared experts"
        other = [suffix for layer in base.layers for suffix in layer]
        other = [suffix for suffix in other if suffix not in (*self.rest, *self.zeros, *DENSE_MLP)]
        if other:
            yield f"has no place for the base's {other[0].lstrip('.')}"
        width, n_heads = config.get("hidden_size"), config.get("num_attention_heads")
        head = config.get("head_dim")
        if self.model_type == "qwen2_moe" and head and width and n_heads and head * n_heads != width:
            yield f"has heads of {width // n_heads}, the base of {head}"


def _mixtral(base: Config, n_experts: int) -> Config:
    return {"num_local_experts": n_experts, "sliding_window": base.get("sliding_window")}


def _qwen(base: Config, n_experts: int) -> Config:
    return {
        "num_experts": n_experts,
        "moe_intermediate_size": base["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2(base: Config, n_experts: int) -> Config:
    config = _qwen(base, n_experts)
    config["shared_expert_intermediate_size"] = base["intermediate_size"]
    config["qkv_bias"] = True
    # Each family has its own rule for the layers that slide where config.json does not list them.
    slides = "mistral" if base.get("sliding_window") else ""
    slides = "qwen2" if base.get("use_sliding_window") else slides
    if base["model_type"] == slides and not base.get("layer_types"):
        first = base.get("max_window_layers", 28) if slides == "qwen2" else 0
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[i >= first] for i in range(base["num_hidden_layers"])]
        config["use_sliding_window"] = True
    return config


MIXTURES = (
    MixtureArchitecture(
        name="mixtral",
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        takes=("llama", "mistral"),
        has_shared=False,
        spelling=MIXTRAL,
        rest=_LLAMA,
        config=_mixtral,
        unties=True,  # vLLM's Mixtral knows no tied head
    ),
    MixtureArchitecture(
        name="qwen",
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        takes=("llama", "mistral", "qwen2"),
        has_shared=True,
        spelling=QWEN,
        rest=_LLAMA,
        config=_qwen2,
        zeros=_QKV_BIASES,
    ),
    MixtureArchitecture(
        name="qwen3",
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        takes=("qwen3",),
        has_shared=False,
        spelling=QWEN,
        rest=_QWEN3,
        config=_qwen,
    ),
)
# Mixtures that mergekit-moe writes and that cannot be made here, and why.
_UNMAKABLE = {"deepseek": "Transformers has no such model and would run code from the Hub for it"}


def choose(recipe: MoeRecipe, base: Architecture) -> MixtureArchitecture:
    """Return the first architecture that fits, among those that the recipe admits.

    Raises:
        RecipeError: none does; with what stands against each.
    """
    wanted = (recipe.architecture or "").lower()
    for name, why in _UNMAKABLE.items():
        if wanted and name.startswith(wanted[: len(name)]):
            raise RecipeError(f"architecture is {recipe.architecture!r}; {why}; {_choices()}")
    found = [mixture for mixture in MIXTURES if _is_meant(mixture, wanted)]
    if not found:
        raise RecipeError(f"architecture is {recipe.architecture!r}, which cannot be made; {_choices()}")
    reasons = {mixture.name: list(mixture.misfits(recipe, base)) for mixture in found}
    for mixture in found:
        if not reasons[mixture.name]:
            return mixture
    against = "; ".join(f"{name} {' and '.join(texts)}" for name, texts in reasons.items())
    raise RecipeError(
        f"experts cannot be joined to a mixture of {recipe.base_model!r}: {against}; change the models, "
        f"shared_experts or architecture"
    )


def _is_meant(mixture: MixtureArchitecture, wanted: str) -> bool:
    """Tell whether a name as mergekit-moe takes it (`qwen`, `Qwen MoE`) or a model type means this."""
    titles = (f"{mixture.name} moe", mixture.model_type, mixture.class_name.lower())
    return any(title.startswith(wanted) for title in titles)


def _choices() -> str:
    return f"use one of: {', '.join(mixture.name for mixture in MIXTURES)}"


def mixture_config(
    mixture: MixtureArchitecture, recipe: MoeRecipe, base: Mapping[str, Any], ties: bool
) -> Config:
    """Return config.json of the mixture.

    Args:
        base: the base's config.json.
        ties: whether the base's head is its embedding.
    """
    config = {**base, **mixture.config(dict(base), len(recipe.experts))}
    config["model_type"] = mixture.model_type
    config["architectures"] = [mixture.class_name]
    config["num_experts_per_tok"] = recipe.experts_per_token
    config["tie_word_embeddings"] = ties and not mixture.unties
    dtype = recipe.out_dtype or recipe.dtype
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config
