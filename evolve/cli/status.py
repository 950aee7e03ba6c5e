"""`evolve status`: how far a search is."""

from __future__ import annotations

import json

from evolve.cli.opened import open_search
from evolve.cli.options import FolderArgument, JsonOption


def status(
    folder: FolderArgument,
    as_json: JsonOption = False,
) -> None:
    """Show how far a search is, its best trial and its failures."""
    from evolve.report import print_result, study_json

    study, recipe_of, verdict = open_search(folder)
    best = study.best()
    data = study_json(study, recipe_of(best) if best else None, verdict)
    if as_json:
        print(json.dumps(data))
        return
    print_result(data, str(folder))
    for trial in study.trials():
        if "failure" in trial.user_attrs:
            failure = trial.user_attrs["failure"]
            print(f"trial {trial.number} failed at {failure['kind']}: {failure['text'].splitlines()[0]}")
