"""Which value a tensor gets: precedence of levels, filters, gradients.

The rules are mergekit's (its defaults, its order): a level whose filters do not match yields
nothing and the look-up goes on downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from merge_core.errors import RecipeError
from merge_core.methods import Parameter

_KINDS: dict[str, Callable[[float | bool], float | bool]] = {
    "boolean": bool,
    "integer": int,
    "number": float,
}


def value_at(setting: Any, tensor_name: str, t: float, steps: bool = False) -> float | bool | None:
    """Evaluate one setting for one tensor.

    Args:
        setting: scalar, gradient (list of scalars), {filter, value} or a list of those.
        tensor_name: what filters match, by plain substring; "*" or no filter match all.
        t: position of the layer in its slice, in [0, 1]; 0 for tensors outside the layers.

    Returns:
        The value, or None where no filter matches.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, list):
        if any(isinstance(item, Mapping) for item in setting):
            place = first_match(setting, tensor_name)
            return None if place is None else value_at(setting[place]["value"], tensor_name, t, steps)
        return _gradient(setting, t, steps)
    scalar: float | bool | None = setting
    return scalar


def first_match(entries: Sequence[Mapping[str, Any]], tensor_name: str) -> int | None:
    """Return which of a setting's entries a tensor takes: the first whose filter matches, or None."""
    for i, entry in enumerate(entries):
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor_name:
            return i
    return None


def is_total(setting: Any) -> bool:
    """Tell whether a setting has a value for every tensor: no filter, or a last resort without one."""
    entries = setting if isinstance(setting, list) else [setting]
    return any(not isinstance(e, Mapping) or e.get("filter") in (None, "*") for e in entries)


def _gradient(anchors: list[Any], t: float, steps: bool) -> float | bool:
    """Interpolate linearly between anchors spread evenly over [0, 1]; booleans step."""
    position = t * (len(anchors) - 1)
    lower = math.floor(position)
    if steps or isinstance(anchors[0], bool):
        return bool(anchors[lower])
    upper = min(lower + 1, len(anchors) - 1)
    share = position - lower
    return float((1 - share) * anchors[lower] + share * anchors[upper])


def look_up(
    name: str,
    parameter: Parameter,
    levels: Iterable[Mapping[str, Any]],
    tensor_name: str,
    t: float,
) -> float | bool:
    """Find a parameter's value: the first level that has one for this tensor, else the default.

    Args:
        levels: mappings of parameters, highest precedence first: the model's own (not for shared
            parameters), slice, module, recipe.

    Raises:
        RecipeError: a required parameter has no value for this tensor.
    """
    for level in levels:
        if name in level:
            value = value_at(level[name], tensor_name, t, parameter.kind == "boolean")
            if value is not None:
                return _KINDS[parameter.kind](value)
    if parameter.default is None:
        raise RecipeError(
            f"{name} has no value for tensor {tensor_name}; no filter matches it, "
            f"add a last entry without filter"
        )
    return parameter.default
