"""From a recipe to the list of its output tensors: what each is made of, and that everything fits.

Nothing is read here but configs and headers. What does not change between the candidates of a
search, the wiring, is made once; a plan adds a recipe's own parameters and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

from merge_core.architecture import text_config, with_layers, with_text_config
from merge_core.checkpoint.safetensors_file import ITEM_BYTES
from merge_core.errors import CheckpointError, RecipeError
from merge_core.leniency import Leniency, Tensors
from merge_core.methods import METHODS, Parameter
from merge_core.moe.recipe import MoeRecipe
from merge_core.parameters import first_match, is_total, value_at
from merge_core.parts import Levels, Part
from merge_core.recipe import Recipe
from merge_core.reference import result_in
from merge_core.sources import Sources
from merge_core.tokenizer.merged import (
    changed_tokens,
    merged_vocabulary,
    prompt_warnings,
    tokenizer_folder,
)
from merge_core.tokenizer.vocabulary import Vocabulary
from merge_core.wiring import Wire, Wiring, layers_of, vocabulary_rows, wire

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Input",
    "MergePlan",
    "Planned",
    "Sources",
    "donor",
    "files_folder",
    "has_own_tokenizer",
    "merged_config",
    "model_alone",
    "origin",
    "plan_merge",
]


@dataclass(frozen=True, slots=True)
class Input:
    """One model's part in an output tensor.

    Attributes:
        model: reference as written.
        name: the tensor's name in that model.
        occurrence: how often the same reference came before among the inputs.
        levels: where its own parameters are looked up, highest precedence first.
        filter_name: what filters match for its own parameters: `name`, or the head's name where a
            tied model's embedding stands in for it.
    """

    model: str
    name: str
    occurrence: int
    levels: Levels
    filter_name: str


class Maker(Protocol):
    """Makes an output tensor that no merge method makes."""

    def prepare(self) -> None:
        """Do what takes long; called once before the first tensor is made, by one thread."""

    def make(self, inputs: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor.

        Args:
            inputs: those of the plan, on the device.
        """


@dataclass(frozen=True, slots=True)
class Planned:
    """One output tensor: how it is made, and what it will be.

    Attributes:
        name: in the merged model.
        method: name of its slice's merge method; "passthrough" where it is taken as it is.
        t: position of the layer in its slice, in [0, 1]; 0 outside the layers.
        base: the base's part, where the method has one.
        inputs: the other models' parts, in the order of the recipe.
        levels: where shared parameters are looked up, highest precedence first: the slice's, the
            module's, the recipe's.
        shape: of the result; an input with more rows gives its leading ones.
        dtype: of the result, torch's name.
        is_floating: whether it is computed; other tensors are copied and must be equal.
        maker: what makes it in the method's place, where it is no merge.
        vocabulary: whose order its rows, and its inputs', are brought into; None for no such tensor.
    """

    name: str
    method: str
    t: float
    base: Input | None
    inputs: tuple[Input, ...]
    levels: Levels
    shape: tuple[int, ...]
    dtype: str
    is_floating: bool = True
    maker: Maker | None = None
    vocabulary: Vocabulary | None = None

    @property
    def all_inputs(self) -> tuple[Input, ...]:
        """The base's part, if there is one, and the others."""
        return self.inputs if self.base is None else (self.base, *self.inputs)

    @property
    def n_bytes(self) -> int:
        """Size of the result."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class MergePlan(Sequence[Planned]):
    """The output tensors in the order of the model, and what a user should know of them."""

    tensors: tuple[Planned, ...]
    own_warnings: tuple[str, ...] = ()
    results: Mapping[str, MergePlan] = field(default_factory=dict)
    """Plans of the intermediate results that go into it, by name."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know of these tensors, and of intermediate ones."""
        inner = [
            f"intermediate.{name}: {warning}"
            for name, plan in self.results.items()
            for warning in plan.warnings
        ]
        return (*self.own_warnings, *dict.fromkeys(inner))

    def methods(self) -> list[str]:
        """List the methods by which tensors are made, intermediate ones included."""
        inner = [method for plan in self.results.values() for method in plan.methods()]
        return list(dict.fromkeys([*(planned.method for planned in self.tensors), *inner]))

    def read(self) -> set[tuple[str, str]]:
        """List the models' tensors on disk that are read: model and name."""
        found: set[tuple[str, str]] = set()
        for planned in self.tensors:
            for entry in planned.all_inputs:
                if result_in(entry.model, self.results) is None:
                    found.add((entry.model, entry.name))
        return found.union(*(plan.read() for plan in self.results.values()))

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Planned]:
        return iter(self.tensors)

    @overload
    def __getitem__(self, index: int) -> Planned: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Planned, ...]: ...
    def __getitem__(self, index: int | slice) -> Planned | tuple[Planned, ...]:
        return self.tensors[index]


