"""The table of merge methods: names, inputs and parameters, as mergekit 0.1.5 has them.

Only this table is needed to validate a recipe, so it imports no torch; `Method.function` loads
the arithmetic when a merge begins.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from merge_core.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

    from merge_core.methods.job import TensorJob

__all__ = ["METHODS", "Method", "Parameter"]

_GUIDE = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"


@dataclass(frozen=True)
class Method:
    """What a merge method takes.

    Attributes:
        base: what a named base model is to it: "required" and "optional" bases stand apart from
            the other inputs, an "ignored" one is not read, and as "input" it is one more model.
        n_models: least and most inputs: besides the base where it is required or optional, else all.
        implementation: module and function below `merge_core.methods`.
        shared, per_model: parameters of the whole tensor and of each model (but the base).
        first_is_base: whether the first of two models is the base where none is named.
        joint: says what is wrong with a model's plain values taken together, or None.
        is_random: whether the result depends on `random_seed`.
        source: where the formula is from.
    """

    name: str
    summary: str
    base: Literal["required", "optional", "ignored", "input"]
    n_models: tuple[float, float]
    implementation: str
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    per_model: Mapping[str, Parameter] = field(default_factory=dict)
    first_is_base: bool = False
    joint: Callable[[Mapping[str, Any]], str | None] | None = None
    is_random: bool = False
    source: str = ""

    @property
    def has_base(self) -> bool:
        """Whether a base stands apart from the inputs."""
        return self.base in ("required", "optional")

    @property
    def parameters(self) -> dict[str, Parameter]:
        """All parameters, by name."""
        return {**self.shared, **self.per_model}

    def function(self) -> Callable[[TensorJob], Tensor]:
        """Load the function that merges one tensor."""
        return _function(self.implementation)


@cache
def _function(implementation: str) -> Callable[[TensorJob], Tensor]:
    module, name = implementation.split(":")
    function: Callable[[TensorJob], Tensor] = getattr(
        importlib.import_module(f"merge_core.methods.{module}"), name
    )
    return function


_WEIGHT = Parameter(required=True, help="share of this model; negative ones subtract", role="share")
_T = Parameter(
    required=True, example=0.5, help="position between the base (0) and the model (1)", role="position"
)
# Only chooses how mergekit holds signs; the result is the same, so it has no effect.
_INT8_MASK = Parameter("boolean", False, help="accepted, without effect")


def _task_vector(
    name: str,
    summary: str,
    source: str,
    *,
    thins: bool = True,
    normalize: bool = False,
    rescale: bool = False,
    own: Mapping[str, Parameter] | None = None,
    joint: Callable[[Mapping[str, Any]], str | None] | None = None,
    is_random: bool = False,
) -> Method:
    return Method(
        name,
        summary,
        "required",
        (1, math.inf),
        f"task_vector:{name}",
        shared={
            "normalize": Parameter("boolean", normalize, help="divide by the sum of the weights"),
            "lambda": Parameter(default=1.0, help="scale of the merged difference", neutral=1.0),
            "rescale": Parameter("boolean", rescale, help="restore each difference's L1 norm"),
            "int8_mask": _INT8_MASK,
        },
        per_model={
            "weight": _WEIGHT,
            "density": Parameter(
                default=1.0,
                low=0.0,
                high=1.0,
                help="share of the difference's entries that is kept",
                neutral=1.0 if thins else None,
            ),
            **(own or {}),
        },
        joint=joint,
        is_random=is_random,
        source=source,
    )


_GAMMA = {"gamma": Parameter(default=0.01, low=0.0, high=1.0, help="share of largest entries dropped")}
_EPSILON = {
    "epsilon": Parameter(
        default=0.15, low=0.0, is_open=True, help="how far keep probabilities lie around density"
    )
}


def _della_band(values: Mapping[str, Any]) -> str | None:
    density, epsilon = values["density"], values["epsilon"]
    if density in (0, 1) or (density - epsilon > 0 and density + epsilon < 1):
        return None
    return (
        f"density is {density:g} and epsilon {epsilon:g}; density - epsilon must be above 0 and "
        f"density + epsilon below 1, choose a smaller epsilon"
    )


_TASK_VECTORS = (
    _task_vector(
        "task_arithmetic",
        "adds weighted differences from the base",
        "https://arxiv.org/abs/2212.04089",
        thins=False,
    ),
    _task_vector(
        "ties",
        "keeps each difference's largest entries and merges those that agree in sign",
        "https://arxiv.org/abs/2306.01708",
        normalize=True,
    ),
    _task_vector(
        "dare_linear",
        "drops entries of each difference at random and adds the rest",
        "https://arxiv.org/abs/2311.03099",
        rescale=True,
        is_random=True,
    ),
    _task_vector(
        "dare_ties",
        "drops entries at random and merges those that agree in sign",
        "https://arxiv.org/abs/2311.03099",
        rescale=True,
        is_random=True,
    ),
    _task_vector(
        "breadcrumbs",
        "drops the largest and the smallest entries of each difference and adds the rest",
        "https://arxiv.org/abs/2312.06795",
        own=_GAMMA,
    ),
    _task_vector(
        "breadcrumbs_ties",
        "drops the largest and the smallest entries and merges those that agree in sign",
        "https://arxiv.org/abs/2312.06795",
        own=_GAMMA,
    ),
    _task_vector(
        "della",
        "drops entries at random, small ones rather, and merges those that agree in sign",
        "https://arxiv.org/abs/2406.11617",
        normalize=True,
        rescale=True,
        own=_EPSILON,
        joint=_della_band,
        is_random=True,
    ),
    _task_vector(
        "della_linear",
        "drops entries at random, small ones rather, and adds the rest",
        "https://arxiv.org/abs/2406.11617",
        rescale=True,
        own=_EPSILON,
        joint=_della_band,
        is_random=True,
    ),
)

_SPHERICAL = (
    Method(
        "slerp",
        "interpolates between two models along the arc between them",
        "required",
        (1, 1),
        "spherical:slerp",
        shared={"t": _T},
        first_is_base=True,
        source="https://doi.org/10.1145/325165.325242",
    ),
    Method(
        "nuslerp",
        "interpolates between two models, or their differences from a base, by weight",
        "optional",
        (2, 2),
        "spherical:nuslerp",
        shared={
            "nuslerp_row_wise": Parameter("boolean", False, help="columns are the vectors, not rows"),
            "nuslerp_flatten": Parameter("boolean", True, help="the whole tensor is one vector"),
        },
        per_model={"weight": _WEIGHT},
        source=f"{_GUIDE}#nuslerp-nuslerp",
    ),
    Method(
        "multislerp",
        "interpolates between any number of models on the sphere",
        "optional",
        (1, math.inf),
        "spherical:multislerp",
        shared={
            "normalize_weights": Parameter("boolean", True, help="divide by the sum of the weights"),
            "eps": Parameter(default=1e-8, low=0.0, help="norms below it count as zero"),
        },
        per_model={"weight": _WEIGHT},
        source=f"{_GUIDE}#multi-slerp-multislerp",
    ),
    Method(
        "karcher",
        "finds the point on the sphere that is nearest to all models",
        "input",
        (1, math.inf),
        "spherical:karcher",
        shared={
            "max_iter": Parameter("integer", 10, low=1, example=10, help="steps at most"),
            "tol": Parameter(default=1e-5, low=0.0, help="a shorter step is the last one"),
        },
        source=f"{_GUIDE}#karcher-mean-karcher",
    ),
)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "averages the models by weight",
            "ignored",
            (1, math.inf),
            "linear:linear",
            shared={"normalize": Parameter("boolean", True, help="divide by the sum of the weights")},
            # mergekit requires a weight; without one every model counts the same here.
            per_model={"weight": Parameter(default=1.0, help="share of this model", role="share")},
            source="https://arxiv.org/abs/2203.05482",
        ),
        Method(
            "passthrough",
            "takes one model's tensors as they are; slices stack its layers",
            "ignored",
            (1, 1),
            "linear:passthrough",
            per_model={"scale": Parameter(default=1.0, help="factor of the tensor", neutral=1.0)},
            source=f"{_GUIDE}#passthrough-passthrough",
        ),
        *_SPHERICAL,
        *_TASK_VECTORS,
        Method(
            "model_stock",
            "averages the models and moves towards the base the more they differ",
            "required",
            (2, math.inf),
            "stock:model_stock",
            shared={"filter_wise": Parameter("boolean", False, help="each row has its own ratio")},
            source="https://arxiv.org/abs/2403.19522",
        ),
        Method(
            "nearswap",
            "takes the model's values where they are near the base's",
            "required",
            (1, 1),
            "fusion:nearswap",
            shared={
                "t": Parameter(
                    required=True, example=0.0001, help="distance up to which values count as near"
                )
            },
            source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        ),
        Method(
            "arcee_fusion",
            "takes from the model the entries that matter most",
            "required",
            (1, 1),
            "fusion:arcee_fusion",
            source=f"{_GUIDE}#arcee-fusion-arcee_fusion",
        ),
        Method(
            "sce",
            "selects varying entries, weighs models by their differences, erases minority signs",
            "required",
            (1, math.inf),
            "consensus:sce",
            shared={
                "select_topk": Parameter(
                    default=1.0, low=0.0, high=1.0, help="share of entries of largest variance kept"
                ),
                "int8_mask": _INT8_MASK,
            },
            source="https://arxiv.org/abs/2408.07990",
        ),
        Method(
            "ram",
            "adds differences of one model whole, and averages those that several share",
            "required",
            (1, math.inf),
            "consensus:ram",
            shared={"epsilon": Parameter(default=1e-5, low=0.0, help="smaller differences are none")},
            source="https://arxiv.org/abs/2601.13572",
        ),
        Method(
            "ramplus_tl",
            "as ram, and strengthens differences of one model alone",
            "required",
            (1, math.inf),
            "consensus:ramplus_tl",
            shared={
                "r": Parameter(default=0.1, help="how much they are strengthened"),
                "alpha": Parameter(default=0.2, low=0.0, help="largest ratio that counts"),
                "epsilon": Parameter(default=1e-5, low=0.0, help="smaller differences are none"),
            },
            source="https://arxiv.org/abs/2601.13572",
        ),
    )
}
