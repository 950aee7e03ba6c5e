"""Adapters on a CPU: one matrix product for all tokens of a candidate.

vLLM's own for the CPU copies an adapter's factors for every token and multiplies each token by its copy.
Requests of one candidate lie side by side here, so that a batch has few runs of tokens with one adapter;
each run is multiplied as a whole. The numbers are those of vLLM's, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from vllm.lora.punica_wrapper import punica_cpu


def install() -> None:
    """Put these in the place of vLLM's own, for this process."""
    punica_cpu.sgmv_shrink = _shrink
    punica_cpu.sgmv_expand = _expand
    punica_cpu.sgmv_expand_slice = _expand_slice


def _runs(lengths: Tensor, adapters: Tensor) -> Iterator[tuple[slice, int]]:
    """Give the tokens of each run and the place of its adapter; -1, no adapter, is left out."""
    start = 0
    for length, place in zip(lengths.tolist(), adapters.tolist(), strict=True):
        if place >= 0:
            yield slice(start, start + length), place
        start += length


def _shrink(
    inputs: Tensor,
    a: Tensor,
    output: Tensor,
    starts: Tensor,
    lengths: Tensor,
    adapters: Tensor,
    batches: int,
    longest: int,
    n_tokens: int,
    scaling: float,
) -> None:
    """Multiply by A: inputs (t, n), a (places, 1, r, n), output (t, r) in float32."""
    for tokens, place in _runs(lengths, adapters):
        product = inputs[tokens].to(output.dtype) @ a[place, 0].to(output.dtype).T
        output[tokens] = product.mul_(scaling)


def _expand(
    inputs: Tensor,
    b: Tensor,
    output: Tensor,
    starts: Tensor,
    lengths: Tensor,
    adapters: Tensor,
    batches: int,
    longest: int,
    n_tokens: int,
    adds: bool = False,
) -> None:
    """Multiply by B: inputs (t, r), b (places, 1, m, r), output (t, m)."""
    _expand_slice(
        inputs, b, output, starts, lengths, adapters, batches, longest, n_tokens, 0, b.shape[-2], adds
    )


def _expand_slice(
    inputs: Tensor,
    b: Tensor,
    output: Tensor,
    starts: Tensor,
    lengths: Tensor,
    adapters: Tensor,
    batches: int,
    longest: int,
    n_tokens: int,
    offset: int,
    width: int,
    adds: bool = False,
) -> None:
    """Multiply by B into columns [offset, offset + width), such as those of q in a joined q, k and v."""
    for tokens, place in _runs(lengths, adapters):
        columns = output[tokens, offset : offset + width]
        product = inputs[tokens].to(output.dtype) @ b[place, 0, : columns.shape[1]].to(output.dtype).T
        if adds:
            columns += product
        else:
            columns.copy_(product)
