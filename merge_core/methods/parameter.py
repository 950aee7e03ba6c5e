"""What a parameter of a merge method may be, and what is said where it is something else."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from merge_core.errors import shown

Kind = Literal["number", "integer", "boolean"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method; without default and required, it must be given.

    Attributes:
        low, high: bounds that are admissible themselves, unless `is_open`, which excludes `low`.
        example: what an error suggests.
        help: one line for people.
        role: "share" of a model in the merge, "position" between base (0) and model (1).
        neutral: the value at which it changes nothing of a model; None where every value will do.
    """

    kind: Kind = "number"
    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf
    required: bool = False
    example: float | bool = 1.0
    is_open: bool = False
    help: str = ""
    role: Literal["share", "position"] | None = None
    neutral: float | None = None

    def faults(self, path: str, setting: Any) -> list[str]:
        """Check a setting: a scalar, a gradient (list), {filter, value}, or a list of those."""
        if isinstance(setting, Mapping):
            return self._filtered(path, setting)
        if isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting):
            return [
                fault for i, item in enumerate(setting) for fault in self._filtered(f"{path}[{i}]", item)
            ]
        if isinstance(setting, list):
            if not setting:
                return [f"{path} is an empty list; give at least one value"]
            return [
                fault for i, item in enumerate(setting) for fault in self._scalar(f"{path}[{i}]", item)
            ]
        return self._scalar(path, setting)

    def _filtered(self, path: str, item: Any) -> list[str]:
        if not isinstance(item, Mapping) or "value" not in item or set(item) - {"filter", "value"}:
            return [f"{path} is {shown(item)}; an entry of a filter list is {{filter: NAME, value: ...}}"]
        if not isinstance(item.get("filter"), str | None):
            return [f"{path}.filter is {shown(item['filter'])}; it must be a part of a tensor's name"]
        value = item["value"]
        if isinstance(value, Mapping) or (
            isinstance(value, list) and any(isinstance(anchor, Mapping) for anchor in value)
        ):
            return [f"{path}.value is {shown(value)}; filters do not nest, give a number or a list"]
        return self.faults(f"{path}.value", value)

    def _scalar(self, path: str, value: Any) -> list[str]:
        if self.kind == "boolean":
            if isinstance(value, bool) or value in (0, 1):
                return []
            return [f"{path} is {shown(value)}; it must be true or false"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            return [f"{path} is {shown(value)}; it must be a finite number"]
        if self.kind == "integer" and value != int(value):
            return [f"{path} is {value}; it must be a whole number"]
        if not self.low <= value <= self.high or (self.is_open and value == self.low):
            return [f"{path} is {value}; it must {self._range()}"]
        return []

    def _range(self) -> str:
        if math.isinf(self.high):
            return f"be {'above' if self.is_open else 'at least'} {self.low:g}"
        return f"lie in {'(' if self.is_open else '['}{self.low:g}, {self.high:g}]"


def _is_finite(value: float) -> bool:
    """Tell numbers that a float can hold; unlike math.isfinite it takes integers of any size."""
    return -sys.float_info.max <= value <= sys.float_info.max


def plain_numbers(setting: Any) -> Any:
    """Return a setting with numbers that were quoted (`"1e-5"`) as numbers; filters stay text."""
    if isinstance(setting, Mapping):
        return {key: value if key == "filter" else plain_numbers(value) for key, value in setting.items()}
    if isinstance(setting, list):
        return [plain_numbers(item) for item in setting]
    if isinstance(setting, str):
        for kind in (int, float):
            try:
                number = kind(setting)
            except ValueError:
                continue
            return number if _is_finite(number) else setting
    return setting
