"""`evolve export`: a trial's recipe, or those of the front, as plain merge configs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evolve.cli.opened import open_search, unwritable
from evolve.cli.options import FolderArgument
from evolve.errors import SearchFileError

if TYPE_CHECKING:
    from evolve.study import Study


def export(
    folder: FolderArgument,
    trial: Annotated[int | None, typer.Option(help="trial number; default: the best")] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="every member of the Pareto front")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", help="file, or with --pareto a folder; default: stdout")
    ] = None,
) -> None:
    """Write a trial's recipe as a plain merge config, or those of the front."""
    from evolve.export import export_yaml
    from evolve.provenance import head_lines
    from merge_core.checkpoint.write import write_text

    study, recipe_of, verdict = open_search(folder)
    seed, documents = study.search_file().search.seed, study.note("documents")
    texts = {}
    for member in _exported(study, trial, pareto):
        recipe = recipe_of(member)
        head = head_lines(
            recipe,
            study.name,
            member.number,
            seed,
            study.scores(member),
            verdict if verdict and verdict.trial == member.number else None,
            documents,
            study.violations(member),
            study.note("notices") or (),
            study.note("metrics"),
            study.is_scored_as_adapter(member),
            study.standard_errors(member),
        )
        texts[f"trial-{member.number}.yml"] = export_yaml(recipe, head)
    whole = "---\n".join(texts.values())
    if output is None:
        print(whole, end="")
        return
    try:
        if pareto and not output.suffix:
            output.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                write_text(output / name, text)
        else:
            write_text(output, whole)
    except OSError as error:
        raise unwritable(output, error) from None


def _exported(study: Study, number: int | None, pareto: bool) -> list[Any]:
    """Return the trials that `evolve export` is asked for: the front, one by number, or the best."""
    from optuna.trial import TrialState

    if pareto and number is not None:
        raise SearchFileError(f"--trial is {number} beside --pareto; give one of them")
    trials = study.trials()
    best = study.best()
    if best is None:
        raise SearchFileError(
            f"DIR is {study.folder}, where no trial is complete yet; let the search run first"
        )
    if pareto:
        if not (front := study.front()):
            raise SearchFileError(
                "--pareto asks for candidates that meet every constraint, and none does; without it "
                "the nearest is exported"
            )
        return front
    if number is None:
        return [best]
    if not 0 <= number < len(trials) or trials[number].state != TrialState.COMPLETE:
        complete = [t.number for t in trials if t.state == TrialState.COMPLETE]
        raise SearchFileError(
            f"--trial is {number}, which is not a completed trial; use one of {complete[:20]}"
            + (" ..." if len(complete) > 20 else "")
        )
    return [trials[number]]
