"""A range as it is written, `{low, high, ...}` or `{choices: [...]}`, checked and made a variable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from evolve.space.variable import Condition, Variable
from merge_core.errors import nearest, shown

# More than any model has layers.
MAX_POINTS = 1000
_KEYS = {"low", "high", "start", "log", "step", "points"}


def is_range(node: Any) -> bool:
    """Tell whether a node of a search file is a range."""
    return isinstance(node, Mapping) and ("choices" in node or bool({"low", "high"} & set(node)))


def variable_of(
    node: Mapping[str, Any], name: str, condition: Condition
) -> tuple[Variable | None, list[str]]:
    """Make the variable of a range.

    Returns:
        The variable, and what is wrong with the range; one of them is empty.
    """
    faults = _faults(node, name)
    if faults:
        return None, faults
    if "choices" in node:
        choices = tuple(node["choices"])
        # The choice itself: a start may be written 1 where the choice is 1.0.
        start = choices[choices.index(node["start"])] if "start" in node else choices[0]
        return Variable(name, choices=choices, start=start, condition=condition), []
    low, high, step = float(node["low"]), float(node["high"]), node.get("step")
    variable = Variable(name, low, high, None, node.get("log", False), step, None, condition)
    if step is not None:
        # As Optuna does: the last value that steps from `low` reach.
        high = min(high, round(low + math.floor((high - low) / step + 1e-8) * step, 12))
        if high <= low:
            return None, [f"{name}.step is {step}; it must be at most high - low"]
        variable = replace(variable, high=high)
    if "start" not in node:
        return replace(variable, start=variable.from_unit(0.5)), []
    start = node["start"]
    if step is not None:
        stepped = variable.from_unit(variable.to_unit(start))
        assert isinstance(stepped, int | float)
        if abs(stepped - start) > 1e-8:
            return None, [f"{name}.start is {start}, between two steps; the nearest is {stepped:g}"]
        start = stepped
    return replace(variable, start=start if variable.is_integer else float(start)), []


def _faults(node: Mapping[str, Any], name: str) -> list[str]:
    known = {"choices", "start"} if "choices" in node else _KEYS
    faults = [
        f"{name}: unknown key {k!r} in a range; {nearest(str(k), known)}" for k in set(node) - known
    ]
    if "choices" in node:
        return faults + _choices_faults(node, name)
    numbers = {}
    for key in ("low", "high", "start", "step"):
        value = node.get(key)
        if key not in node:
            if key in ("low", "high"):
                faults.append(f"{name}.{key} is missing; a range needs low and high, add it")
        elif not is_number(value):
            faults.append(f"{name}.{key} is {shown(value)}; it must be a finite number")
        else:
            numbers[key] = value
    if not isinstance(node.get("log", False), bool):
        faults.append(f"{name}.log is {shown(node['log'])}; it must be true or false")
    points = node.get("points")
    is_count = isinstance(points, int) and not isinstance(points, bool) and 2 <= points <= MAX_POINTS
    if points is not None and not is_count:
        faults.append(
            f"{name}.points is {shown(points)}; it must be a whole number from 2 to {MAX_POINTS}"
        )
    if faults:
        return faults
    low, high = numbers["low"], numbers["high"]
    if not _is_finite(high - low):
        faults.append(f"{name}: high - low is infinite, from {low} to {high}; bring them closer")
    elif low >= high:
        faults.append(f"{name}: low is {low}, high is {high}; low must lie below high, swap them")
    elif not low <= numbers.get("start", low) <= high:
        faults.append(f"{name}.start is {numbers['start']}; it must lie in [{low}, {high}]")
    if node.get("log") and low <= 0:
        faults.append(f"{name}.low is {low}; with log: true it must be above 0")
    if "step" in numbers and (numbers["step"] <= 0 or node.get("log")):
        faults.append(f"{name}.step is {numbers['step']}; it must be above 0, and goes without log")
    return faults


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value is a finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _choices_faults(node: Mapping[str, Any], name: str) -> list[str]:
    choices = node["choices"]
    if isinstance(choices, list) and any(isinstance(choice, dict | list) for choice in choices):
        return [f"{name}.choices is {shown(choices)}; each choice must be a plain value"]
    # As recipes compare them: 1, 1.0 and true are one value.
    if not isinstance(choices, list) or len(choices) < 2 or len(set(choices)) < len(choices):
        return [f"{name}.choices is {shown(choices)}; it must be a list of at least two different values"]
    alike = [
        choice for choice in choices if isinstance(choice, bool) == isinstance(node.get("start"), bool)
    ]
    if "start" in node and node["start"] not in alike:
        return [f"{name}.start is {shown(node['start'])}; it must be one of the choices {shown(choices)}"]
    return []
