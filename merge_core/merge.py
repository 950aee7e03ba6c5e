"""The merge itself: one stream of named tensors, whoever consumes it.

    for name, tensor in merged_tensors(Recipe.load("recipe.yml")): ...

`save_merged` writes that stream, `load_merged` and the engines load it into a live model; there is
no second way to merge. `Sources` keeps checkpoints open and statistics warm between candidates.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.architecture import Architecture, with_layers
from merge_core.checkpoint.read import Checkpoint
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
from merge_core.randomness import MaskKey
from merge_core.recipe import Recipe, SliceEntry, SourceEntry
from merge_core.sparsify import StatisticsCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many differing tensors a message names; the rest is counted.
_SHOWN = 5


class Sources:
    """The checkpoints that recipes refer to, opened once, and statistics of their deltas."""

    def __init__(self) -> None:
        self._architectures: dict[str, Architecture] = {}
        self.statistics = StatisticsCache()

    def architecture(self, reference: str) -> Architecture:
        """Open a model, or return it where it is open already.

        Raises:
            CheckpointError, HubUnreachableError: it cannot be opened.
        """
        if reference not in self._architectures:
            self._architectures[reference] = Architecture(Checkpoint(reference))
        return self._architectures[reference]

    def open_all(self, references: Collection[str]) -> list[str]:
        """Open several models; return the faults of those that cannot be opened."""
        faults: list[str] = []
        for reference in references:
            try:
                self.architecture(reference)
            except CheckpointError as error:
                faults += error.faults
        return faults


@dataclass(frozen=True)
class _Input:
    """One model's part in an output tensor: which tensor of it, and its own parameters."""

    model: str
    name: str
    parameters: Mapping[str, Any]
    occurrence: int


@dataclass(frozen=True)
class _Planned:
    """One output tensor: the donor's or a layer's, at position t of its slice."""

    name: str
    t: float
    inputs: tuple[_Input, ...]
    base: _Input | None
    slice_parameters: Mapping[str, Any]


def donor(recipe: Recipe) -> str:
    """Name the model that config, tokenizer and tensor names come from: the base, or the first."""
    return recipe.base_model or recipe.references()[0]


def merged_tensors(
    recipe: Recipe,
    sources: Sources | None = None,
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, Tensor]]:
    """Merge, one tensor at a time.

    Args:
        recipe: what to merge.
        sources: open checkpoints, to be reused between calls; opened here if absent.
        names: only these output tensors, which come out the same as in the whole merge.
        device: where the arithmetic runs and the tensors end up.

    Yields:
        (name, tensor) in the order of the model: embeddings, layers, head. Each tensor has the
        shape of its sources and dtype `out_dtype`, else `dtype`, else the base checkpoint's.

    Raises:
        CheckpointError: models are missing or do not fit each other (before the first tensor).
        RecipeError: a value is missing for a tensor.
    """
    sources = sources or Sources()
    plan = plan_merge(recipe, sources)
    wanted = [planned for planned in plan if names is None or planned.name in names]
    place = torch.device(device)
    n_threads = torch.get_num_threads() if place.type == "cpu" else 1
    return _in_parallel(recipe, wanted, sources, place, n_threads)


