"""`evolve eval`: score models and recipes on tasks, or on a search's very documents, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evolve.baselines import baseline_jobs, same_prompts
from evolve.engines import EngineSettings, resolve_backend, resolve_device, shape
from evolve.errors import SearchFileError, TrialEngineError
from evolve.intervals import difference_interval, score_interval
from evolve.memory import refuse_too_large
from evolve.search_file import SECTIONS, ScoringSettings, TaskSpec
from evolve.study import Study
from evolve.tasks import SPLITS, Outcomes, TaskSet, reference_faults
from evolve.under_way import UnderWay, data_sets_counted, nobody_waits
from evolve.workers.worker import Job, Prompting, Worker, WorkerSetup
from merge_core.errors import CheckpointError, RecipeError, nearest
from merge_core.plan import (
    Sources,
    files_folder,
    has_own_tokenizer,
    merged_config,
    model_alone,
    origin,
    plan_merge,
)
from merge_core.recipe import Recipe, load_yaml
from merge_core.recipe_yaml import is_recipe_file


@dataclass(frozen=True)
class EvalOptions:
    """What to score on, `tasks` or the documents of the search in `like`, and against what.

    Attributes:
        split: with `like`, on which documents.
        limit, seed: documents a task, drawn by seed; None = all, and seed 0.
        baseline: the model that the others are compared with; None = the first.
        with_baselines: score each recipe's models alone, and their average, too.
        dtype: score in this dtype instead of the model's own.
        verify: compare the weights that the engine holds with each model's.
    """

    tasks: tuple[str, ...] = ()
    like: Path | None = None
    split: str = "search"
    limit: int | None = None
    seed: int | None = None
    task_paths: tuple[str, ...] | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    baseline: str | None = None
    with_baselines: bool = False
    verify: bool = False
    trust_remote_code: bool = False
    allow_unsafe_code: bool = False


def evaluate_models(
    models: Sequence[str], options: EvalOptions, under_way: UnderWay = nobody_waits
) -> list[dict[str, Any]]:
    """Score each model or recipe, asked with its own tokenizer.

    Args:
        models: folders, Hub ids, recipe files.
        options: see EvalOptions.
        under_way: told what is being done.

    Returns:
        One {"name", "scores", "intervals", "n_documents", "over", "differences"} a model, in order;
        "differences" holds by task its score minus that of the model named in "over", paired, with
        a 95% interval, and is empty for that model itself.

    Raises:
        SearchFileError: with every fault of models, recipes, tasks and options.
        TrialEngineError: a model could not be scored, or the engine holds other weights.
    """
    specs, scoring, seed = _what(options)
    sources = Sources()
    faults: list[str] = []
    recipes = {
        name: recipe
        for name in dict.fromkeys(models)
        if (recipe := _recipe(name, options.dtype, sources, faults)) is not None
    }
    if options.with_baselines:
        recipes |= _baselines(recipes, options.dtype)
    over = options.baseline or models[0]
    if over not in recipes and not faults:
        faults.append(
            f"--baseline is {over!r}, which is not among what is scored; {nearest(over, recipes)}"
        )
    device = resolve_device(options.device)
    backend = resolve_backend(scoring.backend, device)
    tasks = None
    try:
        with data_sets_counted(under_way, f"loading tasks {', '.join(spec.name for spec in specs)}"):
            tasks = TaskSet(specs, scoring, seed, allow_unsafe_code=options.allow_unsafe_code)
    except SearchFileError as error:
        faults += error.faults
    if tasks is not None and not faults:
        faults += [f for r in recipes.values() for f in reference_faults(tasks.tasks, r, sources)]
    if faults or tasks is None:
        raise SearchFileError(faults)

    setups = {}
    for name, recipe in recipes.items():
        reference, has_own = origin(recipe), has_own_tokenizer(recipe, sources)
        setups[name] = WorkerSetup(
            backend=backend,
            engine=EngineSettings(
                merged_config(recipe, sources),
                files_folder(recipe, sources),
                device,
                options.trust_remote_code,
                scoring.engine,
            ),
            tasks=tuple(specs),
            scoring=scoring,
            seed=seed,
            prompting=Prompting(None if has_own else reference, scoring.apply_chat_template),
            start=recipe if has_own else None,
            allow_unsafe_code=options.allow_unsafe_code,
        )
    outcomes = dict(_outcomes(recipes, setups, tasks, sources, options, under_way))
    return [_scored(name, outcomes, tasks, over) for name in recipes]


def _outcomes(
    recipes: Mapping[str, Recipe],
    setups: Mapping[str, WorkerSetup],
    tasks: TaskSet,
    sources: Sources,
    options: EvalOptions,
    under_way: UnderWay,
) -> Iterator[tuple[str, Outcomes]]:
    """Score all models, those of one shape with one engine, whose weights are changed in place."""
    split = SPLITS[SPLITS.index(options.split)]
    by_shape: dict[str, list[str]] = {}
    for name, setup in setups.items():
        by_shape.setdefault(shape(setup.engine), []).append(name)
    n_done = 0
    for names in by_shape.values():
        setup = setups[names[0]]
        under_way(f"starting the {setup.backend} engine")
        refuse_too_large(recipes[names[0]], sources, setup.engine.device, 1)
        worker = Worker(setup, tasks, sources)
        try:
            promptings: list[Prompting] = []
            for name in names:
                n_done += 1
                under_way(f"scoring: {name} ({n_done} of {len(setups)})")
                own = setups[name].prompting
                # Requests are built once for tokenizers that are the same.
                prompting = next((known for known in promptings if same_prompts(known, own)), own)
                promptings.append(prompting)
                result = worker.evaluate(Job(name, "trial", recipes[name], (split,), (prompting,)))
                if result.failure:
                    raise TrialEngineError(f"{name} could not be scored: {result.failure[1]}")
                if options.verify:
                    under_way(f"verifying: {name}")
                    _verify(worker, name, recipes[name])
                yield name, result.outcomes[prompting][split]
        finally:
            # Before the next engine takes its memory.
            worker.close()


def _verify(worker: Worker, name: str, recipe: Recipe) -> None:
    """Compare the weights that scored a model with those of its recipe.

    Raises:
        TrialEngineError: they differ.
    """
    differences = worker.engine.verify(recipe)
    if differences:
        raise TrialEngineError(
            f"{name}: the engine holds other weights than the recipe gives, in {len(differences)} "
            f"places: {'; '.join(differences[:3])}"
        )


def _scored(name: str, outcomes: Mapping[str, Outcomes], tasks: TaskSet, over: str) -> dict[str, Any]:
    own, others = outcomes[name], outcomes[over]
    differences = {}
    if name != over:
        differences = {
            task.key: asdict(difference_interval(task, own[task.key], others[task.key], tasks.seed))
            for task in tasks.tasks
        }
    return {
        "name": name,
        "scores": tasks.scores(own),
        "intervals": {
            task.key: asdict(score_interval(task, own[task.key], tasks.seed)) for task in tasks.tasks
        },
        "n_documents": {key: len(values) for key, values in own.items()},
        "over": over,
        "differences": differences,
    }


def _what(options: EvalOptions) -> tuple[list[TaskSpec], ScoringSettings, int]:
    """Find out tasks, scoring settings and seed: the options' own, or those of a search."""
    if options.split not in SPLITS:
        raise SearchFileError(f"--split is {options.split!r}; it must be search or holdout")
    if (options.like is None) == (not options.tasks):
        raise SearchFileError("name what to score on: --task NAME, or --like DIR, not both")
    changes: dict[str, Any] = {"backend": options.backend}
    if options.like is not None:
        _refuse_with_like(options)
        search_file = Study.open(options.like).search_file()
        if options.split == "holdout" and not search_file.scoring.holdout:
            raise SearchFileError(f"--split is holdout; the search in {options.like} kept none")
        specs, scoring, seed = search_file.tasks, search_file.scoring, search_file.search.seed
    else:
        if options.split != "search":
            raise SearchFileError("--split goes with --like DIR; without it all documents are one split")
        specs = [TaskSpec(name=name) for name in dict.fromkeys(options.tasks)]
        scoring, seed = ScoringSettings(limit=options.limit, holdout=0.0), options.seed or 0
    if options.task_paths:
        changes["task_paths"] = list(options.task_paths)
    data = scoring.model_dump() | {key: value for key, value in changes.items() if value is not None}
    if data["backend"] not in ("auto", "hf", "vllm"):
        raise SearchFileError(f"--backend is {data['backend']!r}; it must be hf or vllm")
    return list(specs), ScoringSettings(**data), seed


