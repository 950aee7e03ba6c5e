"""From a search file's recipe to a tree with slots: names, conditions, faults of single ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evolve.space.ranges import is_range, variable_of
from evolve.space.tree import Maybe, Slot
from evolve.space.variable import Clause, Condition, Variable
from merge_core.errors import nearest
from merge_core.methods import METHODS
from merge_core.methods.parameter import plain_numbers
from merge_core.recipe import reference_text

# A slice's or a recipe's method: the category that chooses it, None where it is fixed, and its choices.
_Reader = tuple[str | None, tuple[str, ...]]


# Lists of models with what belongs to each, and how an entry names its model.
ENTRY_LISTS = ("models", "experts", "shared_experts")
MODEL_KEYS = ("model", "source_model")


class Compiler:
    """Turns a template into a tree.

    Args:
        group: number of layer groups and layers a group; None = off.

    Attributes:
        variables: those found, in the order of the file.
        layer_bounds: names of those that bound a layer range.
        faults: of single ranges and parameters.
    """

    def __init__(self, group: tuple[int, int] | None = None) -> None:
        self.variables: list[Variable] = []
        self.layer_bounds: set[str] = set()
        self.faults: list[str] = []
        self._group = group
        self._top: _Reader | None = None

    def recipe(self, template: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tree of a recipe, and of those whose results it uses."""
        tree = self._recipe({k: v for k, v in template.items() if k != "intermediate"}, "")
        others = template.get("intermediate")
        if isinstance(others, Mapping):
            tree["intermediate"] = {
                name: self._recipe(other, f"intermediate.{name}") if isinstance(other, Mapping) else other
                for name, other in others.items()
            }
        return tree

    def _recipe(self, template: Mapping[str, Any], at: str) -> dict[str, Any]:
        self._top = _reader(template, at)
        readers = list(_readers(template, self._top, at))
        tree: dict[str, Any] = {}
        for key, node in template.items():
            if key == "modules" and isinstance(node, Mapping):
                place = _below(at, key)
                tree[key] = {
                    name: self._body(module, f"{place}.{name}", readers)
                    if isinstance(module, Mapping)
                    else module
                    for name, module in node.items()
                }
            else:
                tree |= self._body({key: node}, at, readers)
        return tree

    def _body(self, node: Mapping[str, Any], at: str, readers: Sequence[_Reader]) -> dict[str, Any]:
        """Compile a recipe's or a module's keys."""
        tree: dict[str, Any] = {}
        for key, part in node.items():
            path = _below(at, key)
            if key == "parameters" and isinstance(part, Mapping):
                tree[key] = self._parameters(part, at, readers, False, ())
            elif key in ENTRY_LISTS and isinstance(part, list):
                tree[key] = [self._entry(e, f"{path}[{i}]", readers, ()) for i, e in enumerate(part)]
            elif key == "slices" and isinstance(part, list):
                tree[key] = [self._slice(e, f"{path}[{i}]") for i, e in enumerate(part)]
            else:
                tree[key] = self._node(part, path, ())
        return tree

    def _slice(self, node: Any, at: str) -> Any:
        """Compile a slice; one whose sources can all be off is off when all of them are."""
        if not isinstance(node, Mapping) or not isinstance(node.get("sources"), list):
            return self._node(node, at, ())
        reader = _reader(node, at) or self._top
        readers = [reader] if reader else []
        ways = [_switch(e, f"{at}.sources[{i}]") for i, e in enumerate(node["sources"])]
        switches = [way for way in ways if way]
        can_be_off = bool(ways) and len(switches) == len(ways)
        condition = (Clause(tuple(switches)),) if can_be_off else ()
        tree: dict[str, Any] = {}
        for key, part in node.items():
            path = f"{at}.{key}"
            if key == "sources":
                tree[key] = [self._entry(e, f"{path}[{i}]", readers, ()) for i, e in enumerate(part)]
            elif key == "parameters" and isinstance(part, Mapping):
                tree[key] = self._parameters(part, at, readers, False, condition)
            else:
                tree[key] = self._node(part, path, condition)
        return Maybe(tree, condition, tuple(name for name, _ in switches)) if can_be_off else tree

    def _entry(self, node: Any, at: str, readers: Sequence[_Reader], condition: Condition) -> Any:
        """Compile a model with its parameters; a null among its choices takes it out."""
        if not isinstance(node, Mapping):
            return self._node(node, at, condition)
        switch = _switch(node, at)
        own = (*condition, Clause((switch,))) if switch else condition
        tree: dict[str, Any] = {}
        for key, part in node.items():
            if key == "parameters" and isinstance(part, Mapping):
                tree[key] = self._parameters(part, at, readers, True, own)
            else:
                tree[key] = self._node(part, f"{at}.{key}", condition if key in MODEL_KEYS else own)
        return Maybe(tree, own, (switch[0],)) if switch else tree

    def _parameters(
        self,
        node: Mapping[str, Any],
        at: str,
        readers: Sequence[_Reader],
        is_own: bool,
        condition: Condition,
    ) -> dict[str, Any]:
        """Compile parameters; each is there only with a method that has it, where that is searched."""
        tree: dict[str, Any] = {}
        for key, setting in plain_numbers(node).items():
            path = _below(at, key)
            knowing = [
                (category, tuple(name for name in methods if _reads(name, key, is_own)))
                for category, methods in readers
            ]
            always = not readers or any(
                known == methods or (category is None and known)
                for (category, known), (_, methods) in zip(knowing, readers, strict=True)
            )
            conditional = tuple((category, known) for category, known in knowing if category and known)
            if always or all(category is None for category, _ in readers):
                tree[key] = self._node(setting, path, condition, in_parameters=True)
            elif conditional:
                when = (*condition, Clause(conditional))
                tree[key] = Maybe(self._node(setting, path, when, in_parameters=True), when)
            else:
                self.faults.append(_unknown(path, key, readers, is_own))
        return tree

    def _node(self, node: Any, name: str, condition: Condition, in_parameters: bool = False) -> Any:
        """Replace every range below `node` by a slot, and collect its variables."""
        if is_range(node):
            return self._slot(node, name, condition, in_parameters)
        if isinstance(node, Mapping):
            if in_parameters and "value" in node:
                return self._filtered(node, name, f"{name}[{_filter(node)}]", condition)
            is_model = name.endswith(("base_model", *(f".{key}" for key in MODEL_KEYS)))
            if is_model and any(_ranges(node)):
                self.faults.append(
                    f"{name} has a range inside a mapping; give choices of the whole reference, "
                    f"PATH@REVISION"
                )
            elif is_model:
                return _as_text(node)
            return {key: self._node(part, _below(name, key), condition) for key, part in node.items()}
        if isinstance(node, list):
            has_filters = in_parameters and any(isinstance(e, Mapping) and "value" in e for e in node)
            return [
                self._filtered(item, name, f"{name}[{_filter(item, i)}]", condition)
                if has_filters and isinstance(item, Mapping)
                # A range among the numbers of a gradient is one anchor, not a value per layer group.
                else self._node(item, f"{name}[{i}]", condition)
                for i, item in enumerate(node)
            ]
        return node

    def _filtered(
        self, node: Mapping[str, Any], name: str, label: str, condition: Condition
    ) -> dict[str, Any]:
        if is_range(node):  # among filters, which the recipe's own check refuses
            return {"value": self._slot(node, label, condition, True)}
        return {
            key: self._node(part, label, condition, True)
            if key == "value"
            else self._node(part, f"{label}.{key}", condition)
            for key, part in node.items()
        }

    def _slot(self, node: Mapping[str, Any], name: str, condition: Condition, in_parameters: bool) -> Any:
        if "choices" not in node:
            node = plain_numbers(node)  # YAML 1.1 reads 1e-5 as text
        elif name.split(".")[-1] in ("dtype", "out_dtype") and isinstance(node["choices"], list):
            plain = [c.removeprefix("torch.") if isinstance(c, str) else c for c in node["choices"]]
            node = {**node, "choices": plain}
        variable, faults = variable_of(node, name, condition)
        is_layer_bound = ".layer_range[" in name
        if variable is not None and is_layer_bound:
            faults += _layer_bound_faults(variable)
        if variable is None or faults:
            self.faults += faults
            return None
        if is_layer_bound:
            self.layer_bounds.add(name)
        points = node.get("points")
        names: tuple[str, ...] = (name,)
        repeat = 0
        if points is not None:
            names, repeat = tuple(f"{name}[{i}]" for i in range(points)), 1
        elif self._group and in_parameters and "choices" not in node:
            n_groups, repeat = self._group
            names = tuple(f"{name}[{i}]" for i in range(n_groups))
        for each in names:
            if any(known.name == each for known in self.variables):
                self.faults.append(f"{each} stands twice; give each filter once")
        variables = tuple(replace(variable, name=each) for each in names)
        self.variables += variables
        return Slot(variables, repeat)


