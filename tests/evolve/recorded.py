"""Studies as searches leave them, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evolve.objectives import Rating
from evolve.samplers import Proposal
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.tasks import Outcome
from evolve.workers.worker import Seconds


def search_file(task: str, n_values: int) -> SearchFile:
    data: dict[str, Any] = {
        "merge_method": {"choices": ["ties", "dare_ties"]},
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": {"low": 0, "high": 1}, "density": 0.5}} for m in "ab"
        ],
        "tasks": [task, "other"],
        "search": {"sampler": "random", "objective": "pareto" if n_values > 1 else "weighted_sum"},
    }
    return SearchFile(data, "reported")


def recorded(folder: Path, task: str, failure: str, n: int = 12, n_values: int = 1) -> Study:
    """A study of n candidates, every fifth failed."""
    file = search_file(task, n_values)
    space = file.space(lambda model: 2)
    with Study.create_or_resume(folder, None, file, {}, n_values) as study:
        for number in range(n):
            values = {v.name: v.from_unit(((number + 1) * 0.618034) % 1) for v in space.variables}
            study.begin(number, Proposal(values), space)
            if number % 5 == 4:
                study.fail(number, "engine", failure, Seconds(1.0, 0.0, 0.0))
                continue
            scores = {task: (number * 7 % 10) / 10, "other": (number * 3 % 10) / 10}
            # A constraint that trial 2 alone violates.
            violations = {"other not below 0.7": 0.1 if number == 2 else -0.1}
            objective = sum(scores.values())
            values = list(scores.values()) if n_values > 1 else [objective]
            rating = Rating(values, objective, violations=violations)
            outcomes = {task: [Outcome("leaf", 0, scores[task])]}
            study.complete(number, rating, scores, outcomes, Seconds(0.1, 0.2, 0.3), {})
        study.keep_note("documents", {task: "10 search"})
    return study
