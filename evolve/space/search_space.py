"""What a search goes over: named decision variables, from their values to a recipe, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from evolve.space.variable import Value, Variable, holds

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from merge_core.recipe import Recipe


class SearchSpace(ABC):
    """Decision variables, and the recipes that their values make.

    Attributes:
        variables: in the order that samplers see them.
        is_local: whether only what is near the start is worth a try at first.
        notes: what a user should know of it, one line each: ranges that do the same.
    """

    is_local = False

    def __init__(self) -> None:
        self.variables: list[Variable] = []
        self.notes: list[str] = []

    @abstractmethod
    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the recipe of a candidate.

        Args:
            values: of every variable, or of the active ones.

        Raises:
            RecipeError: the values make no valid recipe; an invalid point, no fault of the file.
        """

    @abstractmethod
    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return the active values that make this recipe: the inverse of `recipe`.

        Raises:
            SearchFileError: the recipe does not lie in the space; with everything that differs.
        """

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values that the recipe reads; those of other variables change nothing."""
        return {
            variable.name: values[variable.name]
            for variable in self.variables
            if holds(variable.condition, values) and variable.name in values
        }

    def starts(self) -> dict[str, Value]:
        """Return the values at which the search begins, of every variable."""
        return {variable.name: variable.start for variable in self.variables}

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return Optuna's description of every variable, by name."""
        return {variable.name: variable.distribution() for variable in self.variables}

    @property
    def n_points(self) -> int | None:
        """How many candidates there are at most; None where a variable is continuous."""
        counts = [variable.n_values for variable in self.variables]
        return math.prod(n for n in counts if n is not None) if None not in counts else None

    def examples(self) -> list[Recipe]:
        """Return recipes that together show every model, method, dtype and shape of the space.

        The recipe at the starts is the first.
        """
        starts = self.starts()
        swapped = [{**starts, v.name: choice} for v in self.variables for choice in v.choices or ()]
        return [self.recipe(values) for values in (starts, *swapped)]

    def tensor_faults(self, names: Iterable[str]) -> list[str]:
        """Say what does not go with the tensors that a candidate has; names as in the models."""
        return []

    def references(self) -> list[str]:
        """List every model that some candidate may use, the start's base first."""
        return list(dict.fromkeys(model for recipe in self.examples() for model in recipe.references()))

    def adapters(self) -> list[str]:
        """List every adapter that some candidate may put on an intermediate result."""
        return list(dict.fromkeys(name for recipe in self.examples() for name in recipe.adapters()))