def _below(at: str, key: Any) -> str:
    return f"{at}.{key}" if at else str(key)


def _filter(item: Mapping[str, Any], i: int = 0) -> str:
    """Name an entry of a filter list: by its filter, or by its place where that is searched."""
    return str(i) if isinstance(item.get("filter"), Mapping) else item.get("filter") or "*"


def _ranges(node: Any) -> Iterator[bool]:
    if is_range(node):
        yield True
    elif isinstance(node, Mapping):
        for part in node.values():
            yield from _ranges(part)


def _as_text(reference: Mapping[str, Any]) -> Any:
    try:
        return reference_text(reference)
    except ValueError:  # the recipe's own check says what is wrong
        return dict(reference)


def _switch(node: Any, at: str) -> tuple[str, tuple[Any, ...]] | None:
    """Return the category of an entry that null takes out, and the choices that keep it."""
    key = next((key for key in MODEL_KEYS if isinstance(node, Mapping) and key in node), None)
    model = None if key is None else node[key]
    choices = model.get("choices") if isinstance(model, Mapping) else None
    if not isinstance(choices, list) or None not in choices:
        return None
    return f"{at}.{key}", tuple(choice for choice in choices if choice is not None)


def _reader(node: Mapping[str, Any], at: str) -> _Reader | None:
    method = node.get("merge_method")
    if isinstance(method, str):
        return None, (method,)
    choices = method.get("choices") if isinstance(method, Mapping) else None
    if not isinstance(choices, list):
        return None
    return _below(at, "merge_method"), tuple(choice for choice in choices if isinstance(choice, str))


