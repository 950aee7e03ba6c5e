"""The genome of a mergekit-evolve file, and the space that it spans.

A genome is an array of shape (G, M, F, P): layer groups, models, tensor-name filters (the last
one catches the rest) and parameters, which are weight and, for ties and dare_ties, density. For
slerp the one parameter is a model's score. Decoded as mergekit-evolve 0.1.5 does, but that its
values are bounded here, where it folds them (|weight|, density cut to [0, 1]).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from evolve.errors import SearchFileError
from evolve.space import SearchSpace, Value, Variable
from evolve.space.tree import differences
from merge_core.errors import RecipeError
from merge_core.methods import METHODS
from merge_core.recipe import Recipe, Reference

# Weights of more than twice a whole task vector are no use; where weights are normalised only
# their ratios count.
WEIGHT_HIGH = 2.0
# Only differences of scores count: the second of two models gets a share of 0.018 at least.
SCORE_HIGH = 4.0
_BASED = ("task_arithmetic", "ties", "dare_ties")
_WITH_DENSITY = ("ties", "dare_ties")
_NORMALIZED = ("linear", "ties", "dare_ties")


class Genome(BaseModel):
    """The section `genome:`; names and defaults are mergekit-evolve's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[Reference, ...] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Reference | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    """Layers a group; 0 or less: one group of all."""
    normalize: bool | None = None
    """None: whether the method is linear, ties or dare_ties."""
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False
    """Whether the groups' values are interpolated over the layers."""

    @property
    def is_slerp(self) -> bool:
        """Whether scores choose two models a group."""
        return self.merge_method == "slerp"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the last axis."""
        if self.is_slerp:
            return ("score",)
        return ("weight", "density") if self.merge_method in _WITH_DENSITY else ("weight",)

    @property
    def has_unlisted_base(self) -> bool:
        """Whether the base is none of the models."""
        return self.base_model is not None and self.base_model not in self.models

    def faults(self) -> list[str]:
        """List settings that do not go together."""
        faults = []
        if self.base_model is None and self.merge_method in _BASED:
            faults.append(f"genome.base_model is missing; {self.merge_method} needs it, add it")
        if self.is_slerp and self.smooth:
            faults.append("genome.smooth is true; slerp has two models a group, remove it")
        if self.is_slerp and self.filters:
            faults.append("genome.filters are given; slerp has one value a group, remove them")
        if self.is_slerp and len(self.models) < 2:
            faults.append("genome.models lists 1 model; slerp takes two or more, add some")
        labels = _labels(self)
        faults += [
            f"genome.filters names {label!r} twice, the rest ('*') is always added; name it once"
            for label in dict.fromkeys(labels)
            if labels.count(label) > 1
        ]
        return faults

    def n_groups(self, n_layers: int) -> int:
        """Return G.

        Raises:
            SearchFileError: the granularity does not divide the layers.
        """
        if self.layer_granularity <= 0:
            return 1
        if n_layers % self.layer_granularity:
            divisors = [d for d in range(1, n_layers + 1) if n_layers % d == 0]
            raise SearchFileError(
                f"genome.layer_granularity is {self.layer_granularity}, which does not divide the "
                f"{n_layers} layers of {self.models[0]}; use one of {divisors}, or 0"
            )
        return n_layers // self.layer_granularity


def _labels(genome: Genome) -> list[str]:
    return [*(genome.filters or ()), "*"]


class GenomeSpace(SearchSpace):
    """The variables of a genome, in row-major order of (G, M, F, P).

    Weights lie in [0, 2], or [-2, 2] with `allow_negative_weights`, densities in [0, 1], slerp's
    scores in [0, 4]. Weights and scores start at 1/M, densities at 1.

    Args:
        genome: see Genome.
        n_layers: gives a model's number of layers; those of the first model are divided.
        random_start: seed of starts that are uniform in [0, 1) instead.

    Raises:
        SearchFileError: with every fault found.
    """

    def __init__(
        self, genome: Genome, n_layers: Callable[[str], int], random_start: int | None = None
    ) -> None:
        super().__init__()
        self.genome = genome
        self._n_layers = n_layers(genome.models[0])
        self._labels = _labels(genome)
        self.shape = (
            genome.n_groups(self._n_layers),
            len(genome.models),
            len(self._labels),
            len(genome.parameters),
        )
        rng = None if random_start is None else random.Random(f"{random_start}:random_init")
        self.variables = [self._variable(cell, rng) for cell in np.ndindex(*self.shape)]
        try:
            self.recipe(self.starts())
        except RecipeError as error:
            raise SearchFileError(error.faults) from None
        self.notes = list(self._notes())

    def _variable(self, cell: tuple[int, ...], rng: random.Random | None) -> Variable:
        g, m, f, p = cell
        n_groups, n_models, n_labels, _ = self.shape
        kind = self.genome.parameters[p]
        name = f"models[{m}].{kind}"
        if n_labels > 1:
            name += f"[{self._labels[f]}]"
        if n_groups > 1:
            name += f"[{g}]"
        high = {"weight": WEIGHT_HIGH, "density": 1.0, "score": SCORE_HIGH}[kind]
        low = -high if kind == "weight" and self.genome.allow_negative_weights else 0.0
        start = 1.0 if kind == "density" else 1 / n_models
        return Variable(name, low, high, rng.random() if rng else start)

    def _notes(self) -> Iterator[str]:
        base, method = self.genome.base_model, self.genome.merge_method
        if self.genome.has_unlisted_base and method == "slerp":
            yield (
                f"genome.base_model: {base} gives config and tokenizer and is not merged "
                f"(mergekit-evolve adds it to each pair of slerp's, and every merge fails)"
            )
        elif self.genome.has_unlisted_base and method == "linear":
            yield (
                f"genome.base_model: {base} gives config and tokenizer and is merged with weight 0 "
                f"(mergekit-evolve gives it no weight, and every merge fails)"
            )
        elif method in _BASED and base in self.genome.models:
            yield (
                f"genome.models[{self.genome.models.index(str(base))}] is the base of {method}, so that "
                f"its values change nothing"
            )

    # ---- arrays -------------------------------------------------------------------------------

    def genotype(self, values: Mapping[str, Value]) -> np.ndarray:
        """Return values as the array that mergekit-evolve has; shape (G, M, F, P)."""
        vector = [float(values[v.name]) for v in self.variables]  # type: ignore[arg-type]
        return np.array(vector).reshape(self.shape)

    def named(self, genotype: np.ndarray) -> dict[str, Value]:
        """Return the values of an array of shape (G, M, F, P): the inverse of `genotype`."""
        return dict(zip((v.name for v in self.variables), genotype.ravel().tolist(), strict=True))

    # ---- recipes ------------------------------------------------------------------------------

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe that a genome stands for.

        Without `smooth` it has a slice a group. What the method does not read, such as int8_mask
        of slerp, is left out; mergekit ignores it.

        Raises:
            RecipeError: never for values within their bounds.
        """
        genotype = self.genotype(values)
        method = self.genome.merge_method
        normalize = self.genome.normalize
        shared = {
            "normalize": method in _NORMALIZED if normalize is None else normalize,
            "int8_mask": True,
        }
        config: dict[str, Any] = {
            "merge_method": method,
            "base_model": self.genome.base_model,
            "parameters": {k: v for k, v in shared.items() if k in METHODS[method].shared},
            "dtype": "bfloat16",
            "tokenizer_source": self.genome.tokenizer_source,
        }
        if self.genome.smooth:
            config["models"] = self._sources(genotype)
        else:
            slices = self._pair if self.genome.is_slerp else self._slice
            config["slices"] = [slices(genotype[g : g + 1], g) for g in range(self.shape[0])]
        return Recipe.parse(config)

    def _slice(self, genotype: np.ndarray, g: int) -> dict[str, Any]:
        layers = self._layers(g)
        return {"sources": [{**source, "layer_range": layers} for source in self._sources(genotype)]}

    def _layers(self, g: int) -> list[int]:
        size = self._n_layers // self.shape[0]
        return [g * size, (g + 1) * size]

    def _sources(self, genotype: np.ndarray) -> list[dict[str, Any]]:
        """List the models with their parameters over the given groups, an unlisted base last."""
        sources: list[dict[str, Any]] = [
            {
                "model": model,
                "parameters": {
                    name: self._setting(genotype[:, m, :, p])
                    for p, name in enumerate(self.genome.parameters)
                },
            }
            for m, model in enumerate(self.genome.models)
        ]
        if self.genome.has_unlisted_base:
            weight = {"parameters": {"weight": 0.0}} if self.genome.merge_method == "linear" else {}
            sources.append({"model": self.genome.base_model, **weight})
        return sources

    def _setting(self, cells: np.ndarray) -> Any:
        """Spell a parameter of one model; cells of shape (groups, F)."""
        by_filter = [float(row[0]) if len(row) == 1 else row.tolist() for row in cells.T]
        if len(by_filter) == 1:
            return by_filter[0]
        *named, rest = by_filter
        labels = self._labels[:-1]
        return [
            *({"filter": label, "value": value} for label, value in zip(labels, named, strict=True)),
            {"value": rest},
        ]

    def _pair(self, genotype: np.ndarray, g: int) -> dict[str, Any]:
        """Merge the two models of the highest scores, the higher as base.

        t is the softmax of the two scores, the other's share.
        """
        scores = genotype.ravel().tolist()
        base, other = sorted(range(len(scores)), key=lambda m: (-scores[m], m))[:2]
        models, layers = self.genome.models, self._layers(g)
        return {
            "sources": [{"model": models[m], "layer_range": layers} for m in (base, other)],
            "base_model": models[base],
            "parameters": {"t": 1 / (1 + math.exp(scores[base] - scores[other]))},
        }

    def examples(self) -> list[Recipe]:
        """Return recipes that name every model: slerp leaves some out."""
        if not self.genome.is_slerp:
            return super().examples()
        raised = np.repeat(self.genotype(self.starts())[None], self.shape[1], axis=0)
        for m, genotype in enumerate(raised):
            genotype[:, m] = SCORE_HIGH
        return [self.recipe(self.starts()), *(self.recipe(self.named(each)) for each in raised)]

    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return values that make this recipe, see SearchSpace."""
        try:
            genotype = self._scores(recipe) if self.genome.is_slerp else self._read(recipe)
            found = self.named(genotype)
            made = self.recipe(found)
        except (LookupError, TypeError, ValueError, ArithmeticError, RecipeError):
            raise SearchFileError(
                f"the recipe is none that genome: with {self.genome.merge_method} stands for; give one "
                f"of its own form"
            ) from None
        faults = list(differences(made.as_config(), recipe.as_config()))
        for variable in self.variables:
            if not variable.low <= (value := float(found[variable.name])) <= variable.high:  # type: ignore[arg-type]
                faults.append(
                    f"{variable.name} is {value:g}; the space has [{variable.low:g}, {variable.high:g}]"
                )
        if faults:
            raise SearchFileError(faults)
        return found

    def _read(self, recipe: Recipe) -> np.ndarray:
        genotype = np.empty(self.shape)
        for g, m, f, p in np.ndindex(*self.shape):
            listed = (recipe.models or ()) if self.genome.smooth else (recipe.slices or ())[g].sources
            setting = listed[m].parameters[self.genome.parameters[p]]
            if len(self._labels) > 1:
                setting = setting[f]["value"]
            genotype[g, m, f, p] = setting[g] if isinstance(setting, list) else setting
        return genotype

    def _scores(self, recipe: Recipe) -> np.ndarray:
        """Find scores that choose these pairs: the other and all below at the start, the base above."""
        start = 1 / self.shape[1]
        genotype = np.full(self.shape, start)
        for g, entry in enumerate(recipe.slices or ()):
            base, other = (self.genome.models.index(source.model) for source in entry.sources)
            t = entry.parameters["t"]
            genotype[g, :other] = 0.0  # an equal score that comes first would be chosen instead
            genotype[g, base] = start + math.log((1 - t) / t)
        return genotype
