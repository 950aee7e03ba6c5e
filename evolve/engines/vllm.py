"""The `vllm` engine: one resident vLLM engine, its weights reloaded in place.

With one rank everything runs in this process and the merged tensors go straight from the merge into
the model. With tensor parallelism each rank is a process that merges for itself and keeps its own
shard (vllm_worker.py). lm-eval's requests are answered by vllm_lm.py.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The engine core in this process: weights reach it without being pickled.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm
from torch import Tensor

from evolve.engines import EngineSettings
from evolve.engines.loading import merge_and_load
from evolve.engines.vllm_lm import VllmLM
from evolve.engines.vllm_start import (
    check_options,
    cpu_defaults,
    forget_ranks,
    give_each_rank_its_cores,
    quiet,
    reported,
)
from evolve.engines.vllm_worker import MergeWorker, RankReport
from evolve.errors import TrialEngineError, TrialMergeError
from merge_core.checkpoint.write import copy_tokenizer
from merge_core.recipe import Recipe
from merge_core.sources import Sources
from merge_core.tokenizer.loaded import load_tokenizer


class VllmEngine:
    """A vLLM engine that stays up while its weights change.

    `options` go to `vllm.LLM` as they are.

    Args:
        settings: how to start it.
        further: options of vLLM that the user does not set.

    Attributes:
        merges_itself: whether the ranks merge on their own; `load` is then refused.

    Raises:
        SearchFileError: an option is unknown or contradicts what the search needs.
        SearchFileError, TrialEngineError: vLLM cannot start with this model and these options.
    """

    def __init__(self, settings: EngineSettings, **further: Any) -> None:
        check_options(settings.options)
        self._settings = settings
        on_cpu = settings.device == "cpu"
        # Left to itself vLLM runs float32 models in 16 bits.
        dtype = settings.config.get("dtype") or settings.config.get("torch_dtype") or "float32"
        options = {
            "enforce_eager": on_cpu,
            "dtype": dtype,
            "max_logprobs": -1,
            **(cpu_defaults() if on_cpu else {}),
            **settings.options,
            **further,
        }
        n_ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        self.merges_itself = n_ranks > 1
        if self.merges_itself and on_cpu:
            give_each_rank_its_cores(n_ranks)
        # vLLM reads configuration and tokenizer from a folder; the weights come with each candidate.
        self._folder = tempfile.TemporaryDirectory(prefix="evolve-vllm-")
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(settings.config))
        copy_tokenizer(settings.folder, folder)
        for code in settings.folder.glob("*.py") if settings.trust_remote_code else ():
            shutil.copy(code, folder)
        self._holds = "nothing"
        self._lms: dict[Path, VllmLM] = {}
        with quiet(), reported(settings.options):
            self._llm = vllm.LLM(
                model=str(folder),
                load_format="dummy",
                trust_remote_code=settings.trust_remote_code,
                disable_log_stats=True,
                worker_extension_cls=f"{MergeWorker.__module__}.{MergeWorker.__qualname__}",
                **options,
            )
            # What the model cannot compute here shows with the first token, not before.
            first = vllm.SamplingParams(max_tokens=1, detokenize=False)
            self._llm.generate([{"prompt_token_ids": [0]}], first, use_tqdm=False)

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Reload the weights in place, and forget cached prefixes of the last candidate.

        Raises:
            TrialEngineError: the stream does not fit the model, or the ranks merge for themselves.
            Exception: whatever the stream raises. The engine then answers nothing until the next load.
        """
        if self.merges_itself:
            raise TrialEngineError("an engine of several ranks takes recipes (load_recipe), no stream")
        self._change(lambda: self._on_ranks("evolve_load", stream))

    def load_recipe(self, recipe: Recipe, sources: Sources | None = None) -> tuple[float, float]:
        """Merge and reload, see Engine; several ranks each merge and load their share.

        Returns:
            Seconds that loading (the slowest rank's) waited for merged tensors, and its others.

        Raises:
            TrialMergeError: the recipe cannot be merged.
            TrialEngineError: the merge does not fit the model, or a rank has died.
        """
        if not self.merges_itself:
            return merge_and_load(recipe, sources, self._settings.device, {}, self.load)
        reports: list[RankReport] = []

        def merge() -> None:
            reports.extend(self._on_ranks("evolve_merge", recipe.as_config()))
            failures = [report.failure for report in reports if report.failure]
            if failures:
                kind, text = failures[0]
                raise (TrialMergeError if kind == "merge" else TrialEngineError)(text)

        self._change(merge)
        slowest = max(reports, key=lambda report: report.merge_s + report.load_s)
        return slowest.merge_s, slowest.load_s

    def _change(self, change: Callable[[], object]) -> None:
        """Change the weights; until that is complete nothing is answered."""
        self._holds = "a candidate that could not be loaded"
        change()
        # vLLM keys its prefix cache on tokens, not on weights.
        if not self._llm.reset_prefix_cache():
            raise TrialEngineError("vLLM kept cached prefixes of the previous candidate")
        self._holds = ""

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of MergeWorker on every rank.

        Raises:
            TrialEngineError: of several ranks one has died, or the method raises in one.
            Exception: with one rank, what the method raises.
        """
        if not self.merges_itself:
            return list(self._llm.collective_rpc(method, args=arguments))
        try:
            by_rank = list(self._llm.collective_rpc("evolve_call", args=(method, *arguments)))
        except Exception as error:
            died = TrialEngineError(
                f"a rank of the vLLM engine has died ({type(error).__name__}: {error!s:.200}); what "
                f"it said is above"
            )
            died.is_unforeseen = True
            raise died from error
        failures = [failure for _, failure in by_rank if failure]
        if failures:
            raise TrialEngineError(failures[0])
        return [answer for answer, _ in by_rank]

    def verify(self, source: Iterable[tuple[str, Tensor]] | Recipe) -> list[str]:
        """Compare what the engine computes with to the tensors of a merge, value by value.

        What is read back is what the model multiplies with, packed copies and tied heads included
        (vllm_check.py says how, and what cannot be told apart). Takes a few seconds and the memory of
        one layer.

        Args:
            source: the tensors by checkpoint name, or the recipe that makes them; several ranks
                take a recipe only.

        Returns:
            A line for each difference, and for each tensor that cannot be read back; none where the
            engine holds exactly these tensors.
        """
        given = source.as_config() if isinstance(source, Recipe) else source
        if self.merges_itself and not isinstance(given, dict):
            raise TrialEngineError("an engine of several ranks is verified against a recipe, no stream")
        by_rank = self._on_ranks("evolve_differences", given)
        if len(by_rank) == 1:
            return list(by_rank[0])
        return [f"rank {rank}: {line}" for rank, lines in enumerate(by_rank) for line in lines]

    def checksum(self) -> dict[str, int]:
        """Digest each parameter as the engine computes with it.

        Returns:
            64-bit digests by vLLM's own parameter names (`qkv_proj` for q, k and v), of the packed
            copy where there is one; with several ranks `rank 1: ...`. Two engines with the same
            options hold the same weights if and only if all digests agree.
        """
        by_rank = self._on_ranks("evolve_checksum")
        if len(by_rank) == 1:
            return dict(by_rank[0])
        return {f"rank {rank}: {k}": v for rank, sums in enumerate(by_rank) for k, v in sums.items()}

    def memory_gb(self) -> dict[str, float]:
        """Memory of weights and KV cache over all ranks, in units of 10^9 bytes."""
        by_rank = self._on_ranks("evolve_memory_gb")
        return {key: sum(rank[key] for rank in by_rank) for key in by_rank[0]}

    def rank_cores(self) -> list[list[int]]:
        """The CPU cores that each rank may run on."""
        return self._on_ranks("evolve_cores")

    def lm(self, tokenizer: Path | None = None) -> VllmLM:
        """Return lm-eval's view of the engine, with the tokenizer of a folder."""
        folder = tokenizer or self._settings.folder
        if folder not in self._lms:
            loaded = load_tokenizer(folder, self._settings.trust_remote_code)
            self._lms[folder] = VllmLM(self._llm, loaded, self._settings.folder, lambda: self._holds)
        return self._lms[folder]

    def close(self) -> None:
        """Stop the engine, its ranks included, and give back its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._lms.clear()
        self._folder.cleanup()
        forget_ranks()
