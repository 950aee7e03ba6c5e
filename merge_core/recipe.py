"""The recipe: a plain merge config, as mergekit reads and writes it, validated and frozen.

`Recipe.load(path)` reads a YAML file, `Recipe.parse(data)` a mapping. Everything that can be said
without opening a model is checked, and every fault found is reported at once.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from merge_core.errors import RecipeError, schema_faults
from merge_core.methods.parameter import plain_numbers
from merge_core.parts import Part, parts_of
from merge_core.recipe_check import Findings, check_recipe, intermediate_faults
from merge_core.recipe_yaml import dump_yaml, load_yaml
from merge_core.reference import Reference as Reference
from merge_core.reference import reference_text, result_in
from merge_core.tokenizer.settings import TokenizerSettings, checked_template, known_keys

__all__ = [
    "ModelEntry",
    "ModuleEntry",
    "Recipe",
    "SliceEntry",
    "SourceEntry",
    "load_yaml",
    "reference_text",
]

Dtype = Literal["bfloat16", "float16", "float32", "float64"]


Parameters = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else plain_numbers(value))
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Part):
    """One model of `models:`, with the parameters that belong to it."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SourceEntry(ModelEntry):
    """One source of an output slice: layers [start, end) of a model."""

    layer_range: tuple[int, int]


class SliceEntry(_Part):
    """One run of output layers and what it is made of; method and base may be its own."""

    sources: tuple[SourceEntry, ...] = Field(min_length=1)
    merge_method: str | None = None
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: float | None = None


