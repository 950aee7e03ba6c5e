"""The merge itself: one stream of named tensors, whoever consumes it.

    for name, tensor in merged_tensors(Recipe.load("recipe.yml")): ...

`save_merged` writes that stream, `load_merged` and the engines load it into a live model; there is
no second way to merge. What goes into each tensor is decided before, in `plan.py`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merge_core.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    complete_folder,
    copy_tokenizer,
    write_shards,
)
from merge_core.errors import CheckpointError
from merge_core.methods import METHODS
from merge_core.methods.job import Source, TensorJob
from merge_core.parameters import look_up
from merge_core.plan import Input, Planned, Sources, donor, merged_config, plan_merge
from merge_core.randomness import MaskKey
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Finished tensors that may wait for the consumer, so that a large one does not stop the others.
_AHEAD_BYTES = 128 << 20
# Entries to be read, over all candidates, from which a compiled loop pays for its compiler.
_COMPILED_ENTRIES = 1 << 26


def merged_tensors(
    recipe: Recipe,
    sources: Sources | None = None,
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    compiles: bool | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge, one tensor at a time.

    Args:
        recipe: what to merge.
        sources: open checkpoints, to be reused between calls; opened here if absent.
        names: only these output tensors, which come out the same as in the whole merge.
        device: where the arithmetic runs and the tensors end up.
        compiles: whether to use compiled loops, which give the same bits, where there is a C
            compiler; by default where the merge is large enough to pay for it.

    Yields:
        (name, tensor) in the order of the model: embeddings, layers, head. Each tensor has the
        shape of its sources and dtype `out_dtype`, else `dtype`, else the base checkpoint's.

    Raises:
        CheckpointError: models are missing or do not fit each other (before the first tensor), or
            have entries that are not numbers.
        RecipeError: a value is missing for a tensor.
    """
    sources = sources or Sources()
    plan = plan_merge(recipe, sources)
    wanted = [planned for planned in plan if names is None or planned.name in names]
    if compiles is None:
        n_read = sum(math.prod(p.shape) * (len(p.inputs) + 1) for p in wanted)
        compiles = n_read >= _COMPILED_ENTRIES
    place = torch.device(device)
    n_threads = torch.get_num_threads() if place.type == "cpu" else 1
    merge = partial(_merge_one, recipe, sources, place, compiles)
    return _in_parallel(wanted, merge, n_threads)


def _in_parallel(
    wanted: list[Planned], merge: Callable[[Planned], Tensor], n_threads: int
) -> Iterator[tuple[str, Tensor]]:
    """Merge a few tensors ahead, each on one thread, and hand them out in order.

    One tensor a thread is twice as fast here as one operation on all threads, whose barriers cost
    more than the work on a chunk, and it does not suffer where other processes want the cores.
    """
    if n_threads == 1:
        for planned in wanted:
            yield planned.name, merge(planned)
        return
    # The number of threads belongs to the thread that sets it: the caller's stays as it is.
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[tuple[Planned, Future[Tensor]]] = deque()
        waiting = deque(wanted)
        n_bytes = 0
        try:
            while True:
                while waiting and (len(ahead) <= n_threads or n_bytes < _AHEAD_BYTES):
                    planned = waiting.popleft()
                    ahead.append((planned, pool.submit(merge, planned)))
                    n_bytes += planned.n_bytes
                if not ahead:
                    return
                planned, future = ahead.popleft()
                n_bytes -= planned.n_bytes
                yield planned.name, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _merge_one(
    recipe: Recipe, sources: Sources, device: torch.device, compiles: bool, planned: Planned
) -> Tensor:
    if not planned.is_floating:
        return _copied(planned, sources).to(device)
    method = METHODS[planned.method]

    def source(entry: Input) -> Source:
        tensor = sources.architecture(entry.model).checkpoint.read(entry.name)
        if planned.shape and tensor.shape[0] > planned.shape[0]:
            tensor = tensor[: planned.shape[0]]
        parameters = {
            name: look_up(name, parameter, (*entry.levels, *planned.levels), entry.filter_name, planned.t)
            for name, parameter in method.per_model.items()
            if entry is not planned.base
        }
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else tensor.dtype
        return Source(
            tensor.to(device=device, dtype=dtype),
            parameters,
            MaskKey(recipe.random_seed, entry.model, entry.occurrence, planned.name),
            entry.model,
            entry.name,
        )

    job = TensorJob(
        name=planned.name,
        base=source(planned.base) if planned.base else None,
        sources=[source(entry) for entry in planned.inputs],
        parameters={
            name: look_up(name, parameter, planned.levels, planned.name, planned.t)
            for name, parameter in method.shared.items()
        },
        out_dtype=getattr(torch, planned.dtype),
        statistics=sources.statistics,
        compiles=compiles,
    )
    return method.function()(job)


def _copied(planned: Planned, sources: Sources) -> Tensor:
    """Return an integer or boolean buffer, which must be the same in every model."""
    inputs = [*([planned.base] if planned.base else []), *planned.inputs]
    tensors = [sources.architecture(entry.model).checkpoint.read(entry.name) for entry in inputs]
    if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise CheckpointError(
            f"buffer {planned.name} differs between the models and is not a number to average; "
            f"merge models that share it"
        )
    return tensors[0]


def save_merged(
    recipe: Recipe,
    folder: str | Path,
    *,
    sources: Sources | None = None,
    recipe_text: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    with_tokenizer: bool = True,
    device: str | torch.device = "cpu",
) -> None:
    """Write the merged model as a folder that Transformers loads; it appears only when complete.

    Args:
        recipe: what to merge.
        folder: where to; it must not exist or be empty, unless `overwrite`.
        recipe_text: what to keep as mergekit_config.yml; default the recipe itself.
        shard_bytes: largest size of one weights file; <= 0 for a single one.
        with_tokenizer: copy the donor's tokenizer and templates.

    Raises:
        OutputError, CheckpointError, RecipeError, HubUnreachableError.
    """
    sources = sources or Sources()
    layout = [(planned.name, planned.dtype, planned.shape) for planned in plan_merge(recipe, sources)]
    stream = merged_tensors(recipe, sources, device=device)
    with complete_folder(Path(folder), overwrite) as part:
        write_shards(layout, stream, part, shard_bytes)
        config = merged_config(recipe, sources)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / "mergekit_config.yml").write_text(recipe_text or recipe.to_yaml())
        if with_tokenizer:
            copy_tokenizer(sources.architecture(donor(recipe)).checkpoint.folder, part)


def load_merged(
    recipe: Recipe, *, sources: Sources | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Merge into a Transformers model in memory; its weights are those `save_merged` writes."""
    from merge_core.resident import build_model, fill

    sources = sources or Sources()
    stream = merged_tensors(recipe, sources)
    folder = sources.architecture(donor(recipe)).checkpoint.folder
    model = build_model(merged_config(recipe, sources), folder, device)
    fill(model, stream)
    return model
