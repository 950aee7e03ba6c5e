"""The `hf` engine: one resident Transformers model, asked through lm-eval's interface (hf_lm.py)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from evolve.engines import EngineSettings
from evolve.engines.hf_lm import ResidentLM
from evolve.errors import SearchFileError
from merge_core.errors import CheckpointError
from merge_core.merge import load_merged
from merge_core.plan import Sources, donor, model_alone
from merge_core.recipe import Recipe
from merge_core.resident import build_model, fill


class HfEngine:
    """A Transformers model that stays in memory while its weights change.

    `options` are HFLM's (batch_size, max_length, add_bos_token ...).
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.model = build_model(
            settings.config, settings.folder, settings.device, settings.trust_remote_code
        )
        self._settings = settings
        self._lms: dict[Path, ResidentLM] = {}

    @classmethod
    def of(cls, model: str | Path | Recipe | PreTrainedModel, device: str) -> HfEngine:
        """Make an engine that holds a folder's, a recipe's or a live model's weights."""
        if isinstance(model, PreTrainedModel):
            live, folder = model, Path(model.name_or_path)
        else:
            recipe = model if isinstance(model, Recipe) else model_alone(str(model))
            sources = Sources()
            live = load_merged(recipe, sources=sources, device=device)
            folder = sources.architecture(donor(recipe)).checkpoint.folder
        engine = cls.__new__(cls)
        engine.model = live
        engine._settings = EngineSettings({}, folder, device)
        engine._lms = {}
        return engine

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the merged tensors into the live model."""
        fill(self.model, stream)

    def lm(self, tokenizer: Path | None = None) -> ResidentLM:
        """Return lm-eval's view of the model, with the tokenizer of a folder."""
        folder = tokenizer or self._settings.folder
        if folder not in self._lms:
            tokenizer_there = load_tokenizer(folder, self._settings.trust_remote_code)
            try:
                self._lms[folder] = ResidentLM(self.model, tokenizer_there, **self._settings.options)
            except (TypeError, ValueError) as error:
                if not self._settings.options:
                    raise
                raise SearchFileError(
                    f"scoring.engine is {self._settings.options}; the hf engine cannot start with it "
                    f"({str(error)[:200]}), correct it"
                ) from error
        return self._lms[folder]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    Raises:
        CheckpointError: the folder has none.
    """
    transformers.utils.logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"no tokenizer can be loaded from {folder} ({str(error).splitlines()[0]:.200}); add the "
            f"model's tokenizer files there"
        ) from error
