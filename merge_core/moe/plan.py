"""From an `experts:` recipe to the list of its output tensors, and config.json of the mixture.

What is no expert is the base's own. An expert's matrices are a model's MLP, its last one times
`residual_scale`; with `noise_scale` noise is added. Routers are made of prompts, or drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from merge_core.architecture import Architecture, text_config
from merge_core.checkpoint.read import TensorInfo
from merge_core.errors import CheckpointError
from merge_core.moe.architectures import DENSE_MLP, MixtureArchitecture, choose, mixture_config
from merge_core.moe.recipe import Expert, MoeRecipe
from merge_core.moe.router import Router
from merge_core.plan import Input, MergePlan, Planned
from merge_core.randomness import MaskKey, normals

if TYPE_CHECKING:
    from torch import Tensor

    from merge_core.sources import Sources

# Numbers of noise that are drawn at a time.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class RouterRows:
    """Makes a layer's router."""

    router: Router
    layer: int

    def prepare(self) -> None:
        """Run the prompts."""
        self.router.prepare()

    def make(self, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows, shape (experts, hidden)."""
        return self.router.rows(self.layer).to(device, dtype)


@dataclass(frozen=True)
class Noisy:
    """Makes an expert's matrix with noise: (x + noise_scale * n) * residual_scale, n standard normal.

    The noise belongs to the expert's model and tensor, and stays the same whatever other experts
    there are.
    """

    key: MaskKey
    noise_scale: float
    residual_scale: float

    def prepare(self) -> None:
        """Do nothing: noise is drawn where it is added."""

    def make(self, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the only input with noise."""
        (tensor,) = inputs
        noisy = torch.empty(tensor.shape, dtype=dtype, device=device)
        flat, result = tensor.reshape(-1), noisy.view(-1)
        for start in range(0, flat.numel(), _AT_ONCE):
            part = flat[start : start + _AT_ONCE].to(torch.float64)
            noise = normals(self.key, start, start + part.numel()).to(device)
            result[start : start + _AT_ONCE] = (part + self.noise_scale * noise) * self.residual_scale
        return noisy


@dataclass(frozen=True)
class Zeros:
    """Makes a tensor of zeros, where a mixture has one that the base lacks."""

    shape: tuple[int, ...]

    def prepare(self) -> None:
        """Do nothing."""

    def make(self, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.shape, dtype=dtype, device=device)


def plan_mixture(recipe: MoeRecipe, sources: Sources) -> MergePlan:
    """List the output tensors of a mixture whose models are open, and check that all fit.

    Raises:
        CheckpointError: experts of another architecture, layers or shapes.
        RecipeError: no architecture fits the recipe.
    """
    tensors = tuple(_Planner(recipe, sources).tensors())
    return MergePlan(tensors, results=sources.plans(recipe.inputs()))


def config_of_mixture(recipe: MoeRecipe, sources: Sources) -> dict[str, Any]:
    """Return config.json of the mixture; the models are open or will be opened."""
    base = sources.architecture(str(recipe.base_model))
    return mixture_config(choose(recipe, base), recipe, base.checkpoint.config, base.ties_embeddings)


class _Planner:
    def __init__(self, recipe: MoeRecipe, sources: Sources) -> None:
        self.recipe = recipe
        self.reference = str(recipe.base_model)
        self.base = sources.architecture(self.reference)
        self.sources = sources
        self.mixture: MixtureArchitecture = choose(recipe, self.base)
        self.everyone = [*recipe.experts, *recipe.shared_experts]
        faults = list(self._faults())
        if faults:
            raise CheckpointError(faults)
        self.router, self.shared_router = (
            Router(experts, recipe, sources) for experts in (recipe.experts, recipe.shared_experts)
        )

    def tensors(self) -> Iterator[Planned]:
        for name in self.base.before:
            yield self._copied(name)
        for layer in range(self.base.n_layers):
            yield from self._layer(layer)
        for name in self.base.after:
            yield self._copied(name)
        if self.mixture.unties and not self.base.has_head and self.base.token_embedding:
            yield self._copied(self.base.token_embedding, "lm_head.weight")

    def _layer(self, layer: int) -> Iterator[Planned]:
        prefix = f"{self.base.prefix}{layer}."
        suffixes = [s for s in self.base.layers[layer] if s not in DENSE_MLP]
        for suffix in suffixes:
            yield self._copied(self.base.layer_name(layer, suffix))
        for suffix in self.mixture.zeros:
            if suffix not in suffixes:
                weight = self._info(self.base, layer, suffix.replace(".bias", ".weight"))
                shape = weight.shape[:1]
                name = self.base.layer_name(layer, suffix)
                yield self._made(name, shape, weight.dtype, Zeros(shape))
        gate = self._info(self.base, layer, DENSE_MLP[0])
        spelling, experts = self.mixture.spelling, self.recipe.experts
        for router, name, n in (
            (self.router, spelling.router(prefix), len(experts)),
            (self.shared_router, spelling.shared_router(prefix), len(self.recipe.shared_experts)),
        ):
            if n:
                yield self._made(name, (n, gate.shape[1]), gate.dtype, RouterRows(router, layer))
        names = [spelling.names(prefix, i) for i in range(len(experts))]
        names += [spelling.shared_names(prefix) for _ in self.recipe.shared_experts]
        seen: Counter[str] = Counter()
        for expert, own_names in zip(self.everyone, names, strict=True):
            for name, suffix in zip(own_names, DENSE_MLP, strict=True):
                yield self._expert(expert, seen[expert.source_model], layer, suffix, name)
            seen[expert.source_model] += 1

    def _expert(self, expert: Expert, occurrence: int, layer: int, suffix: str, name: str) -> Planned:
        architecture = self.sources.architecture(expert.source_model)
        info = self._info(architecture, layer, suffix)
        source = architecture.layer_name(layer, suffix)
        scale = expert.residual_scale if suffix == DENSE_MLP[-1] else None
        scale = 1.0 if scale is None else scale
        entry = Input(expert.source_model, source, occurrence, ({"scale": scale},), source)
        maker = None
        if expert.noise_scale:
            key = MaskKey(self.recipe.random_seed, expert.source_model, occurrence, source)
            maker = Noisy(key, expert.noise_scale, scale)
        return Planned(
            name, "passthrough", 0.0, None, (entry,), (), info.shape, self._dtype(info), maker=maker
        )

    def _copied(self, name: str, output: str | None = None) -> Planned:
        info = self.base.info(name)
        assert info is not None
        entry = Input(self.reference, name, 0, (), name)
        return Planned(
            output or name, "passthrough", 0.0, None, (entry,), (), info.shape, self._dtype(info),
            info.is_floating,
        )  # fmt: skip

    def _made(self, name: str, shape: tuple[int, ...], dtype: str, maker: RouterRows | Zeros) -> Planned:
        dtype = self.recipe.out_dtype or self.recipe.dtype or dtype
        return Planned(name, "passthrough", 0.0, None, (), (), shape, dtype, maker=maker)

    def _dtype(self, info: TensorInfo) -> str:
        wanted = self.recipe.out_dtype or self.recipe.dtype
        return wanted if wanted and info.is_floating else info.dtype

    def _info(self, architecture: Architecture, layer: int, suffix: str) -> TensorInfo:
        info = architecture.info(architecture.layer_name(layer, suffix))
        assert info is not None, "_faults has seen to it"
        return info

    # ---- what does not fit ----

    def _faults(self) -> Iterator[str]:
        places = [f"experts[{i}]" for i in range(len(self.recipe.experts))]
        places += [f"shared_experts[{i}]" for i in range(len(self.recipe.shared_experts))]
        named = [("base_model", self.reference)]
        named += [
            (f"{place}.source_model", e.source_model)
            for place, e in zip(places, self.everyone, strict=True)
        ]
        told: set[str] = set()
        for place, reference in named:
            if reference not in told:
                told.add(reference)
                yield from (f"{place} is {reference!r}, {fault}" for fault in self._misfits(reference))

    def _misfits(self, reference: str) -> Iterator[str]:
        """Say why a model's MLPs cannot be experts here: at most one line."""
        expert = self.sources.architecture(reference)
        kind = text_config(expert.checkpoint.config).get("model_type")
        repair = f"choose a fine-tune of {self.reference!r}"
        if kind not in self.mixture.takes:
            yield (
                f"a model of type {kind}; the experts of a {self.mixture.name} are "
                f"{' or '.join(self.mixture.takes)} models, {repair}"
            )
        elif expert.n_layers != self.base.n_layers:
            yield f"which has {expert.n_layers} layers; the base has {self.base.n_layers}, {repair}"
        else:
            for layer in range(expert.n_layers):
                for suffix in DENSE_MLP:
                    own = expert.info(expert.layer_name(layer, suffix))
                    wanted = self.base.info(self.base.layer_name(layer, suffix))
                    if own is None:
                        yield f"which lacks {expert.layer_name(layer, suffix)}; {repair}"
                        return
                    if wanted is not None and own.shape != wanted.shape:
                        yield (
                            f"whose {expert.layer_name(layer, suffix)} is {list(own.shape)} where the "
                            f"base has {list(wanted.shape)}; {repair}"
                        )
                        return
