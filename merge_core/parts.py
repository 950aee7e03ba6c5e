"""A recipe in its one form: however it was written, a list of slices with all that belongs to each.

`models:` is one slice over all layers; a module is its own body; a base that a slice's method reads
and that is not among the slice's sources is added to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_core.methods import METHODS

if TYPE_CHECKING:
    from merge_core.recipe import Recipe

Levels = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class PartSource:
    """One model of a slice.

    Attributes:
        place: where the recipe names it; empty for a base that was added.
        model: reference as written.
        layer_range: its layers [start, end); None for all.
        levels: its own parameters, highest precedence first.
    """

    place: str
    model: str
    layer_range: tuple[int, int] | None
    levels: Levels = ()


@dataclass(frozen=True)
class Part:
    """One slice: a run of output layers.

    Attributes:
        place: where the recipe describes it.
        listing: where the recipe lists its sources.
        method: name of its merge method; None where none is given.
        base: the model that stands apart from the inputs; None where the method has no base.
        sources: its models, an added base last.
        levels: parameters of slice, module and recipe, highest precedence first.
    """

    place: str
    listing: str
    method: str | None
    base: str | None
    sources: tuple[PartSource, ...]
    levels: Levels

    @property
    def inputs(self) -> list[PartSource]:
        """The sources but the base."""
        return [source for source in self.sources if source.model != self.base]


def parts_of(recipe: Recipe) -> list[Part]:
    """Return the slices of a recipe, in output order."""
    at, body = recipe.body()
    below = (recipe.parameters,) if body is recipe else (body.parameters, recipe.parameters)
    if not body.slices:
        sources = [
            PartSource(f"{at}models[{i}]", entry.model, None, (entry.parameters,))
            for i, entry in enumerate(body.models or ())
        ]
        place = f"{at}models"
        return [_part(place, place, recipe.merge_method, recipe.base_model, sources, below)]
    parts = []
    for i, entry in enumerate(body.slices):
        place = f"{at}slices[{i}]"
        sources = [
            PartSource(
                f"{place}.sources[{j}]",
                source.model,
                source.layer_range,
                (
                    source.parameters,
                    *(own.parameters for own in body.models or () if own.model == source.model),
                ),
            )
            for j, source in enumerate(entry.sources)
        ]
        method = entry.merge_method or recipe.merge_method
        base = entry.base_model or recipe.base_model
        parts.append(_part(place, f"{place}.sources", method, base, sources, (entry.parameters, *below)))
    return parts


def _part(
    place: str,
    listing: str,
    method_name: str | None,
    base: str | None,
    sources: Sequence[PartSource],
    levels: Levels,
) -> Part:
    method = METHODS.get(method_name or "")
    if method is None or method.base == "ignored":
        base = None
    elif base is None and method.first_is_base and len(sources) == 2:
        base = sources[0].model
    if base is not None and base not in [source.model for source in sources]:
        sources = [*sources, PartSource("", base, sources[0].layer_range)]
    return Part(
        place,
        listing,
        method_name,
        base if method and method.has_base else None,
        tuple(sources),
        levels,
    )