class ModuleEntry(_Part):
    """The body of a recipe under the name of the module that it makes."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_models(self) -> ModuleEntry:
        if not self.models and not self.slices:
            raise ValueError("a module needs `models:` or `slices:`; add one")
        return self


class Recipe(_Part):
    """A merge config with every value fixed; hashable by its text, safe to share.

    `models:` merges whole models, `slices:` runs of their layers. With both, slices say which
    layers, and the parameters of a model stand just below those of its sources in the slices.
    `intermediate:` names recipes whose results this one, or each other, uses as models.
    """

    merge_method: str | None = None
    base_model: Reference | None = None
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    modules: dict[str, ModuleEntry] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Reference | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    random_seed: int = 0
    # Each is written as what it is: a mixture of experts has keys of its own.
    intermediate: dict[str, SerializeAsAny[Recipe]] = Field(default_factory=dict)

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _without_torch_prefix(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @field_validator("chat_template")
    @classmethod
    def _is_a_template(cls, value: str | None) -> str | None:
        return value if value is None else checked_template(value)

    @model_validator(mode="after")
    def _has_one_tokenizer(self) -> Recipe:
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError(
                "a recipe has `tokenizer:` or `tokenizer_source:`, not both; write the source into "
                "`tokenizer:`"
            )
        return self

    @model_validator(mode="after")
    def _has_one_body(self) -> Recipe:
        self._check_body()  # another kind's own, where it stands among the intermediate ones
        return self

    def _check_body(self) -> None:
        """Refuse a recipe that merges nothing, or two things.

        Raises:
            ValueError: so it is.
        """
        if self.modules is not None:
            if self.models or self.slices:
                raise ValueError(
                    "a recipe has `modules:`, or `models:` and `slices:`, not both; remove one"
                )
            if len(self.modules) != 1:
                raise ValueError(
                    f"modules names {len(self.modules)} modules ({', '.join(self.modules)}); a causal "
                    f"language model is one, keep one under the name default"
                )
        elif not self.models and not self.slices:
            raise ValueError("a recipe needs `models:` or `slices:`; add one")

    @classmethod
    def parse(cls, data: Any, strict: bool = True) -> Recipe:
        """Build a recipe from a mapping and check it whole.

        Args:
            data: what YAML gave.
            strict: parameters that no method reads are faults; else see `check`.

        Raises:
            RecipeError: with every fault found.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"recipe is {data!r:.60}; it must be a mapping with `merge_method:`")
        recipe, faults = (_kind_of(data) or cls).built(data)
        findings = recipe._findings()
        faults += findings.faults + (findings.unread if strict else [])
        if faults:
            raise RecipeError(faults)
        return recipe

    @classmethod
    def built(cls, data: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
        """Build a recipe from a mapping, each value checked by itself.

        Returns:
            The recipe, and faults beside it: keys that say nothing.

        Raises:
            RecipeError: it cannot be built; with every fault found.
        """
        data, faults, hinders = _with_mixtures(data)
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(schema_faults(error, cls.keys_of(data)) + faults) from None
        if hinders:
            raise RecipeError(faults)
        return recipe, faults

    @classmethod
    def keys_of(cls, data: Mapping[str, Any]) -> dict[str, Iterable[str]]:
        """Say which keys exist at each place of a recipe, those below its own names included."""
        known = {**KNOWN_KEYS, **known_keys(data.get("tokenizer"))}
        for name in _names(data.get("modules")):
            known[f"modules.{name}"] = ModuleEntry.model_fields
            known |= {f"modules.{name}.{place}": keys for place, keys in KNOWN_KEYS.items() if place}
        for name in _names(data.get("intermediate")):
            inner = Recipe.keys_of(data["intermediate"][name])
            known |= {f"intermediate.{name}.{place}".rstrip("."): keys for place, keys in inner.items()}
        return known

    @classmethod
    def load(cls, path: str | Path, strict: bool = True) -> Recipe:
        """Read a recipe from a YAML file; faults as in `parse`."""
        return cls.parse(load_yaml(path), strict)

    def as_config(self) -> dict[str, Any]:
        """Return the plain mapping that mergekit reads too; `parse` of it gives an equal recipe."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text, keys in the usual order."""
        return dump_yaml(self.as_config())

    def body(self) -> tuple[str, Recipe | ModuleEntry]:
        """Return what is merged, the only module or the recipe itself, and its path in the recipe."""
        for name, module in (self.modules or {}).items():
            return f"modules.{name}.", module
        return "", self

    def parts(self) -> list[Part]:
        """Return the recipe in its one form: slices with method, base, sources and levels."""
        return parts_of(self)

    def methods(self) -> list[str]:
        """List the methods of the slices, each once, in their order."""
        return list(dict.fromkeys(part.method for part in self.parts() if part.method))

    def inputs(self) -> list[str]:
        """List what the recipe itself merges, models and intermediate results: each once, base first."""
        found = [self.base_model] if self.base_model else []
        for part in self.parts():
            found += [part.base] if part.base else []
            found += [source.model for source in part.sources]
        return list(dict.fromkeys(found))

    def named(self) -> list[str]:
        """List what the recipe itself merges, then what else its tokenizer is made of: each once."""
        settings = self.vocabulary()
        return list(dict.fromkeys([*self.inputs(), *(settings.references() if settings else ())]))

    def uses(self, results: Container[str]) -> dict[str, list[str]]:
        """Return the results that the recipe itself names, with the adapters that it puts on each."""
        found: dict[str, list[str]] = {}
        for reference in self.named():
            if (result := result_in(reference, results)) is not None:
                name, adapter = result
                found.setdefault(name, []).extend([] if adapter is None else [adapter])
        return found

    def references(self) -> list[str]:
        """List the models on disk that are read, each once, base first, then as written.

        Those of an intermediate result stand in its place; see `adapters` for what is put on it.
        """
        return list(dict.fromkeys(self._models_of(self, ())))

    def _models_of(self, document: Recipe, within: tuple[str, ...]) -> Iterator[str]:
        for reference in document.inputs():
            result = result_in(reference, self.intermediate)
            if result is None:
                yield reference
            elif (name := result[0]) not in within:
                yield from self._models_of(self.intermediate[name], (*within, name))

    def adapters(self) -> list[str]:
        """List the adapters that are put on intermediate results, each once."""
        documents = (self, *self.results().values())
        put = (on for document in documents for on in document.uses(self.intermediate).values())
        return list(dict.fromkeys(adapter for adapters in put for adapter in adapters))

    def results(self) -> dict[str, Recipe]:
        """Return the intermediate recipes that are used, each after those that it uses."""
        found: dict[str, Recipe] = {}

        def add(document: Recipe) -> None:
            for name in document.uses(self.intermediate):
                if name not in found:
                    add(self.intermediate[name])
                    found[name] = self.intermediate[name]

        add(self)
        return found

    def result(self, name: str) -> Recipe:
        """Return the recipe of an intermediate result as one of its own, with what it uses."""
        return self.intermediate[name].model_copy(update={"intermediate": self.intermediate})

    def vocabulary(self) -> TokenizerSettings | None:
        """Return what `tokenizer:` or `tokenizer_source:` says; None: every model has the donor's ids."""
        if self.tokenizer_source is not None:
            return TokenizerSettings(source=self.tokenizer_source)
        return self.tokenizer

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether recipe or intermediate ones say more of the tokenizer than that it is the donor's."""
        documents = (self, *self.intermediate.values())
        return any(d.vocabulary() is not None or d.chat_template is not None for d in documents)

    def check(self) -> tuple[list[str], list[str]]:
        """Check methods, parameters and model counts.

        Returns:
            Faults, and warnings: what has no effect, such as parameters that the method does not
            have (mergekit ignores those in silence).
        """
        findings = self._findings()
        return findings.faults, findings.unread + findings.notes

    def _own_findings(self) -> Findings:
        """Check what is no intermediate recipe."""
        return check_recipe(self, self.parts())

    def _findings(self) -> Findings:
        found = self._own_findings()
        for name, document in self.intermediate.items():
            found.add(document._own_findings(), f"intermediate.{name}.")
        found.faults += intermediate_faults(self)
        documents = (self, *self.intermediate.values())
        used = {name for document in documents for name in document.uses(self.intermediate)}
        found.notes += [
            f"intermediate.{name} is used by no other recipe and is not merged; remove it, or name it "
            f"where a model may stand"
            for name in self.intermediate
            if name not in used
        ]
        return found


def _kind_of(data: Any) -> type[Recipe] | None:
    """Return the kind of recipe that has keys of its own; None where a mapping is a plain one."""
    if not isinstance(data, Mapping) or not ("experts" in data or data.get("merge_method") == "moe"):
        return None
    from merge_core.moe.recipe import MoeRecipe  # a kind of recipe itself

    return MoeRecipe


def _with_mixtures(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Build the intermediate recipes that are mixtures of experts.

    Returns:
        The mapping with these in place of what they are built of; their faults; and whether some
        cannot be built, which are left out.
    """
    given = data.get("intermediate")
    documents: dict[str, Any] = {}
    faults: list[str] = []
    for name, document in given.items() if isinstance(given, Mapping) else ():
        kind = _kind_of(document)
        try:
            documents[name], found = kind.built(document) if kind else (document, [])
        except RecipeError as error:
            found = error.faults
        faults += [f"intermediate.{name}.{fault}" for fault in found]
    if not documents and not faults:
        return dict(data), [], False
    return {**data, "intermediate": documents}, faults, len(documents) < len(given or ())


KNOWN_KEYS: dict[str, Iterable[str]] = {
    "": Recipe.model_fields,
    "models": ModelEntry.model_fields,
    "slices": SliceEntry.model_fields,
    "slices.sources": SourceEntry.model_fields,
}


def _names(node: Any) -> list[str]:
    entries = node.items() if isinstance(node, Mapping) else ()
    return [name for name, part in entries if isinstance(part, Mapping)]
