"""`evolve eval`: score models and recipes on tasks, or on a search's very documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evolve.engines import EngineSettings, resolve_backend, resolve_device
from evolve.errors import SearchFileError, TrialEngineError
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.study import Study
from evolve.tasks import SPLITS, TaskSet, reference_faults
from evolve.verdict import score_interval
from evolve.workers.worker import Job, Prompting, Worker, WorkerSetup
from merge_core.plan import Sources, donor, merged_config, model_alone, plan_merge
from merge_core.recipe import Recipe


@dataclass(frozen=True)
class EvalOptions:
    """What to score on: `tasks`, or the documents of the search in `like`."""

    tasks: tuple[str, ...] = ()
    like: Path | None = None
    split: str = "search"
    limit: int | None = None
    seed: int = 0
    task_paths: tuple[str, ...] | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    allow_unsafe_code: bool = False


def evaluate_models(models: Sequence[str], options: EvalOptions) -> list[dict[str, Any]]:
    """Score each model or recipe.

    Returns:
        One {"name", "scores", "intervals", "n_documents"} a model, in order.

    Raises:
        SearchFileError: with every fault of models, recipes, tasks and options.
    """
    specs, scoring, seed = _what(options)
    sources = Sources()
    faults: list[str] = []
    recipes = [_recipe(model, options.dtype, sources, faults) for model in models]
    device = resolve_device(options.device)
    backend = resolve_backend(scoring.backend, device)
    tasks = None
    try:
        tasks = TaskSet(specs, scoring, seed, allow_unsafe_code=options.allow_unsafe_code)
    except SearchFileError as error:
        faults += error.faults
    if tasks is not None and not faults:
        faults += [f for r in recipes if r for f in reference_faults(tasks.tasks, r, sources)]
    if faults or tasks is None:
        raise SearchFileError(faults)
    scored = []
    for name, recipe in zip(models, recipes, strict=True):
        assert recipe is not None
        reference = donor(recipe)
        setup = WorkerSetup(
            backend=backend,
            engine=EngineSettings(
                merged_config(recipe, sources),
                sources.architecture(reference).checkpoint.folder,
                device,
                options.trust_remote_code,
                scoring.engine,
            ),
            tasks=tuple(specs),
            scoring=scoring,
            seed=seed,
            prompting=Prompting(reference, scoring.apply_chat_template),
            allow_unsafe_code=options.allow_unsafe_code,
        )
        worker = Worker(setup, tasks, sources)
        split = SPLITS[SPLITS.index(options.split)]
        result = worker.evaluate(Job(name, "trial", recipe, (split,), (setup.prompting,)))
        if result.failure:
            raise TrialEngineError(f"{name} could not be scored: {result.failure[1]}")
        outcomes = result.outcomes[setup.prompting][split]
        intervals = {
            task.key: asdict(score_interval(task, outcomes[task.key], seed)) for task in tasks.tasks
        }
        scored.append(
            {
                "name": name,
                "scores": tasks.scores(outcomes),
                "intervals": intervals,
                "n_documents": {key: len(values) for key, values in outcomes.items()},
            }
        )
    return scored


def _what(options: EvalOptions) -> tuple[list[TaskSpec], ScoringSettings, int]:
    """Find out tasks, scoring settings and seed: the options' own, or those of a search."""
    if options.split not in SPLITS:
        raise SearchFileError(f"--split is {options.split!r}; it must be search or holdout")
    if (options.like is None) == (not options.tasks):
        raise SearchFileError("name what to score on: --task NAME, or --like DIR, not both")
    changes: dict[str, Any] = {"backend": options.backend}
    if options.like is not None:
        search_file = Study.open(options.like).search_file()
        if options.split == "holdout" and not search_file.scoring.holdout:
            raise SearchFileError(f"--split is holdout; the search in {options.like} kept none")
        specs, scoring, seed = search_file.tasks, search_file.scoring, search_file.search.seed
    else:
        if options.split != "search":
            raise SearchFileError("--split goes with --like DIR; without it all documents are one split")
        specs = [TaskSpec(name=name) for name in dict.fromkeys(options.tasks)]
        scoring, seed = ScoringSettings(limit=options.limit, holdout=0.0), options.seed
    if options.task_paths:
        changes["task_paths"] = list(options.task_paths)
    data = scoring.model_dump() | {key: value for key, value in changes.items() if value is not None}
    if data["backend"] not in ("auto", "hf", "vllm"):
        raise SearchFileError(f"--backend is {data['backend']!r}; it must be hf or vllm")
    return list(specs), ScoringSettings(**data), seed


def _recipe(model: str, dtype: str | None, sources: Sources, faults: list[str]) -> Recipe | None:
    """Read a recipe file, or make the recipe of a model as it is; collect faults."""
    from merge_core.errors import CheckpointError, RecipeError

    try:
        if Path(model).is_file() and Path(model).suffix in (".yml", ".yaml"):
            recipe = Recipe.load(model, strict=False)
        else:
            recipe = model_alone(model)
        if dtype:
            recipe = Recipe.parse({**recipe.as_config(), "out_dtype": dtype})
        plan_merge(recipe, sources)
    except (CheckpointError, RecipeError) as error:
        faults += error.faults
        return None
    return recipe
