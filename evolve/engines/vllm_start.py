"""What an engine may be started with, and what is said where it does not start."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs

from evolve.errors import SearchFileError, TrialEngineError, TrialError
from merge_core.errors import nearest

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


def check_options(options: dict[str, Any]) -> None:
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


def cpu_defaults() -> dict[str, Any]:
    """Options that suit a CPU better than vLLM's own defaults."""
    defaults: dict[str, Any] = {"block_size": _CPU_BLOCK_TOKENS}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = DEFAULT_KV_CACHE_BYTES
    return defaults


def give_each_rank_its_cores(n_ranks: int) -> None:
    """Split this process's cores evenly, unless the user has done it; two ranks on a core crawl."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // n_ranks, 1)
    parts = [cores[i * share : (i + 1) * share] or cores[-1:] for i in range(n_ranks)]
    text = "|".join(",".join(str(core) for core in part) for part in parts)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", text)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what vLLM and Transformers warn of while an engine starts out of the progress lines."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def reported(options: dict[str, Any]) -> Iterator[None]:
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
        forget_ranks()
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


def forget_ranks() -> None:
    """Take down what vLLM keeps of an engine in this process, so that another one can start."""
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    destroy_model_parallel()
    destroy_distributed_environment()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
