"""What a command prints to stdout: the result table, the JSON object."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from evolve.budget import ended_at
from evolve.intervals import Interval
from evolve.loop import StudyResult
from evolve.study import Study
from evolve.verdict import Baseline, Verdict
from merge_core.recipe import Recipe


def result_json(result: StudyResult) -> dict[str, Any]:
    """Return the JSON object of `evolve run --json`."""
    return study_json(result.study, result.recipe, result.verdict)


def study_json(study: Study, recipe: Recipe | None, verdict: Verdict | None) -> dict[str, Any]:
    """Return the state of a study as the JSON contract spells it."""
    trials = study.trials()
    states = Counter(trial.state.name for trial in trials if trial.state != TrialState.RUNNING)
    finished = [trial for trial in trials if trial.state != TrialState.RUNNING]
    best = study.best()
    seconds = {
        part: sum(trial.user_attrs.get("seconds", {}).get(part, 0.0) for trial in finished)
        for part in ("merge", "load", "score")
    }
    ended = ended_at(study, study.search_file().search)
    is_current = verdict is not None and best is not None and verdict.trial == best.number
    return {
        "study": study.name,
        "n_trials": len(finished),
        "states": {state: states.get(state, 0) for state in ("COMPLETE", "FAIL", "PRUNED")},
        "best": None
        if best is None
        else {
            "number": best.number,
            "objective": study.objective(best),
            **_scores_json(study, best),
            "holdout": _intervals_json(verdict.holdout) if verdict and is_current else {},
            "recipe": recipe.as_config() if recipe else None,
            **_reported_json(verdict if is_current else None),
        },
        "pareto": [{"number": trial.number, **_scores_json(study, trial)} for trial in study.front()],
        "baselines": [
            {"name": b.name, "scores": b.scores, "holdout": _intervals_json(b.holdout)}
            | _reported_json(b)
            for b in (verdict.baselines if verdict else [])
        ],
        "gain": _gain_json(verdict) if is_current else None,
        "verdict": _without_best(bool(finished), ended) if best is None else _text(verdict, is_current),
        # A run that was killed could not add its time to the total.
        "seconds": {**seconds, "total": max(study.note("seconds_total") or 0.0, sum(seconds.values()))},
        "documents_scored": sum(trial.user_attrs.get("documents", 0) for trial in finished)
        + (study.note("finals") or {}).get("documents", 0),
        "noise": asdict(verdict.noise) if verdict and is_current and verdict.noise else None,
        "verdict_notes": _notes_json(study, verdict) if verdict and is_current else None,
        "hypervolume": asdict(volume) if (volume := study.hypervolume()) else None,
        "violations": None if best is None else study.violations(best),
        "gpu_hours": study.note("gpu_hours") or 0.0,
        "ended": ended,
    }


def _scores_json(study: Study, trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial's scores, with the standard errors of those that are estimates, if any."""
    errors = study.standard_errors(trial)
    return {"scores": study.scores(trial), **({"standard_errors": errors} if errors else {})}


def _without_best(has_failures: bool, ended: str | None) -> str:
    if has_failures:
        return "no verdict: no candidate completed"
    if ended:
        return f"no verdict: no candidate was begun, it ended at {ended}"
    return "no verdict yet: the search is not complete"


def _text(verdict: Verdict | None, is_current: bool) -> str:
    if verdict is None:
        return "no verdict yet: the search is not complete"
    return verdict.text if is_current else f"not yet for the new best; before: {verdict.text}"


def _reported_json(scored: Baseline | Verdict | None) -> dict[str, Any]:
    """Return what was scored on the tasks that are only reported, where there are any."""
    return {"report_only": _intervals_json(scored.report_only)} if scored and scored.report_only else {}


def _notes_json(study: Study, verdict: Verdict) -> dict[str, Any]:
    """Return what the verdict's sentence is made of; intervals and p-values are adjusted."""
    return {
        "shortlist": [
            {
                "number": member.trial,
                "holdout_objective": member.holdout_objective,
                "gain": asdict(member.gain) if member.gain else None,
            }
            for member in verdict.shortlist
        ],
        "differences": {task: asdict(found) for task, found in verdict.differences.items()},
        "report_only": {
            task: {name: asdict(found) for name, found in by_baseline.items()}
            for task, by_baseline in verdict.elsewhere.items()
        },
        "documents_needed": verdict.documents_needed,
        "notices": study.note("notices") or [],
    }


