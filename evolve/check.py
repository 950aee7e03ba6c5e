"""What `evolve run --check` prints: the space, the documents, and what the search will take."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from evolve.budget import most_candidates, n_gpus
from evolve.forecast import foretell
from evolve.memory import Memory
from evolve.merge_progress import duration
from evolve.plan import Plan
from evolve.power import resolvable_gain
from evolve.rehearsal import Rehearsal, amounts
from evolve.samplers.stages import sampler_of
from evolve.space.variable import Variable
from evolve.tasks import Split
from evolve.workers.start import Workers
from merge_core.machine import in_units

# On so many of the documents two candidates of a search are taken to differ: one right, one wrong.
DISCORDANT = 0.2


def check_json(
    plan: Plan, memory: Memory, rehearsal: Rehearsal, workers: Workers, gpu_hour_price: float | None
) -> dict[str, Any]:
    """Return the JSON object of `evolve run --check --json`; seconds, bytes, GB as in `Memory`."""
    settings, pace = plan.search_file.search, rehearsal.pace
    forecast = foretell(pace, amounts(plan, workers.count))
    gpus = n_gpus(plan, workers)
    gpu_hours = forecast.gpu_hours(gpus)
    return {
        "search": plan.search_file.name,
        "variables": [_variable_json(variable) for variable in plan.space.variables],
        "n_points": plan.space.n_points,
        "notes": list(plan.notes),
        "documents": plan.documents(),
        "resolvable": {
            task.key: {
                split: _finite(resolvable_gain(task.n_documents(split), DISCORDANT))
                for split in _splits(plan)
            }
            if task.key in rehearsal.binary
            else None
            for task in plan.tasks.tasks
        },
        "discordant": DISCORDANT,
        "sampler": settings.sampler,
        "why_sampler": plan.why_sampler,
        "generation": _generation(plan),
        "n_iterations": settings.n_iterations,
        "n_candidates": most_candidates(plan),
        "signal": settings.followed,
        "follows": [task.key for task in plan.followed.tasks],
        "racing": settings.racing,
        "rounds": settings.rounds,
        "polish": settings.n_polish,
        "engine": plan.setup.backend,
        "device": plan.setup.engine.device,
        "workers": workers.count,
        "memory": asdict(memory),
        "disk": {"trial_bytes": pace.trial_bytes, "total_bytes": forecast.disk_bytes},
        "measured": {
            "candidates": rehearsal.n_candidates,
            "failures": list(rehearsal.failures),
            "first": pace.first_s,
            "merge": pace.merge_s,
            "load": pace.load_s,
            "score": pace.score_s,
            "other": pace.other_s,
            "candidate": pace.candidate_s,
        },
        "seconds": {**forecast.parts(), "total": forecast.total_s},
        "gpus": gpus,
        "gpu_hours": gpu_hours,
        "money": None if gpu_hour_price is None else gpu_hours * gpu_hour_price,
    }


def _splits(plan: Plan) -> tuple[Split, ...]:
    return ("search", "holdout") if plan.search_file.scoring.holdout else ("search",)


def _finite(gain: float) -> float | None:
    return gain if math.isfinite(gain) else None


def _variable_json(variable: Variable) -> dict[str, Any]:
    is_number = variable.choices is None
    return {
        "name": variable.name,
        "low": variable.low if is_number else None,
        "high": variable.high if is_number else None,
        "log": variable.log,
        "step": variable.step,
        "choices": None if variable.choices is None else list(variable.choices),
        "start": variable.start,
        "read_if": " and ".join(map(str, variable.condition)) or None,
    }


def _generation(plan: Plan) -> int | None:
    """Return how many candidates a generation has; None where the sampler knows none."""
    settings = plan.search_file.search
    sampler = sampler_of(settings, plan.space, len(plan.objectives.names))
    return getattr(sampler, "popsize", None)


def print_check(data: dict[str, Any]) -> None:
    """Print what a search would do, from its JSON object."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    console.print(_variables(data["variables"]))
    if data["n_points"] is not None:
        say(f"the space has {data['n_points']} candidates at most")
    for note in data["notes"]:
        say(f"note: {note}")
    for task, documents in data["documents"].items():
        say(f"{task}: {documents}{_shows(data['resolvable'].get(task))}")
    if any(data["resolvable"].values()):
        say(
            f"(8 times in 10, at 95% certainty, where two models differ on {data['discordant']:.0%} of "
            f"the documents)"
        )
    if data["signal"] != "metric":
        say(f"signal {data['signal']}: the sampler follows {', '.join(data['follows'])}")
    say(_plan_line(data))
    say(str(Memory(**data["memory"])))
    disk = data["disk"]
    say(f"disk: {in_units(disk['trial_bytes'])} a candidate, {in_units(disk['total_bytes'])} in all")
    for line in _time_lines(data):
        say(line)
    say(_money(data))
    for failure in data["measured"]["failures"]:
        say(f"failed: {failure}")
    say("the search can begin")


