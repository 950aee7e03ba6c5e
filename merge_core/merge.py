"""The merge itself: one stream of named tensors, whoever consumes it.

    for name, tensor in merged_tensors(Recipe.load("recipe.yml")): ...

`save_merged` writes that stream, `load_merged` and the engines load it into a live model; there is
no second way to merge. What goes into each tensor is decided before, in `plan.py`.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.card import Evaluation, model_card
from merge_core.checkpoint.read import Checkpoint
from merge_core.checkpoint.write import (
    DEFAULT_SHARD_BYTES,
    complete_folder,
    copy_tokenizer,
    write_shards,
)
from merge_core.errors import CheckpointError
from merge_core.machine import give_back_gaps
from merge_core.methods import METHODS, Parameter
from merge_core.methods.job import Source, TensorJob
from merge_core.parameters import look_up
from merge_core.plan import Input, Planned, Sources, files_folder, merged_config, origin, plan_merge
from merge_core.randomness import MaskKey
from merge_core.recipe import Recipe
from merge_core.tokenizer.tables import Table, rebuilt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Finished tensors that may wait for the consumer, so that a large one does not stop the others.
AHEAD_BYTES = 128 << 20
# Entries to be read, over all candidates, from which a compiled loop pays for its compiler.
_COMPILED_ENTRIES = 1 << 26
# How many candidates a search has at least.
_CANDIDATES = 16


def merged_tensors(
    recipe: Recipe,
    sources: Sources | None = None,
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    compiles: bool | None = None,
    into: Mapping[str, Tensor] | None = None,
    **plan_options: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Merge, one tensor at a time.

    Args:
        recipe: what to merge.
        sources: open checkpoints, to be reused between calls; opened here if absent.
        names: only these output tensors, which come out the same as in the whole merge.
        device: where the arithmetic runs and the tensors end up.
        compiles: whether to use compiled loops, which give the same bits, where there is a C
            compiler; by default where the merge is large enough to pay for it.
        into: by name, where results are to be written that are computed entry by entry, such as a
            live model's parameters; those of another shape or dtype are left alone.
        plan_options: of `plan_merge`.

    Yields:
        (name, tensor) in the order of the model: embeddings, layers, head. Each tensor has the
        shape of its sources and dtype `out_dtype`, else `dtype`, else the base checkpoint's.

    Raises:
        CheckpointError: models are missing or do not fit each other (before the first tensor), or
            have entries that are not numbers.
        RecipeError: a value is missing for a tensor.
    """
    sources = sources or Sources()
    plan = plan_merge(recipe, sources, **plan_options)
    sources = sources.within(recipe, **plan_options)
    wanted = [planned for planned in plan if names is None or planned.name in names]
    return _stream(recipe, sources, wanted, torch.device(device), compiles, into)


def pays_to_compile(wanted: Iterable[Planned], sources: Sources) -> bool:
    """Tell whether a merge is large enough for compiled loops to make up for the compiler's time."""
    n_read = sum(math.prod(planned.shape) * len(planned.all_inputs) for planned in wanted)
    return n_read * (_CANDIDATES if sources.keeps else 1) >= _COMPILED_ENTRIES


