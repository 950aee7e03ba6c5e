"""What happens beside the weights: loading, merging, checking and measuring, in each rank's process.

vLLM adds `MergeWorker` to its own worker class (`worker_extension_cls`), so its methods run where
the weights are: in this process, or with tensor parallelism in a process for each rank. A rank
merges for itself and keeps its own shard, so that no weight crosses a pipe.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import merge_core.moe.router  # noqa: F401  (it keeps torch's function that vLLM replaces, see below)
from merge_core.experts import MIXTRAL, respelled
from merge_core.merge import merged_tensors
from merge_core.recipe import Recipe
from merge_core.sources import Sources

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# vLLM replaces this function by one that does nothing when it starts on a CPU.
_set_num_threads = torch.set_num_threads

GB = 1e9


@dataclass
class RankReport:
    """What a rank has to say after it merged and loaded; plain data, it crosses a pipe.

    Attributes:
        merge_s: seconds that loading waited for merged tensors.
        load_s: the other seconds.
        failure: "merge" or "engine", and what went wrong; None where all went well.
    """

    merge_s: float = 0.0
    load_s: float = 0.0
    failure: tuple[str, str] | None = None


class _Broken:
    """A stream that ends where it fails, and remembers why.

    vLLM then ends its reload as always, and no layer is left half taken apart.
    """

    def __init__(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self._stream = iter(stream)
        self.error: BaseException | None = None
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            began = time.perf_counter()
            try:
                item = next(self._stream, None)
            except BaseException as error:
                self.error = error
                return
            finally:
                self.waited_s += time.perf_counter() - began
            if item is None:
                return
            yield item


class MergeWorker:
    """Methods that vLLM's worker gets; each is called by name through `collective_rpc`."""

    model_runner: Any
    vllm_config: Any
    device: torch.device

    def evolve_call(self, method: str, *arguments: Any) -> tuple[Any, str]:
        """Call a method here; returns its answer, and what went wrong or nothing.

        With several ranks nothing may be raised: vLLM would leave the other ranks' answers in their
        queues, and take them for those to the next call.
        """
        try:
            return getattr(self, method)(*arguments), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def evolve_load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights by a stream of checkpoint tensors, in place.

        Raises:
            ValueError: a parameter of the model got no tensor, or a tensor has no place.
            Exception: whatever the stream raises.
        """
        self._reload(_Broken(stream))

    def evolve_merge(self, config: dict[str, Any]) -> RankReport:
        """Merge a recipe, given as its config, and load this rank's share of it; reports failures."""
        report = RankReport()
        began = time.perf_counter()
        stream = None
        try:
            recipe = Recipe.parse(config)
            if not hasattr(self, "_evolve_sources"):
                self._evolve_sources = Sources(keep=True)
            stream = _Broken(merged_tensors(recipe, self._evolve_sources, device=self.device))
            self._reload(stream)
        except Exception as error:
            is_merged = stream is not None and stream.error is None
            kind, doing = ("engine", "loading the merged weights") if is_merged else ("merge", "merging")
            report.failure = (kind, f"{doing}: {type(error).__name__}: {error}")
        report.merge_s = stream.waited_s if stream else 0.0
        report.load_s = time.perf_counter() - began - report.merge_s
        return report

    def evolve_differences(self, source: Iterable[tuple[str, Tensor]] | dict[str, Any]) -> list[str]:
        """Compare what this rank computes with to checkpoint tensors (or to those of a recipe)."""
        from evolve.engines.vllm_check import differences

        with self._configured():
            if isinstance(source, dict):
                source = merged_tensors(Recipe.parse(source), device=self.device)
            model = self.model_runner.get_model()
            return differences(model, self.vllm_config.model_config, as_spelled(model, source))

    def evolve_unplaced(self, number: int) -> list[str]:
        """Name the modules of an adapter that vLLM has loaded and does not apply to any layer."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(number).loras) - set(manager.modules))

    def evolve_checksum(self) -> dict[str, int]:
        """Digest of every parameter as this rank computes with it, by vLLM's own names."""
        from evolve.engines.vllm_check import live_values

        digests = {}
        for name, values in live_values(self.model_runner.get_model()):
            content = values.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            digests[name] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        return digests

    def evolve_memory_gb(self) -> dict[str, float]:
        """Bytes held by this rank, in GB: the weights, packed copies included, and the KV cache."""
        from evolve.engines.vllm_check import weight_bytes

        return {
            "weights": weight_bytes(self.model_runner.get_model()) / GB,
            "kv_cache": sum(_storages(self.model_runner.kv_caches).values()) / GB,
        }

    def evolve_cores(self) -> list[int]:
        """The cores that this process may run on."""
        return sorted(os.sched_getaffinity(0))

    def _reload(self, stream: _Broken) -> None:
        """Do what vLLM's own `reload_weights` does, strictly.

        That one only logs parameters which got no tensor, and leaves layers half taken apart where
        the stream fails; the next reload would then mix two candidates.
        """
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model = self.model_runner.get_model()
        # A layer with room for adapters holds the one that it was as `base_layer`.
        names = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
        with self._configured(), one_thread():
            _pack_experts_again(model)
            initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights(as_spelled(model, stream))
            finally:
                finalize_layerwise_reload(model, self.vllm_config.model_config)
            _share_packed_heads(model)
        if stream.error is not None:
            raise stream.error
        missing = sorted(names - loaded) if loaded is not None else []
        if missing and self.vllm_config.model_config.quantization is None:
            raise ValueError(
                f"{len(missing)} of the model's {len(names)} parameters are in no tensor of the merge: "
                f"{', '.join(missing[:3])}"
            )

    def _configured(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.vllm_config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread here: the others are merging the next tensors meanwhile.

    Two pools of threads on the same cores wait for each other; loading then takes ten times as
    long. The merge, too, sets the number of its threads, so torch's own function must be back.
    """
    replaced, n_threads = torch.set_num_threads, torch.get_num_threads()
    torch.set_num_threads = _set_num_threads
    _set_num_threads(1)
    try:
        yield
    finally:
        _set_num_threads(n_threads)
        torch.set_num_threads = replaced


def as_spelled(model: Module, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass checkpoint tensors on under names that the model's loader knows.

    vLLM's Mixtral knows its experts one by one and its own name of the block, where Transformers 5
    may have saved all in one tensor under another.
    """
    is_mixtral = any(name.endswith(f".{MIXTRAL.block}") for name, _ in model.named_modules())
    return respelled(stream, MIXTRAL) if is_mixtral else iter(stream)


def _pack_experts_again(model: Module) -> None:
    """Have the experts of the next reload packed for the CPU's kernel, as those of a first load are.

    vLLM packs them where it makes the kernel, and where there is one already it would copy plain
    weights into the packed ones' place.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        weight = getattr(module, "w13_weight", None)
        is_packed = weight is not None and weight.device.type == "cpu"
        if is_packed and method is not None and hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def _share_packed_heads(model: Module) -> None:
    """Let a tied output head multiply with the embedding's new weights.

    On CPU vLLM multiplies with a packed copy of a weight. A reload packs a module that gets tensors
    of its own; a tied head gets none, and would go on with the weights it started with.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    owners: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and getattr(module, "weight", None) is not None:
            owner = owners.setdefault(id(module.weight), module)
            if owner is not module and hasattr(owner, "cpu_linear"):
                module.cpu_linear = owner.cpu_linear


def _storages(caches: Iterable[Any]) -> dict[int, int]:
    """Bytes of the storages under vLLM's KV caches, which are nested lists of views."""
    found: dict[int, int] = {}
    pending = list(caches)
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return found
