"""A linear recipe over LoRA adapters of one base, whose merge is itself an adapter of that base.

With models W + s_i B_i A_i and coefficients c_i that leave W its weight of 1, the merged weight is
W + sum_i c_i s_i B_i A_i, which is W + B A with A = [A_1; A_2; ...] and
B = [c_1 s_1 B_1, c_2 s_2 B_2, ...]. Nothing is merged then: an engine that holds W and serves adapters
can serve many such recipes at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merge_core.adapted import LowRankUpdate
from merge_core.checkpoint.adapter import PREFIX, Adapter, Factors
from merge_core.checkpoint.locate import ADAPTER_FILES, split_adapter
from merge_core.checkpoint.read import ADAPTER_CONFIG
from merge_core.errors import MergeError, RecipeError
from merge_core.methods import METHODS
from merge_core.methods.linear import divisor_of
from merge_core.moe.recipe import MoeRecipe
from merge_core.parameters import look_up
from merge_core.plan import Input, Planned, model_alone, plan_merge
from merge_core.recipe import Recipe
from merge_core.sources import Sources

# By how much the base's weight may differ from 1: the rounding of normalised weights in float64.
_ROUNDING = 1e-9


class NoAdapterError(MergeError):
    """A recipe whose merge is no low-rank change of one base; it may be a good recipe all the same."""


@dataclass(frozen=True)
class CombinedAdapter:
    """The merge of a recipe as an adapter.

    Attributes:
        base: reference of the model that it changes.
        factors: by the adapted module's name A, shape (r, n), and B, shape (m, r), both float32. B A is
            added to the map of the module, whose m outputs are rows; scalings and coefficients are in B.
    """

    base: str
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rank(self) -> int:
        """The largest r."""
        return max(a.shape[0] for a, _ in self.factors.values())

    def save(self, folder: Path) -> None:
        """Write the adapter into a new folder, as PEFT does."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        tensors = {}
        for module, (a, b) in self.factors.items():
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            # Scalings are in B already; what is read is divided by r.
            "lora_alpha": self.rank,
            "rank_pattern": {module: len(a) for module, (a, _) in self.factors.items()},
            "alpha_pattern": {module: len(a) for module, (a, _) in self.factors.items()},
            "target_modules": sorted({module.rpartition(".")[2] for module in self.factors}),
            "bias": "none",
        }
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def combined_adapter(recipe: Recipe, sources: Sources) -> CombinedAdapter:
    """Return the adapter that a recipe's merge is.

    Parameters are looked up tensor by tensor as a merge does, filters and gradients included. Factors of
    a model whose coefficient is zero stay, so that all recipes over the same models have one rank.

    Raises:
        NoAdapterError: the merge is no such adapter, with the reason.
        RecipeError, CheckpointError: it cannot be merged at all.
    """
    base = _base_of(recipe)
    plan = list(plan_merge(recipe, sources))
    alone = plan_merge(model_alone(base, recipe), sources)
    if [planned.name for planned in plan] != [planned.name for planned in alone]:
        raise NoAdapterError(f"it has other tensors than {base!r}")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for planned in plan:
        if not planned.is_floating:
            continue
        parts: list[tuple[Tensor, Tensor]] = []
        for reference, coefficient in _coefficients(planned, base).items():
            parts += _scaled(planned.name, reference, coefficient, sources)
        if parts:
            module = planned.name.removesuffix(".weight")
            factors[module] = (
                torch.cat([a for a, _ in parts]),
                torch.cat([b for _, b in parts], dim=1),
            )
    if not factors:
        raise NoAdapterError("no model of it has an adapter")
    return CombinedAdapter(base, factors)


def combined_adapters(recipes: Iterable[Recipe], sources: Sources) -> list[CombinedAdapter]:
    """Return the adapters of the recipes, without those whose numbers allow no merge.

    Raises:
        NoAdapterError: the merge of one is no adapter.
    """
    found = []
    for recipe in recipes:
        # Such as weights that are all zero, at the lower ends of their ranges.
        with suppress(RecipeError):
            found.append(combined_adapter(recipe, sources))
    return found