def _stream(
    recipe: Recipe,
    sources: Sources,
    wanted: list[Planned],
    device: torch.device,
    compiles: bool | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    if compiles is None:
        compiles = pays_to_compile(wanted, sources)
    merger = Merger(recipe, sources, device, compiles, into or {})
    merger.announce(wanted)
    n_threads = torch.get_num_threads() if device.type == "cpu" else 1
    stream = _in_parallel(wanted, merger, n_threads)
    return _giving_back(stream) if sources.keeps else stream


def _giving_back(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass the tensors on, and leave a search's next candidate no memory that this one freed."""
    try:
        yield from stream
    finally:
        give_back_gaps()


def _in_parallel(wanted: list[Planned], merger: Merger, n_threads: int) -> Iterator[tuple[str, Tensor]]:
    """Merge a few tensors ahead, each on one thread, and hand them out in order.

    One tensor a thread is twice as fast here as one operation on all threads, whose barriers cost
    more than the work on a chunk, and it does not suffer where other processes want the cores.
    """
    # The number of threads belongs to the thread that sets it: the caller's stays as it is.
    with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[tuple[Planned, Future[Tensor]]] = deque()
        waiting = deque(wanted)
        n_bytes = 0
        try:
            while True:
                while waiting and (len(ahead) <= n_threads or n_bytes < AHEAD_BYTES):
                    planned = waiting.popleft()
                    merger.prefetch(planned)
                    ahead.append((planned, pool.submit(merger.merge, planned)))
                    n_bytes += planned.n_bytes
                if not ahead:
                    return
                planned, future = ahead.popleft()
                n_bytes -= planned.n_bytes
                yield planned.name, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


class Merger:
    """Makes planned tensors out of the sources'."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        device: torch.device,
        compiles: bool,
        into: Mapping[str, Tensor],
    ) -> None:
        self._recipe, self._sources, self._device = recipe, sources, device
        self._compiles, self._into = compiles, into
        self._found: dict[tuple[str, str, str], tuple[Checkpoint, str, torch.dtype]] = {}

    def announce(self, wanted: Iterable[Planned]) -> None:
        """Have it decided where the inputs live between candidates, and makers prepare."""
        wanted = list(wanted)
        stored = [self._stored(planned, entry) for planned in wanted for entry in planned.all_inputs]
        self._sources.residence.announce(stored, self._device)
        for planned in wanted:
            if planned.maker is not None:
                planned.maker.prepare()

    def prefetch(self, planned: Planned) -> None:
        """Start to bring the inputs from disk, or to the device."""
        for entry in planned.all_inputs:
            self._sources.residence.prefetch(*self._stored(planned, entry), self._device)

    def _stored(self, planned: Planned, entry: Input) -> tuple[Checkpoint, str, torch.dtype]:
        """Where an input is, and the dtype it is taken in: the recipe's, else its own."""
        key = planned.name if planned.vocabulary else "", entry.model, entry.name
        if key not in self._found:
            checkpoint = self._sources.architecture(entry.model).checkpoint
            dtype = self._recipe.dtype or checkpoint.tensors[entry.name].dtype
            if planned.vocabulary is not None:
                tables = {
                    other.model: Table(self._sources.architecture(other.model).checkpoint, other.name)
                    for other in planned.all_inputs
                }
                checkpoint = rebuilt(planned.vocabulary, entry.model, tables, dtype, self._sources)
            self._found[key] = checkpoint, entry.name, getattr(torch, dtype)
        return self._found[key]

    def merge(self, planned: Planned) -> Tensor:
        """Make one tensor, on the device."""
        if not planned.is_floating:
            return self._copied(planned)
        out_dtype = getattr(torch, planned.dtype)
        if planned.maker is not None:
            inputs = [
                self._sources.residence.fetch(*self._stored(planned, entry), self._device)
                for entry in planned.all_inputs
            ]
            return planned.maker.make(inputs, out_dtype, self._device)
        method = METHODS[planned.method]
        job = TensorJob(
            name=planned.name,
            base=self._source(planned, planned.base, {}) if planned.base else None,
            sources=[self._source(planned, entry, method.per_model) for entry in planned.inputs],
            parameters={
                name: look_up(name, parameter, planned.levels, planned.name, planned.t)
                for name, parameter in method.shared.items()
            },
            out_dtype=out_dtype,
            statistics=self._sources.statistics,
            compiles=self._compiles,
            place=self._place(planned, out_dtype),
        )
        return method.function()(job)

    def _place(self, planned: Planned, dtype: torch.dtype) -> Tensor | None:
        """Where a result goes, if that can take it as it is."""
        place = self._into.get(planned.name)
        if place is None or place.shape != planned.shape or place.dtype != dtype:
            return None
        return place if place.is_contiguous() and place.device.type == self._device.type else None

    def _source(self, planned: Planned, entry: Input, per_model: Mapping[str, Parameter]) -> Source:
        checkpoint, name, dtype = self._stored(planned, entry)
        tensor = self._sources.residence.fetch(checkpoint, name, dtype, self._device)
        if planned.shape and tensor.shape[0] > planned.shape[0]:
            tensor = tensor[: planned.shape[0]]
        levels = (*entry.levels, *planned.levels)
        parameters = {
            name: look_up(name, parameter, levels, entry.filter_name, planned.t)
            for name, parameter in per_model.items()
        }
        key = MaskKey(self._recipe.random_seed, entry.model, entry.occurrence, planned.name)
        return Source(tensor, parameters, key, checkpoint.identity, entry.name)

    def _copied(self, planned: Planned) -> Tensor:
        """Return an integer or boolean buffer, which must be the same in every model."""
        checkpoints = [(self._stored(planned, entry)[0], entry.name) for entry in planned.all_inputs]
        first, *others = (checkpoint.read(name) for checkpoint, name in checkpoints)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"buffer {planned.name} differs between the models and is not a number to average; "
                f"merge models that share it"
            )
        return first.to(self._device)


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
    evaluation: Evaluation | None = None,
    device: str | torch.device = "cpu",
    on_tensor: Callable[[str, int], None] | None = None,
    **plan_options: Any,
) -> None:
    """Write the merged model as a folder that Transformers loads; it appears only when complete.

    Of files of weights only weights come out, and the recipe.

    Args:
        recipe: what to merge.
        folder: where to; it must not exist or be empty, unless `overwrite`.
        recipe_text: what to keep as mergekit_config.yml; default the recipe itself.
        shard_bytes: largest size of one weights file; <= 0 for a single one.
        with_tokenizer: copy the donor's tokenizer and templates.
        with_card: write README.md.
        evaluation: what the merge scored, for the card.
        on_tensor: called with name and bytes of each tensor as it goes to the writer.
        plan_options: of `plan_merge`.

    Raises:
        OutputError, CheckpointError, RecipeError, HubUnreachableError.
    """
    sources = sources or Sources()
    text = recipe_text or recipe.to_yaml()
    plan = plan_merge(recipe, sources, **plan_options)
    layout = [(planned.name, planned.dtype, planned.shape) for planned in plan]
    seen = sources.within(recipe, **plan_options)
    stream = _stream(recipe, seen, list(plan), torch.device(device))
    with complete_folder(Path(folder), overwrite, sources.folders(recipe)) as part:
        write_shards(layout, _told(stream, on_tensor), part, shard_bytes)
        config = merged_config(recipe, seen)
        if config:
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / "mergekit_config.yml").write_text(text, encoding="utf-8")
        if with_card and config:
            card = model_card(recipe, seen, plan, Path(folder).resolve().name, text, evaluation)
            (part / "README.md").write_text(card, encoding="utf-8")
        if with_tokenizer and config:
            own = seen.architecture(origin(recipe)).checkpoint.folder
            copy_tokenizer(files_folder(recipe, seen), part, own)


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
    from merge_core.resident import build_model, fill, places

    sources = sources or Sources()
    plan_merge(recipe, sources)
    folder = files_folder(recipe, sources)
    model = build_model(merged_config(recipe, sources), folder, device)
    fill(model, merged_tensors(recipe, sources, device=device, into=places(model)))
    return model
