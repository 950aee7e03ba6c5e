"""The space: the ranges of a search file as named decision variables, and back to a recipe.

A variable is named by its path in the file, `models[0].weight[mlp][2]`; these are the parameter
names in the storage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evolve.errors import SearchFileError
from merge_core.errors import RecipeError, nearest
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = float | int | bool | str | None
_RANGE_KEYS = {"low", "high", "start", "log", "step", "points"}


@dataclass(frozen=True)
class Variable:
    """One decision variable.

    Attributes:
        name: path in the search file.
        low, high: closed bounds, None for a category.
        start: where the search begins; default the middle (of the logarithms, for `log`).
        log: whether the scale is logarithmic.
        step: spacing of the admissible values, None for continuous.
        choices: the values of a category.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    start: Value = None
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] | None = None

    @property
    def is_integer(self) -> bool:
        """Whether only whole numbers are admissible."""
        return self.step is not None and all(x == int(x) for x in (self.low, self.step))

    def distribution(self) -> BaseDistribution:
        """Return Optuna's description of the variable."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        if self.is_integer:
            assert self.step is not None
            return IntDistribution(int(self.low), int(self.high), step=int(self.step))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def from_unit(self, u: float) -> Value:
        """Map u in [0, 1] to a value; a category gets equal shares of the interval."""
        u = min(1.0, max(0.0, u))
        if self.choices is not None:
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        if self.step is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
        value = min(self.high, max(self.low, value))
        return int(value) if self.is_integer else value

    def to_unit(self, value: Value) -> float:
        """Map a value to [0, 1], inverse to `from_unit` (a category: the middle of its share)."""
        if self.choices is not None:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        assert isinstance(value, int | float)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Slot:
    """Where a range stood: its variables, and how often each repeats in the exported list."""

    names: tuple[str, ...]
    repeat: int = 0  # 0: a scalar

    def fill(self, values: Mapping[str, Value]) -> Any:
        if self.repeat == 0:
            return values[self.names[0]]
        return [values[name] for name in self.names for _ in range(self.repeat)]

    def read(self, setting: Any) -> Iterator[tuple[str, Value]]:
        settings = [setting] if self.repeat == 0 else setting[:: self.repeat]
        yield from zip(self.names, settings, strict=True)


class SearchSpace(ABC):
    """What a search goes over: variables, and the recipe that their values make.

    Attributes:
        variables: in the order that samplers see them.
    """

    def __init__(self) -> None:
        self.variables: list[Variable] = []

    @abstractmethod
    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe that the values of all variables make.

        Raises:
            RecipeError: the values make no valid recipe.
        """

    @abstractmethod
    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return values that make this recipe: the inverse of `recipe`."""

    def starts(self) -> dict[str, Value]:
        """Return the values at which the search begins."""
        return {variable.name: variable.start for variable in self.variables}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's description of every variable, by name."""
        return {variable.name: variable.distribution() for variable in self.variables}

    def examples(self) -> list[Recipe]:
        """Return recipes that name all that any candidate may: at the starts, and with each choice."""
        starts = self.starts()
        choices = [{**starts, v.name: choice} for v in self.variables for choice in v.choices or ()]
        return [self.recipe(values) for values in (starts, *choices)]

    def references(self) -> list[str]:
        """List the models that some candidate may use, each once."""
        return list(dict.fromkeys(model for recipe in self.examples() for model in recipe.references()))


