"""What a merge will need, before it begins: bytes read and written, private memory, seconds.

Disk is counted from the plan. Memory is what this process holds now plus the tensors that the merge
keeps at once. Time is measured: a few rows of representative tensors go through the merge itself and
into a nameless file beside OUT, so that processor, page cache and disk all speak for themselves.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from merge_core.architecture import Architecture
from merge_core.checkpoint.read import Checkpoint, TensorInfo, split_layer
from merge_core.checkpoint.write import DEFAULT_SHARD_BYTES, TEMPLATE_FILES, TOKENIZER_FILES
from merge_core.errors import ResourceError
from merge_core.experts import Spelling
from merge_core.machine import (
    disk_seconds,
    in_units,
    memory_left,
    nameless_file,
    nearest_folder,
    private_bytes,
)
from merge_core.merge import AHEAD_BYTES, merged_tensors, pays_to_compile
from merge_core.moe.recipe import MoeRecipe
from merge_core.plan import MergePlan, Planned, Sources, files_folder, merged_config, plan_merge
from merge_core.recipe import Recipe

# The last, longest pass over the sample takes about this long.
SAMPLE_S = 1.0


@dataclass(frozen=True)
class Estimate:
    """What a merge needs and what there is; bytes, and seconds of wall clock.

    Attributes:
        architecture: class name of config.json, or "unknown".
        n_layers, n_tensors: of the merged model.
        models: references as written, base first, then adapters that are put on results.
        read_bytes: of all tensors that go into it, each counted once.
        write_bytes: of the whole folder, but for a few kB of card and recipe.
        free_bytes: on the disk of OUT.
        memory_bytes: private memory of this process at its peak; mapped files are not private.
        available_bytes: memory that this process may have; None where the system does not say.
        seconds: from the start of the command; None where nothing was timed.
    """

    architecture: str
    n_layers: int
    n_tensors: int
    models: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    available_bytes: int | None
    seconds: float | None = None

    def check(self, folder: Path) -> None:
        """Refuse a merge that cannot end well.

        Raises:
            ResourceError: not enough disk, not enough memory, or both.
        """
        faults = []
        if self.write_bytes > self.free_bytes:
            faults.append(
                f"OUT is {folder}, whose disk has {in_units(self.free_bytes)} free; the merge writes "
                f"{in_units(self.write_bytes)}, free {in_units(self.write_bytes - self.free_bytes)} or "
                f"name a folder on another disk"
            )
        if self.available_bytes is not None and self.memory_bytes > self.available_bytes:
            faults.append(
                f"memory: {in_units(self.available_bytes)} are available; the merge needs "
                f"{in_units(self.memory_bytes)}, end other programs or use fewer threads (-j)"
            )
        if faults:
            raise ResourceError(faults)


def estimate(
    recipe: Recipe,
    sources: Sources,
    folder: str | Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    with_tokenizer: bool = True,
    device: str | torch.device = "cpu",
    timed: bool = True,
    start_up_s: float = 0.0,
    **plan_options: Any,
) -> Estimate:
    """Foretell a merge; arguments as of `save_merged`.

    Args:
        timed: merge a sample, about a second, to foretell the seconds.
        start_up_s: seconds that the command takes before it merges.

    Raises:
        CheckpointError, RecipeError: as the merge itself would.
        OutputError: nothing can be written beside `folder`.
    """
    began = time.perf_counter()
    sources = sources.within(recipe, **plan_options)
    plan = plan_merge(recipe, sources, **plan_options)
    plan_s = time.perf_counter() - began
    place = nearest_folder(Path(folder))
    device = torch.device(device)
    n_threads = torch.get_num_threads() if device.type == "cpu" else 1
    sizes = [planned.n_bytes for planned in plan]
    write_bytes = sum(sizes) + _other_bytes(recipe, sources, plan, sizes, shard_bytes, with_tokenizer)
    free_bytes = shutil.disk_usage(place).free
    own_bytes = private_bytes()
    seconds = None
    if timed and write_bytes < free_bytes:
        merging = _merge_seconds(recipe, sources, plan, place, n_threads, device, plan_options)
        # The command plans once, the merge and the card once more each.
        seconds = start_up_s + 2 * plan_s + max(merging, disk_seconds(place, write_bytes))
        own_bytes = max(own_bytes, private_bytes())
    layers = {split[:2] for planned in plan if (split := split_layer(planned.name))}
    held = [size + _rebuilt(planned) for size, planned in zip(sizes, plan, strict=True)]
    left = memory_left()
    return Estimate(
        architecture=str((merged_config(recipe, sources).get("architectures") or ["unknown"])[0]),
        n_layers=max((number for _, number in layers), default=-1) + 1,
        n_tensors=len(plan),
        models=(*recipe.references(), *recipe.adapters()),
        read_bytes=_read_bytes(plan, sources),
        write_bytes=write_bytes,
        free_bytes=free_bytes,
        memory_bytes=own_bytes + _in_flight(held, n_threads) + n_threads * _intermediate(plan),
        available_bytes=None if left is None else left + private_bytes(),
        seconds=seconds,
    )


def _read_bytes(plan: MergePlan, sources: Sources) -> int:
    infos = (sources.architecture(model).info(name) for model, name in plan.read())
    return sum(info.n_bytes for info in infos if info is not None)


def _intermediate(plan: MergePlan) -> int:
    """Most bytes of intermediate tensors that one thread holds for an output tensor."""
    return sum(
        max(planned.n_bytes for planned in inner) + _intermediate(inner)
        for inner in plan.results.values()
    )


def _other_bytes(
    recipe: Recipe,
    sources: Sources,
    plan: Sequence[Planned],
    sizes: Sequence[int],
    shard_bytes: int,
    with_tokenizer: bool,
) -> int:
    """Count what is written besides the numbers: headers, index, config and tokenizer."""
    header: dict[str, Any] = {}
    end = n_shards = 0
    for planned, size in zip(plan, sizes, strict=True):
        if n_shards == 0 or (end and 0 < shard_bytes < end + size):
            end, n_shards = 0, n_shards + 1
        header[planned.name] = {
            "dtype": "BF16",
            "shape": planned.shape,
            "data_offsets": [end, end + size],
        }
        end += size
    total = len(json.dumps(header, separators=(",", ":"))) + 48 * n_shards
    if n_shards > 1:
        total += len(json.dumps(dict.fromkeys(header, "model-00001-of-00001.safetensors"), indent=2))
    total += len(json.dumps(merged_config(recipe, sources), indent=2))
    if with_tokenizer:
        folder = files_folder(recipe, sources)
        files = [folder / file for file in (*TOKENIZER_FILES, *TEMPLATE_FILES)]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def _rebuilt(planned: Planned) -> int:
    """Bytes of the inputs that are brought into the order of another vocabulary, in memory."""
    if planned.vocabulary is None:
        return 0
    n_copied = sum(not planned.vocabulary.keeps_rows(entry.model) for entry in planned.all_inputs)
    return n_copied * planned.n_bytes


def _in_flight(sizes: Sequence[int], n_threads: int) -> int:
    """Most bytes of output tensors alive at once: those merged ahead, and the one being written."""
    peak = 0
    for first in range(len(sizes)):
        ahead = n = 0
        while first + n < len(sizes) and (n <= n_threads or ahead < AHEAD_BYTES):
            ahead += sizes[first + n]
            n += 1
        peak = max(peak, ahead + (sizes[first - 1] if first else 0))
    return peak


class _Rows(Checkpoint):
    """A checkpoint whose layers' tensors are cut to some rows from their middle."""

    def __init__(self, whole: Checkpoint, n_entries: int) -> None:
        self.__dict__.update(whole.__dict__)
        self._whole = whole
        self._n_entries = n_entries
        self.tensors = {name: self._cut(name, info) for name, info in whole.tensors.items()}

    def _cut(self, name: str, info: TensorInfo) -> TensorInfo:
        if not info.shape or split_layer(name) is None:
            return info
        rows = math.ceil(self._n_entries / max(1, math.prod(info.shape[1:])))
        return replace(info, shape=(min(info.shape[0], rows), *info.shape[1:]))

    @property
    def tokenizer_folder(self) -> Path:
        return self._whole.tokenizer_folder

    def read(self, name: str) -> torch.Tensor:
        tensor = self._whole.read(name)
        n = self.tensors[name].shape[0] if tensor.dim() else 0
        return tensor.narrow(0, (tensor.shape[0] - n) // 2, n) if tensor.dim() else tensor

    def prefetch(self, name: str) -> None:
        self._whole.prefetch(name)


class _SampleSources(Sources):
    """The same models, small."""

    def __init__(self, whole: Sources, n_entries: int) -> None:
        super().__init__()
        self.tokenizers, self.prompted = whole.tokenizers, whole.prompted
        self._whole = whole
        self._n_entries = n_entries
        self._cut: dict[str, Architecture] = {}

    def within(self, recipe: Recipe, **plan_options: Any) -> Self:
        view = super().within(recipe, **plan_options)
        view._whole, view._cut = self._whole.within(recipe, **plan_options), {}
        return view

    def _to_be_taken_apart(self, recipe: Recipe) -> dict[str, Spelling]:
        return self._whole.within(recipe)._apart

    def architecture(self, reference: str) -> Architecture:
        result = self.results.get(reference)
        # Of a mixture, routers would come out whole beside experts that are cut.
        if result is not None and reference not in self._apart and not isinstance(result, MoeRecipe):
            return super().architecture(reference)
        if reference not in self._cut:
            part = self._cut[reference] = copy.copy(self._whole.architecture(reference))
            part.checkpoint = _Rows(part.checkpoint, self._n_entries)
        return self._cut[reference]


def _sample_names(plan: Sequence[Planned], n: int) -> list[str]:
    """Choose tensors of the layers, spread evenly over the entries: large ones more often."""
    layered = [p for p in plan if p.is_floating and split_layer(p.name) and p.all_inputs] or list(plan)
    total = sum(math.prod(p.shape) for p in layered)
    names: list[str] = []
    passed = 0
    for planned in layered:
        passed += math.prod(planned.shape)
        if passed * n >= total * (len(names) + 0.5) and len(names) < n:
            names.append(planned.name)
    return names


def _merge_seconds(
    recipe: Recipe,
    sources: Sources,
    plan: Sequence[Planned],
    place: Path,
    n_threads: int,
    device: torch.device,
    plan_options: dict[str, Any],
) -> float:
    """Merge growing samples and foretell the seconds of merging and writing all tensors."""
    # Enough of them that filling and draining the threads does not count.
    names = _sample_names(plan, max(16, 8 * n_threads))
    compiles = pays_to_compile(plan, sources)

    def run(n_entries: int) -> tuple[float, int]:
        part = _SampleSources(sources, n_entries)
        stream = merged_tensors(recipe, part, names, device, compiles, **plan_options)
        began, merged = time.perf_counter(), 0
        for _, tensor in stream:
            flat = tensor.cpu().contiguous().view(-1)
            merged += flat.numel()
            file.write(flat.view(torch.uint8).numpy().data)
        return time.perf_counter() - began, merged

    with nameless_file(place) as file:
        once_s, _ = run(1)  # also loads and compiles what the merge does once
        few_s, few = run(1)
        n_entries, seconds, merged = 1 << 17, 0.0, 0
        while seconds < SAMPLE_S / 2:
            before = merged
            seconds, merged = run(n_entries)
            if merged == before:  # the sample is all of its tensors
                break
            n_entries = int(n_entries * min(8.0, max(2.0, SAMPLE_S / seconds)))
    per_tensor = few_s / len(names)
    per_entry = max(0.0, seconds - few_s) / max(1, merged - few)
    entries = sum(math.prod(p.shape) for p in plan)
    return max(0.0, once_s - few_s) + len(plan) * per_tensor + entries * per_entry
