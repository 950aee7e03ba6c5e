"""Layer paths: which layers of which models a token passes through, in which order.

The data-flow space of Akiba et al. 2024 (https://arxiv.org/abs/2403.13187, section 3.2), as far as a
plain merge file can express it. All layers of all models are laid out in a row, `repeats` times;
each variable says whether one of them is on the path, so that layers are skipped, repeated, and
mixed. The paper scales what enters a layer. A file can scale what a layer adds to the stream, which
in models whose norms take out the scale of their input (RMSNorm, before each block and at the end)
makes the same models: an input scaled by w is what all later layers add, divided by w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from evolve.errors import SearchFileError
from evolve.space.ranges import is_number, is_range, variable_of
from evolve.space.search_space import SearchSpace
from evolve.space.tree import differences
from evolve.space.variable import Clause, Value, Variable
from merge_core.errors import RecipeError, schema_faults, shown
from merge_core.recipe import Recipe, reference_text

# How many of the switches a sampler's first draws are to turn.
_FIRST_TURNS = 4


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Length(_Section):
    """How many layers a path may have."""

    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Length:
        if self.low > self.high:
            raise ValueError("low must not lie above high; swap them")
        return self


class LayerPath(_Section):
    """The section `layer_path:` of a search file."""

    models: tuple[Annotated[str, BeforeValidator(reference_text)], ...] = Field(min_length=1)
    """Whose layers; config, tokenizer and, on the path's ends, embedding and head are theirs too."""
    repeats: int = Field(default=1, ge=1)
    """How often the row of all layers is laid out."""
    order: Literal["models", "depths"] = "models"
    """The row: all layers of a model, then those of the next; or every model's first, then second."""
    group: int = Field(default=1, ge=1)
    """Neighbouring layers that are switched together."""
    length: Length | None = None
    """Bounds on the number of layers; null = any."""
    scale: dict[str, Any] | None = None
    """A range: by what the tensors `scaled` of each layer are multiplied; null = not at all."""
    scaled: tuple[str, ...] = Field(default=("o_proj", "down_proj"), min_length=1)
    """Filters of the tensors through which a layer adds to the stream."""


@dataclass(frozen=True)
class _Slot:
    """A place in the row: neighbouring layers of one model, from `layer` on."""

    switch: str
    model: str
    layer: int


# A step of a path: layers of a model, from the number on, and their scale.
_Step = tuple[str, int, float]


