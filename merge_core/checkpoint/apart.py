"""A mixture whose experts lie in one tensor a layer, seen as if each had tensors of its own.

So it can be merged with mixtures that are stored that way. Its matrices are views of the files, as
everything is that is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoint.read import Checkpoint
from merge_core.experts import MIXTRAL, QWEN, Spelling, respelled

if TYPE_CHECKING:
    from torch import Tensor


def spelling_of(names: Iterable[str]) -> Spelling | None:
    """Tell how a checkpoint spells single experts; None where it has none."""
    for name in names:
        for spelling in (MIXTRAL, QWEN):
            if f".{spelling.block}.experts.0.{spelling.gate}." in name:
                return spelling
    return None


def has_joined_experts(names: Iterable[str]) -> bool:
    """Tell whether a checkpoint has all experts of a layer in one tensor."""
    return any(name.endswith(f".{QWEN.block}.experts.gate_up_proj") for name in names)


class ApartCheckpoint(Checkpoint):
    """Another checkpoint with its experts one by one; everything else is as it was.

    Args:
        whole: has its experts joined.
        spelling: what the single ones are called.
    """

    def __init__(self, whole: Checkpoint, spelling: Spelling) -> None:
        import torch

        self.__dict__.update(whole.__dict__)
        self.__dict__.pop("structure", None)  # it has one of its own
        self._whole = whole
        self.is_mapped = whole.is_mapped
        self.tensors = {}
        # Name in the other checkpoint, and the entry at which this tensor begins there.
        self._origins: dict[str, tuple[str, int]] = {}
        for name, info in whole.tensors.items():
            # Without memory; it shows what a view of the tensor would be.
            empty = torch.empty(info.shape, device="meta")
            for own_name, part in respelled([(name, empty)], spelling):
                self.tensors[own_name] = replace(info, shape=tuple(part.shape))
                self._origins[own_name] = name, int(part.storage_offset())

    @property
    def identity(self) -> str:
        """The other's: what is learned of a tensor goes by its own name."""
        return self._whole.identity

    @property
    def tokenizer_folder(self) -> Path:
        """The other's."""
        return self._whole.tokenizer_folder

    def read(self, name: str) -> Tensor:
        """Return a view of the other checkpoint's tensor; never write into it."""
        origin, start = self._origins[name]
        shape = self.tensors[name].shape
        return self._whole.read(origin).view(-1)[start : start + math.prod(shape)].view(shape)

    def prefetch(self, name: str) -> None:
        """Tell the system that the other checkpoint's tensor will be wanted."""
        self._whole.prefetch(self._origins[name][0])