def _in_parallel(
    recipe: Recipe, wanted: list[_Planned], sources: Sources, device: torch.device, n_threads: int
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


def plan_merge(recipe: Recipe, sources: Sources) -> list[_Planned]:
    """List the output tensors and check that every input exists and fits.

    Raises:
        CheckpointError: with the first differing tensors and shapes.
    """
    faults = sources.open_all(recipe.references())
    if faults:
        raise CheckpointError(faults)
    slices = _slices(recipe, sources)
    faults = _range_faults(slices, sources)
    if faults:
        raise CheckpointError(faults)
    model = sources.architecture(donor(recipe))
    architectures = [[sources.architecture(s.model) for s in part.sources] for part in slices]
    # Every model's tensors, so that one which another model lacks is refused and not dropped.
    before = dict.fromkeys(name for a in (model, *architectures[0]) for name in a.before)
    after = dict.fromkeys(name for a in (model, *architectures[-1]) for name in a.after)
    planned = [_plan_outside(name, slices[0]) for name in before]
    n_done = 0
    for part in slices:
        start, end = part.sources[0].layer_range
        for i in range(end - start):
            # A slice of one layer sits at its end, as in mergekit.
            t = i / (end - start - 1) if end - start > 1 else 1.0
            planned += [
                _plan_layer(model.layer_name(n_done + i, suffix), part, i, suffix, t, sources)
                for suffix in dict.fromkeys(
                    suffix
                    for source in part.sources
                    for suffix in sources.architecture(source.model).layers[source.layer_range[0] + i]
                )
            ]
        n_done += end - start
    planned += [_plan_outside(name, slices[-1]) for name in after]
    _check_fit(planned, sources)
    return planned


def _slices(recipe: Recipe, sources: Sources) -> list[SliceEntry]:
    """Return the recipe as slices, each with its base: the sources' own, or appended.

    `models:` is one slice over all layers. A slice that does not list the base it needs gets it,
    with the layer range of its first source.
    """
    needs_base = METHODS[recipe.merge_method].base == "required"
    parts = recipe.slices
    if recipe.models:
        entries = tuple(
            SourceEntry(
                model=entry.model,
                parameters=entry.parameters,
                layer_range=(0, sources.architecture(entry.model).n_layers),
            )
            for entry in recipe.models
        )
        parts = (SliceEntry(sources=entries),)
    slices = []
    for part in parts or ():
        base = (part.base_model or recipe.base_model) if needs_base else None
        entries = part.sources
        if base is not None and base not in [entry.model for entry in entries]:
            entries += (SourceEntry(model=base, layer_range=entries[0].layer_range),)
        slices.append(part.model_copy(update={"sources": entries, "base_model": base}))
    return slices


def _range_faults(slices: list[SliceEntry], sources: Sources) -> list[str]:
    faults = []
    for i, part in enumerate(slices):
        ranges = [(source.model, *source.layer_range) for source in part.sources]
        for model, start, end in ranges:
            n_layers = sources.architecture(model).n_layers
            if end > n_layers:
                faults.append(
                    f"slices[{i}]: layers [{start}, {end}) of {model} are asked for; it has "
                    f"{n_layers} layers, shorten the range"
                )
        if len({end - start for _, start, end in ranges}) > 1:
            faults.append(
                "models have different numbers of layers: "
                + ", ".join(f"{model} {end - start}" for model, start, end in ranges)
                + "; merge models of one architecture, or choose layers with slices"
            )
    return faults


def _plan_outside(name: str, part: SliceEntry) -> _Planned:
    """Plan a tensor outside the layers: every model has it under the donor's name."""
    return _planned(name, part, [name] * len(part.sources), 0.0)


def _plan_layer(name: str, part: SliceEntry, i: int, suffix: str, t: float, sources: Sources) -> _Planned:
    """Plan a tensor of the slice's i-th layer; each model names it by its own layer number."""
    names = [
        sources.architecture(source.model).layer_name(source.layer_range[0] + i, suffix)
        for source in part.sources
    ]
    return _planned(name, part, names, t)


def _planned(name: str, part: SliceEntry, input_names: list[str], t: float) -> _Planned:
    seen: Counter[str] = Counter()
    inputs = []
    base = None
    for source, input_name in zip(part.sources, input_names, strict=True):
        entry = _Input(source.model, input_name, source.parameters, seen[source.model])
        seen[source.model] += 1
        if source.model == part.base_model:
            base = entry
        else:
            inputs.append(entry)
    return _Planned(name, t, tuple(inputs), base, part.parameters)


def _check_fit(planned: list[_Planned], sources: Sources) -> None:
    """Refuse models whose tensors are missing or differ in shape.

    Raises:
        CheckpointError: one fault a pair of models.
    """
    differing: dict[tuple[str, str], list[str]] = {}
    for tensor in planned:
        inputs = [*tensor.inputs, *([tensor.base] if tensor.base else [])]
        reference = tensor.base or inputs[0]
        expected = sources.architecture(reference.model).info(reference.name)
        for entry in inputs:
            if entry is reference and (expected is not None or len(inputs) > 1):
                continue
            found = sources.architecture(entry.model).info(entry.name)
            if found is None or expected is None:
                lacking = entry if found is None else reference
                text = f"{lacking.name} is missing in {lacking.model}"
            elif found.shape != expected.shape:
                text = f"{entry.name} is {list(found.shape)} against {list(expected.shape)}"
            else:
                continue
            differing.setdefault((entry.model, reference.model), []).append(text)
    faults = []
    for (model, reference_model), texts in differing.items():
        more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        faults.append(
            f"model {model!r} does not fit {reference_model!r}: {'; '.join(texts[:_SHOWN])}{more}; "
            f"merge fine-tunes of one base with the same shapes"
        )
    if faults:
        raise CheckpointError(faults)


def _merge_one(recipe: Recipe, planned: _Planned, sources: Sources, device: torch.device) -> Tensor:
    reference = planned.base or planned.inputs[0]
    info = sources.architecture(reference.model).info(reference.name)
    assert info is not None
    if not info.is_floating:
        return _copied(planned, sources).to(device)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype else None
    out_dtype = getattr(torch, recipe.out_dtype or recipe.dtype or info.dtype)
    method = METHODS[recipe.merge_method]
    levels = (planned.slice_parameters, recipe.parameters)

    def source(entry: _Input) -> Source:
        tensor = sources.architecture(entry.model).checkpoint.read(entry.name)
        parameters = {
            name: look_up(name, parameter, (entry.parameters, *levels), entry.name, planned.t)
            for name, parameter in method.per_model.items()
            if entry is not planned.base
        }
        return Source(
            tensor.to(device=device, dtype=dtype or tensor.dtype),
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
            name: look_up(name, parameter, levels, planned.name, planned.t)
            for name, parameter in method.shared.items()
        },
        out_dtype=out_dtype,
        statistics=sources.statistics,
    )
    return method.function()(job)