class LayerPathSpace(SearchSpace):
    """Paths through the layers of some models.

    Different rows of switches can be the same path, where layers repeat: the one whose layers come
    first in the row stands for all, and `active` returns it.

    Args:
        template: the recipe with `layer_path:` in place of models and slices.
        n_layers: gives a model's number of layers.

    Raises:
        SearchFileError: with every fault of the section.
    """

    is_local = True

    def __init__(self, template: Mapping[str, Any], n_layers: Callable[[str], int]) -> None:
        super().__init__()
        self._rest = {key: part for key, part in template.items() if key != "layer_path"}
        self._section = _checked(template)
        counts = {model: n_layers(model) for model in self._section.models}
        self._slots = list(self._row(counts))
        self._scales: dict[str, Variable] = {}
        first = self._start()
        steadiness = 1 - min(0.5, _FIRST_TURNS / len(self._slots))
        for slot in self._slots:
            is_on = slot in first
            self.variables.append(
                Variable(slot.switch, choices=(False, True), start=is_on, steadiness=steadiness)
            )
            if self._section.scale is not None:
                self._scales[slot.switch] = _scale(self._section.scale, slot)
                self.variables.append(self._scales[slot.switch])
        try:
            self.recipe(self.starts())
        except RecipeError as error:
            raise SearchFileError(error.faults) from None

    def _row(self, counts: Mapping[str, int]) -> Iterator[_Slot]:
        """Lay out all layers, `repeats` times."""
        size, models = self._section.group, self._section.models
        faults = [
            f"layer_path.group is {size}, which does not divide the {n} layers of {model}; use a "
            f"divisor, or 1"
            for model, n in counts.items()
            if n % size
        ]
        if faults:
            raise SearchFileError(faults)
        places = [(k, layer) for k, model in enumerate(models) for layer in range(0, counts[model], size)]
        if self._section.order == "depths":
            places.sort(key=lambda place: (place[1], place[0]))
        for r in range(self._section.repeats):
            for k, layer in places:
                yield _Slot(f"layer_path[{r}].models[{k}].layers[{layer}]", models[k], layer)

    def _start(self) -> list[_Slot]:
        """Return the places of the first model; its last off, or others on, as length asks."""
        once = self._slots[: len(self._slots) // self._section.repeats]
        start = [slot for slot in once if slot.model == self._section.models[0]]
        if (length := self._section.length) is None:
            return start
        size = self._section.group
        fewest, most = -(-length.low // size), min(length.high // size, len(self._slots))
        if fewest > most:
            raise SearchFileError(
                f"layer_path.length admits {length.low} to {length.high} layers; a path of this row has "
                f"a multiple of layer_path.group ({size}), up to {len(self._slots) * size}; change "
                f"length, group or repeats"
            )
        others = [slot for slot in self._slots if slot not in start]
        return start[:most] + others[: max(0, fewest - len(start))]

    # ---- values and recipes -------------------------------------------------------------------

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the values that stand for the path, see SearchSpace."""
        placed = self._placed(self._path(values))
        assert placed is not None, "a path lies where it came from"
        found: dict[str, Value] = {slot.switch: slot.switch in placed for slot in self._slots}
        for switch, scale in placed.items():
            if switch in self._scales:
                found[self._scales[switch].name] = scale
        return {v.name: found[v.name] for v in self.variables if v.name in found}

    def recipe(self, values: Mapping[str, Value]) -> Recipe:
        """Return the path as a recipe of slices, see SearchSpace."""
        path = self._path(values)
        n, length = len(path) * self._section.group, self._section.length
        if not path:
            raise RecipeError("layer_path: no layer is on the path; switch some on")
        if length is not None and not length.low <= n <= length.high:
            raise RecipeError(
                f"layer_path: the path has {n} layers; layer_path.length admits {length.low} to "
                f"{length.high}"
            )
        return Recipe.parse({**self._rest, "merge_method": "passthrough", "slices": self._slices(path)})

    def values(self, recipe: Recipe) -> dict[str, Value]:
        """Return the active values of the path that a recipe is, see SearchSpace."""
        path = list(self._read(recipe))
        placed = self._placed(path)
        if placed is None:
            raise SearchFileError(
                f"slices: the path goes back, or repeats layers, more often than layer_path.repeats "
                f"({self._section.repeats}) and its order allow"
            )
        found: dict[str, Value] = {slot.switch: slot.switch in placed for slot in self._slots}
        for switch, scale in placed.items():
            if switch in self._scales:
                variable = self._scales[switch]
                found[variable.name], fault = variable.admitted(scale)
                if fault:
                    raise SearchFileError(fault)
        try:
            again = self.recipe(found)
        except RecipeError as error:  # too short or too long
            raise SearchFileError(error.faults) from None
        made, given = (r.as_config() | {"slices": None} for r in (again, recipe))
        if faults := list(differences(made, given)):
            raise SearchFileError(faults)
        return {v.name: found[v.name] for v in self.variables if v.name in found}

    def examples(self) -> list[Recipe]:
        """Return the start, each model as it is, and the longest path, see SearchSpace."""
        starts = self.starts()
        points = [starts]
        once = self._slots[: len(self._slots) // self._section.repeats]
        for model in self._section.models:
            points.append(starts | {s.switch: s in once and s.model == model for s in self._slots})
        room = len(self._slots)
        if self._section.length is not None:
            room = min(room, self._section.length.high // self._section.group)
        points.append(starts | {slot.switch: i < room for i, slot in enumerate(self._slots)})
        found: dict[str, Recipe] = {}
        for point in points:
            try:
                recipe = self.recipe(point)
            except RecipeError:  # too short or too long by itself
                continue
            found.setdefault(recipe.to_yaml(), recipe)
        return list(found.values())

    def tensor_faults(self, names: Iterable[str]) -> list[str]:
        """Say which of `scaled` the models have not, see SearchSpace."""
        known = list(names)
        return [
            f"layer_path.scaled names {text!r}, which is in no tensor's name; write filters of the "
            f"tensors that end a layer's attention and MLP, see {known[len(known) // 2]}"
            for text in (self._section.scaled if self._scales else ())
            if not any(text in name for name in known)
        ]

    # ---- paths ----------------------------------------------------------------------------------

    def _path(self, values: Mapping[str, Value]) -> list[_Step]:
        return [
            (slot.model, slot.layer, self._scale_at(slot, values))
            for slot in self._slots
            if values[slot.switch]
        ]

    def _scale_at(self, slot: _Slot, values: Mapping[str, Value]) -> float:
        variable = self._scales.get(slot.switch)
        if variable is None:
            return 1.0
        value = values.get(variable.name, variable.start)
        assert isinstance(value, int | float)
        return value

    def _placed(self, path: Sequence[_Step]) -> dict[str, float] | None:
        """Find the first places in the row for a path; None where there are none.

        Returns:
            By the switches that are on, their scales.
        """
        placed = {}
        places = iter(self._slots)
        for model, layer, scale in path:
            slot = next((s for s in places if (s.model, s.layer) == (model, layer)), None)
            if slot is None:
                return None
            placed[slot.switch] = scale
        return placed

    def _slices(self, path: Sequence[_Step]) -> list[dict[str, Any]]:
        """Write a path as slices; neighbouring layers that are not scaled share one."""
        size = self._section.group
        slices: list[dict[str, Any]] = []
        end: tuple[str, int] | None = None
        for model, layer, scale in path:
            if self._scales or end != (model, layer):
                source: dict[str, Any] = {"model": model, "layer_range": [layer, layer]}
                if self._scales:
                    filters = [{"filter": name, "value": scale} for name in self._section.scaled]
                    source["parameters"] = {"scale": [*filters, {"value": 1.0}]}
                slices.append({"sources": [source]})
            end = model, layer + size
            slices[-1]["sources"][0]["layer_range"][1] = end[1]
        return slices

    def _read(self, recipe: Recipe) -> Iterator[_Step]:
        """Read a recipe's slices as a path."""
        size = self._section.group
        if not recipe.slices:
            raise SearchFileError("slices is missing; a path through layers has slices, write some")
        for i, entry in enumerate(recipe.slices):
            place, source = f"slices[{i}]", entry.sources[0]
            start, end = source.layer_range
            is_plain = len(entry.sources) == 1 and not entry.parameters
            if not is_plain or (entry.merge_method or "passthrough") != "passthrough":
                raise SearchFileError(
                    f"{place} has more than one source, parameters of its own or another method; a path "
                    f"takes layers from one model at a time"
                )
            if start % size or end % size:
                raise SearchFileError(
                    f"{place}.layer_range is [{start}, {end}]; layer_path.group is {size}, its bounds "
                    f"are multiples of that"
                )
            scale = self._read_scale(f"{place}.sources[0].parameters", source.parameters)
            for layer in range(start, end, size):
                yield source.model, layer, scale

    def _read_scale(self, place: str, parameters: Mapping[str, Any]) -> float:
        if not parameters:
            return 1.0
        given = parameters.get("scale")
        first = given[0] if isinstance(given, list) and given else None
        scale = first.get("value") if isinstance(first, Mapping) else None
        wanted = [*({"filter": name, "value": scale} for name in self._section.scaled), {"value": 1.0}]
        if not self._scales or set(parameters) != {"scale"} or given != wanted:
            names = ", ".join(self._section.scaled)
            what = f"one value for {names} and 1.0 for the rest" if self._scales else "none"
            raise SearchFileError(f"{place} is {dict(parameters)!r:.80}; the space has {what} there")
        return scale  # type: ignore[return-value]  # what is no number is told by the variable


def _scale(written: Mapping[str, Any], slot: _Slot) -> Variable:
    condition = (Clause(((slot.switch, (True,)),)),)
    variable, _ = variable_of(written, f"{slot.switch}.scale", condition)
    assert variable is not None, "the range was checked"
    # A layer as it is, where that lies in the range.
    if "start" not in written and variable.admitted(1.0)[1] is None:
        variable = replace(variable, start=variable.admitted(1.0)[0])
    return variable


def _scale_faults(written: Mapping[str, Any]) -> list[str]:
    """List what is wrong with the range of the scales."""
    where = "layer_path.scale"
    _, faults = variable_of(written, where, ())
    if faults:
        return faults
    if not all(map(is_number, written.get("choices", ()))):
        return [f"{where}.choices is {shown(written['choices'])}; each choice must be a finite number"]
    if written.get("points") is not None:
        return [f"{where}.points is {written['points']}; every layer has one scale anyway, remove points"]
    return []


def _checked(template: Mapping[str, Any]) -> LayerPath:
    """Check the section, and what stands beside it."""
    faults = [
        f"{key} stands beside layer_path, which says which layers are merged; remove {key}"
        for key in ("models", "slices", "modules", "intermediate", "parameters")
        if template.get(key)
    ]
    if template.get("merge_method", "passthrough") != "passthrough":
        faults.append(
            f"merge_method is {template['merge_method']!r}; a layer path is passthrough, write that"
        )
    faults += [
        f"{key} is a range; beside layer_path all values are fixed, write one of them"
        for key, node in template.items()
        if key != "layer_path" and is_range(node)
    ]
    try:
        section = LayerPath.model_validate(template["layer_path"])
    except ValidationError as error:
        known = {"": LayerPath.model_fields, "length": Length.model_fields}
        raise SearchFileError(
            faults + [f"layer_path.{fault}" for fault in schema_faults(error, known)]
        ) from None
    twice = {model for model in section.models if section.models.count(model) > 1}
    faults += [f"layer_path.models lists {model!r} twice; use repeats" for model in twice]
    faults += _scale_faults(section.scale) if section.scale is not None else []
    if faults:
        raise SearchFileError(faults)
    return section
