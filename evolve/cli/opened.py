"""A search's folder, opened by the commands that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve.errors import SearchFileError

if TYPE_CHECKING:
    from evolve.study import Study
    from evolve.verdict import Verdict


def open_search(folder: Path) -> tuple[Study, Callable[[Any], Any], Verdict | None]:
    """Open a search for reading: the study, trial to recipe, and the verdict if there is one.

    Raises:
        SearchFileError, StorageError: there is none, or its record cannot be read.
    """
    from evolve.record_check import reading
    from evolve.study import Study
    from evolve.verdict import Verdict

    study = Study.open(folder)
    space = study.search_file().space(lambda model: study.note("n_layers"))
    note = study.note("verdict")

    def recipe_of(trial: Any) -> Any:
        with reading(f"{folder}: trial {trial.number}"):  # search.yml may be another than it was
            return space.recipe(trial.params)

    return study, recipe_of, Verdict.recalled(note) if note else None


def unwritable(output: Path, error: OSError) -> SearchFileError:
    """Say that what `-o` names cannot be written."""
    return SearchFileError(
        f"-o is {output}, which cannot be written ({error.strerror}); name another file"
    )