def _refuse_with_like(options: EvalOptions) -> None:
    given = {"--limit": options.limit, "--seed": options.seed}
    faults = [
        f"{option} is {value}; with --like the documents are those of the search in {options.like}, "
        f"leave it out, or name --task instead of --like"
        for option, value in given.items()
        if value is not None
    ]
    if faults:
        raise SearchFileError(faults)


def _recipe(model: str, dtype: str | None, sources: Sources, faults: list[str]) -> Recipe | None:
    """Read a recipe file, or make the recipe of a model as it is; collect faults."""
    try:
        if is_recipe_file(model):
            data = load_yaml(model)
            if isinstance(data, Mapping) and {*SECTIONS, "genome"} & set(data):
                faults.append(
                    f"{model} is a search file, whose values are ranges; name its result, the best.yml "
                    f"in the search's folder, or a recipe without {', '.join(SECTIONS)}"
                )
                return None
            recipe = Recipe.load(model, strict=False)
        else:
            recipe = model_alone(model)
        recipe = _in_dtype(recipe, dtype)
        plan_merge(recipe, sources)
    except (CheckpointError, RecipeError) as error:
        faults += error.faults
        return None
    return recipe


def _in_dtype(recipe: Recipe, dtype: str | None) -> Recipe:
    return Recipe.parse({**recipe.as_config(), "out_dtype": dtype}) if dtype else recipe


def _baselines(recipes: Mapping[str, Recipe], dtype: str | None) -> dict[str, Recipe]:
    """List what each recipe has to beat, but for what is scored already: its models alone, and
    their average."""
    found: dict[str, Recipe] = {}
    averages = []
    for name, recipe in recipes.items():
        if len(recipe.references()) < 2:
            continue
        *alone, average, _ = baseline_jobs(recipe, Prompting(origin(recipe), False))
        found |= {job.name: _in_dtype(job.recipe, dtype) for job in alone if job.name not in recipes}
        if average.recipe not in averages:
            averages.append(average.recipe)
            of = f" of {name}" if len(averages) > 1 else ""
            found[f"average{of}"] = _in_dtype(average.recipe, dtype)
    return found