def donor(recipe: Recipe) -> str:
    """Name what config and tensor names come from: the base, or the first model; maybe a result."""
    return recipe.inputs()[0]


def origin(recipe: Recipe) -> str:
    """Name the model on disk that tokenizer and other files come from: the donor, or the donor's."""
    return recipe.references()[0]


def has_own_tokenizer(recipe: Recipe, sources: Sources) -> bool:
    """Tell whether the merge's tokenizer may be another than that of `origin`.

    So it is where the recipe says more of it, or where an adapter that is put on a result brings one.
    """
    own = sources.architecture(origin(recipe)).checkpoint.tokenizer_folder
    return recipe.has_own_tokenizer or files_folder(recipe, sources) != own


def files_folder(recipe: Recipe, sources: Sources) -> Path:
    """Return the folder of the merge's tokenizer, template and generation defaults; see
    `tokenizer_folder`."""
    return tokenizer_folder(recipe, donor(recipe), sources.within(recipe))


def plan_merge(
    recipe: Recipe,
    sources: Sources,
    *,
    allow_crimes: bool = False,
    unsafe_truncate_embeddings: bool = False,
    tensors: Tensors = "same",
) -> MergePlan:
    """List the output tensors and check that every input exists and fits.

    Args:
        allow_crimes: merge models of different families, and tensors that only some models have:
            the donor's tensors come out, each merged from the models that have it; where those are
            too few for the method, the base's own, else the donor's.
        unsafe_truncate_embeddings: merge vocabularies of different sizes over their common leading
            rows.
        tensors: of files of weights, which tensors come out where they differ, see `Leniency`.

    Raises:
        CheckpointError: with the first differing tensors and shapes.
        RecipeError: a required parameter has no value for some tensor, whose name no filter matches.
    """
    leniency = Leniency(allow_crimes, unsafe_truncate_embeddings, tensors)
    sources = sources.within(recipe, **leniency._asdict())
    faults = sources.open_all(recipe.references(), recipe.adapters())
    if faults:
        raise CheckpointError(faults)
    if isinstance(recipe, MoeRecipe):
        from merge_core.moe.plan import plan_mixture  # made of what is defined here

        return plan_mixture(recipe, sources)
    parts = recipe.parts()
    vocabulary = merged_vocabulary(recipe, donor(recipe), sources)
    wiring = _wiring(parts, donor(recipe), sources, leniency, vocabulary)
    own = [[source.levels for source in part.sources] for part in parts]
    dtype = recipe.out_dtype or recipe.dtype

    def entry(wire: Wire, part: int | None) -> Input:
        levels = () if part is None else own[part][wire.source]
        return Input(wire.model, wire.name, wire.occurrence, levels, wire.filter_name)

    faults = list(_value_faults(parts, wiring))
    if faults:
        raise RecipeError(faults)
    planned = tuple(
        Planned(
            name=wired.name,
            method=wired.method,
            t=wired.t,
            base=entry(wired.base, wired.part) if wired.base else None,
            inputs=tuple([entry(wire, wired.part) for wire in wired.inputs]),
            levels=() if wired.part is None else parts[wired.part].levels,
            shape=wired.shape,
            dtype=(dtype or wired.dtype) if wired.is_floating else wired.dtype,
            is_floating=wired.is_floating,
            vocabulary=vocabulary if wired.by_token else None,
        )
        for wired in wiring.tensors
    )
    warnings = (*wiring.warnings, *prompt_warnings(recipe, donor(recipe), sources))
    return MergePlan(planned, warnings, sources.plans(recipe.inputs()))


def unmatched_filters(recipe: Recipe, plan: MergePlan) -> list[str]:
    """Say which filters reach no tensor of a recipe's own merge, one line each."""
    if isinstance(recipe, MoeRecipe):
        return []
    names = {
        name for planned in plan for name in (planned.name, *(i.filter_name for i in planned.inputs))
    }
    levels = [
        level
        for part in recipe.parts()
        for level in (*part.levels, *(level for source in part.sources for level in source.levels))
    ]
    found: dict[str, None] = {}
    for level in levels:
        for parameter, setting in level.items():
            entries = setting if isinstance(setting, list) else [setting]
            if not all(isinstance(entry, Mapping) for entry in entries):
                continue
            reached = {first_match(entries, name) for name in names}
            for i, entry in enumerate(entries):
                pattern = entry.get("filter")
                if i in reached or pattern in (None, "*"):
                    continue
                why = (
                    "is never reached, an entry before it takes every tensor that it matches, so its "
                    "value does nothing; put it first"
                    if any(pattern in name for name in names)
                    else "matches no tensor, so its value does nothing; correct it"
                )
                found[f"filter {pattern!r} of {parameter} {why}, or take it out"] = None
    return list(found)


