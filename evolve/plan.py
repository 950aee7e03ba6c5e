"""Everything a search needs, checked and opened before anything is written or computed."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from evolve.automatic import race_of, resolve_adapters, resolve_polish, resolve_racing, resolve_signal
from evolve.baselines import same_prompts
from evolve.engines import EngineSettings, resolve_backend, resolve_device
from evolve.errors import SearchFileError
from evolve.genome import GenomeSpace
from evolve.known import known_recipes, own_recipes
from evolve.memory import merged_bytes
from evolve.mergekit_file import SIGMA0
from evolve.objectives import Objectives, constraint_faults
from evolve.racing import Race
from evolve.samplers.auto import resolve_sampler, sampler_faults
from evolve.search_file import SearchFile
from evolve.space import SearchSpace, Value
from evolve.tasks import ScoredTask, TaskSet, reference_faults, report_set
from evolve.under_way import UnderWay, data_sets_counted, nobody_waits
from evolve.workers.worker import Prompting, WorkerSetup
from merge_core.checkpoint.write import has_tokenizer, tokenizer_digest
from merge_core.errors import CheckpointError, MergeError
from merge_core.plan import (
    Sources,
    files_folder,
    has_own_tokenizer,
    merged_config,
    origin,
    plan_merge,
    unmatched_filters,
)
from merge_core.recipe import Recipe
from merge_core.reference import result_in

# Finalists, where candidates are not raced: a twentieth of them, and no fewer than three.
_SHARE_OF_FINALISTS = 0.05
FEWEST_FINALISTS = 3
# Of `search:`, what cma alone reads.
_CMA_SETTINGS = ("sigma0", "population_size")


@dataclass(frozen=True)
class Plan:
    """A search that can begin.

    Attributes:
        search_file: with backend, sampler and racing resolved.
        why_sampler: why `auto` chose the sampler.
        known: recipes that are tried first, by name: values of the active variables.
        notes: what a user should know of this search, one line each.
        report_only: tasks that only winner and baselines are scored on; None where there are none.
    """

    search_file: SearchFile
    space: SearchSpace
    tasks: TaskSet
    sources: Sources
    start: Recipe
    setup: WorkerSetup
    why_sampler: str
    known: dict[str, dict[str, Value]]
    notes: tuple[str, ...] = ()
    report_only: TaskSet | None = None

    def identity(self) -> dict[str, Any]:
        """What makes two searches the same one; a resume with another is refused."""
        settings = self.search_file.as_dict()
        files = self.tasks.files() | (self.report_only.files() if self.report_only else {})
        models = (*self.references(), *(r for tasks in self._sets() for r in tasks.references()))
        cma = {key: settings["search"][key] for key in _CMA_SETTINGS}
        return {
            "recipe": self.search_file.template,
            "tasks": settings["tasks"],
            "documents": self.documents(),
            "scoring": settings["scoring"],
            "seed": self.search_file.search.seed,
            "objective": self.search_file.search.objective,
            "signal": self.search_file.search.signal,
            "constraints": settings["search"]["constraints"],
            "layer_granularity": self.search_file.search.layer_granularity,
            "sampler": self.search_file.search.sampler,
            "rounds": self.search_file.search.rounds,
            "polish": self.search_file.search.polish,
            "racing": self.search_file.search.racing,
            "seed_recipes": [self.known[file] for file in self.search_file.search.seed_recipes],
            **{key: value for key, value in cma.items() if value is not None},
            "checkpoints": {
                reference: self.sources.architecture(reference).checkpoint.fingerprint()
                for reference in models
            }
            | {f"+{name}": self.sources.adapter(name).fingerprint() for name in self.space.adapters()},
            **({"report_only": settings["report_only"]} if self.report_only else {}),
            # What weights mean, and what a model is asked, is part of the scores.
            "configs": {
                reference: _digest(self.sources.architecture(reference).checkpoint.config)
                for reference in models
            },
            "tokenizers": self._tokenizers(),
            # Texts, and the files of functions: what they hold is part of the scores.
            **({"files": files} if files else {}),
        }

    def _tokenizers(self) -> dict[str, str]:
        """Hash the tokenizer files of each model, and of each adapter that is put on a result."""
        folders = {
            reference: self.sources.architecture(reference).checkpoint.tokenizer_folder
            for reference in self.references()
        }
        folders |= {f"+{name}": self.sources.adapter(name).folder for name in self.space.adapters()}
        return {reference: tokenizer_digest(folder) for reference, folder in folders.items()}

    @property
    def followed(self) -> TaskSet:
        """What is scored of a candidate: the tasks by `search.signal`."""
        return self.tasks.following(self.search_file.search.followed)

    @property
    def objectives(self) -> Objectives:
        """What the sampler sees of a candidate."""
        return Objectives(self.tasks, self.search_file.search)

    @property
    def needs_finals(self) -> bool:
        """Whether the sampler sees something else than merges' metrics over all search documents."""
        settings = self.search_file.search
        return settings.signal != "metric" or settings.racing == "always" or settings.n_adapters > 0

    @property
    def n_finalists(self) -> int:
        """How many candidates the finals score; of a front every member, if those are more."""
        if not self.needs_finals:
            return 0
        if race := self.race():
            return race.n_finalists
        share = math.ceil(_SHARE_OF_FINALISTS * self.search_file.search.n_iterations)
        return max(FEWEST_FINALISTS, share)

    def race(self) -> Race | None:
        """Return a new race, where candidates are raced."""
        settings = self.search_file.search
        return race_of(settings, self.tasks) if settings.racing == "always" else None

    @property
    def largest(self) -> Recipe:
        """The candidate whose weights take the most memory."""
        return max(self.space.examples(), key=lambda recipe: merged_bytes(recipe, self.sources))

    @property
    def n_layers(self) -> int:
        """Layers of which groups are made: the donor's, or those of a genome's first model."""
        space = self.space
        model = space.genome.models[0] if isinstance(space, GenomeSpace) else origin(self.start)
        return self.sources.architecture(model).n_layers

    def references(self) -> list[str]:
        """Every model that some candidate of the space may use."""
        return self.space.references()

    def documents(self) -> dict[str, str]:
        """Say per task how its documents were split."""
        drawn = {
            task.key: f"{task.n_documents('search')} search, {task.n_documents('holdout')} holdout, "
            f"{self._drawn(task)}"
            for task in self.tasks.tasks
        }
        reported = self.report_only.tasks if self.report_only else []
        return drawn | {
            task.key: f"{task.n_documents('search')} reported, {self._drawn(task)}" for task in reported
        }

    def metrics(self) -> dict[str, str]:
        """Say per task what its score is: metric and filter, where it has one."""
        return {
            task.key: f"{task.metric},{task.filter}" if task.filter else task.metric
            for task in self.tasks.tasks
        }

    def notices(self) -> list[str]:
        """Say what readers of the result must know: documents that are a benchmark's, code that ran."""
        found = self.tasks.notices()
        if self.setup.engine.trust_remote_code:
            with_code = [
                reference
                for reference in self.references()
                if any(self.sources.architecture(reference).checkpoint.folder.glob("*.py"))
            ]
            whose = f"the Python files of {', '.join(with_code)}" if with_code else "no model has any"
            found.append(f"--trust-remote-code let models' own Python files run: {whose}")
        unsafe = [task.key for tasks in self._sets() for task in tasks.tasks if task.runs_code]
        if unsafe:
            found.append(f"--allow-unsafe-code let code run that models wrote, for {', '.join(unsafe)}")
        return found

    def _drawn(self, task: ScoredTask) -> str:
        """Say how documents were chosen, and from which split, as its data set calls it."""
        splits = ", ".join(dict.fromkeys(leaf.split for leaf in task.leaves))
        if self.search_file.scoring.draw == "first":
            return f"the first ones of {splits} for the search"
        return f"drawn by seed {self.tasks.seed} from {splits}"

    def _sets(self) -> list[TaskSet]:
        return [self.tasks, *([self.report_only] if self.report_only else [])]


