"""The `vllm` engine: one resident vLLM engine, its weights reloaded in place.

With one rank everything runs in this process and the merged tensors go straight from the merge into
the model. With tensor parallelism each rank is a process that merges for itself and keeps its own
shard (vllm_worker.py). lm-eval's requests are answered by vllm_lm.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The engine core in this process: weights reach it without being pickled.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs

from evolve.engines import EngineSettings
from evolve.engines.hf import load_tokenizer
from evolve.engines.loading import merge_and_load
from evolve.engines.vllm_lm import VllmLM
from evolve.engines.vllm_worker import MergeWorker, RankReport
from evolve.errors import SearchFileError, TrialEngineError, TrialError, TrialMergeError
from merge_core.checkpoint.write import copy_tokenizer
from merge_core.errors import nearest
from merge_core.recipe import Recipe
from merge_core.sources import Sources

# Options that would make the engine another one than the search needs, and why.
_OURS = {
    "model": "the engine holds the recipe's merge",
    "tokenizer": "the engine takes the merge's tokenizer",
    "skip_tokenizer_init": "stop sequences need the tokenizer",
    "load_format": "the weights come from the merge",
    "hf_overrides": "the configuration is that of the merge",
    "quantization": "the weights that are scored are those that are shipped",
    "worker_extension_cls": "the engine's own takes its place",
    "data_parallel_size": "use --workers for more engines",
    "logprobs_mode": "scores are log-probabilities of the model itself",
    "runner": "the engine has to generate",
    "trust_remote_code": "use --trust-remote-code",
    "dtype": "the engine runs in the recipe's dtype; change dtype there",
}
DEFAULT_KV_CACHE_BYTES = 1 << 30
# On CPU vLLM takes 128; prompts share whole blocks only, and most are shorter.
_CPU_BLOCK_TOKENS = 32


class VllmEngine:
    """A vLLM engine that stays up while its weights change.

    `options` go to `vllm.LLM` as they are.

    Attributes:
        merges_itself: whether the ranks merge on their own; `load` is then refused.

    Raises:
        SearchFileError: an option is unknown or contradicts what the search needs.
        SearchFileError, TrialEngineError: vLLM cannot start with this model and these options.
    """

    def __init__(self, settings: EngineSettings) -> None:
        _check_options(settings.options)
        self._settings = settings
        on_cpu = settings.device == "cpu"
        # Left to itself vLLM runs float32 models in 16 bits.
        dtype = settings.config.get("dtype") or settings.config.get("torch_dtype") or "float32"
        options = {
            "enforce_eager": on_cpu,
            "dtype": dtype,
            "max_logprobs": -1,
            **(_cpu_defaults() if on_cpu else {}),
            **settings.options,
        }
        n_ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        self.merges_itself = n_ranks > 1
        if self.merges_itself and on_cpu:
            _give_each_rank_its_cores(n_ranks)
        # vLLM reads configuration and tokenizer from a folder; the weights come with each candidate.
        self._folder = tempfile.TemporaryDirectory(prefix="evolve-vllm-")
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(settings.config))
        copy_tokenizer(settings.folder, folder)
        if (settings.folder / "generation_config.json").is_file():
            shutil.copy(settings.folder / "generation_config.json", folder)
        self._holds = "nothing"
        self._lms: dict[Path, VllmLM] = {}
        with _quiet(), _reported(settings.options):
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
            raise TrialEngineError(
                f"a rank of the vLLM engine has died ({type(error).__name__}: {error!s:.200}); what "
                f"it said is above; run the same command again, it resumes"
            ) from error
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
        _forget_ranks()


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that vLLM does not have, and those that the search decides.

    Raises:
        SearchFileError: with every fault.
    """
    known = {field.name for field in fields(EngineArgs)}
    faults = [
        f"scoring.engine.{key} is {value!r}; {_OURS[key]}, so it cannot be set; remove it"
        for key, value in options.items()
        if key in _OURS
    ]
    faults += [
        f"scoring.engine.{key} is no option of vLLM; {_near_option(key, known)}"
        for key in options
        if key not in known | set(_OURS)
    ]
    if faults:
        raise SearchFileError(faults)


def _near_option(key: str, known: Iterable[str]) -> str:
    close = nearest(key, known)
    return close if close.startswith("did you mean") else "see vLLM's engine arguments, or remove it"


def _cpu_defaults() -> dict[str, Any]:
    defaults: dict[str, Any] = {"block_size": _CPU_BLOCK_TOKENS}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = DEFAULT_KV_CACHE_BYTES
    return defaults


def _give_each_rank_its_cores(n_ranks: int) -> None:
    """Split this process's cores evenly, unless the user has done it; two ranks on a core crawl."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // n_ranks, 1)
    parts = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(n_ranks)]
    text = "|".join(",".join(str(core) for core in part) for part in parts)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", text)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what vLLM and Transformers warn of while an engine starts out of the progress lines."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _reported(options: dict[str, Any]) -> Iterator[None]:
    """Turn whatever keeps vLLM from starting into one line that names the setting to change.

    Raises:
        SearchFileError: options are given, which are the likelier cause.
        TrialEngineError: none are.
    """
    try:
        yield
    except TrialError:
        raise
    except Exception as error:
        _forget_ranks()
        reason = _reason(error)
        kind = SearchFileError if options else TrialEngineError
        raise kind(
            f"scoring.engine: vLLM cannot start with this model ({reason:.300}); {_repair(reason)}"
        ) from error


def _reason(error: BaseException) -> str:
    """Find the line that says most: pydantic names the field, other errors begin or end with it."""
    if callable(found := getattr(error, "errors", None)) and (details := found()):
        where = ".".join(str(part) for part in details[0]["loc"])
        text = str(details[0]["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return f"{where}: {text}" if where else text.splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return lines[-1] if lines[0].endswith(":") else lines[0]


def _repair(reason: str) -> str:
    """Name the setting that cures a failed start."""
    told = reason.lower()
    if "kv cache" in told and ("max seq len" in told or "max_model_len" in told):
        return "lower scoring.engine.max_model_len, or give kv_cache_memory_bytes there more"
    if "max_model_len" in told or "max_position_embeddings" in told:
        return "lower scoring.engine.max_model_len"
    if "kv cache" in told or "cache blocks" in told:
        return "set scoring.engine.kv_cache_memory_bytes to what is free, or lower max_model_len"
    if "memory" in told:
        return "lower scoring.engine.gpu_memory_utilization or max_model_len"
    if "this architecture" in told or "architectures" in told or "unsupported" in told:
        return "vLLM cannot run such a model here; use --backend hf"
    if "tensor parallel" in told or "divisible" in told or "world size" in told:
        return "change scoring.engine.tensor_parallel_size"
    if "background process" in told or "core initialization" in told:
        return "what the rank said is above; change the setting it names, or use --backend hf"
    return "change the setting it names, or use --backend hf"


def _forget_ranks() -> None:
    """Take down what vLLM keeps of an engine in this process, so that another one can start."""
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
