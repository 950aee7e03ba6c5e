"""What can be said against a recipe without opening a model: methods, parameters, counts, ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from merge_core.errors import nearest
from merge_core.methods import METHODS, Method
from merge_core.parts import Part

if TYPE_CHECKING:
    from merge_core.recipe import Recipe


@dataclass
class Findings:
    """What a check found, one line each.

    Attributes:
        faults: what must be repaired.
        unread: parameters that no method reads where they stand; most are slips.
        notes: what is well written and has no effect.
    """

    faults: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Findings, at: str) -> None:
        """Add what was found in a recipe inside this one, at a place."""
        self.faults += [at + line for line in other.faults]
        self.unread += [at + line for line in other.unread]
        self.notes += [at + line for line in other.notes]


def check_recipe(recipe: Recipe, parts: Sequence[Part]) -> Findings:
    """Check a recipe, given also as parts; everything else waits until the methods are known."""
    faults = list(dict.fromkeys(_method_faults(recipe, parts)))
    if faults:
        return Findings(faults)
    pairs = [(part, METHODS[part.method]) for part in parts if part.method]
    found = Findings(list(dict.fromkeys(_base_faults(recipe, pairs))))
    for place, parameters, is_own, readers in _parameter_places(recipe, pairs):
        _check_parameters(place, parameters, is_own, readers, found)
    for check in (_missing, _joint_faults, _count_faults, _range_faults):
        found.faults += dict.fromkeys(fault for pair in pairs for fault in check(*pair))
    found.notes = list(dict.fromkeys(_notes(recipe, pairs)))
    return found


def intermediate_faults(recipe: Recipe) -> Iterator[str]:
    """Find names that cannot be used, and recipes that would need their own results."""
    for name, document in recipe.intermediate.items():
        if not name or any(part in ("", ".", "..") for part in name.split("/")) or set(name) & {"@", "+"}:
            yield f"intermediate has the name {name!r}; a name is text without '@' and '+', and no path"
        if document.intermediate:
            yield f"intermediate.{name}.intermediate is given; write all recipes beside each other"
    waiting = dict(recipe.intermediate)
    while ready := [name for name, d in waiting.items() if not d.uses(waiting)]:
        for name in ready:
            del waiting[name]
    if waiting:
        yield (
            f"intermediate results {', '.join(waiting)} use each other in a circle; "
            f"name a model on disk in one of them"
        )
    for document in (recipe, *recipe.intermediate.values()):
        for name, adapters in document.uses(recipe.intermediate).items():
            if "" in adapters:
                yield f"model '{name}+' names no adapter; write it behind the '+', or leave that out"


def _method_faults(recipe: Recipe, parts: Sequence[Part]) -> Iterator[str]:
    top = recipe.merge_method
    for place, name in [("", top), *((f"{part.place}.", part.method) for part in parts)]:
        if name is not None and name not in METHODS and (not place or name != top):
            yield (
                f"{place}merge_method is {name!r}, which is not a known method; {nearest(name, METHODS)}"
            )
    if any(part.method is None for part in parts):
        yield "merge_method is missing; it is required, add it"


def _base_faults(recipe: Recipe, pairs: Iterable[tuple[Part, Method]]) -> Iterator[str]:
    for part, method in pairs:
        if method.base == "required" and part.base is None:
            place = "" if method.name == recipe.merge_method else f"{part.place}."
            yield (
                f"{place}base_model is missing; {method.name} merges differences from a base, "
                f"add base_model"
            )


def _parameter_places(
    recipe: Recipe, pairs: Sequence[tuple[Part, Method]]
) -> Iterator[tuple[str, Mapping[str, Any], bool, list[Method]]]:
    """Walk every `parameters:`: path, mapping, whether a model's own, and the methods that read it."""
    everyone = list({method.name: method for _, method in pairs}.values())
    yield "parameters", recipe.parameters, False, everyone
    at, body = recipe.body()
    if body is not recipe:
        yield f"{at}parameters", body.parameters, False, everyone
    for i, entry in enumerate(body.models or ()):
        readers = [
            method for part, method in pairs if entry.model in [source.model for source in part.sources]
        ]
        yield f"{at}models[{i}].parameters", entry.parameters, True, readers or everyone
    for i, part in enumerate(body.slices or ()):
        readers = [pairs[i][1]]
        yield f"{at}slices[{i}].parameters", part.parameters, False, readers
        for j, source in enumerate(part.sources):
            place = f"{at}slices[{i}].sources[{j}].parameters"
            yield place, source.parameters, True, readers


