"""The verdict: what the winner gained over the best baseline, on documents the search never saw.

Intervals are 95% percentile bootstrap over documents, paired: the same resampled documents for
both models. For 0/1 outcomes a resample also holds two made-up documents, one that only the winner
gets right and one that only the baseline does (Agresti and Min 2005,
https://doi.org/10.1002/sim.1781), so that a handful of equal documents cannot claim certainty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evolve.errors import TrialTaskError
from evolve.noise import Noise
from evolve.tasks import Outcome, Outcomes, ScoredTask, Split, TaskSet, n_documents
from evolve.workers.worker import Job, Prompting
from merge_core.checkpoint.locate import locate
from merge_core.checkpoint.write import TEMPLATE_FILES, TOKENIZER_FILES
from merge_core.plan import donor, model_alone
from merge_core.recipe import Recipe

N_RESAMPLES = 2000
LEVEL = 0.95
# Documents drawn in one array operation.
_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Baseline:
    """A recipe the winner must beat, and what it scored."""

    name: str
    scores: dict[str, float]
    holdout: dict[str, Interval]
    holdout_objective: float | None


@dataclass(frozen=True)
class Verdict:
    """The winner against the baselines.

    `gain` is None where there is no holdout or no baseline, `noise` where it was not measured.
    """

    trial: int
    holdout: dict[str, Interval]
    baselines: list[Baseline]
    gain: Interval | None
    over: str | None
    text: str
    noise: Noise | None = None

    @property
    def is_shown(self) -> bool:
        """Whether the gain's interval lies above zero, and the gain above the noise floor."""
        return self.gain is not None and self.gain.low > 0 and self.gain.value > _floor(self.noise)

    @classmethod
    def recalled(cls, data: Mapping[str, Any]) -> Verdict:
        """Rebuild a verdict from what `asdict` made of it."""

        def intervals(by_task: Mapping[str, Any]) -> dict[str, Interval]:
            return {task: Interval(**interval) for task, interval in by_task.items()}

        baselines = [
            Baseline(**{**baseline, "holdout": intervals(baseline["holdout"])})
            for baseline in data["baselines"]
        ]
        return cls(
            data["trial"],
            intervals(data["holdout"]),
            baselines,
            Interval(**data["gain"]) if data["gain"] else None,
            data["over"],
            data["text"],
            Noise.recalled(data["noise"]) if data.get("noise") else None,
        )


def _floor(noise: Noise | None) -> float:
    return noise.floor if noise else 0.0


def baseline_jobs(
    start: Recipe, prompting: Prompting, references: Sequence[str] | None = None
) -> list[Job]:
    """List the baselines: each model alone, the plain average, the recipe at its starts.

    `references` are the models, where the recipe at its starts does not name them all.

    A model alone is asked as the merge will be, and also as its owner would ask it where that
    differs.
    """
    references = references or start.references()
    jobs = []
    for reference in references:
        own = Prompting(reference, _has_chat_template(reference))
        promptings = (prompting,) if same_prompts(own, prompting) else (prompting, own)
        jobs.append(Job(reference, "baseline", model_alone(reference, start), (), promptings))
    others = [reference for reference in references if reference != start.base_model]
    averaged = others if len(others) > 1 else references
    if len(averaged) > 1:
        recipe = Recipe.parse(
            {
                "merge_method": "linear",
                "base_model": donor(start),
                "models": [{"model": model, "parameters": {"weight": 1.0}} for model in averaged],
                "dtype": start.dtype,
                "out_dtype": start.out_dtype,
            }
        )
        jobs.append(Job("average", "baseline", recipe, (), (prompting,)))
    jobs.append(Job("starts", "baseline", start, (), (prompting,)))
    return jobs


