"""The space of a search file: its recipe, in which ranges stand for values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from random import Random
from typing import Any

from evolve.errors import SearchFileError
from evolve.space.compile import MODEL_KEYS, Compiler
from evolve.space.foldings import foldings
from evolve.space.ranges import is_range
from evolve.space.search_space import SearchSpace
from evolve.space.tree import Maybe, Misfit, Slot, differences, fill, read, skeleton, slots
from evolve.space.variable import Value, Variable, holds
from merge_core.errors import RecipeError
from merge_core.recipe import Recipe

# Where a choice does not fit with the starts of the others, so many other points are tried with it.
_N_DRAWS = 200


class Space(SearchSpace):
    """The decision variables of a search file.

    Args:
        template: recipe with ranges.
        layer_granularity: layers a group, 0 = off.
        n_layers: gives the number of layers of the merge; called only where it is needed.

    Raises:
        SearchFileError: with every fault of the ranges and of the recipes they span.
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        layer_granularity: int = 0,
        n_layers: Callable[[], int] | None = None,
    ) -> None:
        super().__init__()
        faults: list[str] = []
        group = None
        if layer_granularity and n_layers:
            group, faults = _groups(template, layer_granularity, n_layers)
        compiler = Compiler(group)
        self._tree = compiler.recipe(template)
        self._layer_bounds = compiler.layer_bounds
        self._is_ambiguous = any(_ambiguous_lists(self._tree))
        self.variables = compiler.variables
        faults += compiler.faults
        if not self.variables and not faults:
            faults += [
                f"{place} is a range, and no value that can be searched; write the range where a number "
                f"stands, such as weight: {{low: 0.0, high: 1.0}}"
                for place in _ranges(template)
            ] or [
                "no ranges: no value of the recipe is a range, so there is nothing to search; write "
                "{low: 0.0, high: 1.0} where a number stands, or use `evolve merge`"
            ]
        self._corners: list[dict[str, Value]] = []
        if not faults:
            faults = self._recipe_faults()
        if faults:
            raise SearchFileError(faults)
        depth = n_layers() if n_layers and _has_many_points(self._tree) else None
        if "experts" not in template:
            shapes = (skeleton(self._tree, self.active(corner)) for corner in self._corners)
            self.notes = foldings(shapes, depth)

    # ---- values and recipes -------------------------------------------------------------------

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values that the recipe reads, see SearchSpace; what is off switches nothing on."""
        found: dict[str, Value] = {}
        waiting = [variable for variable in self.variables if variable.name in values]
        while ready := [variable for variable in waiting if holds(variable.condition, found)]:
            found |= {variable.name: values[variable.name] for variable in ready}
            waiting = [variable for variable in waiting if variable.name not in found]
        return {v.name: found[v.name] for v in self.variables if v.name in found}

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe with every range replaced by its value, see SearchSpace."""
        active = self.active(values)
        recipe = Recipe.parse(fill(self._tree, active))
        if self._is_ambiguous:
            first = self._read(recipe)
            if first != active:
                off = [name for name, value in active.items() if first.get(name) != value]
                raise RecipeError(
                    f"{off[0]}: entries with the same model are switched on in their order, so this "
                    f"is the recipe of another candidate"
                )
        return recipe

    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return the active values that make this recipe, see SearchSpace."""
        try:
            values = self._read(recipe)
        except Misfit as misfit:
            raise SearchFileError(misfit.faults) from None
        made = Recipe.parse(fill(self._tree, values))
        if faults := list(differences(made.as_config(), recipe.as_config())):
            raise SearchFileError(faults)
        return values

    def _read(self, recipe: Recipe) -> dict[str, Value]:
        found = read(self._tree, recipe.model_dump(mode="json"), {})
        return {v.name: found[v.name] for v in self.variables if v.name in found}

    # ---- corners ------------------------------------------------------------------------------

    def examples(self) -> list[Recipe]:
        """Return recipes that together show every model, method, dtype and shape, see SearchSpace."""
        return self._examples

    @cached_property
    def _examples(self) -> list[Recipe]:
        recipes = (self.recipe(values) for values in self._corners)
        return list({recipe.to_yaml(): recipe for recipe in recipes}.values())

    def _recipe_faults(self) -> list[str]:
        """Check the starts, and each choice and layer bound in turn, at all lows and all highs.

        A choice that does not fit the starts of the others is at fault only where it fits no others
        either. Fills `_corners` with those that are right.
        """
        starts = self.starts()
        try:
            self.recipe(starts)
        except RecipeError as error:
            return error.faults
        self._corners = [starts]
        faults = dict.fromkeys(self._range_faults(starts))
        seen = {frozenset(self.active(starts))}
        for variable, choice in self._swaps():
            corner, found = self._corner(variable, choice)
            if corner is None:
                faults.update(dict.fromkeys(f"{variable.name} {choice}: {text}" for text in found))
                continue
            self._corners.append(corner)
            names = frozenset(self.active(corner))
            if names not in seen or variable.name.endswith("merge_method"):
                seen.add(names)
                known = [text.rpartition(": ")[2] for text in faults]
                faults.update(
                    (f"with {variable.name} {choice}: {text}", None)
                    for text in self._range_faults(corner)
                    if text not in faults and text not in known
                )
        self._corners += [corner for corner in self._largest() if self._is_valid(corner)]
        return list(faults)

    def _swaps(self) -> Iterator[tuple[Variable, Value]]:
        for variable in self.variables:
            if variable.choices is not None:
                yield from ((variable, choice) for choice in variable.choices)
            elif variable.name in self._layer_bounds:
                yield from ((variable, variable.from_unit(u)) for u in (0.0, 1.0))

    def _corner(self, variable: Variable, choice: Value) -> tuple[dict[str, Value] | None, list[str]]:
        """Find a valid point where a variable has a value: the starts, else one that is drawn.

        Returns:
            The point; or None, and what is wrong with it at the starts.
        """
        near = {**self.starts(), **_witness(variable, self.starts()), variable.name: choice}
        try:
            self.recipe(near)
        except RecipeError as error:
            faults = error.faults
        else:
            return near, []
        rng = Random(0)
        fixed = {name: near[name] for clause in variable.condition for name, _ in clause.any_of}
        structure = [v for v in self.variables if v.choices is not None or v.name in self._layer_bounds]
        for _ in range(_N_DRAWS if len(structure) > 1 else 0):
            share = rng.random()  # of the entries that can be off: also very few or nearly all
            drawn = {
                v.name: None
                if v.choices and None in v.choices and rng.random() < share
                else v.from_unit(rng.random())
                for v in structure
            }
            point = {**near, **drawn, **fixed, variable.name: choice}
            if self._is_valid(point):
                return point, []
        # A bound that only crosses the other one is no fault.
        return None, [] if variable.name in self._layer_bounds else faults

    def _range_faults(self, corner: Mapping[str, Value]) -> Iterator[str]:
        """Check the lowest and the highest numbers, all at once."""
        numeric = [v for v in self.variables if v.choices is None and v.name not in self._layer_bounds]
        for bounds in ({v.name: v.low for v in numeric}, {v.name: v.high for v in numeric}):
            try:
                self.recipe({**corner, **bounds})
            except RecipeError as error:
                yield from error.faults

    def _largest(self) -> Iterator[dict[str, Value]]:
        """Yield the points with everything on and the longest layer ranges, one for each dtype."""
        starts = self.starts()
        whole = dict(starts)
        for variable in self.variables:
            if variable.choices is not None and None in variable.choices:
                on = (choice for choice in variable.choices if choice is not None)
                whole[variable.name] = starts[variable.name] or next(on)
            elif variable.name in self._layer_bounds:
                numbers = [variable.from_unit(u) for u in (0.0, 1.0)]
                whole[variable.name] = numbers[variable.name.endswith("[1]")]
        yield whole
        for name in ("dtype", "out_dtype"):
            for variable in self.variables:
                if variable.name == name:
                    yield from ({**whole, name: choice} for choice in variable.choices or ())

    def _is_valid(self, values: Mapping[str, Value]) -> bool:
        try:
            self.recipe(values)
        except RecipeError:
            return False
        return True


def _ranges(node: Any, at: str = "") -> Iterator[str]:
    """Walk the places of a template where ranges stand."""
    if is_range(node):
        yield at
    elif isinstance(node, Mapping):
        for key, part in node.items():
            yield from _ranges(part, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list):
        for i, part in enumerate(node):
            yield from _ranges(part, f"{at}[{i}]")


def _has_many_points(tree: Any) -> bool:
    """Tell whether a gradient has so many anchors that there may be fewer layers."""
    return any(slot.repeat == 1 and len(slot.variables) > 2 for slot in slots(tree))


def _groups(
    template: Mapping[str, Any], granularity: int, count_layers: Callable[[], int]
) -> tuple[tuple[int, int] | None, list[str]]:
    """Return the number of layer groups and the layers a group, or what is wrong."""
    setting = f"search.layer_granularity is {granularity}"
    others = template.get("intermediate")
    documents = [template, *(others.values() if isinstance(others, Mapping) else ())]
    if any(isinstance(document, Mapping) and "models" not in document for document in documents):
        return None, [f"{setting}; it goes with `models:` only, remove it"]
    n_layers = count_layers()
    if n_layers % granularity:
        divisors = [d for d in range(1, n_layers + 1) if n_layers % d == 0]
        wanted = f"use one of {divisors}, or 0"
        return None, [f"{setting}, which does not divide the {n_layers} layers; {wanted}"]
    return (n_layers // granularity, granularity), []


def _witness(variable: Variable, starts: Mapping[str, Value]) -> dict[str, Value]:
    """Return what must be changed at the starts so that a variable is read."""
    return {
        clause.any_of[0][0]: clause.any_of[0][1][0]
        for clause in variable.condition
        if not clause.holds(starts)
    }


def _ambiguous_lists(node: Any) -> Iterator[bool]:
    """Find lists where an entry that can be off may be the same as another."""
    if isinstance(node, Maybe):
        yield from _ambiguous_lists(node.node)
    elif isinstance(node, dict):
        for part in node.values():
            yield from _ambiguous_lists(part)
    elif isinstance(node, list):
        for i, item in enumerate(node):
            yield from _ambiguous_lists(item)
            if isinstance(item, Maybe):
                others = (*node[:i], *node[i + 1 :])
                yield any(_models(item) & _models(other) for other in others)


def _models(node: Any) -> set[Value]:
    """List the models that an entry of a list, or a slice's sources, may have."""
    node = node.node if isinstance(node, Maybe) else node
    if not isinstance(node, dict):
        return set()
    if "sources" in node:
        return {model for source in node["sources"] for model in _models(source)}
    model = next((node[key] for key in MODEL_KEYS if key in node), None)
    choices = model.variables[0].choices if isinstance(model, Slot) else (model,)
    return {choice for choice in choices or () if isinstance(choice, str)}
