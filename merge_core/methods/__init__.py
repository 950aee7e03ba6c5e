"""The table of merge methods: names, inputs and parameters, as mergekit 0.1.5 has them.

Only this table is needed to validate a recipe, so it imports no torch; `Method.function` loads
the arithmetic when a merge begins.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from merge_core.errors import shown

if TYPE_CHECKING:
    from torch import Tensor

    from merge_core.methods.job import TensorJob


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: kind, default, closed range; no default means required."""

    kind: Literal["number", "boolean"] = "number"
    default: float | bool | None = None
    low: float = -math.inf
    high: float = math.inf
    required: bool = False
    example: float | bool = 1.0

    def faults(self, path: str, setting: Any) -> list[str]:
        """Check a setting: a scalar, a gradient (list), or a list of {filter, value}."""
        if isinstance(setting, Mapping):
            setting = [setting]
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
        return self.faults(f"{path}.value", item["value"])

    def _scalar(self, path: str, value: Any) -> list[str]:
        if self.kind == "boolean":
            if isinstance(value, bool) or value in (0, 1):
                return []
            return [f"{path} is {shown(value)}; it must be true or false"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return [f"{path} is {shown(value)}; it must be a finite number"]
        if not self.low <= value <= self.high:
            return [f"{path} is {value}; it must lie in [{self.low:g}, {self.high:g}]"]
        return []


@dataclass(frozen=True)
class Method:
    """What a merge method takes.

    `n_models` counts the models besides the base where a base is required, else all inputs.
    """

    name: str
    base: Literal["required", "ignored"]
    n_models: tuple[float, float]
    implementation: str
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    is_random: bool = False
    source: str = ""

    def function(self) -> Callable[[TensorJob], Tensor]:
        """Load the function that merges one tensor."""
        module, name = self.implementation.split(":")
        function: Callable[[TensorJob], Tensor] = getattr(
            importlib.import_module(f"merge_core.methods.{module}"), name
        )
        return function


_WEIGHT = Parameter(required=True)
_DENSITY = Parameter(default=1.0, low=0.0, high=1.0)


def _task_vector(
    name: str, normalize: bool, rescale: bool, source: str, is_random: bool = False, extra={}
) -> Method:
    return Method(
        name,
        "required",
        (1, math.inf),
        f"task_vector:{name}",
        shared={
            "normalize": Parameter("boolean", normalize),
            "lambda": Parameter(default=1.0),
            "rescale": Parameter("boolean", rescale),
            # Only chooses how mergekit holds signs; the result is the same, so it has no effect.
            "int8_mask": Parameter("boolean", False),
        },
        per_model={"weight": _WEIGHT, "density": _DENSITY, **extra},
        is_random=is_random,
        source=source,
    )


_R = dict
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "ignored",
            (1, math.inf),
            "linear:linear",
            shared={"normalize": Parameter("boolean", True)},
            per_model={"weight": Parameter(default=1.0)},
        ),
        Method(
            "slerp",
            "required",
            (1, 1),
            "spherical:slerp",
            shared={"t": Parameter(required=True, example=0.5)},
        ),
        Method(
            "nuslerp",
            "optional",
            (2, 2),
            "spherical:nuslerp",
            shared={
                "nuslerp_row_wise": Parameter("boolean", False),
                "nuslerp_flatten": Parameter("boolean", True),
            },
            per_model={"weight": _WEIGHT},
        ),
        Method(
            "multislerp",
            "optional",
            (1, math.inf),
            "spherical:multislerp",
            shared={"normalize_weights": Parameter("boolean", True), "eps": Parameter(default=1e-8)},
            per_model={"weight": _WEIGHT},
        ),
        Method(
            "karcher",
            "input",
            (1, math.inf),
            "spherical:karcher",
            shared={"max_iter": Parameter(default=10), "tol": Parameter(default=1e-5)},
        ),
        _task_vector("task_arithmetic", False, False, ""),
        _task_vector("ties", True, False, ""),
        _task_vector("dare_linear", False, True, "", True),
        _task_vector("dare_ties", False, True, "", True),
        _task_vector("breadcrumbs", False, False, "", extra={"gamma": Parameter(default=0.01)}),
        _task_vector("breadcrumbs_ties", False, False, "", extra={"gamma": Parameter(default=0.01)}),
        _task_vector("della", True, True, "", True, extra={"epsilon": Parameter(default=0.15)}),
        _task_vector("della_linear", False, True, "", True, extra={"epsilon": Parameter(default=0.15)}),
        Method(
            "model_stock",
            "required",
            (2, math.inf),
            "stock:model_stock",
            shared={"filter_wise": Parameter("boolean", False)},
        ),
        Method(
            "nearswap",
            "required",
            (1, 1),
            "fusion:nearswap",
            shared={"t": Parameter(required=True, example=0.5)},
        ),
        Method("arcee_fusion", "required", (1, 1), "fusion:arcee_fusion"),
        Method(
            "sce",
            "required",
            (1, math.inf),
            "consensus:sce",
            shared={"int8_mask": Parameter("boolean", False), "select_topk": Parameter(default=1.0)},
        ),
        Method(
            "ram", "required", (1, math.inf), "consensus:ram", shared={"epsilon": Parameter(default=1e-5)}
        ),
        Method(
            "ramplus_tl",
            "required",
            (1, math.inf),
            "consensus:ramplus_tl",
            shared={
                "epsilon": Parameter(default=1e-5),
                "r": Parameter(default=0.1),
                "alpha": Parameter(default=0.2),
            },
        ),
        Method(
            "passthrough",
            "ignored",
            (1, 1),
            "linear:passthrough",
            per_model={"scale": Parameter(default=1.0)},
        ),
    )
}
