"""Formulas for one entry of a tensor, run over all of them.

A formula is a function of `Operands`, written with ordinary torch operations on the entries of a
chunk. It is run in one of two ways that give the same bits: chunk by chunk with torch, or, where a
C compiler is present and the merge is large, as one compiled loop (`compiled.py`). For that a
formula has no branch on a value, uses operations that IEEE 754 defines to the last bit, and never
fuses a multiplication with an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_core.methods.compiled import Loop, Traced, is_compilable, loop_for
from merge_core.methods.job import TensorJob
from merge_core.randomness import high_word


@dataclass(frozen=True)
class Values:
    """What a formula is given besides the tensors; they change from candidate to candidate.

    Attributes:
        numbers: reals, in the order in which the formula asks for them.
        integers: signed 32-bit integers, likewise.
        arrays: further tensors of shape (n,), uint16 or int32, such as ranks.
    """

    numbers: tuple[float, ...] = ()
    integers: tuple[int, ...] = ()
    arrays: tuple[Tensor, ...] = ()


class Operands:
    """The entries of a chunk, and the values in the order in which they are asked for.

    Attributes:
        base: the base's entries in the work dtype, shape (n,), or None.
        xs: the sources' entries in the work dtype, each shape (n,); not to be written into.
        index: flat index of each entry, its lower 32 bits as int32.
        index_high: `high_word` of the chunk's indices.
    """

    def __init__(
        self,
        base: Any,
        xs: Sequence[Any],
        index: Callable[[], Any],
        index_high: int,
        numbers: Sequence[Any],
        integers: Sequence[Any],
        arrays: Sequence[Any],
    ) -> None:
        self.base, self.xs, self.index_high = base, list(xs), index_high
        self._index = index
        self._values = {
            name: iter(of) for name, of in (("number", numbers), ("integer", integers), ("array", arrays))
        }

    @property
    def index(self) -> Any:
        """A new tensor at each call, which may be written into."""
        return self._index()

    def number(self) -> Any:
        """Next of the numbers."""
        return next(self._values["number"])

    def integer(self) -> Any:
        """Next of the integers."""
        return next(self._values["integer"])

    def array(self) -> Any:
        """Next of the arrays: the chunk's part of it, in the work dtype."""
        return next(self._values["array"])


Formula = Callable[[Any, Operands], Any]
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def indicator(compare: Callable[..., Tensor], a: Any, b: Any) -> Any:
    """Compare entries: 1 where it holds, else 0, in the dtype of `a`.

    torch computes with floats several times faster than with booleans.
    """
    if isinstance(a, Traced):
        return a.indicator(compare, b)
    return compare(a, b, out=torch.empty_like(a))


def bits(x: Any) -> Any:
    """Return the bits of numbers as signed integers of the same width; their order is that of the
    magnitudes, their sign the numbers' sign."""
    return x.bits() if isinstance(x, Traced) else x.view(_BITS[x.dtype])


def negative(whole: Any) -> Any:
    """Tell where signed integers are negative: -1 there, else 0."""
    width = whole.width if isinstance(whole, Traced) else 8 * whole.itemsize
    return whole >> (width - 1)


def kept(mask: Any, x: Any) -> Any:
    """Keep entries where a mask is -1, and put +0 where it is 0.

    Bits and masks cost a fraction of what selecting by booleans does, in torch and compiled.

    Args:
        mask: signed integers of any width, shape (n,).
        x: shape (n,); overwritten.
    """
    if isinstance(x, Traced):
        return x.kept(mask)
    whole = bits(x)
    whole &= mask.to(whole.dtype)
    return x