def make_plan(
    search_file: SearchFile,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_unsafe_code: bool = False,
    under_way: UnderWay = nobody_waits,
) -> Plan:
    """Check a search file against models, tasks and machine.

    Args:
        search_file: what to search.
        device: torch device; None = a GPU if there is one.
        trust_remote_code: allow the models' own Python files to run.
        allow_unsafe_code: allow tasks that execute what a model wrote.
        under_way: told what is being done; downloads may take long.

    Raises:
        SearchFileError: with every fault found.
        HubUnreachableError: a model or data set must be fetched and the Hub does not answer.
    """
    sources = Sources(keep=True)
    device = resolve_device(device)
    backend = resolve_backend(search_file.scoring.backend, device)

    try:
        space = search_file.space(lambda reference: sources.architecture(reference).n_layers)
    except CheckpointError as error:
        raise SearchFileError(error.faults) from None
    n_objectives = len(search_file.tasks) if search_file.search.objective == "pareto" else 1
    search_file = search_file.changed(scoring={"backend": backend})
    if unfit := sampler_faults(search_file.search, space, n_objectives):
        raise SearchFileError(unfit)
    start = space.recipe(space.starts())
    faults = _model_faults(space, start, sources, under_way)
    own: dict[str, dict[str, Value]] = {}
    try:
        own = own_recipes(space, search_file.search.seed_recipes)
    except SearchFileError as error:
        faults += error.faults
    sets: list[TaskSet] = []
    why = ""
    loads_reported = partial(report_set, searched=search_file.tasks)
    for load, specs in ((TaskSet, search_file.tasks), (loads_reported, search_file.report_only)):
        if load is loads_reported and not specs:
            continue
        named = ", ".join(dict.fromkeys(task.name for task in specs))
        try:
            with data_sets_counted(under_way, f"loading tasks {named}"):
                tasks = load(
                    specs,
                    search_file.scoring,
                    search_file.search.seed,
                    allow_unsafe_code=allow_unsafe_code,
                )
            sets.append(tasks)
            if load is TaskSet:
                search_file, why = _resolved(search_file, tasks, space, n_objectives)
        except SearchFileError as error:
            faults += error.faults
    if not faults:  # a signal at fault is told above
        faults += constraint_faults(search_file.search, sets[0], _base_on_disk(start))
        faults += [fault for tasks in sets for fault in reference_faults(tasks.tasks, start, sources)]
        faults += [fault for reported in sets[1:] for fault in reported.shared_faults(sets[0])]
        try:
            at_once = resolve_adapters(search_file, space, sources, device)
            search_file = search_file.changed(search={"adapters_at_once": at_once})
        except (SearchFileError, MergeError) as error:
            faults += error.faults
    if faults:
        raise SearchFileError(faults)
    tasks, *reported = sets
    planned = plan_merge(start, sources)
    notes = [
        *_unread_settings(search_file),
        *space.notes,
        *dict.fromkeys(note for each in sets for note in each.notes),
        *planned.warnings,
        *unmatched_filters(start, planned),
    ]
    if n_adapters := search_file.search.n_adapters:
        notes.append(
            f"candidates are scored {n_adapters} at once, as adapters; finalists and baselines as merges"
        )
    if not tasks.has_holdout:
        search_file = search_file.changed(scoring={"holdout": 0.0})
    own_tokenizers = any(has_own_tokenizer(recipe, sources) for recipe in space.examples())
    setup = WorkerSetup(
        backend=backend,
        engine=EngineSettings(
            config=merged_config(start, sources),
            folder=files_folder(start, sources),
            device=device,
            trust_remote_code=trust_remote_code,
            options=search_file.scoring.engine,
        ),
        tasks=tuple(search_file.tasks),
        scoring=search_file.scoring,
        seed=search_file.search.seed,
        prompting=Prompting(
            None if own_tokenizers else origin(start), search_file.scoring.apply_chat_template
        ),
        allow_unsafe_code=allow_unsafe_code,
        signal=search_file.search.followed,
        report_only=tuple(search_file.report_only),
        start=start if own_tokenizers else None,
        references=tuple(space.references()),
        adapters=tuple(space.adapters()),
    )
    known = known_recipes(space, own, lambda model: sources.architecture(model).n_layers)
    return Plan(search_file, space, tasks, sources, start, setup, why, known, tuple(notes), *reported)