def _copied(planned: _Planned, sources: Sources) -> Tensor:
    """Return an integer or boolean buffer, which must be the same in every model."""
    inputs = [*([planned.base] if planned.base else []), *planned.inputs]
    tensors = [sources.architecture(entry.model).checkpoint.read(entry.name) for entry in inputs]
    if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise CheckpointError(
            f"buffer {planned.name} differs between the models and is not a number to average; "
            f"merge models that share it"
        )
    return tensors[0]


def merged_config(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Return config.json of the merged model: the donor's, with layers and dtype as merged."""
    model = sources.architecture(donor(recipe))
    config = dict(model.checkpoint.config)
    kept = [layer for part in _slices(recipe, sources) for layer in range(*part.sources[0].layer_range)]
    config = with_layers(config, kept)
    dtype = recipe.out_dtype or recipe.dtype
    if dtype:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    return config


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
    stream = merged_tensors(recipe, sources, device=device)
    with complete_folder(Path(folder), overwrite) as part:
        write_shards(((name, tensor.cpu()) for name, tensor in stream), part, shard_bytes)
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


def model_alone(reference: str, like: Recipe | None = None) -> Recipe:
    """Return the recipe of one model as it is, in the dtype of another recipe."""
    return Recipe.parse(
        {
            "merge_method": "passthrough",
            "models": [{"model": reference}],
            "dtype": like.dtype if like else None,
            "out_dtype": like.out_dtype if like else None,
        }
    )
