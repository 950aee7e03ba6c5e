"""The verdict: what the winner gained over the best baseline, on documents the search never saw.

A frozen shortlist is scored on the holdout, and the member that does best there is the winner.
Its gain over the best baseline has an interval that stays honest under both choices; how, says
`evolve.comparison`.

Why three members, and why the holdout picks. In 600 simulated searches a row, of 160 candidates that
differ and four baselines (`python tests/benchmarks/null_test.py --power`), a gain was claimed in,
and the pick truly gained:

    correlation, spread of abilities   search's first   best of 3 on holdout   best of 5
    0.0, 0.1                           9.5%, +0.053     9.7%, +0.057           9.2%, +0.058
    0.0, 0.2                           64%,  +0.130     75%,  +0.135           74%,  +0.135
    0.8, 0.1                           33%,  +0.062     39%,  +0.065           37%,  +0.066

Standard errors are at most 2% and 0.0013. Looking at three costs the claim nothing and the pick is
better; at more, nothing is won but scorings.

Where a study is taken up again with more candidates, its next shortlist joins those frozen before:
the intervals then hold for all members that the holdout was ever asked about. They do not correct
for going on *because* no gain was shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evolve.comparison import Comparison, Difference
from evolve.intervals import Interval, score_interval
from evolve.noise import Noise
from evolve.tasks import Outcomes, Split, TaskSet, n_documents

# Candidates that the holdout is asked about.
SHORTLIST = 3


@dataclass(frozen=True)
class Baseline:
    """A recipe the winner must beat, and what it scored."""

    name: str
    scores: dict[str, float]
    holdout: dict[str, Interval]
    holdout_objective: float | None
    report_only: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """A trial of the shortlist: its objective on the holdout, and its gain over the best baseline."""

    trial: int
    holdout_objective: float
    gain: Interval | None


@dataclass(frozen=True)
class Elsewhere:
    """What was scored on the tasks of `report_only:`, the winner and the baselines by name."""

    tasks: TaskSet
    winner: Outcomes
    baselines: Mapping[str, Outcomes]


@dataclass(frozen=True)
class Verdict:
    """The winner against the baselines.

    `gain` is None where there is no holdout or no baseline, `noise` where it was not measured.

    Attributes:
        shortlist: all that the holdout was asked about, in the search's order.
        differences: the winner minus the best baseline, by task.
        report_only: the winner's scores on the tasks that are only reported.
        elsewhere: of these, the winner minus each baseline: by task, by baseline.
        documents_needed: holdout documents that would show a gain of the size seen; None where it is
            shown, or is none.
        violations: the winner's by split and constraint; at most 0 where it is met.
    """

    trial: int
    holdout: dict[str, Interval]
    baselines: list[Baseline]
    gain: Interval | None
    over: str | None
    text: str
    noise: Noise | None = None
    shortlist: list[Member] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict)
    report_only: dict[str, Interval] = field(default_factory=dict)
    elsewhere: dict[str, dict[str, Difference]] = field(default_factory=dict)
    documents_needed: int | None = None
    violations: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_shown(self) -> bool:
        """Whether the gain's interval lies above zero, and the gain above the noise floor.

        Where no candidate meets every constraint on the search documents, no gain is shown.
        """
        if _broken(self.violations.get("search", {})):
            return False
        return self.gain is not None and self.gain.low > 0 and self.gain.value > _floor(self.noise)

    @classmethod
    def recalled(cls, data: Mapping[str, Any]) -> Verdict:
        """Rebuild a verdict from what `asdict` made of it."""

        def intervals(by_task: Mapping[str, Any]) -> dict[str, Interval]:
            return {task: Interval(**interval) for task, interval in by_task.items()}

        def differences(by_name: Mapping[str, Any]) -> dict[str, Difference]:
            return {name: Difference(**difference) for name, difference in by_name.items()}

        def gain(found: Mapping[str, Any]) -> Interval | None:
            return Interval(**found["gain"]) if found["gain"] else None

        told = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        return cls(
            **told
            | {
                "holdout": intervals(data["holdout"]),
                "baselines": [
                    Baseline(
                        **baseline
                        | {key: intervals(baseline.get(key, {})) for key in ("holdout", "report_only")}
                    )
                    for baseline in data["baselines"]
                ],
                "gain": gain(data),
                "noise": Noise.recalled(data["noise"]) if data.get("noise") else None,
                "shortlist": [
                    Member(**member | {"gain": gain(member)}) for member in data.get("shortlist", [])
                ],
                "differences": differences(data.get("differences", {})),
                "report_only": intervals(data.get("report_only", {})),
                "elsewhere": {k: differences(v) for k, v in data.get("elsewhere", {}).items()},
            }
        )


def winner_of(tasks: TaskSet, members: Mapping[int, Outcomes]) -> int:
    """Return the trial with the best objective on the holdout; of equals the search's favourite.

    Args:
        members: the shortlist in the search's order, each with its holdout outcomes; empty ones
            without a holdout, where the search's favourite wins.
    """
    if not _has_holdout(members):
        return next(iter(members))
    return max(members, key=lambda trial: tasks.objective(tasks.scores(members[trial])))


def conclude(
    tasks: TaskSet,
    members: Mapping[int, Outcomes],
    baselines: Mapping[str, Mapping[Split, Outcomes]],
    noise: Noise | None = None,
    elsewhere: Elsewhere | None = None,
    trial: int | None = None,
) -> Verdict:
    """Compare the winner with the best baseline on the holdout.

    Args:
        members: as for `winner_of`.
        baselines: by name the outcomes of each split.
        noise: how far scorings of the winner differ; a gain no larger is not claimed.
        elsewhere: tasks that are only reported.
        trial: the winner, where not every member may win.
    """
    trial = winner_of(tasks, members) if trial is None else trial
    has_holdout = _has_holdout(members)
    measured = []
    for name, outcomes in baselines.items():
        holdout = outcomes["holdout"] if has_holdout else {}
        measured.append(
            Baseline(
                name,
                tasks.scores(outcomes["search"]),
                _intervals(tasks, holdout),
                tasks.objective(tasks.scores(holdout)) if has_holdout else None,
                _intervals(elsewhere.tasks, elsewhere.baselines[name]) if elsewhere else {},
            )
        )
    found = Verdict(trial, _intervals(tasks, members[trial]), measured, None, None, "", noise)
    if elsewhere:
        found = replace(found, **_reported(trial, elsewhere))
    if not has_holdout:
        return replace(found, text=sentence("no gain shown: no holdout", tasks, found))
    objectives = {n: tasks.objective(tasks.scores(outcomes)) for n, outcomes in members.items()}
    if not measured:
        shortlist = [Member(n, objective, None) for n, objective in objectives.items()]
        text = sentence("no gain shown: no baseline could be scored", tasks, found)
        return replace(found, shortlist=shortlist, text=text)
    compared = Comparison(tasks, members, {name: o["holdout"] for name, o in baselines.items()})
    gains = compared.gains()
    gain = gains[trial]
    over = compared.best_baseline()
    found = replace(
        found,
        gain=gain,
        over=over,
        shortlist=[Member(n, objective, gains[n]) for n, objective in objectives.items()],
        differences=compared.differences(trial, over, noise),
    )
    n = n_documents(members[trial])
    found = replace(found, documents_needed=compared.documents_needed(trial, n))
    return replace(found, text=sentence(_head(tasks, found, gain, n), tasks, found))


def _has_holdout(members: Mapping[int, Outcomes]) -> bool:
    return any(any(outcomes.values()) for outcomes in members.values())


def _intervals(tasks: TaskSet, outcomes: Outcomes) -> dict[str, Interval]:
    return {
        task.key: score_interval(task, outcomes[task.key], tasks.seed)
        for task in tasks.tasks
        if outcomes.get(task.key)
    }


def _reported(trial: int, elsewhere: Elsewhere) -> dict[str, Any]:
    """Compare winner and baselines on the tasks that are only reported."""
    tasks, winner, baselines = elsewhere.tasks, elsewhere.winner, elsewhere.baselines
    by_task: dict[str, dict[str, Difference]] = {}
    compared = Comparison(tasks, {trial: winner}, baselines) if baselines else None
    for name in baselines:
        for task, difference in (compared.differences(trial, name) if compared else {}).items():
            by_task.setdefault(task, {})[name] = difference
    return {"report_only": _intervals(tasks, winner), "elsewhere": by_task}


def _floor(noise: Noise | None) -> float:
    return noise.floor if noise else 0.0


def constrained(
    verdict: Verdict, tasks: TaskSet, search: Mapping[str, float], holdout: Mapping[str, float]
) -> Verdict:
    """Add what the winner keeps of the constraints, on search and holdout documents.

    Where it meets not all of them on the search documents no candidate did, and nothing is claimed.

    Args:
        search, holdout: by constraint how far it is violated; at most 0 where it is met.
    """
    text = verdict.text
    if broken := _broken(search):
        verdict = replace(verdict, documents_needed=None)  # no number of them would show it
        head = f"no gain shown: no candidate met every constraint; the nearest violates {broken}"
        text = sentence(head, tasks, verdict)
    elif broken := _broken(holdout):
        text = f"{text}; on the holdout the winner violates {broken}"
    elif holdout:
        text = f"{text}; the constraints are met on the holdout too"
    violations = {"search": dict(search), "holdout": dict(holdout)}
    return replace(verdict, text=text, violations=violations)


def _broken(violations: Mapping[str, float]) -> str:
    found = [f"'{name}' by {violation:.3f}" for name, violation in violations.items() if violation > 0]
    return " and ".join(found)


# ---- the sentence -------------------------------------------------------------------------------


def sentence(head: str, tasks: TaskSet, verdict: Verdict) -> str:
    """Say it all in one sentence: the gain, where it comes from, what was lost, on which documents."""
    parts = [head]
    if verdict.documents_needed:
        parts.append(
            f"it would take about {_rounded(verdict.documents_needed)} such documents to show a gain of "
            f"this size"
        )
    for what, is_better in (("gained", True), ("lost", False)):
        told = {k: d for k, d in verdict.differences.items() if d.is_better is is_better}
        if told and len(tasks.tasks) > 1:
            parts.append(f"{what} on " + ", ".join(f"{task} {_numbers(d)}" for task, d in told.items()))
    for task, by_baseline in verdict.elsewhere.items():
        losses = {name: d for name, d in by_baseline.items() if d.is_better is False}
        if losses:
            name = max(losses, key=lambda name: abs(losses[name].value))
            parts.append(f"lost on {task}: {_numbers(losses[name])} against {name!r}")
    return "; ".join([*parts, *tasks.notices()])


def _head(tasks: TaskSet, verdict: Verdict, gain: Interval, n: int) -> str:
    what = "the weighted sum" if len(tasks.tasks) > 1 else tasks.tasks[0].key
    where = f"{_numbers(gain)} in {what} over {verdict.over!r} on {n} holdout documents, at 95% certainty"
    if len(verdict.shortlist) > 1:
        where += f" for {len(verdict.shortlist)} finalists"
    reasons = []
    if gain.low <= 0:
        where_it_lies = "includes zero" if gain.high >= 0 else "lies below zero"
        reasons.append(f"the interval {where_it_lies}")
    if 0 < gain.value <= _floor(verdict.noise):
        reasons.append(f"scoring the winner again moved it by up to {_floor(verdict.noise):.3f}")
    if reasons:
        return f"no gain shown: {where}; {', and '.join(reasons)}"
    return f"gain shown: {where}"


def _numbers(found: Interval | Difference) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _rounded(n: int) -> str:
    """Round up to two digits: more would claim a precision that is not there."""
    unit = 10 ** max(len(str(n)) - 2, 0)
    return f"{-(-n // unit) * unit:,}"
