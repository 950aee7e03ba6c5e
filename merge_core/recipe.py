"""The recipe: a plain merge config, as mergekit reads and writes it, validated and frozen.

`Recipe.load(path)` reads a YAML file, `Recipe.parse(data)` a mapping. Everything that can be said
without opening a model is checked here, and every fault found is reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from merge_core.errors import RecipeError, nearest, schema_faults
from merge_core.methods import METHODS, Method, Parameter

Dtype = Literal["bfloat16", "float16", "float32", "float64"]
MAX_YAML_BYTES = 4 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Part):
    """One model of `models:`, with the parameters that belong to it."""

    model: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class SourceEntry(ModelEntry):
    """One source of an output slice: layers [start, end) of a model."""

    layer_range: tuple[int, int]


class SliceEntry(_Part):
    """One run of output layers and what it is made of."""

    sources: tuple[SourceEntry, ...] = Field(min_length=1)
    base_model: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Recipe(_Part):
    """A merge config with every value fixed; hashable by its text, safe to share."""

    merge_method: str
    base_model: str | None = None
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[SliceEntry, ...] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Literal["base"] | None = None
    random_seed: int = 0

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _without_torch_prefix(cls, value: Any) -> Any:
        return value.removeprefix("torch.") if isinstance(value, str) else value

    @field_validator("parameters", "models", "slices", mode="before")
    @classmethod
    def _empty_is_absent(cls, value: Any, info: Any) -> Any:
        if value is None and info.field_name == "parameters":
            return {}
        return value

    @model_validator(mode="after")
    def _one_of_models_and_slices(self) -> Recipe:
        if not self.models and not self.slices:
            raise ValueError("a recipe needs `models:` or `slices:`; add one")
        if self.models and self.slices:
            raise ValueError("a recipe has `models:` or `slices:`, not both; remove one")
        return self

    @classmethod
    def parse(cls, data: Any, strict: bool = True) -> Recipe:
        """Build a recipe from a mapping and check it whole.

        Args:
            data: what YAML gave.
            strict: unknown method parameters are faults; else see `warnings`.

        Raises:
            RecipeError: with every fault found.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"recipe is {data!r:.60}; it must be a mapping with `merge_method:`")
        try:
            recipe = cls.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(schema_faults(error, KNOWN_KEYS)) from None
        faults, warnings = recipe.check()
        if faults or (strict and warnings):
            raise RecipeError(faults + (warnings if strict else []))
        return recipe

    @classmethod
    def load(cls, path: str | Path, strict: bool = True) -> Recipe:
        """Read a recipe from a YAML file; faults as in `parse`."""
        return cls.parse(load_yaml(path), strict)

    def as_config(self) -> dict[str, Any]:
        """Return the plain mapping that mergekit reads too; `parse` of it gives an equal recipe."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text, keys in the usual order."""
        return yaml.dump(self.as_config(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=99)

    def references(self) -> list[str]:
        """List the models the recipe reads, each once, base first, then as written."""
        found = [self.base_model] if self.base_model else []
        found += [entry.model for entry in self.models or ()]
        for part in self.slices or ():
            found += [part.base_model] if part.base_model else []
            found += [source.model for source in part.sources]
        return list(dict.fromkeys(found))

    def check(self) -> tuple[list[str], list[str]]:
        """Check method, parameters and model counts.

        Returns:
            Faults, and warnings about parameters that the method does not have (mergekit ignores
            those in silence).
        """
        method = METHODS.get(self.merge_method)
        if method is None:
            fault = f"merge_method is {self.merge_method!r}, which is not a known method; "
            return [fault + nearest(self.merge_method, METHODS)], []
        faults: list[str] = []
        warnings: list[str] = []
        if method.base == "required" and not self._has_base():
            faults.append(
                f"base_model is missing; {method.name} merges differences from a base, add base_model"
            )
        for place, parameters, is_source in self._parameter_places():
            _check_parameters(place, parameters, is_source, method, faults, warnings)
        self._check_required(method, faults)
        for place, inputs, base in self._input_lists():
            _check_count(place, inputs, base, method, faults)
        for i, part in enumerate(self.slices or ()):
            _check_ranges(f"slices[{i}]", part, faults)
        return faults, warnings

    def _has_base(self) -> bool:
        if self.base_model:
            return True
        return bool(self.slices) and all(part.base_model for part in self.slices or ())

    def _parameter_places(self) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
        """Walk the `parameters:` of every level: path, mapping, whether a model's own."""
        yield "parameters", self.parameters, False
        for i, entry in enumerate(self.models or ()):
            yield f"models[{i}].parameters", entry.parameters, True
        for i, part in enumerate(self.slices or ()):
            yield f"slices[{i}].parameters", part.parameters, False
            for j, source in enumerate(part.sources):
                yield f"slices[{i}].sources[{j}].parameters", source.parameters, True

    def _input_lists(self) -> Iterator[tuple[str, list[str], str | None]]:
        """Walk the lists of models that meet in one output tensor, with their base."""
        if self.models:
            yield "models", [entry.model for entry in self.models], self.base_model
        for i, part in enumerate(self.slices or ()):
            base = part.base_model or self.base_model
            yield f"slices[{i}].sources", [source.model for source in part.sources], base

    def _check_required(self, method: Method, faults: list[str]) -> None:
        for name, parameter in {**method.shared, **method.per_model}.items():
            if not parameter.required or name in self.parameters:
                continue
            places: list[tuple[str, Mapping[str, Any], str]] = []
            for i, entry in enumerate(self.models or ()):
                places.append((f"models[{i}]", entry.parameters, entry.model))
            for i, part in enumerate(self.slices or ()):
                if name in part.parameters:
                    continue
                if name in method.shared:
                    places.append((f"slices[{i}]", part.parameters, ""))
                    continue
                for j, source in enumerate(part.sources):
                    if source.model != part.base_model:
                        at = f"slices[{i}].sources[{j}]"
                        places.append((at, source.parameters, source.model))
            if name in method.shared:
                missing = [""] if self.models else [place for place, given, _ in places]
            else:
                missing = [
                    place
                    for place, given, model in places
                    if name not in given and model != self.base_model
                ]
            for place in missing:
                at = f"{place}.parameters.{name}" if place else f"parameters.{name}"
                faults.append(f"{at} is missing; {method.name} needs it, add {name}: {parameter.example}")


def _check_parameters(
    place: str,
    parameters: Mapping[str, Any],
    is_source: bool,
    method: Method,
    faults: list[str],
    warnings: list[str],
) -> None:
    known = method.per_model if is_source else {**method.shared, **method.per_model}
    for name, setting in parameters.items():
        if name in known:
            faults.extend(known[name].faults(f"{place}.{name}", setting))
        elif is_source and name in method.shared:
            faults.append(
                f"{place}.{name}: {name} belongs to the whole merge and is not read from a model; "
                f"move it to the top-level parameters"
            )
        else:
            names = {**method.shared, **method.per_model} or {"none at all": Parameter()}
            warnings.append(
                f"{place}.{name}: {method.name} has no parameter {name!r}; {nearest(name, names)}"
            )


def _check_count(
    place: str, inputs: list[str], base: str | None, method: Method, faults: list[str]
) -> None:
    others = [model for model in inputs if model != base]
    if method.base == "required":
        low, high, count, what = (
            method.n_models[0],
            method.n_models[1],
            len(others),
            "besides the base",
        )
    else:
        low, high, count, what = *method.n_models, len(inputs), "in all"
    if count < low or count > high:
        wanted = str(low) if low == high else f"at least {low}" if math.isinf(high) else f"{low}-{high}"
        faults.append(
            f"{place} lists {count} models {what}; {method.name} takes {wanted}: "
            f"{'remove some or use another method' if count > high else 'add some'}"
        )


def _check_ranges(place: str, part: SliceEntry, faults: list[str]) -> None:
    lengths = set()
    for j, source in enumerate(part.sources):
        start, end = source.layer_range
        lengths.add(end - start)
        if not 0 <= start < end:
            faults.append(
                f"{place}.sources[{j}].layer_range is [{start}, {end}]; "
                f"it must be [start, end) with 0 <= start < end"
            )
    if len(lengths) > 1:
        faults.append(
            f"{place}.sources have layer ranges of lengths {sorted(lengths)}; "
            f"all sources of a slice must be equally long"
        )


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-5 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def load_yaml(path: str | Path) -> Any:
    """Read one YAML document, safely and of bounded size.

    Raises:
        RecipeError: the file is missing, too large, empty or not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file; give the path of a YAML file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise RecipeError(
            f"{path} has {path.stat().st_size} bytes; a recipe has at most {MAX_YAML_BYTES}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        if text.count("*") > 1000 and text.count("&") > 10:
            raise RecipeError(f"{path} is full of YAML aliases; write the values out")
        data = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; give a YAML file") from None
    except RecursionError:
        raise RecipeError(
            f"{path}: not valid YAML: nested too deeply; correct the syntax there"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(f"{error}".split())
        raise RecipeError(f"{where}: not valid YAML: {problem}; correct the syntax there") from None
    if data is None:
        raise RecipeError(f"{path} is empty; it must hold a mapping with `merge_method:`")
    return data


KNOWN_KEYS = {
    "": Recipe.model_fields,
    "models": ModelEntry.model_fields,
    "slices": SliceEntry.model_fields,
    "slices.sources": SourceEntry.model_fields,
}
