"""Masks drawn entry by entry from the hash, as tests want them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from merge_core.randomness import MaskKey, above, hash_words, high_word, last_kept


def hash31(key: MaskKey, index: Tensor) -> Tensor:
    """Hash flat indices, int64 and rising, under a key; int32 in [0, 2**31)."""
    high: Tensor | int = 0
    if index.numel() and int(index[-1]) >> 32:
        high = (index >> 32).to(torch.int32) * high_word(1 << 32)
    return cast(Tensor, hash_words(*key.words(), index.to(torch.int32, copy=True), high))


def keep_below(key: MaskKey, index: Tensor, numerator: int, denominator: int) -> Tensor:
    """1 where u < numerator / denominator, else 0, float32."""
    return cast(Tensor, above(hash31(key, index), last_kept(numerator, denominator)) + 1.0)


def keep_mask(key: MaskKey, start: int, stop: int, probability: float, device: torch.device) -> Tensor:
    """The Bernoulli mask of entries start..stop-1 of a flattened tensor."""
    index = torch.arange(start, stop, dtype=torch.int64, device=device)
    return keep_below(key, index, *probability.as_integer_ratio())
