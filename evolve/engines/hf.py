"""The `hf` engine: one resident Transformers model, asked through lm-eval's interface (hf_lm.py)."""

from __future__ import annotations

import gc
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from evolve.engines import EngineSettings
from evolve.engines.hf_lm import ResidentLM
from evolve.engines.loading import merge_and_load
from evolve.errors import SearchFileError, TrialEngineError
from merge_core.errors import nearest
from merge_core.merge import load_merged, merged_tensors
from merge_core.plan import Sources, files_folder, model_alone
from merge_core.recipe import Recipe
from merge_core.resident import build_model, fill, places
from merge_core.tokenizer.loaded import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

_GB = 1e9


class HfEngine:
    """A Transformers model that stays in memory while its weights change.

    `options` are ResidentLM's: HFLM's own (batch_size, max_length, add_bos_token ...) and
    `shared_prefixes`.

    Raises:
        SearchFileError: an option is not known.
        TrialEngineError: the model does not fit into the device's memory.
    """

    def __init__(self, settings: EngineSettings) -> None:
        _check_options(settings.options)
        try:
            self.model = build_model(
                settings.config, settings.folder, settings.device, settings.trust_remote_code
            )
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower():
                raise
            raise TrialEngineError(
                f"the model does not fit into the memory of {settings.device} ({error!s:.200}); use "
                f"dtype: bfloat16, a smaller model, or another --device"
            ) from error
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
            folder = files_folder(recipe, sources)
        engine = cls.__new__(cls)
        engine.model = live
        engine._settings = EngineSettings({}, folder, device)
        engine._lms = {}
        return engine

    def load_recipe(self, recipe: Recipe, sources: Sources | None = None) -> tuple[float, float]:
        """Merge straight into the live parameters, see Engine."""
        into = places(self.model)
        return merge_and_load(recipe, sources, self._settings.device, into, self.load)

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Copy merged tensors into the live model, those that are not in their places yet."""
        fill(self.model, stream)

    def lm(self, tokenizer: Path | None = None) -> ResidentLM:
        """Return lm-eval's view of the model, with the tokenizer of a folder."""
        folder = tokenizer or self._settings.folder
        if folder not in self._lms:
            tokenizer_there = load_tokenizer(folder, self._settings.trust_remote_code)
            try:
                self._lms[folder] = ResidentLM(self.model, tokenizer_there, **self._settings.options)
            except (TypeError, ValueError, AttributeError) as error:
                if not self._settings.options:
                    raise
                raise SearchFileError(
                    f"scoring.engine is {self._settings.options}; the hf engine cannot start with it "
                    f"({str(error)[:200]}), correct it"
                ) from error
        return self._lms[folder]

    def close(self) -> None:
        """Give back the model's memory."""
        device = self.model.device
        self._lms.clear()
        del self.model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def checksum(self) -> dict[str, int]:
        """Digest each parameter's bytes, by the model's own names.

        Returns:
            64-bit digests; two engines of one model hold the same weights, bit for bit, if and only
            if all of them agree.
        """
        return {name: _digest(parameter) for name, parameter in self.model.named_parameters()}

    def verify(self, source: Iterable[tuple[str, Tensor]] | Recipe) -> list[str]:
        """Compare the weights that the engine holds to the tensors of a merge, bit by bit.

        Args:
            source: the tensors by checkpoint name, or the recipe that makes them.

        Returns:
            A line for each difference; none where the engine holds exactly these tensors.
        """
        stream = merged_tensors(source) if isinstance(source, Recipe) else source
        held = places(self.model)
        differences = []
        for name, tensor in stream:
            place = held.get(name)
            if place is None:
                differences.append(f"{name}: the engine holds no such tensor")
            elif _digest(place) != _digest(tensor.to(place.dtype)):
                differences.append(f"{name}: the engine holds other values")
        return differences

    def memory_gb(self) -> dict[str, float]:
        """Return the memory of the weights, and on CUDA the most that answering took beside them.

        In units of 10^9 bytes; "activations" counts from the first answer.
        """
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        weights = sum(storages.values()) / _GB
        if self.model.device.type != "cuda":
            return {"weights": weights}
        peak = torch.cuda.max_memory_allocated(self.model.device) / _GB
        return {"weights": weights, "activations": max(0.0, peak - weights)}


def _digest(tensor: Tensor) -> int:
    """Digest a tensor's bytes to 64 bits."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return int.from_bytes(hashlib.blake2b(content.data, digest_size=8).digest(), "big")


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that neither ResidentLM nor HFLM has; HFLM itself would ignore them."""
    known = {
        name
        for where in (ResidentLM, HFLM)
        for name in inspect.signature(where).parameters
        if name not in ("model", "tokenizer", "pretrained", "options", "kwargs", "trust_remote_code")
    }
    faults = [
        f"scoring.engine.{name} is {options[name]!r}; a file cannot allow code to run, use "
        f"--trust-remote-code"
        for name in ("trust_remote_code",)
        if name in options
    ]
    faults += [
        f"scoring.engine has {name!r}, which the hf engine does not know; {nearest(name, known)}"
        for name in options
        if name not in known | {"trust_remote_code"}
    ]
    if faults:
        raise SearchFileError(faults)
