"""Known recipes: what anyone would try before a search. They are its first candidates.

The recipe at the starts; the user's own; each model alone; the average; the centres of all ranges.
Only what lies in the space is a candidate: bounds, steps, choices and fixed values are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from evolve.errors import SearchFileError
from evolve.space import SearchSpace, Value
from merge_core.errors import RecipeError
from merge_core.methods import METHODS, Parameter
from merge_core.parameters import is_total
from merge_core.parts import Levels, Part, PartSource
from merge_core.recipe import Recipe

Values = dict[str, Value]


def known_recipes(
    space: SearchSpace, own: Mapping[str, Values], n_layers: Callable[[str], int]
) -> dict[str, Values]:
    """Return the active values of every known recipe, by name, in the order they are tried.

    Args:
        own: the user's, see `own_recipes`.
        n_layers: gives a model's number of layers.
    """
    found = {named_apart("starts", own): space.active(space.starts()), **own}
    examples = space.examples()
    for model in space.references():
        alone = (model_alone(model, recipe, n_layers) for recipe in examples)
        if (values := _first_within(space, alone)) is not None:
            found[named_apart(f"{model} alone", own)] = values
    # Of structures that are searched, those with most models first.
    widest = sorted(examples, key=lambda recipe: -len(recipe.references()))
    if (values := _first_within(space, map(average, widest))) is not None:
        found[named_apart("average", own)] = values
    centres = {v.name: v.start if v.choices is not None else v.from_unit(0.5) for v in space.variables}
    try:
        space.recipe(centres)
    except RecipeError:  # the bounds of a layer range may meet in their centres
        return found
    return {**found, named_apart("centres", own): space.active(centres)}


def named_apart(name: str, theirs: Collection[str]) -> str:
    """Return a recipe's name, told apart from a file or model of the user's that is called so."""
    return f"{name} (recipe)" if name in theirs else name


def own_recipes(space: SearchSpace, files: Sequence[str]) -> dict[str, Values]:
    """Return the active values of the user's own recipes, by file.

    Raises:
        SearchFileError: a file is no recipe, or lies outside the space; with every fault.
    """
    found: dict[str, Values] = {}
    faults: list[str] = []
    for file in files:
        try:
            found[file] = space.values(Recipe.load(file))
        except RecipeError as error:
            faults += [f"search.seed_recipes: {file}: {fault}" for fault in error.faults]
        except SearchFileError as error:
            faults += [
                f"search.seed_recipes: {file}: {fault}; change the recipe, or the range"
                for fault in error.faults
            ]
    if faults:
        raise SearchFileError(faults)
    return found


def _first_within(space: SearchSpace, recipes: Iterator[Recipe | None]) -> Values | None:
    """Return the values of the first recipe that lies in the space."""
    for recipe in recipes:
        if recipe is not None:
            try:
                return space.values(recipe)
            except SearchFileError:
                continue
    return None


class _UnreachableError(Exception):
    """No setting of the recipe's parameters makes the recipe that is wanted."""


class _Wanted:
    """Which parameters of a recipe must have which value."""

    def __init__(self) -> None:
        self._by_level: dict[int, dict[str, float]] = {}

    def add(self, levels: Levels, name: str, parameter: Parameter, value: float) -> None:
        """Want a parameter to be `value` on every tensor.

        Raises:
            _UnreachableError: another value is wanted of the same setting; it is not set, and its default
                is another.
        """
        for level in levels:
            if name not in level:
                continue
            # Levels are told apart by identity: equal ones may belong to different models.
            if self._by_level.setdefault(id(level), {}).setdefault(name, value) != value:
                raise _UnreachableError
            if is_total(level[name]):
                return
        if parameter.default != value:
            raise _UnreachableError

    def apply(self, recipe: Recipe) -> Recipe | None:
        """Return the recipe with what is wanted, or None where that is no valid one."""
        try:
            return Recipe.parse(self._changed(recipe))
        except RecipeError:
            return None

    def _changed(self, node: Any) -> Any:
        if isinstance(node, BaseModel):
            return {key: self._changed(getattr(node, key)) for key in type(node).model_fields}
        if isinstance(node, dict):
            wanted = self._by_level.get(id(node), {})
            return {
                key: _constant(part, wanted[key]) if key in wanted else self._changed(part)
                for key, part in node.items()
            }
        return [self._changed(part) for part in node] if isinstance(node, list | tuple) else node