def _base_of(recipe: Recipe) -> str:
    """Return the base that all models of a recipe have, or are."""
    if isinstance(recipe, MoeRecipe) or recipe.intermediate:
        raise NoAdapterError("only plain merges of models with adapters are adapters")
    if recipe.has_own_tokenizer:
        raise NoAdapterError("its vocabulary is built anew")
    bases = dict.fromkeys(split_adapter(reference)[0] for reference in recipe.references())
    if len(bases) > 1:
        raise NoAdapterError(f"its models have several bases ({', '.join(bases)})")
    return next(iter(bases))


def _coefficients(planned: Planned, base: str) -> dict[str, float]:
    """Return each model's coefficient in a tensor, by reference; that of the base's weight is 1."""
    entries: Sequence[Input] = planned.all_inputs
    if any(entry.name != planned.name for entry in entries) or planned.maker or planned.vocabulary:
        raise NoAdapterError(f"{planned.name} is made of other tensors of the models")
    method = METHODS[planned.method]

    def own(name: str) -> list[float]:
        parameter = method.per_model[name]
        return [
            look_up(name, parameter, (*e.levels, *planned.levels), e.filter_name, planned.t)
            for e in planned.inputs
        ]

    def shared(name: str) -> float | bool:
        return look_up(name, method.shared[name], planned.levels, planned.name, planned.t)

    found: dict[str, float] = {}
    if planned.method == "passthrough":
        coefficients = own("scale")
    elif planned.method == "linear":
        weights = own("weight")
        divisor = divisor_of(planned.name, weights) if shared("normalize") else 1.0
        coefficients = [weight / divisor for weight in weights]
    elif planned.method == "task_arithmetic" and planned.base is not None:
        weights, factor = own("weight"), shared("lambda")
        if shared("normalize") and abs(total := sum(weights)) >= 1e-8:
            factor /= total
        coefficients = [weight * factor for weight in weights]
        found[planned.base.model] = 1.0 - sum(coefficients)
    else:
        raise NoAdapterError(f"{planned.method} is not linear in its models")
    for entry, coefficient in zip(planned.inputs, coefficients, strict=True):
        found[entry.model] = found.get(entry.model, 0.0) + coefficient
    if abs(sum(found.values()) - 1.0) > _ROUNDING:
        raise NoAdapterError(
            f"the weights of {planned.name} sum to {sum(found.values()):g}, which scales {base!r} "
            f"itself; set normalize: true"
        )
    return found


def _scaled(
    name: str, reference: str, coefficient: float, sources: Sources
) -> list[tuple[Tensor, Tensor]]:
    """Return A and scaled B of each change that a model's adapter makes to a tensor."""
    checkpoint = sources.architecture(reference).checkpoint
    base = sources.architecture(split_adapter(reference)[0]).checkpoint
    store, _, update = checkpoint.origin(name)
    if store is not base:
        raise NoAdapterError(f"{reference!r} replaces {name} as a whole")
    if update is None:
        return []
    if not isinstance(update, LowRankUpdate):
        raise NoAdapterError(f"{reference!r} changes the bias {name}")
    parts = []
    for term in update.terms:
        if term.factors.magnitude:
            raise NoAdapterError(f"{reference!r} scales the rows of {name} (DoRA)")
        if term.factors.of_embedding or sources.architecture(reference).is_vocabulary(name):
            raise NoAdapterError(f"{reference!r} changes the vocabulary's {name}")
        a, b = _read(update.adapter, term.factors)
        parts.append((a, b * (term.factors.scaling * coefficient)))
    return parts


def _read(adapter: Adapter, factors: Factors) -> tuple[Tensor, Tensor]:
    return adapter.read(factors.a).float(), adapter.read(factors.b).float()