def entries(
    job: TensorJob, formula: Formula, structure: Hashable, sources: Sequence[Tensor], values: Values
) -> Tensor:
    """Compute every entry of the result.

    Args:
        formula: takes `structure` and Operands; returns the chunk's result in the work dtype.
        structure: whatever of the formula's shape does not depend on values.
        sources: tensors of the job's shape, the formula's `xs`.

    Returns:
        Tensor of the job's shape and output dtype, in the job's place if it has one.
    """
    out = job.place
    if out is None:
        out = torch.empty(job.like.shape, dtype=job.out_dtype, device=job.like.device)
    loop = _loop(job, formula, structure, sources, values, job.out_dtype)
    if loop is not None:
        has_nan = loop.run(_base(job), sources, values.numbers, values.integers, values.arrays, out) != 0
    else:
        has_nan = False
        flat = out.view(-1)
        for start, stop in job.chunks():
            result = formula(structure, operands(job, sources, values, start, stop))
            flat[start:stop] = result
            # One sum sees a NaN at the speed of memory; what else makes one is looked at closer.
            total = float(result.sum())
            if total != total:
                has_nan = has_nan or bool(result.isnan().any())
    if has_nan:
        raise job.not_a_number()
    return out


def total(
    job: TensorJob, formula: Formula, structure: Hashable, sources: Sequence[Tensor], values: Values
) -> int:
    """Sum a formula over all entries, each truncated to an integer: exact in any order."""
    loop = _loop(job, formula, structure, sources, values, None)
    if loop is not None:
        return loop.run(_base(job), sources, values.numbers, values.integers, values.arrays, None)
    return sum(
        int(formula(structure, operands(job, sources, values, start, stop)).to(torch.int64).sum())
        for start, stop in job.chunks()
    )


def evaluated(
    job: TensorJob, formula: Formula, structure: Hashable, sources: Sequence[Tensor], values: Values
) -> Iterator[Tensor]:
    """Compute a formula in float32, a chunk at a time.

    Raises:
        CheckpointError: a result is not a number.
    """
    loop = _loop(job, formula, structure, sources, values, torch.float32)
    for start, stop in job.chunks():
        if loop is not None:
            xs = [tensor.reshape(-1)[start:stop] for tensor in sources]
            base = job.base.tensor.reshape(-1)[start:stop] if job.base else None
            result = torch.empty(stop - start, dtype=torch.float32)
            has_nan = loop.run(base, xs, values.numbers, values.integers, (), result, start) != 0
        else:
            result = formula(structure, operands(job, sources, values, start, stop)).to(torch.float32)
            has_nan = bool(torch.isnan(result.sum()) and result.isnan().any())
        if has_nan:
            raise job.not_a_number()
        yield result


def operands(
    job: TensorJob, sources: Sequence[Tensor], values: Values, start: int, stop: int
) -> Operands:
    """Cut the chunk [start, stop) out of the flattened tensors."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[start:stop].to(job.work_dtype)

    def index() -> Tensor:
        return torch.arange(start, stop, dtype=torch.int64, device=job.like.device).to(torch.int32)

    base = _base(job)
    return Operands(
        None if base is None else part(base),
        [part(x) for x in sources],
        index,
        high_word(start),
        values.numbers,
        values.integers,
        [part(array) for array in values.arrays],
    )


def _base(job: TensorJob) -> Tensor | None:
    return job.base.tensor if job.base else None


def _loop(
    job: TensorJob,
    formula: Formula,
    structure: Hashable,
    sources: Sequence[Tensor],
    values: Values,
    out: torch.dtype | None,
) -> Loop | None:
    if not job.compiles or not is_compilable(job.like):
        return None
    base = _base(job)

    def trace(base: Any, xs: Any, index: Any, high: Any, numbers: Any, integers: Any, arrays: Any) -> Any:
        return formula(structure, Operands(base, xs, index, high, numbers, integers, arrays))

    return loop_for(
        (formula, structure),
        trace,
        None if base is None else base.dtype,
        tuple(x.dtype for x in sources),
        out,
        job.work_dtype,
        tuple(array.dtype for array in values.arrays),
        (len(values.numbers), len(values.integers)),
    )
