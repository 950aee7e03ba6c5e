"""Directions of a space in which nothing changes, told before a search wastes candidates on them.

Two candidates there have different recipes and the same model. None of this is a fault: a user may
want it so. Each note names what to fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evolve.space.tree import Slot, slots
from evolve.space.variable import Variable
from merge_core.methods import METHODS, Method
from merge_core.parts import Part, PartSource
from merge_core.recipe import Recipe

# The parameter that says whether weights are divided by their sum; nuslerp always does.
_NORMALIZERS = ("normalize", "normalize_weights")
# What does nothing for a model without weight.
_MOOT_WITHOUT_WEIGHT = ("density", "gamma", "epsilon")


def foldings(skeletons: Iterable[Mapping[str, Any]], n_layers: int | None) -> list[str]:
    """Find directions in which a candidate's model stays the same.

    Args:
        skeletons: recipes as plain data, with slots where parameters are searched; together they
            show all methods.
        n_layers: of the merge, where it has `models:` and it is known.

    Returns:
        One line each: what cancels, where, and what to fix.
    """
    scales: dict[tuple[str, str], tuple[dict[str, None], str]] = {}
    others: dict[str, None] = {}
    for skeleton in skeletons:
        alone = {key: part for key, part in skeleton.items() if key != "intermediate"}
        for part in Recipe.model_validate(alone).parts():
            method = METHODS[part.method or ""]
            for kind, where, fix in _cancelled_scales(part, method):
                methods, _ = scales.setdefault((kind, where), ({}, fix))
                methods[method.name] = None
            start, end = part.sources[0].layer_range or (0, n_layers)
            others.update(dict.fromkeys(_moot(part, method)))
            others.update(dict.fromkeys(_too_many_points(part, None if end is None else end - start)))
    kinds = {kind for _, kind in scales}
    notes = [
        f"{', '.join(methods)}: {why}, so candidates that differ in that scale alone are the same "
        f"model{_whose(kind) if len(kinds) > 1 else ''}; fix {fix}"
        for (why, kind), (methods, fix) in scales.items()
    ]
    return notes + list(others)


def _whose(kind: str) -> str:
    return " on tensors without a filter of their own" if kind == "*" else f" on tensors of {kind!r}"


def _setting(name: str, levels: Sequence[Mapping[str, Any]], default: Any = None) -> Any:
    return next((level[name] for level in levels if name in level), default)


def _cancelled_scales(part: Part, method: Method) -> Iterator[tuple[str, str, str]]:
    """Find weights that are all free where their scale cancels: why, for which filter, what to fix."""
    if "weight" not in method.per_model:
        return
    weights = [_setting("weight", (*source.levels, *part.levels)) for source in part.inputs]
    kinds = list(dict.fromkeys(kind for weight in weights for kind in _filters(weight)))
    if (where := _divides_by_sum(part, method)) is not None:
        for kind in kinds:
            for first in _all_free(weights, kind):
                fix = f"one of them, such as {first.name.removesuffix('[0]')}"
                yield (
                    f"the weights are divided by their sum{where}, which takes their scale out",
                    kind,
                    fix,
                )
    elif "lambda" in method.shared and _is_free(_setting("lambda", part.levels), "*"):
        for first in _all_free(weights, "*"):
            why = "lambda and the weights have one scale between them"
            yield why, "*", f"lambda, or {first.name.removesuffix('[0]')}"


def _divides_by_sum(part: Part, method: Method) -> str | None:
    """Say where weights are divided by their sum, "" for every candidate; None where they never are."""
    if method.name == "nuslerp":
        return ""
    for name in _NORMALIZERS:
        if name in method.shared:
            setting = _setting(name, part.levels, method.shared[name].default)
            if isinstance(setting, Slot):
                return f" where {name} is true" if True in (setting.variables[0].choices or ()) else None
            return "" if setting == 1 else None  # true, however it is written
    return None


def _all_free(weights: Sequence[Any], kind: str) -> Iterator[Variable]:
    """Yield the first variable of weights none of which is a fixed number (but zero)."""
    if all(_is_free(weight, kind) or _for(weight, kind) == 0 for weight in weights):
        found = (slot.variables[0] for weight in weights for slot in slots(_for(weight, kind)))
        yield from (variable for variable, _ in zip(found, range(1), strict=False))


def _filters(setting: Any) -> list[str]:
    """List the filters of a setting; "*" for what has none."""
    entries = setting if isinstance(setting, list) else [setting]
    return [_filter(entry) if isinstance(entry, Mapping) else "*" for entry in entries]


def _filter(entry: Mapping[str, Any]) -> str:
    """Name the filter of an entry, by its variable where it is searched; "*" where it has none."""
    given = entry.get("filter") or "*"
    return given.variables[0].name if isinstance(given, Slot) else given


def _for(setting: Any, kind: str) -> Any:
    """Return what a setting says for tensors of a filter."""
    entries = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(entry, Mapping) for entry in entries):
        return setting
    for entry in entries:
        if not isinstance(entry, Mapping):
            return entry
        if _filter(entry) in ("*", kind):
            return entry["value"]
    return None


def _is_free(setting: Any, kind: str) -> bool:
    """Tell whether every number that a setting has for a filter is searched."""
    value = _for(setting, kind)
    return all(
        isinstance(item, Slot) for item in (value if isinstance(value, list) and value else [value])
    )


def _moot(part: Part, method: Method) -> Iterator[str]:
    """Find parameters that are searched for a model on which they have no effect."""
    for source in part.sources:
        own = {name: setting for level in reversed(source.levels) for name, setting in level.items()}
        is_base = source.model == part.base
        for name, setting in own.items():
            slot = next(slots(setting), None)
            if slot is None or name not in method.per_model:
                continue
            variable = slot.variables[0].name.removesuffix("[0]")
            if is_base:
                why = f"with {method.name}: {source.model!r} is its base"
                yield f"{variable} has no effect {why}; remove it"
            elif name in _MOOT_WITHOUT_WEIGHT and _weight(source, part) == 0:
                yield f"{variable} has no effect: the model's weight is 0; fix it"


def _weight(source: PartSource, part: Part) -> Any:
    return _setting("weight", (*source.levels, *part.levels))


def _too_many_points(part: Part, n_layers: int | None) -> Iterator[str]:
    """Find gradients with more anchors than layers."""
    if n_layers is None:
        return
    levels = [level for source in part.sources for level in source.levels]
    for level in (*levels, *part.levels):
        for slot in slots(dict(level)):
            if len(slot.variables) > n_layers and slot.repeat:
                yield (
                    f"{slot.variables[0].name.removesuffix('[0]')} has {len(slot.variables)} points over "
                    f"{n_layers} layers, so some of them cannot be told apart; use at most {n_layers}"
                )