def _resolved(
    search_file: SearchFile, tasks: TaskSet, space: SearchSpace, n_objectives: int
) -> tuple[SearchFile, str]:
    """Return the file with what `auto` means for signal, racing, sampler and polish, and why the sampler.

    Raises:
        SearchFileError: what is asked for cannot be had with these tasks.
    """
    signal = resolve_signal(search_file.search, tasks)
    tasks.following(signal)
    search_file = search_file.changed(search={"signal": signal})
    racing = resolve_racing(search_file.search, tasks)
    search_file = search_file.changed(search={"racing": racing})
    settings = search_file.search
    sampler, why = resolve_sampler(
        settings.sampler, space, settings.n_iterations, n_objectives, racing == "always"
    )
    polish = resolve_polish(settings, space)
    return search_file.changed(search={"sampler": sampler, "polish": polish}), why


def _unread_settings(search_file: SearchFile) -> list[str]:
    """List the settings of cma that were given and that the sampler does not read."""
    sampler = search_file.search.sampler
    given = {key: getattr(search_file.search, key) for key in _CMA_SETTINGS}
    if search_file.is_mergekit and given["sigma0"] == SIGMA0:  # such a file's default
        del given["sigma0"]
    return [
        f"search.{key} is {value:g}, which only cma reads, and the sampler is {sampler}; remove it"
        for key, value in given.items()
        if value is not None and sampler != "cma"
    ]


