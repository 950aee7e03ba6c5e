"""`evolve report`: a search as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evolve.cli.opened import open_search, unwritable
from evolve.cli.options import FolderArgument
from evolve.merge_progress import say


def report(
    folder: FolderArgument,
    output: Annotated[Path | None, typer.Option("-o", help="file; default: DIR/report.html")] = None,
) -> None:
    """Write a report of a search: one HTML file with tables and charts."""
    from evolve.html_report import html_report
    from evolve.report import study_json
    from merge_core.checkpoint.write import write_text

    study, recipe_of, verdict = open_search(folder)
    best = study.best()
    data = study_json(study, recipe_of(best) if best else None, verdict)
    output = output or folder / "report.html"
    text = html_report(study, study.search_file().space(lambda model: study.note("n_layers")), data)
    try:
        write_text(output, text)
    except OSError as error:
        raise unwritable(output, error) from None
    say(f"wrote {output}")
