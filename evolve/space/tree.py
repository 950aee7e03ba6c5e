"""A recipe with gaps: filled with values, and read back.

What a search file spells as ranges is here a tree of plain data with slots, and with parts that are
in a recipe only under a condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolve.space.variable import Condition, Value, Variable, holds

# Read first: whether other parts are there depends on them. What is not named comes in between.
_FIRST = ("merge_method", "base_model", "model", "source_model", "slices", "models")
_LAST = ("parameters",)


class Misfit(Exception):
    """A recipe is not of this tree."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True)
class Slot:
    """Where a range stood: its variables, and how often each repeats in the exported list."""

    variables: tuple[Variable, ...]
    repeat: int = 0  # 0: a scalar

    def fill(self, values: Mapping[str, Value]) -> Any:
        """Return the setting that the values make."""
        if self.repeat == 0:
            return _typed(self.variables[0], values)
        return [_typed(variable, values) for variable in self.variables for _ in range(self.repeat)]

    def read(self, setting: Any) -> dict[str, Value]:
        """Return the values that make a setting; a number stands for a list of the same.

        Raises:
            Misfit: it is none of this slot.
        """
        if self.repeat == 0:
            settings = [setting]
        elif isinstance(setting, list):
            if len(setting) != len(self.variables) * self.repeat:
                raise Misfit(
                    [
                        f"{self.variables[0].name.rpartition('[')[0]} has {len(setting)} values; the "
                        f"space has {len(self.variables) * self.repeat}"
                    ]
                )
            settings = setting[:: self.repeat]
        else:
            settings = [setting] * len(self.variables)
        admitted = [v.admitted(s) for v, s in zip(self.variables, settings, strict=True)]
        faults = [fault for _, fault in admitted if fault]
        if faults:
            raise Misfit(faults)
        return {v.name: value for v, (value, _) in zip(self.variables, admitted, strict=True)}


def _typed(variable: Variable, values: Mapping[str, Value]) -> Value:
    value = values[variable.name]
    return int(value) if variable.choices is None and variable.is_integer else value  # type: ignore[arg-type]


@dataclass(frozen=True)
class Maybe:
    """A part that is in the recipe only where its condition holds.

    Attributes:
        switches: of an entry in a list, the categories whose null takes it out.
    """

    node: Any
    condition: Condition
    switches: tuple[str, ...] = ()


def fill(node: Any, values: Mapping[str, Value]) -> Any:
    """Return the tree as plain data.

    Args:
        values: of the active variables.
    """
    if isinstance(node, Slot):
        return node.fill(values)
    if isinstance(node, dict):
        return {key: fill(_inner(part), values) for key, part in node.items() if _is_in(part, values)}
    if isinstance(node, list):
        return [fill(_inner(item), values) for item in node if _is_in(item, values)]
    return node


def skeleton(node: Any, values: Mapping[str, Value], in_parameters: bool = False) -> Any:
    """Return the tree as plain data in which the slots of parameters stay.

    Args:
        values: of the active variables.
    """
    if isinstance(node, Slot):
        return node if in_parameters else node.fill(values)
    if isinstance(node, dict):
        return {
            key: skeleton(_inner(part), values, in_parameters or key == "parameters")
            for key, part in node.items()
            if _is_in(part, values)
        }
    if isinstance(node, list):
        return [skeleton(_inner(item), values, in_parameters) for item in node if _is_in(item, values)]
    return node


def _is_in(node: Any, values: Mapping[str, Value]) -> bool:
    return not isinstance(node, Maybe) or holds(node.condition, values)


def _inner(node: Any) -> Any:
    return node.node if isinstance(node, Maybe) else node


def slots(node: Any) -> Iterator[Slot]:
    """Walk the slots of a tree."""
    node = _inner(node)
    if isinstance(node, Slot):
        yield node
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from slots(part)


def read(node: Any, config: Any, known: Mapping[str, Value], at: str = "") -> dict[str, Value]:
    """Return the values with which the tree makes a config.

    Args:
        node: the tree.
        config: plain data; what stands outside the slots is not compared.
        known: values read so far.
        at: path, for the faults.

    Raises:
        Misfit: with every fault found.
    """
    if isinstance(node, Slot):
        return node.read(config)
    if isinstance(node, dict) and isinstance(config, dict):
        return _read_mapping(node, config, known, at)
    if isinstance(node, list):
        if isinstance(config, list):
            return _read_list(node, config, known, at, 0)
        if next(slots(node), None) is not None:  # a gradient, some of whose anchors are ranges
            return _read_list(node, [config] * len(node), known, at, 0)
    if next(slots(node), None) is not None:
        raise Misfit([f"{at} is {config!r:.60}; the space has another form there"])
    return {}


