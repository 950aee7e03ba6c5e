"""Exported recipes: the plain merge config of a trial, with its provenance as head comments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from evolve.provenance import head_lines
from merge_core.checkpoint.write import write_text
from merge_core.methods import METHODS
from merge_core.moe.recipe import MoeRecipe
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from evolve.plan import Plan
    from evolve.study import Study
    from evolve.verdict import Verdict


def keep_current(
    study: Study, plan: Plan, verdict: Verdict | None = None, has_new_scores: bool = False
) -> None:
    """Keep best.yml and pareto/ what the record says, whatever was killed before.

    A new member of the front is in its place before one that it dominates goes.

    Args:
        verdict: on the best, once it is known.
        has_new_scores: whether scores changed of what may be written already.
    """
    best = study.best()
    if best is not None and (has_new_scores or _trial_in(study.folder / "best.yml") != best.number):
        write_best(study, plan, best)
    folder = study.folder / "pareto"
    folder.mkdir(exist_ok=True)
    members = {f"trial-{trial.number}.yml": trial for trial in study.front()}
    for name, trial in members.items():
        if has_new_scores or not (folder / name).exists():
            is_judged = verdict is not None and verdict.trial == trial.number
            write_text(folder / name, _text(study, plan, trial, verdict if is_judged else None))
    for path in folder.glob("trial-*.yml*"):  # also what a killed process left half written
        if path.name not in members:
            path.unlink()


def write_best(study: Study, plan: Plan, best: FrozenTrial, verdict: Verdict | None = None) -> None:
    """Write best.yml, and its copy in pareto/, with the holdout scores once they are known."""
    text = _text(study, plan, best, verdict)
    member = study.folder / "pareto" / f"trial-{best.number}.yml"
    for path in (study.folder / "best.yml", *([member] if member.exists() else [])):
        write_text(path, text)


def _text(study: Study, plan: Plan, trial: FrozenTrial, verdict: Verdict | None) -> str:
    recipe = plan.space.recipe(trial.params)
    head = head_lines(
        recipe,
        study.name,
        trial.number,
        plan.search_file.search.seed,
        study.scores(trial),
        verdict,
        plan.documents(),
        study.violations(trial),
        study.note("notices") or plan.notices(),
        plan.metrics(),
        study.is_scored_as_adapter(trial),
        study.standard_errors(trial),
    )
    return export_yaml(recipe, head)


def _trial_in(path: Path) -> int | None:
    """Read whose recipe an exported file holds, at its head."""
    if not path.is_file():
        return None
    found = re.search(rb", trial (\d+), seed \d+\n", path.read_bytes())
    return int(found[1]) if found else None


def export_yaml(recipe: Recipe, head: Iterable[str]) -> str:
    """Return a trial's recipe as YAML that mergekit reads too, headed by where it comes from.

    Args:
        head: what is known of it, see `head_lines`.
    """
    lines = [*head, *mergekit_notes(recipe)]
    return "".join(f"# {line}\n" for line in lines) + recipe.to_yaml()


def mergekit_notes(recipe: Recipe) -> list[str]:
    """Say where mergekit would make another model of this recipe, or none."""
    documents = (*recipe.results().values(), recipe)
    if recipe.intermediate and any(isinstance(document, MoeRecipe) for document in documents):
        return ["mergekit-multi does not know experts; only `evolve merge` makes this model"]
    notes = []
    if recipe.intermediate:
        notes.append("mergekit reads several documents with `mergekit-multi`")
    for document in documents:
        notes += _notes_on_one(document)
    return list(dict.fromkeys(notes))


def _notes_on_one(recipe: Recipe) -> list[str]:
    """Say it of one document."""
    if isinstance(recipe, MoeRecipe):
        return recipe.mergekit_notes()
    notes = []
    parts = [(part, METHODS[part.method]) for part in recipe.parts() if part.method]
    for name in dict.fromkeys(method.name for _, method in parts if method.is_random):
        notes.append(
            f"mergekit draws other random masks for {name} and ignores random_seed; "
            f"only `evolve merge` makes the model that was scored"
        )
    _, body = recipe.body()
    if body.models and body.slices:
        notes.append("mergekit takes models or slices, not both; only `evolve merge` makes this model")
    if any(entry.merge_method for entry in body.slices or ()):
        notes.append("mergekit has one method for all slices; only `evolve merge` makes this model")
    if body.slices and any(not source.place for part, _ in parts for source in part.sources):
        notes.append("mergekit wants the base model listed in every slice; it is added here by itself")
    if any(method.first_is_base for _, method in parts) and not recipe.base_model:
        notes.append("mergekit wants a base_model; without one the first model is the base here")
    has_weight = all(
        any("weight" in level for level in (*source.levels, *part.levels))
        for part, method in parts
        if method.name == "linear"
        for source in part.sources
    )
    if not has_weight:
        notes.append("mergekit wants a weight for every model; without one all count the same here")
    return notes
