"""The result of a recipe as a model of another: merged when a tensor is asked for, never written.

What comes out is what would lie on disk, rounded to the dtype of its recipe, so that a merge of
merges is the same whether its parts were written or not.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_core.checkpoint.read import Checkpoint, TensorInfo
from merge_core.leniency import Leniency
from merge_core.merge import Merger, pays_to_compile
from merge_core.plan import Sources, donor, files_folder, merged_config, plan_merge
from merge_core.recipe import Recipe


class MergedCheckpoint(Checkpoint):
    """A recipe's result, by its name in the recipe that uses it.

    Attributes:
        plan: its tensors, and what they are made of.

    Args:
        name: what other recipes call it.
        recipe: makes it.
        sources: its models.
        text: tells it from other results of that name.
        leniency: of its plan.

    Raises:
        CheckpointError, RecipeError: as of `plan_merge`.
    """

    is_mapped = False

    def __init__(
        self, name: str, recipe: Recipe, sources: Sources, text: str, leniency: Leniency
    ) -> None:
        self.reference = name
        self.plan = plan_merge(recipe, sources, **leniency._asdict())
        self.is_state_dict = sources.architecture(donor(recipe)).checkpoint.is_state_dict
        self.folder = sources.architecture(donor(recipe)).checkpoint.folder
        self._tokenizer_folder = files_folder(recipe, sources)
        self.tensors = {p.name: TensorInfo("", p.dtype, p.shape) for p in self.plan}
        self._text = text
        self._planned = {planned.name: planned for planned in self.plan}
        self._made_config = merged_config(recipe, sources)
        seen = sources.within(recipe)
        compiles = pays_to_compile(self.plan, seen)
        self._merger = Merger(recipe, seen, torch.device("cpu"), compiles, {})

    @property
    def identity(self) -> str:
        """Its name with a hash of all recipes that have a say in it."""
        return f"{self.reference}#{self.fingerprint()}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json that it would have."""
        return self._made_config

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is that it would have."""
        return self._tokenizer_folder

    def read(self, name: str) -> Tensor:
        """Merge one of its tensors; never write into it."""
        return self._merger.merge(self._planned[name])

    def prefetch(self, name: str) -> None:
        """Start to read what goes into a tensor."""
        self._merger.prefetch(self._planned[name])

    def fingerprint(self) -> str:
        """Hash of all recipes that have a say in it."""
        return hashlib.sha256(self._text.encode()).hexdigest()[:16]
