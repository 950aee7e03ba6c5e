"""The checkpoints that recipes refer to, opened once and kept with what was learned of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

from merge_core.architecture import Architecture
from merge_core.checkpoint.adapter import Adapter
from merge_core.checkpoint.apart import ApartCheckpoint
from merge_core.checkpoint.locate import split_adapter
from merge_core.checkpoint.read import Checkpoint
from merge_core.errors import CheckpointError, RecipeError
from merge_core.experts import Spelling
from merge_core.leniency import Leniency
from merge_core.reference import result_in
from merge_core.tokenizer.loaded import Tokenizers

if TYPE_CHECKING:
    from merge_core.plan import MergePlan
    from merge_core.recipe import Recipe

# A search has one structure, or a few where layer ranges or models are searched too.
_MAX_REMEMBERED = 32


class Remembered:
    """What was made of the last few things; several threads may ask for it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return what `build` made for a key, now or before; errors are not remembered."""
        with self._lock:
            if key in self._known:
                return self._known[key]
        made = build()  # may ask for others
        with self._lock:
            while len(self._known) >= _MAX_REMEMBERED:
                del self._known[next(iter(self._known))]
            return self._known.setdefault(key, made)


class Sources:
    """Open checkpoints, statistics of their deltas, and the structures planned over them.

    Args:
        keep: keep cast or copied tensors too, within half of the memory that is free: for a
            search, where they are wanted again.
        shared_as: keep casts once for all processes of this host that give the same name.

    Attributes:
        results: the recipes of intermediate results, by the names under which they are models.
        prompted: what prompts gave that were run through models.
    """

    def __init__(self, keep: bool = False, shared_as: str | None = None) -> None:
        # Not before: torch takes a second to import, and who reads a search file needs none.
        from merge_core.residence import Residence, host_share_bytes
        from merge_core.shared import SharedTensors
        from merge_core.statistics import StatisticsCache

        self.keeps = keep
        self._shared = SharedTensors(shared_as) if keep and shared_as else None
        self.residence = Residence(keep, shared=self._shared)
        self.tokenizers = Tokenizers()
        self._architectures: dict[str, Architecture] = {}
        self._structures = Remembered()
        self.results: Mapping[str, Recipe] = {}
        self.prompted = Remembered()
        self._texts = Remembered()
        self._leniency = Leniency()
        self._results: dict[str, tuple[str, Architecture]] = {}
        self._adapters: dict[str, Adapter] = {}
        # What is made of each result's last state, by its name.
        self._made_of_results: dict[str, dict[Hashable, Architecture]] = {}
        self._apart: dict[str, Spelling] = {}
        self._taken_apart: dict[Hashable, Architecture] = {}
        self.statistics = StatisticsCache(host_share_bytes() // 4 if keep else 0)

    def within(self, recipe: Recipe, **plan_options: Any) -> Self:
        """Return these sources as a recipe sees them.

        Its intermediate results are models too. Where of what it merges one mixture's experts are
        joined and another's are not, all are seen one by one.

        Args:
            recipe: gives the results their names.
            plan_options: of `plan_merge`, for the recipes of those results; without any they stay
                what they are.
        """
        view = copy.copy(self)
        if recipe.intermediate:
            view.results = recipe.intermediate
        if plan_options:
            view._leniency = Leniency(**plan_options)
        view._apart = view._to_be_taken_apart(recipe)
        return view

    def _to_be_taken_apart(self, recipe: Recipe) -> dict[str, Spelling]:
        """Find the models whose experts are joined while another's are not, and how to spell them."""
        try:
            opened = {name: self._opened(name) for name in recipe.inputs()}
        except (CheckpointError, RecipeError):  # told when all are opened for the plan
            return {}
        spellings = [model.expert_spelling for model in opened.values()]
        spelling = next((found for found in spellings if found), None)
        if spelling is None:
            return {}
        return {name: spelling for name, model in opened.items() if model.has_joined_experts}

    def architecture(self, reference: str) -> Architecture:
        """Open a model, or return it where it is open already.

        Raises:
            CheckpointError, HubUnreachableError: it cannot be opened.
        """
        whole, spelling = self._opened(reference), self._apart.get(reference)
        return whole if spelling is None else self._with_single_experts(reference, whole, spelling)

    def _opened(self, reference: str) -> Architecture:
        """Open a model, its experts as they are stored."""
        if (result := result_in(reference, self.results)) is not None:
            name, adapter = result
            return self._result(name) if adapter is None else self._adapted_result(name, adapter)
        if reference not in self._architectures:
            model, adapter = split_adapter(reference)
            self._architectures[reference] = (
                Architecture(Checkpoint(reference))
                if adapter is None
                else self._adapted(self._opened(model), adapter)
            )
        return self._architectures[reference]

    def makes(self, reference: str) -> bool:
        """Tell whether a model is put together here, by a recipe or an adapter, and lies in no folder."""
        return bool(result_in(reference, self.results)) or split_adapter(reference)[1] is not None

    def _with_single_experts(
        self, reference: str, whole: Architecture, spelling: Spelling
    ) -> Architecture:
        """Return an open model with its experts one by one, the same one each time."""
        result = result_in(reference, self.results)
        known = self._taken_apart if result is None else self._made_of(result[0])
        key = reference, spelling
        if key not in known:
            known[key] = Architecture(ApartCheckpoint(whole.checkpoint, spelling))
        return known[key]

    def _made_of(self, name: str) -> dict[Hashable, Architecture]:
        """Return the models that are made of a result; they are kept as long as it is."""
        return self._made_of_results.setdefault(name, {})

    def adapter(self, reference: str) -> Adapter:
        """Open an adapter, or return it where it is open already.

        Raises:
            CheckpointError, HubUnreachableError: it cannot be opened.
        """
        if reference not in self._adapters:
            self._adapters[reference] = Adapter(reference)
        return self._adapters[reference]

    def _adapted(self, base: Architecture, adapter: str) -> Architecture:
        """Put an adapter on an open model; several adapters of one model share its files."""
        from merge_core.adapted import AdaptedCheckpoint

        reference = f"{base.checkpoint.reference}+{adapter}"
        return Architecture(AdaptedCheckpoint(reference, base, self.adapter(adapter)))

    def _adapted_result(self, name: str, adapter: str) -> Architecture:
        """Return an intermediate result with an adapter."""
        base, key = self._result(name), f"{name}+{adapter}"
        known = self._made_of(name)
        if key not in known:
            known[key] = self._adapted(base, adapter)
        return known[key]

    def _result(self, name: str) -> Architecture:
        """Return an intermediate result; of each name the last one is kept."""
        # It is merged as any recipe is, over these sources.
        from merge_core.intermediate import MergedCheckpoint

        text = self._text_of(name)
        known, architecture = self._results.get(name, ("", None))
        if architecture is None or known != text:
            if architecture is not None:
                for former in (architecture, *self._made_of_results.pop(name, {}).values()):
                    self.residence.forget(former.checkpoint)
                    self.statistics.forget(former.checkpoint.identity)
            try:
                checkpoint = MergedCheckpoint(name, self.results[name], self, text, self._leniency)
            except (CheckpointError, RecipeError) as error:
                raise type(error)([f"intermediate.{name}: {fault}" for fault in error.faults]) from None
            architecture = Architecture(checkpoint)
            self._results[name] = text, architecture
        return architecture

    def _text_of(self, name: str) -> str:
        """Return the text of a result's recipe and of all that it uses, which tells it from others."""
        recipe = self.results[name]
        used = [self._text_of(other) for other in recipe.uses(self.results)]
        # What is remembered holds the recipe, so that no other has its id.
        _, own = self._texts.get(id(recipe), lambda: (recipe, recipe.to_yaml()))
        return "---\n".join([*used, own, repr(self._leniency)])

    def plans(self, references: Collection[str]) -> dict[str, MergePlan]:
        """Return the plans of the intermediate results among them, those with adapters too, by name."""
        from merge_core.intermediate import MergedCheckpoint

        results = [result for r in references if (result := result_in(r, self.results))]
        opened = {name: self._result(name).checkpoint for name, _ in results}
        return {name: c.plan for name, c in opened.items() if isinstance(c, MergedCheckpoint)}

    def structures(self, references: Collection[str]) -> Hashable:
        """Return what of intermediate results has a say in how a recipe is planned: all but numbers."""
        return tuple(
            self.architecture(reference).checkpoint.structure
            for reference in references
            if result_in(reference, self.results)
        )

    def open_all(self, references: Collection[str], adapters: Collection[str] = ()) -> list[str]:
        """Open several models and adapters; return the faults of those that cannot be opened."""
        faults: list[str] = []
        opening = [(self.architecture, reference) for reference in references]
        for opened, reference in [*opening, *((self.adapter, adapter) for adapter in adapters)]:
            try:
                opened(reference)
            except CheckpointError as error:
                faults += error.faults
        return faults

    def folders(self, recipe: Recipe) -> list[Path]:
        """List the folders that a recipe's models and adapters are read from."""
        models = [self.architecture(reference).checkpoint for reference in recipe.references()]
        stores = [store for model in models for store in model.stores()]
        return [store.folder for store in (*stores, *map(self.adapter, recipe.adapters()))]

    def remembered(self, structure: Hashable, build: Callable[[], Any]) -> Any:
        """Return what `build` made of a structure, now or before; errors are not remembered."""
        return self._structures.get(structure, build)

    def close(self) -> None:
        """Leave what is shared with other processes."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None
