"""What `auto` means for a search's tasks: the signal that a sampler follows, and whether it races."""

from __future__ import annotations

from evolve.errors import SearchFileError
from evolve.racing import Race, race_over
from evolve.search_file import SearchSettings, Signal
from evolve.tasks import TaskSet


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

    A few zeros and ones say too little: raced by the metric, or both, winners fall behind (README).

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