def _wiring(
    parts: Sequence[Part],
    donor: str,
    sources: Sources,
    leniency: Leniency,
    vocabulary: Vocabulary | None,
) -> Wiring:
    """Wire up a recipe, once for all recipes that differ in numbers only."""
    shape = tuple(
        (part.method, part.base, tuple((source.model, source.layer_range) for source in part.sources))
        for part in parts
    )
    models = [source.model for part in parts for source in part.sources]
    wiring: Wiring = sources.remembered(
        (donor, leniency, shape, sources.structures([donor, *models]), vocabulary and vocabulary.key),
        lambda: wire(parts, donor, sources, leniency, vocabulary),
    )
    return wiring


def _value_faults(parts: Sequence[Part], wiring: Wiring) -> Iterator[str]:
    """Find tensors that filters leave without a value of a required parameter."""
    gaps: dict[tuple[int, int | None], list[tuple[str, str, Levels]]] = {}
    for k, part in enumerate(parts):
        method = METHODS[part.method or ""]
        everyone: list[tuple[int | None, str, Levels, Mapping[str, Parameter]]]
        everyone = [(None, part.place, part.levels, method.shared)]
        everyone += [
            (i, source.place, (*source.levels, *part.levels), method.per_model)
            for i, source in enumerate(part.sources)
            if source.model != part.base
        ]
        for i, place, levels, parameters in everyone:
            for name, parameter in parameters.items():
                if parameter.required and not any(is_total(v[name]) for v in levels if name in v):
                    gaps.setdefault((k, i), []).append((place, name, levels))
    without: dict[tuple[str, str], list[str]] = {}
    for wired in wiring.tensors if gaps else ():
        if wired.part is None or not wired.is_floating:
            continue
        asked = [(None, wired.name), *((wire.source, wire.filter_name) for wire in wired.inputs)]
        for i, tensor in asked:
            for place, name, levels in gaps.get((wired.part, i), ()):
                if all(value_at(v[name], tensor, wired.t) is None for v in levels if name in v):
                    without.setdefault((place, name), []).append(tensor)
    for (place, name), tensors in without.items():
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        yield (
            f"{place}: {name} has no value for tensor {tensors[0]}{more}; no filter matches it, "
            f"add a last entry without filter"
        )


def merged_config(recipe: Recipe, sources: Sources) -> dict[str, Any]:
    """Return config.json of the merged model: the donor's, with layers and dtype as merged.

    An output head beside a tied donor unties it. Another vocabulary gives its size, and one of another
    model that model's ids of special tokens. Files of weights have none: it is empty.
    """
    sources = sources.within(recipe)
    if isinstance(recipe, MoeRecipe):
        from merge_core.moe.plan import config_of_mixture

        return config_of_mixture(recipe, sources)
    model = sources.architecture(donor(recipe))
    if model.checkpoint.is_state_dict:
        return {}
    config = dict(model.checkpoint.config)
    parts = recipe.parts()
    first = [(part.sources[0], sources.architecture(part.sources[0].model)) for part in parts]
    config = with_layers(config, [layer for pair in first for layer in range(*layers_of(*pair))])
    ends = [
        [sources.architecture(source.model) for source in part.sources] for part in (parts[0], parts[-1])
    ]
    if model.ties_embeddings and any(architecture.has_head for architecture in ends[1]):
        if "tie_word_embeddings" in text_config(config):
            config = with_text_config(config, tie_word_embeddings=False)
        config["tie_word_embeddings"] = False
    elif not model.ties_embeddings and "tie_word_embeddings" not in {**config, **text_config(config)}:
        # Some families tie by default; here the head is a tensor of its own.
        config["tie_word_embeddings"] = False
    vocabulary = merged_vocabulary(recipe, donor(recipe), sources)
    n_rows = vocabulary_rows([*ends[0], *ends[1]])
    if vocabulary is not None:
        config = with_text_config(config, vocab_size=vocabulary.size)
        config = changed_tokens(config, vocabulary, donor(recipe), sources)
    elif n_rows is not None and n_rows != (model.vocabulary_size or n_rows):
        config = with_text_config(config, vocab_size=n_rows)
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