class Space(SearchSpace):
    """The ranges of a search file.

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
        self._faults: list[str] = []
        self._group: tuple[int, int] | None = None
        if layer_granularity and n_layers:
            self._group = self._groups(template, layer_granularity, n_layers)
        self._filled = self._compile(template, "", in_parameters=False)
        if not self.variables and not self._faults:
            self._faults.append(
                "no ranges: no value of the recipe is a range, so there is nothing to search; write "
                "{low: 0.0, high: 1.0} where a number stands, or use `evolve merge`"
            )
        if not self._faults:
            self._faults = self._recipe_faults()
        if self._faults:
            raise SearchFileError(self._faults)

    def _groups(
        self, template: Mapping[str, Any], granularity: int, count_layers: Callable[[], int]
    ) -> tuple[int, int] | None:
        if "models" not in template:
            self._faults.append(
                f"search.layer_granularity is {granularity}; it goes with `models:` only, remove it"
            )
            return None
        n_layers = count_layers()
        if n_layers % granularity:
            divisors = [d for d in range(1, n_layers + 1) if n_layers % d == 0]
            self._faults.append(
                f"search.layer_granularity is {granularity}, which does not divide the {n_layers} "
                f"layers; use one of {divisors}, or 0"
            )
        else:
            return n_layers // granularity, granularity
        return None

    def _compile(self, node: Any, name: str, in_parameters: bool) -> Any:
        """Replace every range below `node` by a slot, and collect its variables."""
        if isinstance(node, Mapping):
            if "choices" in node or {"low", "high"} & set(node):
                return self._slot(node, name, in_parameters)
            if in_parameters and "value" in node:
                label = f"{name}[{node.get('filter') or '*'}]"
                return {
                    key: self._compile(value, label, True) if key == "value" else value
                    for key, value in node.items()
                }
            return {
                key: self._compile(value, name, True)
                if key == "parameters"
                else self._compile(value, f"{name}.{key}" if name else str(key), in_parameters)
                for key, value in node.items()
            }
        if isinstance(node, list):
            has_filters = in_parameters and any(
                isinstance(item, Mapping) and "value" in item for item in node
            )
            # A range among the numbers of a gradient is one anchor, not a value per layer group.
            return [
                self._compile(item, name, True)
                if has_filters
                else self._compile(item, f"{name}[{i}]", False)
                for i, item in enumerate(node)
            ]
        return node

    def _slot(self, node: Mapping[str, Any], name: str, in_parameters: bool) -> Any:
        faults = _range_faults(node, name)
        if faults:
            self._faults += faults
            return None
        points = node.get("points")
        if "choices" in node:
            choices = tuple(node["choices"])
            variable = Variable(name, choices=choices, start=node.get("start", choices[0]))
        else:
            low, high = float(node["low"]), float(node["high"])
            variable = Variable(name, low, high, None, bool(node.get("log", False)), node.get("step"))
            start = node["start"] if "start" in node else variable.from_unit(0.5)
            variable = replace(variable, start=start)
            if variable.step is not None:
                # As Optuna does: the last value that steps from `low` reach.
                n_steps = math.floor((high - low) / variable.step + 1e-8)
                high = min(high, round(low + n_steps * variable.step, 12))
                variable = replace(variable, high=high)
                nearest_value = variable.from_unit(variable.to_unit(start)) if high > low else start
                if high <= low:
                    self._faults.append(f"{name}.step is {variable.step}; it must be at most high - low")
                elif "start" not in node:
                    variable = replace(variable, start=nearest_value)
                elif abs(float(nearest_value) - float(start)) > 1e-8:  # type: ignore[arg-type]
                    self._faults.append(
                        f"{name}.start is {start}, between two steps; the nearest is {nearest_value:g}"
                    )
        names: tuple[str, ...] = (name,)
        repeat = 0
        if points is not None:
            names, repeat = tuple(f"{name}[{i}]" for i in range(points)), 1
        elif self._group and in_parameters and "choices" not in node:
            n_groups, repeat = self._group
            names = tuple(f"{name}[{i}]" for i in range(n_groups))
        for each in names:
            if any(known.name == each for known in self.variables):
                self._faults.append(f"{each} stands twice; give each filter once")
            self.variables.append(replace(variable, name=each))
        return _Slot(names, repeat)

    def _recipe_faults(self) -> list[str]:
        """Check the recipes at the corners: all lows, all highs, all starts, every choice."""
        corners = [{v.name: v.low if v.choices is None else v.start for v in self.variables}]
        corners.append({v.name: v.high if v.choices is None else v.start for v in self.variables})
        corners.append(self.starts())
        for variable in self.variables:
            for choice in variable.choices or ():
                corners.append({**self.starts(), variable.name: choice})
        faults: dict[str, None] = {}
        for corner in corners:
            try:
                self.recipe(corner)
            except RecipeError as error:
                faults.update(dict.fromkeys(error.faults))
        return list(faults)

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe with every range replaced by its value.

        Raises:
            RecipeError: the values make no valid recipe.
        """
        typed = {
            v.name: int(values[v.name]) if v.choices is None and v.is_integer else values[v.name]  # type: ignore[arg-type]
            for v in self.variables
        }
        return Recipe.parse(_fill(self._filled, typed))

    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return the values that make this recipe: the inverse of `recipe`."""
        return dict(_read(self._filled, recipe.model_dump(mode="json")))


def _fill(node: Any, values: Mapping[str, Value]) -> Any:
    if isinstance(node, _Slot):
        return node.fill(values)
    if isinstance(node, dict):
        return {key: _fill(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill(item, values) for item in node]
    return node


def _read(node: Any, recipe: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(node, _Slot):
        yield from node.read(recipe)
    elif isinstance(node, dict) and isinstance(recipe, dict):  # a reference's mapping became text
        for key, value in node.items():
            if isinstance(value, dict | list | _Slot):
                yield from _read(value, recipe[key])
    elif isinstance(node, list):
        for item, part in zip(node, recipe, strict=True):
            yield from _read(item, part)


def _range_faults(node: Mapping[str, Any], name: str) -> list[str]:
    """Check one range for itself."""
    known = {"choices", "start"} if "choices" in node else _RANGE_KEYS
    faults = [
        f"{name}: unknown key {k!r} in a range; {nearest(str(k), known)}" for k in set(node) - known
    ]
    if "choices" in node:
        choices = node["choices"]
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or len(set(map(repr, choices))) < len(choices)
        ):
            faults.append(
                f"{name}.choices is {choices!r}; it must be a list of at least two different values"
            )
        elif any(isinstance(choice, dict | list) for choice in choices):
            faults.append(f"{name}.choices is {choices!r}; each choice must be a plain value")
        elif "start" in node and node["start"] not in choices:
            faults.append(f"{name}.start is {node['start']!r}; it must be one of the choices {choices}")
        return faults
    numbers = {}
    for key in ("low", "high", "start", "step"):
        value = node.get(key)
        if key not in node:
            if key in ("low", "high"):
                faults.append(f"{name}.{key} is missing; a range needs low and high, add it")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            faults.append(f"{name}.{key} is {value!r}; it must be a finite number")
        else:
            numbers[key] = value
    points = node.get("points")
    if points is not None and (not isinstance(points, int) or isinstance(points, bool) or points < 2):
        faults.append(f"{name}.points is {points!r}; it must be a whole number of at least 2")
    if faults:
        return faults
    low, high = numbers["low"], numbers["high"]
    if low >= high:
        faults.append(f"{name}: low is {low}, high is {high}; low must lie below high, swap them")
    elif not low <= numbers.get("start", low) <= high:
        faults.append(f"{name}.start is {numbers['start']}; it must lie in [{low}, {high}]")
    if node.get("log") and low <= 0:
        faults.append(f"{name}.low is {low}; with log: true it must be above 0")
    if "step" in numbers and (numbers["step"] <= 0 or node.get("log")):
        faults.append(f"{name}.step is {numbers['step']}; it must be above 0, and goes without log")
    return faults