def _base_on_disk(recipe: Recipe) -> str | None:
    """Name the base that is also a baseline: one that no recipe has to make first."""
    base = recipe.base_model
    return None if base is None or result_in(base, recipe.intermediate) else base


def _model_faults(space: SearchSpace, start: Recipe, sources: Sources, under_way: UnderWay) -> list[str]:
    faults: list[str] = []
    references = space.references()
    for i, reference in enumerate(references):
        under_way(f"opening the models: {reference} ({i + 1} of {len(references)})")
        faults += sources.open_all([reference])
    if faults:
        return faults
    config: dict[str, Any] = {}
    donors: dict[str, None] = {}
    examples = space.examples()
    for recipe in examples:
        donors[origin(recipe)] = None
        try:
            faults += space.tensor_faults(planned.name for planned in plan_merge(recipe, sources))
            files_folder(recipe, sources)
            config = config or merged_config(recipe, sources)
        except MergeError as error:
            faults += error.faults
    if faults:
        return list(dict.fromkeys(faults))
    folder = files_folder(start, sources)
    if not has_tokenizer(folder):
        faults.append(
            f"model {origin(start)!r} has no tokenizer files in {folder}; scoring needs them, add them"
        )
    faults += [
        f"model {other!r} gives some candidates their tokenizer, which is another than that of "
        f"{origin(start)!r}, and requests are built once; fix base_model, or use models with one "
        f"tokenizer"
        for other in donors
        if not any(has_own_tokenizer(recipe, sources) for recipe in examples)
        and not same_prompts(Prompting(origin(start), False), Prompting(other, False))
    ]
    kind = config.get("model_type")
    if not kind and "auto_map" not in config:
        faults.append(f"{folder / 'config.json'} has no model_type; use a Transformers model")
    return faults


def _digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