def _constant(setting: Any, value: float) -> Any:
    """Return a setting of the same form that is `value` everywhere."""
    if isinstance(setting, Mapping):
        return {**setting, "value": _constant(setting["value"], value)}
    return [_constant(item, value) for item in setting] if isinstance(setting, list) else value


def model_alone(model: str, like: Recipe, n_layers: Callable[[str], int]) -> Recipe | None:
    """Return the recipe of the same form that makes one of its models, or None where there is none.

    Its share is 1 and that of others 0; a method that interpolates is at its end; what a method
    does to each model (density, scale) is at the value that does nothing.
    """
    if not like.parts():  # experts
        return None
    wanted = _Wanted()
    end = 0
    try:
        for part in like.parts():
            source = next((source for source in part.sources if source.model == model), None)
            if source is None:
                return None
            if source.layer_range is not None:
                begin, end_here = source.layer_range
                if begin != end:
                    return None
                end = end_here
            _want_shares(wanted, part, {id(source): 1.0})
            _want_neutral(wanted, part, [source])
    except _UnreachableError:
        return None
    if end not in (0, n_layers(model)):
        return None
    return wanted.apply(like)


def average(like: Recipe) -> Recipe | None:
    """Return the recipe of the same form in which all models count the same, or None."""
    if not like.parts():
        return None
    wanted = _Wanted()
    try:
        for part in like.parts():
            n = len(part.inputs)
            if "position" in _roles(part).values():
                _want_shares(wanted, part, {id(source): 0.5 for source in part.inputs})
            elif n > 1 and "share" in _roles(part).values():
                _want_shares(wanted, part, {id(source): 1 / n for source in part.inputs})
            else:
                return None
            _want_neutral(wanted, part, part.inputs)
    except _UnreachableError:
        return None
    return wanted.apply(like)


def _roles(part: Part) -> dict[str, str]:
    parameters = METHODS[part.method or ""].parameters
    return {name: parameter.role for name, parameter in parameters.items() if parameter.role}


def _want_shares(wanted: _Wanted, part: Part, shares: Mapping[int, float]) -> None:
    """Give each source of a slice its share.

    Args:
        shares: by a source's identity; others have 0.

    Raises:
        _UnreachableError: the method gives no shares, or this source none.
    """
    method = METHODS[part.method or ""]
    if len(part.sources) == 1 and not _roles(part):
        return  # the only one is whole
    inputs = [shares.get(id(source), 0.0) for source in part.inputs]
    for name, role in _roles(part).items():
        parameter = method.parameters[name]
        if role == "position":
            wanted.add(part.levels, name, parameter, inputs[0])
            return
        if not any(inputs):  # a base apart from the models has no share
            raise _UnreachableError
        for source, share in zip(part.inputs, inputs, strict=True):
            wanted.add((*source.levels, *part.levels), name, parameter, share)
        return
    raise _UnreachableError


def _want_neutral(wanted: _Wanted, part: Part, sources: Sequence[PartSource]) -> None:
    """Have a slice's method do nothing else to these sources."""
    method = METHODS[part.method or ""]
    for name, parameter in method.shared.items():
        if parameter.neutral is not None:
            wanted.add(part.levels, name, parameter, parameter.neutral)
    for source in sources:
        for name, parameter in method.per_model.items():
            if parameter.neutral is not None:
                wanted.add((*source.levels, *part.levels), name, parameter, parameter.neutral)