def _read_mapping(
    node: dict[str, Any], config: dict[str, Any], known: Mapping[str, Value], at: str
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    faults: list[str] = []
    for key in sorted(node, key=_rank):
        part, path = node[key], at if key == "parameters" else f"{at}.{key}" if at else key
        if not _is_in(part, {**known, **found}) or next(slots(part), None) is None:
            continue
        if key not in config or (config[key] is None and isinstance(_inner(part), list | dict)):
            faults.append(f"{path} is missing; the space has it, add it")
            continue
        try:
            found |= read(_inner(part), config[key], {**known, **found}, path)
        except Misfit as misfit:
            faults += misfit.faults
    if faults:
        raise Misfit(faults)
    return found


def _rank(key: str) -> int:
    return _FIRST.index(key) if key in _FIRST else len(_FIRST) + (key in _LAST)


def _read_list(
    items: list[Any], config: list[Any], known: Mapping[str, Value], at: str, i: int
) -> dict[str, Value]:
    """Match items with entries from the i-th on, in order; what can be left out may be missing."""
    n_needed = sum(not isinstance(item, Maybe) for item in items)
    if not n_needed <= len(config) <= len(items):
        wanted = len(items) + i if n_needed == len(items) else f"at most {len(items) + i}"
        raise Misfit([f"{at} has {len(config) + i} entries; the space has {wanted}"])
    if not items:
        return {}
    first, rest = items[0], items[1:]
    taken: Misfit | None = None
    if config:
        try:
            found = read(_inner(first), config[0], known, f"{at}[{i}]")
            if n_needed < len(items):  # which entry it is shows in what is fixed, too
                made = fill(_inner(first), {**known, **found})
                if faults := list(differences(_without_empty(made), _without_empty(config[0]), at)):
                    raise Misfit(faults)
            return found | _read_list(rest, config[1:], {**known, **found}, at, i + 1)
        except Misfit as misfit:
            taken = misfit
    if isinstance(first, Maybe):
        out: dict[str, Value] = dict.fromkeys(first.switches)
        try:
            return out | _read_list(rest, config, {**known, **out}, at, i)
        except Misfit as misfit:
            taken = taken or misfit
    assert taken is not None
    raise taken


def _without_empty(node: Any) -> Any:
    """Return plain data without the keys that say nothing."""
    if isinstance(node, dict):
        pruned = {key: _without_empty(part) for key, part in node.items()}
        return {key: part for key, part in pruned.items() if part not in (None, {}, [])}
    return [_without_empty(item) for item in node] if isinstance(node, list) else node


def differences(wanted: Any, config: Any, at: str = "") -> Iterator[str]:
    """Say where a config is not as wanted; a number is as good as a list of it."""
    if isinstance(wanted, dict) and isinstance(config, dict):
        for key in {**wanted, **config}:
            path = at if key == "parameters" and at else f"{at}.{key}" if at else key
            if key not in config:
                yield f"{path} is missing; the space has {wanted[key]!r} there"
            elif key not in wanted:
                yield f"{path} is {config[key]!r}; the space has none there, remove it"
            else:
                yield from differences(wanted[key], config[key], path)
    elif isinstance(wanted, list) and isinstance(config, list) and len(wanted) == len(config):
        for i, (one, other) in enumerate(zip(wanted, config, strict=True)):
            yield from differences(one, other, f"{at}[{i}]")
    elif isinstance(wanted, list) and _is_number(config) and all(map(_is_number, wanted)):
        for one in wanted[: next((i + 1 for i, one in enumerate(wanted) if one != config), 0)]:
            yield from differences(one, config, at)
    elif _is_number(wanted) and _is_number(config):
        if not math.isclose(wanted, config, rel_tol=1e-6, abs_tol=1e-12):
            yield f"{at} is {config}; the space has {wanted} there"
    elif wanted != config:
        yield f"{at} is {config!r}; the space has {wanted!r} there"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
