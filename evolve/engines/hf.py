"""The `hf` engine: one resident Transformers model, answered through lm-eval's own HFLM.

HFLM scores exactly as `lm_eval` does. What is changed is that texts are tokenised once a search
instead of once a candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from evolve.engines import EngineSettings
from evolve.engines.hf_options import refuse_unknown
from evolve.errors import SearchFileError
from merge_core.errors import CheckpointError
from merge_core.merge import load_merged
from merge_core.plan import Sources, donor, model_alone
from merge_core.recipe import Recipe
from merge_core.resident import build_model, fill

if TYPE_CHECKING:
    import torch

# Fixed, so that a document meets the same batch, and so the same rounding, in every run.
DEFAULT_BATCH_SIZE = 64


class ResidentLM(HFLM):  # type: ignore[misc]
    """HFLM around a live model, with every text tokenised once."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, **options: Any) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self._encode_pair = cache(super()._encode_pair)
        self._tok_encode = cache(super().tok_encode)
        self._tok_batch_encode = cache(super().tok_batch_encode)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise a text, or recall how it was tokenised."""
        if not hasattr(self, "_tok_encode"):  # HFLM's constructor tokenises before it is done
            return list(super().tok_encode(string, *args, **kwargs))
        return list(self._tok_encode(string, *args, **kwargs))

    def tok_batch_encode(
        self, strings: Iterable[str], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenise and pad a batch of texts, or recall it; callers do not write into it."""
        ids, mask = self._tok_batch_encode(tuple(strings), *args, **kwargs)
        return ids, mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score continuations; no progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score whole texts; no progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Generate answers; no progress bar."""
        return super().generate_until(requests, disable_tqdm=True)


class HfEngine:
    """A Transformers model that stays in memory while its weights change.

    `options` are HFLM's (batch_size, max_length, add_bos_token ...).
    """

    def __init__(self, settings: EngineSettings) -> None:
        refuse_unknown(settings.options)
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

    def memory_gb(self) -> dict[str, float]:
        """Return what the model's weights take; a key-value cache lives only while it generates."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {"weights": sum(tensor.nbytes for tensor in tensors) / 1e9}

    def lm(self, tokenizer: Path | None = None) -> ResidentLM:
        """Return lm-eval's view of the model, with the tokenizer of a folder."""
        folder = tokenizer or self._settings.folder
        if folder not in self._lms:
            options = {"batch_size": DEFAULT_BATCH_SIZE, **self._settings.options}
            tokenizer_there = load_tokenizer(folder, self._settings.trust_remote_code)
            try:
                self._lms[folder] = ResidentLM(self.model, tokenizer_there, **options)
            except (TypeError, ValueError, AttributeError) as error:
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
