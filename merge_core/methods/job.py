"""What a method is given for one output tensor, and how it walks over it.

A method computes in float32 (float64 where a source is float64), chunk by chunk, and rounds once
to the output dtype. The chunk length has no influence on any bit of the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.errors import CheckpointError
from merge_core.randomness import MaskKey

if TYPE_CHECKING:
    from merge_core.statistics import StatisticsCache

# Big enough that a torch call's own cost vanishes, small enough that temporaries stay in cache.
CHUNK = 1 << 18
# On an accelerator a chunk must keep thousands of cores busy, and its memory is large.
_DEVICE_CHUNK = 1 << 25
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

    @cached_property
    def identity(self) -> Hashable:
        """What tells this tensor from others."""
        return self.model, self.input_name, self.tensor.dtype, self.tensor.shape


@dataclass(frozen=True)
class TensorJob:
    """One output tensor: where it comes from and which values it gets.

    Attributes:
        name: output tensor name.
        base: the base's tensor, shape (*s), or None where the method has no base.
        sources: the other models' tensors, each shape (*s), in the order of the recipe.
        parameters: the method's shared parameters for this tensor.
        out_dtype: dtype of the result.
        statistics: what is known of the sources, kept between merges.
        compiles: whether a compiled loop pays, where there is a compiler.
        place: where the result may be written, of its shape, dtype and device; None for new memory.
    """

    name: str
    base: Source | None
    sources: list[Source]
    parameters: dict[str, Any]
    out_dtype: torch.dtype
    statistics: StatisticsCache
    compiles: bool = False
    place: Tensor | None = None

    @property
    def like(self) -> Tensor:
        """A tensor with the result's shape and device."""
        return self.base.tensor if self.base else self.sources[0].tensor

    @cached_property
    def work_dtype(self) -> torch.dtype:
        """float32, or float64 as soon as one source is float64."""
        tensors = [source.tensor for source in self.sources] + ([self.base.tensor] if self.base else [])
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Cut the flattened tensor into pieces [start, stop) of at most a chunk."""
        length = CHUNK if self.like.device.type == "cpu" else _DEVICE_CHUNK
        n = self.like.numel()
        for start in range(0, n, length):
            yield start, min(start + length, n)

    def without_base(self, sources: list[Source]) -> TensorJob:
        """Return this job with other sources and no base."""
        return replace(self, base=None, sources=sources)

    def not_a_number(self) -> CheckpointError:
        """Find out which source has NaN, after one has been met."""
        for source in [*([self.base] if self.base else []), *self.sources]:
            n = int(source.tensor.isnan().sum())
            if n:
                return CheckpointError(
                    f"tensor {source.input_name} of {source.model}: {n} of its {source.tensor.numel()} "
                    f"entries are not numbers (NaN); use a model without NaN"
                )
        return CheckpointError(
            f"tensor {self.name}: the sources have infinite entries whose merge is not a number "
            f"(NaN); use models with finite weights"
        )


def rows_in_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into blocks of whole rows along its last dimension, each shape (r, m)."""
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    yield from torch.split(rows, max(1, CHUNK // max(1, rows.shape[1])))


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
