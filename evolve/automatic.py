"""What `auto` means for a search: the signal that a sampler follows, whether it races, how many
candidates are drawn around the best, and whether they are served as adapters."""

from __future__ import annotations

from contextlib import suppress

from evolve.engines import EngineSettings, shape
from evolve.errors import SearchFileError
from evolve.racing import Race, race_over
from evolve.search_file import SearchFile, SearchSettings, Signal
from evolve.space import SearchSpace
from evolve.tasks import TaskSet
from merge_core.errors import RecipeError
from merge_core.plan import Sources, files_folder, merged_config
from merge_core.recipe import Recipe

# Candidates that `auto` serves at once on a GPU.
ADAPTERS = 8


def resolve_signal(settings: SearchSettings, tasks: TaskSet) -> Signal:
    """Choose for `auto`: the likelihood where every entry has references, else the metric.

    A constraint is on a metric, which the likelihood alone would not score.
    """
    if settings.signal != "auto":
        return settings.signal
    if settings.constraints or not tasks.have_references:
        return "metric"
    return "likelihood"


def race_of(settings: SearchSettings, tasks: TaskSet) -> Race | None:
    """Make the race of a search; None where a score is no mean over documents."""
    followed = tasks.following(settings.followed).tasks
    is_pareto = settings.objective == "pareto"
    return race_over(followed, settings.n_iterations, settings.seed, is_pareto)


def resolve_racing(settings: SearchSettings, tasks: TaskSet) -> str:
    """Choose for `auto`: race where that saves most of the documents, and the likelihood is followed.

    A few zeros and ones say too little: raced by the metric, or both, winners fall behind
    (configs/README.md).

    Args:
        settings: with the signal resolved.

    Raises:
        SearchFileError: racing is asked for, and a score is no mean over documents.
    """
    race = race_of(settings, tasks)
    if settings.racing == "always" and race is None:
        followed = tasks.following(settings.followed).tasks
        whole = [task.key for task in followed if not task.is_raced]
        raise SearchFileError(
            f"search.racing is always, but {', '.join(whole)} cannot be told from a part of the "
            f"documents; write auto or none"
        )
    if settings.racing != "auto":
        return settings.racing
    if settings.sampler == "greedy_soup":  # it compares whole scores
        return "none"
    pays = race is not None and settings.followed == "likelihood" and race.is_worthwhile()
    return "always" if pays else "none"


def resolve_polish(settings: SearchSettings, space: SearchSpace) -> int:
    """Choose for `auto`: a fifth of the candidates where estimates of one objective have a centre.

    That is a raced search whose variables are numbers; elsewhere none.

    Args:
        settings: with racing resolved.
    """
    if settings.polish != "auto":
        return settings.polish
    is_raced = settings.racing == "always" and settings.objective == "weighted_sum"
    has_centre = all(variable.choices is None for variable in space.variables)
    return settings.n_iterations // 5 if is_raced and has_centre else 0


def resolve_adapters(
    search_file: SearchFile, space: SearchSpace, sources: Sources, device: str
) -> int | str:
    """Choose for `auto`: several candidates at once on a GPU, where vLLM can serve all as adapters.

    On a CPU each is merged: with many documents serving them together was slower there
    (merge_core/README.md).

    Args:
        search_file: with the backend resolved.
        device: the engine's.

    Returns:
        How many at once, or "none".

    Raises:
        SearchFileError: a number is asked for, and candidates cannot be served so.
    """
    wanted = search_file.search.adapters_at_once
    if wanted == "none" or (wanted == "auto" and device == "cpu"):
        return "none"
    why_not = _why_no_adapters(search_file, space, sources)
    if why_not is None:
        return ADAPTERS if wanted == "auto" else wanted
    if wanted == "auto":
        return "none"
    raise SearchFileError(f"search.adapters_at_once is {wanted}; {why_not}, or write none")


def _why_no_adapters(search_file: SearchFile, space: SearchSpace, sources: Sources) -> str | None:
    """Say what keeps candidates from being served as adapters, and what to change; None for nothing."""
    from merge_core.combined import NoAdapterError, combined_adapters  # it imports torch

    backend, engine = search_file.scoring.backend, search_file.scoring.engine
    if backend != "vllm":
        return f"the {backend} engine serves none; use --backend vllm"
    if search_file.search.candidate_timeout_s is not None:
        return "candidates that are served together are not stopped one by one; drop candidate_timeout_s"
    if any(engine.get(f"{kind}_parallel_size", 1) != 1 for kind in ("tensor", "pipeline")):
        return "only an engine of one rank serves them; drop scoring.engine's parallel sizes"
    if any(task.kind == "seconds_per_document" for task in search_file.tasks):
        return "seconds of candidates that are served together say nothing; drop seconds_per_document"
    examples = _examples(space)
    try:
        adapters = combined_adapters(examples, sources)
    except NoAdapterError as error:
        return f"a candidate is no adapter of one base ({error}); change that"
    if not adapters:
        return "no candidate could be merged at the values tried; change their ranges"
    bases = {adapter.base for adapter in adapters}
    settings = [(merged_config(each, sources), files_folder(each, sources)) for each in examples]
    shapes = {shape(EngineSettings(config, folder)) for config, folder in settings}
    if len(bases) > 1 or len(shapes) > 1:
        return "candidates have several bases, shapes or dtypes; name one"
    if sources.architecture(adapters[0].base).expert_spelling is not None:
        return "adapters of mixtures are not served; name a dense base"
    return None


def _examples(space: SearchSpace) -> list[Recipe]:
    """Return recipes of every model, method and shape: numbers at their starts, all low, and all high.

    At the starts alone weights may sum to 1 by chance.
    """
    found = space.examples()
    choices = [(v.name, choice) for v in space.variables for choice in v.choices or ()]
    for end in ("low", "high"):
        numbers = {v.name: getattr(v, end) for v in space.variables if v.choices is None}
        values = {**space.starts(), **numbers}
        for point in (values, *({**values, name: choice} for name, choice in choices)):
            with suppress(RecipeError):
                found = [*found, space.recipe(point)]
    return found
