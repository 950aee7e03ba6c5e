"""What a search holds in memory: its sources, its engine, and what the machine has left.

Sources are mapped: their files fill the page cache while memory is free, and give way when it is
not. What a search must have is the engine's weights and caches, and the casts that are kept where a
source has another dtype than the merge computes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from evolve.errors import SearchFileError
from merge_core.checkpoint.adapter import Adapter
from merge_core.checkpoint.safetensors_file import ITEM_BYTES
from merge_core.machine import in_units, memory_left, private_bytes
from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

_GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Memory of one worker when its engine is up, in GB of 10^9 bytes.

    Attributes:
        mapped_gb: the sources' tensors, as files mapped.
        kept_gb: copies of source tensors that the first candidate will make and keep: casts.
        engine_gb: what the engine says it holds, by name: "weights", "kv_cache".
        private_gb: the process's own memory now, the engine on the CPU included.
        left_gb: what this machine or its control group can still give; None where nobody says.
    """

    mapped_gb: float
    kept_gb: float
    engine_gb: dict[str, float]
    private_gb: float
    left_gb: float | None

    def __str__(self) -> str:
        parts = [f"sources {_gb(self.mapped_gb)} mapped"]
        if self.kept_gb:
            parts.append(f"their casts {_gb(self.kept_gb)}")
        parts += [f"engine {name.replace('_', ' ')} {_gb(gb)}" for name, gb in self.engine_gb.items()]
        parts.append(f"this process {_gb(self.private_gb)} of its own")
        if self.left_gb is not None:
            parts.append(f"{_gb(self.left_gb)} left on this machine")
        return "memory: " + ", ".join(parts)


def _gb(gb: float) -> str:
    return in_units(gb * _GB)


class _Holds(Protocol):
    def memory_gb(self) -> dict[str, float]: ...


def measure(
    engine: _Holds,
    sources: Sources,
    references: Iterable[str],
    dtype: str | None,
    adapters: Iterable[str] = (),
) -> Memory:
    """Measure a worker that is ready for its first candidate.

    Args:
        engine: the worker's engine, started.
        sources: gives the checkpoints.
        references: the models that candidates may use.
        dtype: the recipe's, which sources are cast to; None = as they are.
        adapters: what candidates may put on intermediate results.
    """
    mapped = kept = 0
    # Models with adapters share their base; factors are small and not kept.
    opened = [sources.architecture(reference).checkpoint for reference in dict.fromkeys(references)]
    opened += [sources.adapter(reference) for reference in adapters]
    stores = {store.reference: store for checkpoint in opened for store in checkpoint.stores()}
    for store in stores.values():
        for info in store.tensors.values():
            entries = math.prod(info.shape)
            mapped += entries * ITEM_BYTES[info.dtype]
            if isinstance(store, Adapter):
                continue
            if dtype and info.dtype != dtype and info.dtype in ("float16", "bfloat16", "float32"):
                kept += entries * ITEM_BYTES[dtype]
    left = memory_left()
    return Memory(
        mapped / _GB,
        kept / _GB,
        engine.memory_gb(),
        private_bytes() / _GB,
        None if left is None else left / _GB,
    )


def merged_bytes(recipe: Recipe, sources: Sources) -> int:
    """Return the size of a recipe's merged weights."""
    return sum(planned.n_bytes for planned in plan_merge(recipe, sources))


def refuse_too_large(recipe: Recipe, sources: Sources, device: str, n_workers: int) -> None:
    """Refuse an engine whose weights alone are more than the device can give.

    Raises:
        SearchFileError: with what is needed, what there is, and what to change.
    """
    plan = plan_merge(recipe, sources)
    wanted = sum(planned.n_bytes for planned in plan)
    if device == "cpu":
        left, where = memory_left(), "this machine"
    elif device.startswith("cuda"):
        import torch

        left, where, n_workers = torch.cuda.mem_get_info(device)[0], device, 1
    else:
        return
    fault = _too_large(wanted, left, where, n_workers, {planned.dtype for planned in plan})
    if fault:
        raise SearchFileError(fault)


def _too_large(wanted: int, left: int | None, where: str, n_workers: int, dtypes: set[str]) -> str | None:
    """Say what does not fit, and what would help; None where it fits."""
    if left is None or wanted * n_workers <= left:
        return None
    repairs = ["use a machine or device with more memory"]
    if n_workers > 1:
        repairs.insert(0, "use fewer --workers")
    if "float32" in dtypes:
        repairs.insert(0, "set dtype: bfloat16")
    each = f" in each of {n_workers} workers" if n_workers > 1 else ""
    return (
        f"scoring: the engine holds the merged model's weights, {in_units(wanted)}{each}, and {where} "
        f"has {in_units(left)} left; {' or '.join(repairs)}"
    )