def _has_chat_template(reference: str) -> bool:
    folder = locate(reference)
    config = folder / "tokenizer_config.json"
    return (
        (folder / "chat_template.jinja").is_file()
        or (folder / "chat_template.json").is_file()
        or (config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8"))
    )


def same_prompts(one: Prompting, other: Prompting) -> bool:
    """Tell whether two ways of prompting give the same requests."""
    if one.apply_chat_template != other.apply_chat_template:
        return False
    a, b = locate(one.tokenizer), locate(other.tokenizer)
    return all(
        ((a / file).read_bytes() if (a / file).is_file() else b"")
        == ((b / file).read_bytes() if (b / file).is_file() else b"")
        for file in (*TOKENIZER_FILES, *TEMPLATE_FILES)
    )


def score_interval(task: ScoredTask, outcomes: Sequence[Outcome], seed: int) -> Interval:
    """Return a task's score with its interval: Wilson's for 0/1 outcomes, else bootstrap."""
    value = task.score(outcomes)
    if task.averages(outcomes) and task.weight_by_size is not False and _is_binary(task, outcomes):
        from scipy.stats import binomtest

        n_right = round(sum(float(outcome.value) for outcome in outcomes))
        bounds = binomtest(n_right, len(outcomes)).proportion_ci(LEVEL, method="wilson")
        return Interval(value, float(bounds.low), float(bounds.high))
    samples = _resampled_scores(task, [outcomes], np.random.default_rng(seed))[0]
    return Interval(value, *_percentiles(samples))


def difference_interval(
    task: ScoredTask, one: Sequence[Outcome], other: Sequence[Outcome], seed: int
) -> Interval:
    """Return one model's score minus another's, as the task counts, with its paired interval.

    Args:
        one, other: outcomes of the same documents, in the same order.
    """
    value = task.score(one) - task.score(other)
    return Interval(value, *_percentiles(_resampled_gains(task, one, other, np.random.default_rng(seed))))


def gain_interval(tasks: TaskSet, winner: Outcomes, baseline: Outcomes) -> Interval:
    """Return the winner's objective minus the baseline's, with its paired interval.

    Args:
        winner, baseline: outcomes of the same documents, in the same order.
    """
    value = tasks.objective(tasks.scores(winner)) - tasks.objective(tasks.scores(baseline))
    rng = np.random.default_rng(tasks.seed)
    samples = np.zeros(N_RESAMPLES)
    states: dict[tuple[str, ...], Any] = {}
    for task in tasks.tasks:
        # Two metrics of one task are two views of the same documents: draw the same ones for both.
        leaves = tuple(leaf.name for leaf in task.leaves)
        draws = rng
        if leaves in states:
            draws = np.random.default_rng()
            draws.bit_generator.state = states[leaves]
        else:
            states[leaves] = rng.bit_generator.state
        gains = _resampled_gains(task, winner[task.key], baseline[task.key], draws)
        samples += task.sign * task.weight * gains
    return Interval(value, *_percentiles(samples))


def _resampled_gains(
    task: ScoredTask,
    winner: Sequence[Outcome],
    baseline: Sequence[Outcome],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return N_RESAMPLES differences of one task's score; shape (N_RESAMPLES,)."""
    if not (task.averages(winner) and task.averages(baseline)):
        won, lost = _resampled_scores(task, [winner, baseline], rng)
        gains: np.ndarray = won - lost
        return gains
    difference = _contributions(task, winner) - _contributions(task, baseline)
    if _is_binary(task, winner) and _is_binary(task, baseline):
        difference = np.concatenate([difference, [1.0, -1.0]])
    n = len(difference)
    rows = max(1, _AT_ONCE // n)
    means = [
        difference[rng.integers(0, n, (min(rows, N_RESAMPLES - done), n))].mean(axis=1)
        for done in range(0, N_RESAMPLES, rows)
    ]
    return np.concatenate(means)


def _contributions(task: ScoredTask, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Scale each document's value so that the task's score is the plain mean; shape (n,)."""
    values = np.array([float(outcome.value) for outcome in outcomes])
    if task.weight_by_size is not False:
        return values
    sizes: dict[str, int] = defaultdict(int)
    for outcome in outcomes:
        sizes[outcome.leaf] += 1
    n, n_leaves = len(outcomes), len(sizes)
    scale = np.array([n / (n_leaves * sizes[outcome.leaf]) for outcome in outcomes])
    scaled: np.ndarray = values * scale
    return scaled


def _resampled_scores(
    task: ScoredTask, sides: Sequence[Sequence[Outcome]], rng: np.random.Generator
) -> list[np.ndarray]:
    """Score resampled documents with the task's own aggregation, the same documents a side.

    Where a task scores fewer resamples, or some cannot be scored (an aggregation may fail where one
    class is missing), those that were are drawn from again.

    Returns:
        One array a side; shape (N_RESAMPLES,).
    """
    by_leaf: dict[str, list[int]] = defaultdict(list)
    for i, outcome in enumerate(sides[0]):
        by_leaf[outcome.leaf].append(i)
    scored = []
    for _ in range(task.n_resamples):
        drawn = [i for members in by_leaf.values() for i in rng.choice(members, len(members))]
        try:
            scored.append([task.score([side[i] for i in drawn]) for side in sides])
        except TrialTaskError:
            continue
    if not scored:
        raise TrialTaskError(f"{task.key}: none of {task.n_resamples} resamples can be scored")
    samples = np.array(scored)
    if len(samples) < N_RESAMPLES:
        samples = samples[rng.integers(0, len(samples), N_RESAMPLES)]
    return list(samples.T)


def _is_binary(task: ScoredTask, outcomes: Sequence[Outcome]) -> bool:
    return task.may_be_share and all(outcome.value in (0, 1) for outcome in outcomes)


def _percentiles(samples: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def conclude(
    tasks: TaskSet,
    trial: int,
    winner: Outcomes,
    baselines: Mapping[str, Mapping[Split, Outcomes]],
    noise: Noise | None = None,
) -> Verdict:
    """Compare the winner with the best baseline on the holdout.

    Args:
        trial: the winner's number.
        winner: its holdout outcomes; empty without a holdout.
        baselines: by name the outcomes of each split.
        noise: how far scorings of the winner differ; a gain no larger is not claimed.
    """
    has_holdout = any(winner.values())
    measured = []
    for name, outcomes in baselines.items():
        holdout = outcomes["holdout"] if has_holdout else {}
        measured.append(
            Baseline(
                name,
                tasks.scores(outcomes["search"]),
                _intervals(tasks, holdout),
                tasks.objective(tasks.scores(holdout)) if has_holdout else None,
            )
        )
    if not has_holdout:
        return Verdict(trial, {}, measured, None, None, "no gain shown: no holdout", noise)
    if not measured:
        text = "no gain shown: no baseline could be scored"
        return Verdict(trial, _intervals(tasks, winner), [], None, None, text, noise)
    best = max(measured, key=lambda baseline: baseline.holdout_objective or 0.0)
    gain = gain_interval(tasks, winner, baselines[best.name]["holdout"])
    text = _sentence(tasks, gain, best, winner, noise)
    return Verdict(trial, _intervals(tasks, winner), measured, gain, best.name, text, noise)


def _intervals(tasks: TaskSet, outcomes: Outcomes) -> dict[str, Interval]:
    return {
        task.key: score_interval(task, outcomes[task.key], tasks.seed)
        for task in tasks.tasks
        if outcomes.get(task.key)
    }


def _sentence(
    tasks: TaskSet, gain: Interval, best: Baseline, winner: Outcomes, noise: Noise | None
) -> str:
    n = n_documents(winner)
    what = "the weighted sum" if len(tasks.tasks) > 1 else tasks.tasks[0].key
    numbers = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] in {what} over {best.name!r}"
    where = f"on {n} holdout documents, at 95% certainty"
    reasons = []
    if gain.low <= 0:
        where_it_lies = "includes zero" if gain.high >= 0 else "lies below zero"
        reasons.append(f"the interval {where_it_lies}")
    if 0 < gain.value <= _floor(noise):
        reasons.append(f"scoring the winner again moved it by up to {_floor(noise):.3f}")
    if reasons:
        return f"no gain shown: {numbers} {where}; {', and '.join(reasons)}"
    return f"gain shown: {numbers} {where}"
