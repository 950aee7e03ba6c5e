"""The `experts:` recipe: which models become experts, and what sends a token to them.

The keys are mergekit-moe's, with its defaults; values may be searched like those of any recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from merge_core.errors import RecipeError, nearest
from merge_core.parts import Part
from merge_core.recipe import Recipe, Reference
from merge_core.recipe_check import Findings

GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"]
RANDOM_GATES = ("random", "uniform_random")
# Keys of a plain recipe that say something here too.
_LISTS = ("experts", "shared_experts")
_SHARED_KEYS = (
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "random_seed",
    "tokenizer_source",
    "intermediate",
)


class Expert(BaseModel):
    """One model whose MLPs become an expert."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source_model: Reference
    positive_prompts: tuple[str, ...] = ()
    """Texts that shall reach this expert."""
    negative_prompts: tuple[str, ...] = ()
    """Texts that shall not."""
    noise_scale: float | None = Field(default=None, ge=0)
    """Standard deviation of normal noise added to each tensor of the expert; null = none."""
    residual_scale: float | None = None
    """Factor of what the expert adds to the residual stream; null = 1."""

    @field_validator("positive_prompts", "negative_prompts", mode="before")
    @classmethod
    def _list_of_texts(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple | None) or not all(isinstance(t, str) for t in value or ()):
            raise ValueError("it must be a list of texts; write one in []")
        return tuple(value or ())

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative prompts."""
        return self.positive_prompts, self.negative_prompts


class MoeRecipe(Recipe):
    """A mixture of experts with every value fixed: `base_model` gives all but the MLPs."""

    merge_method: Literal["moe"] | None = None
    """Some recipes say it; mergekit-moe does not read it."""
    experts: tuple[Expert, ...]
    shared_experts: tuple[Expert, ...] = ()
    """Experts that every token passes through."""
    gate_mode: GateMode = "hidden"
    """What the router's rows are made of."""
    experts_per_token: int = Field(default=2, ge=1)
    architecture: str | None = None
    """Beginning of the name of the model that comes out; null = the first that fits."""

    @field_validator("tokenizer_source")
    @classmethod
    def _is_the_bases(cls, value: str | None) -> str | None:
        if value not in (None, "base"):
            raise ValueError("a mixture of experts has the base's tokenizer; write base, or remove it")
        return value

    def vocabulary(self) -> None:
        """Return None: every expert takes the base's ids."""
        return None

    @field_validator("experts", mode="before")
    @classmethod
    def _some_experts(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("it must be a list of experts, each with source_model; add some")
        return value

    @field_validator("shared_experts", mode="before")
    @classmethod
    def _no_shared_experts(cls, value: Any) -> Any:
        return () if value is None else value

    def _check_body(self) -> None:
        """Let it pass: the experts are the body."""

    @classmethod
    def built(cls, data: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
        """Build a recipe from a mapping, each value checked by itself, see Recipe."""
        known = cls.own_keys()
        faults = [
            f"{key} has no place beside experts; remove it"
            if key in Recipe.model_fields
            else f"{key}: unknown key {str(key)!r}; {nearest(str(key), known)}"
            for key, value in data.items()
            if key not in known and value is not None
        ]
        try:
            recipe, others = super().built({key: data[key] for key in known if key in data})
        except RecipeError as error:
            raise RecipeError(faults + error.faults) from None
        return recipe, faults + others

    @classmethod
    def keys_of(cls, data: Mapping[str, Any]) -> dict[str, Iterable[str]]:
        """Say which keys exist at each place, see Recipe."""
        own = {"": cls.own_keys(), **dict.fromkeys(_LISTS, Expert.model_fields)}
        return {**super().keys_of(data), **own}

    @classmethod
    def own_keys(cls) -> list[str]:
        """List the keys of such a recipe; those of other recipes' bodies are not among them."""
        return [*_SHARED_KEYS, *(key for key in cls.model_fields if key not in Recipe.model_fields)]

    def parts(self) -> list[Part]:
        """Return none: nothing is merged layer by layer."""
        return []

    def inputs(self) -> list[str]:
        """List the models and intermediate results that are read, each once, base first."""
        experts = [expert.source_model for expert in (*self.experts, *self.shared_experts)]
        return list(dict.fromkeys([*([self.base_model] if self.base_model else []), *experts]))

    @property
    def is_random(self) -> bool:
        """Whether the model depends on `random_seed`."""
        return self.gate_mode in RANDOM_GATES or any(
            expert.noise_scale for expert in (*self.experts, *self.shared_experts)
        )

    def mergekit_notes(self) -> list[str]:
        """Say what makes this model in mergekit, or where mergekit would make another."""
        if self.is_random:
            notes = [
                "mergekit draws other random gates and noise and ignores random_seed; only `evolve "
                "merge` makes the model that was scored"
            ]
        else:
            notes = ["mergekit-moe makes this model, mergekit-yaml does not know experts"]
        if self.gate_mode == "uniform_random" and not all(e.positive_prompts for e in self.experts):
            notes.append("mergekit wants positive_prompts for uniform_random too")
        return notes

    def _own_findings(self) -> Findings:
        return Findings(list(self._faults()), notes=list(self._notes()))

    def _faults(self) -> Iterator[str]:
        if self.base_model is None:
            yield "base_model is missing; it gives all that is no expert, add it"
        if self.experts_per_token > len(self.experts):
            yield (
                f"experts_per_token is {self.experts_per_token}; there are {len(self.experts)} experts, "
                f"ask for as many at most"
            )
        if self.gate_mode in RANDOM_GATES:
            return
        for key, experts in (("experts", self.experts), ("shared_experts", self.shared_experts)):
            for i, expert in enumerate(experts):
                if not expert.positive_prompts:
                    yield (
                        f"{key}[{i}].positive_prompts is missing; gate_mode {self.gate_mode} makes the "
                        f"router of them, add some, or choose gate_mode: random"
                    )
        prompts = {expert.prompts for expert in self.experts}
        if len(self.experts) > 1 and len(prompts) == 1 and self.experts[0].positive_prompts:
            yield (
                "experts have the same prompts, so that the router cannot tell them apart; give each "
                "prompts of its own, or choose gate_mode: random"
            )

    def _notes(self) -> Iterator[str]:
        models = {expert.source_model for expert in self.experts}
        noisy = any(expert.noise_scale for expert in self.experts)
        if len(self.experts) > 1 and len(models) == 1 and not noisy:
            yield f"all experts are {next(iter(models))!r}; they are the same until they are trained"
        if self.gate_mode in RANDOM_GATES:
            yield f"gate_mode is {self.gate_mode}; tokens reach experts by chance until it is trained"