def _variables(variables: list[dict[str, Any]]) -> Table:
    table = Table(title="variables")
    has_conditions = any(variable["read_if"] for variable in variables)
    for column in ("name", "values", "scale", "start", *(["read where"] if has_conditions else [])):
        table.add_column(column, overflow="fold")
    for variable in variables:
        if variable["choices"] is not None:
            values, scale = ", ".join(map(str, variable["choices"])), "choice"
        else:
            values = f"{variable['low']:g} to {variable['high']:g}"
            scale = "log" if variable["log"] else "linear"
            if variable["step"] is not None:
                scale += f", step {variable['step']:g}"
        start = variable["start"]
        start = f"{start:g}" if isinstance(start, float) else str(start)
        condition = [variable["read_if"] or "always"] if has_conditions else []
        table.add_row(variable["name"], values, scale, start, *condition)
    return table


def _shows(gains: dict[str, float | None] | None) -> str:
    if gains is None:
        return ""
    parts = [
        f"a gain of {gain:.3f} on {split}" if gain is not None else f"no gain on {split}"
        for split, gain in gains.items()
    ]
    return f"; shows {', '.join(parts)}"


def _plan_line(data: dict[str, Any]) -> str:
    generation = f" in generations of {data['generation']}" if data["generation"] else ""
    raced = ", raced over blocks of documents" if data["racing"] == "always" else ""
    rounds = f", {data['rounds']} rounds" if data["rounds"] > 1 else ""
    n_candidates = data["n_candidates"]
    n_polish = min(data["polish"], n_candidates)
    polish = f", the last {n_polish} drawn around the best" if n_polish else ""
    workers = f", {data['workers']} workers" if data["workers"] > 1 else ""
    return (
        f"sampler {data['sampler']} ({data['why_sampler']}), {n_candidates} candidates"
        f"{generation}{rounds}{raced}{polish}, engine {data['engine']} on {data['device']}{workers}"
    )


def _time_lines(data: dict[str, Any]) -> list[str]:
    measured, seconds = data["measured"], data["seconds"]
    split = ", ".join(f"{part} {measured[part]:.2f} s" for part in ("merge", "load", "score", "other"))
    parts = ", ".join(
        f"{part.replace('_', '-')} {duration(seconds[part])}"
        for part in seconds
        if part != "total" and seconds[part]
    )
    return [
        f"a candidate: {measured['candidate']:.2f} s ({split}), the first {measured['first']:.2f} s; "
        f"measured on {measured['candidates']}",
        f"time: about {duration(seconds['total'])} ({parts})",
    ]


def _money(data: dict[str, Any]) -> str:
    if not data["gpus"]:
        return "money: no GPU is used"
    hours = f"{data['gpu_hours']:.3g} GPU hours on {data['gpus']:g} GPUs"
    if data["money"] is None:
        return f"money: {hours}; --gpu-hour-price P gives the price"
    return f"money: about {data['money']:.2f} for {hours}"
