"""The merge itself: one stream of named tensors, whoever consumes it.

    for name, tensor in merged_tensors(Recipe.load("recipe.yml")): ...

`save_merged` writes that stream, `load_merged` and the engines load it into a live model; there is
no second way to merge. What goes into each tensor is decided before, in `plan.py`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.card import model_card
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


def merged_tensors(
    recipe: Recipe,
    sources: Sources | None = None,
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    **plan_options: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Merge, one tensor at a time.

    Args:
        recipe: what to merge.
        sources: open checkpoints, to be reused between calls; opened here if absent.
        names: only these output tensors, which come out the same as in the whole merge.
        device: where the arithmetic runs and the tensors end up.
        plan_options: of `plan_merge`.

    Yields:
        (name, tensor) in the order of the model: embeddings, layers, head. Each tensor has the
        shape of its sources and dtype `out_dtype`, else `dtype`, else the base checkpoint's.

    Raises:
        CheckpointError: models are missing or do not fit each other (before the first tensor).
        RecipeError: a value is missing for a tensor.
    """
    sources = sources or Sources()
    plan = plan_merge(recipe, sources, **plan_options)
    wanted = [planned for planned in plan if names is None or planned.name in names]
    place = torch.device(device)
    n_threads = torch.get_num_threads() if place.type == "cpu" else 1
    return _in_parallel(recipe, wanted, sources, place, n_threads)


def _in_parallel(
    recipe: Recipe, wanted: list[Planned], sources: Sources, device: torch.device, n_threads: int
) -> Iterator[tuple[str, Tensor]]:
    """Merge a few tensors ahead, each on one thread, and hand them out in order.

    One tensor a thread is twice as fast here as one operation on all threads, whose barriers cost
    more than the work on a chunk, and it does not suffer where other processes want the cores.
    """
    if n_threads == 1:
        for planned in wanted:
            yield planned.name, _merge_one(recipe, planned, sources, device)
        return
    # The number of threads belongs to the thread that sets it: the caller's stays as it is.
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[tuple[str, Future[Tensor]]] = deque()
        try:
            for planned in wanted:
                ahead.append((planned.name, pool.submit(_merge_one, recipe, planned, sources, device)))
                if len(ahead) > n_threads:
                    name, future = ahead.popleft()
                    yield name, future.result()
            while ahead:
                name, future = ahead.popleft()
                yield name, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _merge_one(recipe: Recipe, planned: Planned, sources: Sources, device: torch.device) -> Tensor:
    if not planned.is_floating:
        return _copied(planned, sources).to(device)
    method = METHODS[planned.method]

    def source(entry: Input) -> Source:
        tensor = sources.architecture(entry.model).checkpoint.read(entry.name)
        if planned.shape and tensor.shape[0] > planned.shape[0]:
            tensor = tensor[: planned.shape[0]]
        parameters = {
            name: look_up(name, parameter, (*entry.levels, *planned.levels), entry.name, planned.t)
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
    with_card: bool = True,
    device: str | torch.device = "cpu",
    on_tensor: Callable[[str, int], None] | None = None,
    **plan_options: Any,
) -> None:
    """Write the merged model as a folder that Transformers loads; it appears only when complete.

    Args:
        recipe: what to merge.
        folder: where to; it must not exist or be empty, unless `overwrite`.
        recipe_text: what to keep as mergekit_config.yml; default the recipe itself.
        shard_bytes: largest size of one weights file; <= 0 for a single one.
        with_tokenizer: copy the donor's tokenizer and templates.
        with_card: write README.md.
        on_tensor: called with name and bytes of each tensor as it goes to the writer.
        plan_options: of `plan_merge`.

    Raises:
        OutputError, CheckpointError, RecipeError, HubUnreachableError.
    """
    sources = sources or Sources()
    text = recipe_text or recipe.to_yaml()
    stream = merged_tensors(recipe, sources, device=device, **plan_options)
    with complete_folder(Path(folder), overwrite) as part:
        write_shards(_told(stream, on_tensor), part, shard_bytes)
        config = merged_config(recipe, sources)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / "mergekit_config.yml").write_text(text, encoding="utf-8")
        if with_card:
            plan = plan_merge(recipe, sources, **plan_options)
            card = model_card(recipe, sources, plan, Path(folder).resolve().name, text)
            (part / "README.md").write_text(card, encoding="utf-8")
        if with_tokenizer:
            copy_tokenizer(sources.architecture(donor(recipe)).checkpoint.folder, part)


def _told(
    stream: Iterator[tuple[str, Tensor]], on_tensor: Callable[[str, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor.cpu()
        if on_tensor:
            on_tensor(name, tensor.numel() * tensor.element_size())


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
