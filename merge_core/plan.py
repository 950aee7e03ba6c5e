"""From a recipe to the list of its output tensors: what each is made of, and that everything fits.

Nothing is read here but configs and headers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from merge_core.architecture import Architecture, with_layers
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError
from merge_core.methods import METHODS
from merge_core.recipe import Recipe, SliceEntry, SourceEntry
from merge_core.statistics import StatisticsCache

_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
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
class Input:
    """One model's part in an output tensor.

    Attributes:
        model: reference as written.
        name: the tensor's name in that model.
        occurrence: how often the same reference came before among the inputs.
        levels: where its own parameters are looked up, highest precedence first.
    """

    model: str
    name: str
    occurrence: int
    levels: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Planned:
    """One output tensor: how it is made, and what it will be.

    Attributes:
        name: in the merged model.
        method: name of the merge method.
        t: position of the layer in its slice, in [0, 1]; 0 outside the layers.
        base: the base's part, where the method has one.
        inputs: the other models' parts, in the order of the recipe.
        levels: where shared parameters are looked up, highest precedence first.
        shape: of the result; an input with more rows gives its leading ones.
        dtype: of the result, torch's name.
        is_floating: whether it is computed; other tensors are copied and must be equal.
    """

    name: str
    method: str
    t: float
    base: Input | None
    inputs: tuple[Input, ...]
    levels: tuple[Mapping[str, Any], ...]
    shape: tuple[int, ...]
    dtype: str
    is_floating: bool = True

    @property
    def n_bytes(self) -> int:
        """Size of the result."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 8)


def donor(recipe: Recipe) -> str:
    """Name the model that config, tokenizer and tensor names come from: the base, or the first."""
    return recipe.base_model or recipe.references()[0]


def plan_merge(recipe: Recipe, sources: Sources) -> list[Planned]:
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
    wired = [_wire_outside(name, slices[0]) for name in before]
    n_done = 0
    for part in slices:
        start, end = part.sources[0].layer_range
        for i in range(end - start):
            # A slice of one layer sits at its end, as in mergekit.
            t = i / (end - start - 1) if end - start > 1 else 1.0
            wired += [
                _wire_layer(model.layer_name(n_done + i, suffix), part, i, suffix, t, sources)
                for suffix in dict.fromkeys(
                    suffix
                    for source in part.sources
                    for suffix in sources.architecture(source.model).layers[source.layer_range[0] + i]
                )
            ]
        n_done += end - start
    wired += [_wire_outside(name, slices[-1]) for name in after]
    _check_fit(wired, sources)
    return [_planned(tensor, recipe, sources) for tensor in wired]


@dataclass(frozen=True)
class _Wired:
    """An output tensor of which is known what goes into it, but not yet whether that fits."""

    name: str
    t: float
    inputs: tuple[Input, ...]
    base: Input | None
    part: SliceEntry


def _planned(tensor: _Wired, recipe: Recipe, sources: Sources) -> Planned:
    reference = tensor.base or tensor.inputs[0]
    info = sources.architecture(reference.model).info(reference.name)
    assert info is not None
    return Planned(
        name=tensor.name,
        method=recipe.merge_method,
        t=tensor.t,
        base=tensor.base,
        inputs=tensor.inputs,
        levels=(tensor.part.parameters, recipe.parameters),
        shape=info.shape,
        dtype=(recipe.out_dtype or recipe.dtype or info.dtype) if info.is_floating else info.dtype,
        is_floating=info.is_floating,
    )


def _slices(recipe: Recipe, sources: Sources) -> list[SliceEntry]:
    """Return the recipe as slices, each with its base: the sources' own, or appended.

    `models:` is one slice over all layers. A slice that does not list the base it needs gets it,
    with the layer range of its first source.
    """
    needs_base = METHODS[recipe.merge_method].base in ("required", "optional")
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


def _wire_outside(name: str, part: SliceEntry) -> _Wired:
    """Wire a tensor outside the layers: every model has it under the donor's name."""
    return _wired(name, part, [name] * len(part.sources), 0.0)


def _wire_layer(name: str, part: SliceEntry, i: int, suffix: str, t: float, sources: Sources) -> _Wired:
    """Wire a tensor of the slice's i-th layer; each model names it by its own layer number."""
    names = [
        sources.architecture(source.model).layer_name(source.layer_range[0] + i, suffix)
        for source in part.sources
    ]
    return _wired(name, part, names, t)


def _wired(name: str, part: SliceEntry, input_names: list[str], t: float) -> _Wired:
    seen: Counter[str] = Counter()
    inputs = []
    base = None
    for source, input_name in zip(part.sources, input_names, strict=True):
        entry = Input(source.model, input_name, seen[source.model], (source.parameters,))
        seen[source.model] += 1
        if source.model == part.base_model:
            base = entry
        else:
            inputs.append(entry)
    return _Wired(name, t, tuple(inputs), base, part)


def _check_fit(planned: list[_Wired], sources: Sources) -> None:
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
