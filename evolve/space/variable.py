"""One decision variable: its bounds or choices, its scale, and when a recipe reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = float | int | bool | str | None


@dataclass(frozen=True)
class Clause:
    """Holds where at least one of some categories has one of certain values."""

    any_of: tuple[tuple[str, tuple[Value, ...]], ...]

    def holds(self, values: Mapping[str, Value]) -> bool:
        """Tell whether it holds; a variable without a value has none of them."""
        return any(name in values and values[name] in choices for name, choices in self.any_of)

    def __str__(self) -> str:
        return " or ".join(
            f"{name} is on"
            if all(isinstance(choice, str) for choice in choices)
            and name.endswith((".model", ".source_model"))
            else f"{name} is {' or '.join(str(choice) for choice in choices)}"
            for name, choices in self.any_of
        )


Condition = tuple[Clause, ...]
"""All of its clauses must hold."""


def holds(condition: Condition, values: Mapping[str, Value]) -> bool:
    """Tell whether a condition holds; one without clauses always does."""
    return all(clause.holds(values) for clause in condition)


@dataclass(frozen=True)
class Variable:
    """One decision variable.

    Attributes:
        name: path in the search file.
        low, high: closed bounds; without meaning for a category.
        start: where the search begins; default the middle (of the logarithms, for `log`).
        log: whether the scale is logarithmic.
        step: spacing of the admissible values, None for continuous.
        choices: the values of a category, None for a number.
        condition: when a recipe reads it; () = always.
        steadiness: of a category, which share of a sampler's first draws keeps the start's choice.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    start: Value = None
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] | None = None
    condition: Condition = ()
    steadiness: float = 0.5

    @property
    def is_integer(self) -> bool:
        """Whether only whole numbers are admissible."""
        return self.step is not None and all(x == int(x) for x in (self.low, self.step))

    @property
    def n_values(self) -> int | None:
        """How many values it can take; None where it is continuous."""
        if self.choices is not None:
            return len(self.choices)
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def all_values(self) -> list[Value]:
        """List the values it can take, where they can be counted."""
        if self.choices is not None:
            return list(self.choices)
        n = self.n_values or 0
        return [self.from_unit(i / (n - 1)) for i in range(n)]

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

    def admitted(self, setting: object) -> tuple[Value, str | None]:
        """Find the value that a recipe's setting is.

        Returns:
            The value, on its step where it has one; and what is wrong with it, or None.
        """
        if self.choices is not None:
            for choice in self.choices:
                if choice == setting and isinstance(choice, bool) == isinstance(setting, bool):
                    return choice, None
            shown = ", ".join(str(choice) for choice in self.choices)
            return None, f"{self.name} is {setting!r}; the space has the choices {shown}"
        if isinstance(setting, bool) or not isinstance(setting, int | float):
            return None, f"{self.name} is {setting!r}; the space has a number there"
        slack = 1e-9 * max(abs(self.low), abs(self.high))
        if not self.low - slack <= setting <= self.high + slack:
            return None, f"{self.name} is {setting:g}; the space has [{self.low:g}, {self.high:g}]"
        value: Value = float(min(self.high, max(self.low, setting)))
        if self.step is not None:
            value = self.from_unit(self.to_unit(value))
            assert isinstance(value, int | float)
            if abs(value - setting) > max(slack, 1e-6 * self.step):
                nearest = f"the space has steps of {self.step:g} there, the nearest is {value:g}"
                return None, f"{self.name} is {setting:g}; {nearest}"
        return value, None