def _readers(template: Mapping[str, Any], top: _Reader | None, at: str) -> Iterator[_Reader]:
    """Find the methods that read the recipe's parameters: its own, or those of its slices."""
    modules = template.get("modules")
    bodies = [(at, template)]
    if isinstance(modules, Mapping):
        place = _below(at, "modules")
        bodies = [(f"{place}.{k}", m) for k, m in modules.items() if isinstance(m, Mapping)]
    for place, body in bodies:
        slices = body.get("slices")
        found = [
            _reader(entry, _below(place, f"slices[{i}]")) or top
            for i, entry in enumerate(slices if isinstance(slices, list) else ())
            if isinstance(entry, Mapping)
        ]
        yield from dict.fromkeys(reader for reader in found or [top] if reader)


def _reads(method: str, parameter: str, is_own: bool) -> bool:
    """Tell whether a method reads a parameter of a model, or of the whole merge."""
    if method not in METHODS:
        return False
    table = METHODS[method].per_model if is_own else METHODS[method].parameters
    return parameter in table


def _unknown(path: str, key: str, readers: Sequence[_Reader], is_own: bool) -> str:
    methods = [
        name for name in dict.fromkeys(m for _, names in readers for m in names) if name in METHODS
    ]
    if is_own and any(key in METHODS[name].shared for name in methods):
        return (
            f"{path}: {key} belongs to the whole merge and is not read from a model; move it to the "
            f"top-level parameters"
        )
    names = {p for name in methods for p in METHODS[name].parameters} or {"none at all"}
    return f"{path}: {' or '.join(methods)} has no parameter {key!r}; {nearest(str(key), names)}"


def _layer_bound_faults(variable: Variable) -> list[str]:
    if variable.choices is not None:
        whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in variable.choices)
        return [] if whole else [f"{variable.name}.choices must be whole numbers from 0 on"]
    if not variable.is_integer:
        return [f"{variable.name} bounds layers; it needs step: 1, add it"]
    if variable.low < 0:
        return [f"{variable.name}.low is {variable.low:g}; layers count from 0"]
    return []