def _gain_json(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None or verdict.gain is None:
        return None
    return {**asdict(verdict.gain), "over": verdict.over, "shown": verdict.is_shown}


def _intervals_json(intervals: dict[str, Interval]) -> dict[str, Any]:
    return {task: asdict(interval) for task, interval in intervals.items()}


def print_result(data: dict[str, Any], folder: str) -> None:
    """Print the result table, the verdict and how to go on, to stdout."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    best = data["best"]
    if best is None:
        n_failed = data["states"]["FAIL"]
        so_far = f"{n_failed} failed" if n_failed else "none has finished"
        console.print(f"no candidate completed so far; {so_far}\n{data['verdict']}", soft_wrap=True)
        return
    # A candidate that was scored by another signal, so far, has no scores by metric.
    tasks = list(dict.fromkeys(key for b in (*data["baselines"], best) for key in b["scores"]))
    where = "holdout documents, with 95% intervals" if best["holdout"] else "search documents"
    # Above the table, not in it: there it would be folded to the table's width.
    console.print(f"{data['study']}: scores on {where}", soft_wrap=True)
    table = Table()
    table.add_column("model")
    for task in tasks:
        table.add_column(task, justify="right")
    reported = list(best.get("report_only", {}))
    for task in reported:
        table.add_column(f"{task}, only reported", justify="right")
    rows = [*data["baselines"], {**best, "name": f"best (trial {best['number']})"}]
    for row in rows:
        held, others = row["holdout"], row.get("report_only", {})
        if best["holdout"]:
            cells = [_cell(held[task]) if task in held else "" for task in tasks]
        else:
            cells = score_cells(row, tasks)
        cells += [_cell(others[task]) if task in others else "" for task in reported]
        table.add_row(row["name"], *cells)
    console.print(table)
    if not best["holdout"] and "standard_errors" in best:
        console.print(ESTIMATED, soft_wrap=True)
    if data["hypervolume"]:
        _print_front(console, data)
    states = data["states"]
    console.print(
        f"{data['n_trials']} candidates ({states['COMPLETE']} complete, {states['FAIL']} failed), best "
        f"objective {best['objective']:.4f}; seconds: merge {data['seconds']['merge']:.1f}, load "
        f"{data['seconds']['load']:.1f}, score {data['seconds']['score']:.1f}, total "
        f"{data['seconds']['total']:.1f}",
        markup=False,
        soft_wrap=True,
    )
    console.print(data["verdict"], markup=False, soft_wrap=True)
    finalists = (data["verdict_notes"] or {}).get("shortlist", [])
    if len(finalists) > 1:
        console.print(_finalists_line(finalists), markup=False, soft_wrap=True)
    if data["noise"]:
        console.print(_noise_line(data["noise"]), markup=False, soft_wrap=True)
    line = shlex.join(["evolve", "merge", f"{folder}/best.yml", f"{folder}/model"])
    console.print(
        f"recipe: {folder}/best.yml\nmerge it: {line}",
        markup=False,
        soft_wrap=True,
    )


def _finalists_line(finalists: list[dict[str, Any]]) -> str:
    """Say what each of the shortlist gained; the intervals hold for all of them at once."""
    gains = (
        f"trial {member['number']} {_cell(member['gain'], '+.3f') if member['gain'] else ''}".strip()
        for member in finalists
    )
    return f"finalists, with what each gained on the holdout: {', '.join(gains)}"


def _print_front(console: Console, data: dict[str, Any]) -> None:
    """Print the members of a Pareto front, and how the hypervolume grew."""
    members = data["pareto"]
    console.print(f"Pareto front on search documents: {len(members)} candidates", soft_wrap=True)
    if members:
        table = Table()
        table.add_column("trial")
        # Where finals are yet to come, others are known by another signal than those of earlier ones.
        tasks = list(dict.fromkeys(task for member in members for task in member["scores"]))
        for task in tasks:
            table.add_column(task, justify="right")
        for member in members:
            is_best = member["number"] == data["best"]["number"]
            name = f"{member['number']}{' (knee, best.yml)' if is_best else ''}"
            table.add_row(name, *score_cells(member, tasks))
        console.print(table)
        if any("standard_errors" in member for member in members):
            console.print(ESTIMATED, soft_wrap=True)
    volume = data["hypervolume"]
    so_far = volume["over_time"]
    at = sorted({max(1, round(len(so_far) * share)) for share in (0.25, 0.5, 0.75, 1)})
    reference = ", ".join(f"{value:.3f}" for value in volume["reference"])
    console.print(
        f"hypervolume {volume['value']:.4f} above ({reference}); "
        + ", ".join(f"{so_far[n - 1]:.4f} after {n}" for n in at),
        soft_wrap=True,
    )


ESTIMATED = "~ estimated from a part of the documents, with its standard error"


def score_cells(row: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """Spell what a candidate or baseline scored on each task's search documents, and what of it is
    estimated; nothing where it has no such score."""
    scores, errors = row["scores"], row.get("standard_errors", {})
    return [
        f"~{scores[task]:.3f} (±{errors[task]:.3f})"
        if task in errors
        else f"{scores[task]:.3f}"
        if task in scores
        else ""
        for task in tasks
    ]


def _noise_line(noise: dict[str, Any]) -> str:
    """Say how far the winner's scores moved when it was scored again."""
    parts = []
    for task, changes in noise["tasks"].items():
        changed = max(change["changed"] for change in changes.values())
        moved = max((change["difference"] for change in changes.values()), key=abs)
        if changed:
            parts.append(f"{changed:.1%} of the outcomes of {task} changed, its score by {moved:+.4f}")
    what = f"{'; '.join(parts)}; the objective by up to {noise['floor']:.4f}"
    return (
        f"noise floor, from scoring the best again, and again in another order: "
        f"{what if parts else 'no outcome changed'} ({noise['n_documents']} {noise['split']} documents)"
    )


def _cell(score: float | dict[str, float], spelling: str = ".3f") -> str:
    if not isinstance(score, dict):
        return f"{score:{spelling}}"
    value, low, high = (format(score[key], spelling) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def print_scores(models: list[dict[str, Any]]) -> None:
    """Print the table of `evolve eval`: a row a model, its difference to the baseline below."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    below = f"; below, the paired difference to {models[0]['over']}" if len(models) > 1 else ""
    console.print(f"scores with 95% intervals{below}", soft_wrap=True)
    table = Table()
    table.add_column("model", overflow="fold")
    for task in models[0]["scores"]:
        table.add_column(f"{task} ({models[0]['n_documents'][task]})", justify="right")
    for model in models:
        cells = []
        for task, interval in model["intervals"].items():
            lines = [_cell(interval)]
            if task in model["differences"]:
                lines.append(_cell(model["differences"][task], "+.3f"))
            cells.append("\n".join(lines))
        table.add_row(model["name"], *cells)
    console.print(table)
