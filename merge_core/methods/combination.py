"""Weighted sums of whole tensors or of their deltas, the last step of many methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from merge_core.methods.entrywise import Operands, Values, entries
from merge_core.methods.job import TensorJob


def combine(job: TensorJob, coefficients: Sequence[float], divisor: float = 1.0) -> Tensor:
    """Return sum_i c_i x_i / divisor, or x_b + sum_i c_i (x_i - x_b) / divisor with a base.

    Args:
        coefficients: one a source.

    Returns:
        Tensor of the sources' shape (*s), in the job's output dtype.
    """
    structure = (job.base is not None, divisor != 1.0)
    numbers = (*coefficients, divisor) if divisor != 1.0 else tuple(coefficients)
    return entries(job, _combined, structure, [s.tensor for s in job.sources], Values(numbers))


def _combined(structure: Any, o: Operands) -> Any:
    of_deltas, divides = structure
    mixed = None
    for x in o.xs:
        term = (x - o.base if of_deltas else x) * o.number()
        mixed = term if mixed is None else mixed.add_(term)
    assert mixed is not None
    if divides:
        mixed = mixed.div_(o.number())
    return mixed.add_(o.base) if of_deltas else mixed
