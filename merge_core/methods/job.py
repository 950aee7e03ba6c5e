"""What a method is given for one output tensor, and how it walks over it.

A method computes in float32 (float64 where a source is float64), chunk by chunk, and rounds once
to the output dtype. The chunk length has no influence on any bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.randomness import MaskKey

if TYPE_CHECKING:
    from merge_core.sparsify import StatisticsCache

# Big enough that a torch call's own cost vanishes, small enough that temporaries stay in cache.
CHUNK = 1 << 18
# Sums are taken over rows of this length, so that no thread count changes their order.
_ROW = 1 << 12


@dataclass(frozen=True)
class Source:
    """One model's tensor, as read from its checkpoint.

    `tensor` has been cast to the recipe's dtype; `parameters` are this model's for this tensor;
    `key` names its stream of random numbers.
    """

    tensor: Tensor
    parameters: dict[str, Any] = field(default_factory=dict)
    key: MaskKey = field(default_factory=lambda: MaskKey(0, "", 0, ""))
    model: str = ""
    input_name: str = ""


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: where it comes from and which values it gets.

    Attributes:
        name: output tensor name.
        base: the base's tensor, shape (*s), or None where the method has no base.
        sources: the other models' tensors, each shape (*s), in the order of the recipe.
        parameters: the method's shared parameters for this tensor.
        out_dtype: dtype of the result.
        statistics: order statistics kept between merges of the same sources.
    """

    name: str
    base: Source | None
    sources: list[Source]
    parameters: dict[str, Any]
    out_dtype: torch.dtype
    statistics: StatisticsCache

    @property
    def like(self) -> Tensor:
        """A tensor with the result's shape and device."""
        return self.base.tensor if self.base else self.sources[0].tensor

    @property
    def work_dtype(self) -> torch.dtype:
        """float32, or float64 as soon as one source is float64."""
        tensors = [source.tensor for source in self.sources] + ([self.base.tensor] if self.base else [])
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def chunks(n: int) -> Iterator[tuple[int, int]]:
    """Cut range(n) into [start, stop) pieces of at most CHUNK entries."""
    for start in range(0, n, CHUNK):
        yield start, min(start + CHUNK, n)


def by_chunks(job: TensorJob, compute: Callable[[int, int], Tensor]) -> Tensor:
    """Assemble the result from `compute(start, stop)` over the flattened tensor.

    Returns:
        Tensor of the job's shape and output dtype.
    """
    out = torch.empty(job.like.shape, dtype=job.out_dtype, device=job.like.device)
    flat = out.view(-1)
    for start, stop in chunks(flat.numel()):
        flat[start:stop] = compute(start, stop)
    return out


def row_sums(values: Tensor) -> list[float]:
    """Sum rows of fixed length in float64; `math.fsum` of all rows is the same however they are cut.

    Args:
        values: shape (n,); a chunk, whose start is a multiple of the row length.
    """
    n_whole = values.numel() // _ROW * _ROW
    rows: list[float] = values[:n_whole].view(-1, _ROW).sum(dim=1, dtype=torch.float64).tolist()
    if n_whole < values.numel():
        rows.append(float(values[n_whole:].sum(dtype=torch.float64)))
    return rows