def _check_parameters(
    place: str, parameters: Mapping[str, Any], is_own: bool, readers: list[Method], found: Findings
) -> None:
    for name, setting in parameters.items():
        shared = [method.shared[name] for method in readers if name in method.shared]
        known = [method.per_model[name] for method in readers if name in method.per_model]
        if not is_own:
            known += shared
        if known:
            found.faults += dict.fromkeys(
                fault for parameter in known for fault in parameter.faults(f"{place}.{name}", setting)
            )
        elif shared:
            found.unread.append(
                f"{place}.{name}: {name} belongs to the whole merge and is not read from a model; "
                f"move it to the top-level parameters"
            )
        else:
            names = {name for method in readers for name in method.parameters} or {"none at all"}
            methods = " or ".join(dict.fromkeys(method.name for method in readers))
            found.unread.append(
                f"{place}.{name}: {methods} has no parameter {name!r}; {nearest(name, names)}"
            )


def _missing(part: Part, method: Method) -> Iterator[str]:
    """Find required parameters that no level of the recipe gives."""
    for name, parameter in method.parameters.items():
        if not parameter.required or any(name in level for level in part.levels):
            continue
        if name in method.shared:
            places = [f"{part.place}." if part.place != part.listing else ""]
        else:
            places = [
                f"{source.place}."
                for source in part.inputs
                if not any(name in level for level in source.levels)
            ]
        for place in places:
            yield (
                f"{place}parameters.{name} is missing; {method.name} needs it, "
                f"add {name}: {parameter.example}"
            )


def _joint_faults(part: Part, method: Method) -> Iterator[str]:
    """Find values of one model that do not go together, where all of them are plain numbers."""
    if method.joint is None:
        return
    for source in part.inputs:
        levels = (*source.levels, *part.levels)
        values = {
            name: next((level[name] for level in levels if name in level), parameter.default)
            for name, parameter in method.per_model.items()
        }
        plain = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not method.per_model[name].faults(name, value)
        }
        if plain.keys() == values.keys() and (fault := method.joint(plain)):
            yield f"{source.place}.parameters: {fault}"


def _count_faults(part: Part, method: Method) -> Iterator[str]:
    low, high = method.n_models
    count = len(part.inputs)
    if not low <= count <= high:
        what = "besides the base" if part.base or method.base == "required" else "in all"
        wanted = str(low) if low == high else f"at least {low}" if math.isinf(high) else f"{low}-{high}"
        yield (
            f"{part.listing} lists {count} models {what}; {method.name} takes {wanted}: "
            f"{'remove some or use another method' if count > high else 'add some'}"
        )


def _range_faults(part: Part, method: Method) -> Iterator[str]:
    lengths = set()
    for source in part.sources:
        if source.layer_range is None or not source.place:
            continue
        start, end = source.layer_range
        lengths.add(end - start)
        if not 0 <= start < end:
            yield (
                f"{source.place}.layer_range is [{start}, {end}]; "
                f"it must be [start, end) with 0 <= start < end"
            )
    if len(lengths) > 1:
        yield (
            f"{part.listing} have layer ranges of lengths {sorted(lengths)}; "
            f"all sources of a slice must be equally long"
        )


def _notes(recipe: Recipe, pairs: Sequence[tuple[Part, Method]]) -> Iterator[str]:
    """Say what has no effect although it is spelled as it should be."""
    for part, method in pairs:
        for source in part.sources:
            if source.model != part.base:
                continue
            for name, value in {k: v for level in source.levels for k, v in level.items()}.items():
                # A weight beside the base is a habit; what else is set there was meant to do something.
                parameter = method.per_model.get(name)
                if parameter is not None and name != "weight" and value != parameter.default:
                    yield (
                        f"{source.place}.parameters.{name} has no effect; {source.model!r} is the base "
                        f"of {method.name}, remove it"
                    )
    at, body = recipe.body()
    for i, entry in enumerate(body.slices or ()):
        if entry.residual_weight is not None:
            yield f"{at}slices[{i}].residual_weight has no effect, in mergekit neither; remove it"
    merged = {source.model for part, _ in pairs for source in part.sources}
    for i, model in enumerate(body.models or ()):
        if model.model not in merged:
            yield (
                f"{at}models[{i}] ({model.model!r}) is in no slice and is not merged; remove it, or "
                f"name it in a slice"
            )
