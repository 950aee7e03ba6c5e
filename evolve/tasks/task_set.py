"""The task set: the entries of `tasks:`, loaded, drawn and checked."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evolve.errors import SearchFileError
from evolve.search_file import ScoringSettings, Signal, TaskSpec
from evolve.tasks.asked import asked_split
from evolve.tasks.divergence import Divergence, make_divergence
from evolve.tasks.draw import Leaf, draw
from evolve.tasks.likelihood import Likelihood, likelihood_of, why_none
from evolve.tasks.load import Loaded, load_tasks, task_fingerprint
from evolve.tasks.measures import function_file, measure
from evolve.tasks.outcome import Outcomes
from evolve.tasks.scored import ScoredTask
from evolve.tasks.text import fingerprint, text_task


class TaskSet:
    """The tasks and other objectives of a search.

    Args:
        specs: entries of `tasks:`, or of another section.
        scoring: limits, few-shot, task paths.
        seed: draws the documents; few-shot examples keep lm-eval's own seed.
        allow_unsafe_code: allow tasks that execute what a model wrote.
        section: how faults name the entries.
        beside: entries of other sections, from which these are told apart by their keys.

    Attributes:
        tasks: one ScoredTask an entry, in order.
        notes: what a user should know of them, one line each.
        public: by name the split, as its data set calls it, of the entries whose documents others are
            measured on.

    Raises:
        SearchFileError: unknown tasks or metrics, with every fault found.
        HubUnreachableError: a task's data set cannot be fetched.
    """

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        scoring: ScoringSettings,
        seed: int,
        *,
        allow_unsafe_code: bool = False,
        section: str = "tasks",
        beside: Sequence[TaskSpec] = (),
    ) -> None:
        if not specs:
            raise SearchFileError(f"{section}: no task is named; list at least one, or give --task NAME")
        self.scoring = scoring
        self.seed = seed
        self._specs = tuple(specs)
        self._following: dict[Signal, TaskSet] = {}
        entries = [f"{section}[{i}]" for i in range(len(specs))]
        faults = [
            fault for entry, spec in zip(entries, specs, strict=True) for fault in spec.faults(entry)
        ]
        if faults:
            raise SearchFileError(faults)
        places: dict[str, str] = {}
        for entry, spec in zip(entries, specs, strict=True):
            if spec.kind == "task":
                places.setdefault(spec.name, entry)
        loaded = load_tasks(places, scoring, allow_unsafe_code, faults) if places else {}
        drawn = draw({name: item.leaves for name, item in loaded.items()}, scoring, seed)
        self.public = {
            name: asked_split(next(leaf for leaf in item.leaves if leaf.task_name in item.public))
            for name, item in loaded.items()
            if item.public
        }
        texts = self._texts(entries, faults)
        found: dict[int, ScoredTask] = {}
        for i, spec in enumerate(specs):
            try:
                if spec.kind == "kl_divergence" and spec.text in texts:
                    found[i] = make_divergence(spec, texts[spec.text])
                elif spec.kind == "perplexity" and spec.text in texts:
                    leaf = texts[spec.text]
                    found[i] = _scored(entries[i], spec, Loaded((leaf.task,)), (leaf,))
                elif spec.name in loaded:
                    found[i] = _scored(entries[i], spec, loaded[spec.name], drawn[spec.name])
            except SearchFileError as error:
                faults += error.faults
        # What is taken over the documents of the others; where one of these is at fault, that says it.
        asked = [found[i] for i, spec in enumerate(specs) if spec.kind == "task" and i in found]
        is_whole = len(asked) == sum(spec.kind == "task" for spec in specs)
        for i, spec in enumerate(specs):
            if spec.kind in ("output_tokens", "seconds_per_document", "function") and is_whole:
                try:
                    found[i] = measure(entries[i], spec, asked)
                except SearchFileError as error:
                    faults += error.faults
        for i, task in found.items():
            faults += _against_direction(entries[i], specs[i], task)
        every = [*specs, *beside]
        self.tasks = [replace(task, key=_key(specs[i], task, every)) for i, task in sorted(found.items())]
        self.notes = _kept_without_examples(loaded, scoring)
        if scoring.draw != "seeded":
            # The search documents come first, and may leave none.
            self.notes += _notes(specs, found, scoring)
            if not self.has_holdout:
                self.tasks = [_without_holdout(task) for task in self.tasks]
        elif scoring.holdout:
            faults += [
                f"scoring.holdout is {scoring.holdout:g}, which keeps no document of {task.key}; raise "
                f"it, or set it to 0"
                for task in self.tasks
                if not task.n_documents("holdout")
            ]
        keys = Counter(task.key for task in self.tasks)
        faults += [f"{section}: {key} stands {n} times; name it once" for key, n in keys.items() if n > 1]
        if faults:
            raise SearchFileError(faults)

    def _texts(self, entries: Sequence[str], faults: list[str]) -> dict[str | None, Leaf]:
        """Read the text files that entries name, and draw their documents; by file."""
        texts: dict[str | None, Leaf] = {}
        for entry, spec in zip(entries, self._specs, strict=True):
            if spec.text is None or spec.text in texts:
                continue
            try:
                task = text_task(f"{entry}.text", spec.text)
            except SearchFileError as error:
                faults += error.faults
                continue
            (texts[spec.text],) = draw({spec.text: [task]}, self.scoring, self.seed)[spec.text]
        return texts

    @property
    def has_holdout(self) -> bool:
        """Whether every entry has documents for the verdict."""
        return all(task.n_documents("holdout") for task in self.tasks)

    @property
    def n_documents(self) -> int:
        """Search documents that one candidate is scored on, over all tasks."""
        # A likelihood's leaf holds fewer documents than the metric's of the same name may.
        leaves = [leaf for task in self.tasks for leaf in task.leaves]
        return len({(leaf.name, number) for leaf in leaves for number in leaf.documents["search"]})

    def references(self) -> list[str]:
        """Models that candidates are held against."""
        return list(dict.fromkeys(t.reference for t in self.tasks if isinstance(t, Divergence)))

    def files(self) -> dict[str, str]:
        """Fingerprints of what scores depend on besides models: tasks, texts, and where functions are."""
        leaves = {leaf.name: leaf for task in self.tasks if task.is_asked for leaf in task.leaves}
        files = {name: task_fingerprint(leaf.task) for name, leaf in leaves.items()}
        files |= {spec.text: fingerprint(spec.text) for spec in self._specs if spec.text is not None}
        for spec in self._specs:
            if spec.kind == "function" and (file := function_file(spec.name)):
                files[spec.name] = fingerprint(file)
        return files

    @cached_property
    def have_references(self) -> bool:
        """Whether every entry has reference answers."""
        return all(likelihood_of(task) is not None for task in self.tasks)

    @cached_property
    def likelihoods(self) -> dict[str, Likelihood]:
        """The likelihoods of the entries that have reference answers, by the entries' keys.

        Raises:
            SearchFileError: a reference cannot be read, or no entry has any.
        """
        found = {task.key: likelihood_of(task) for task in self.tasks}
        if not any(found.values()):
            why = "; ".join(f"{task.key} {why_none(task)}" for task in self.tasks)
            raise SearchFileError(
                f"search.signal asks for the likelihood of reference answers, and no entry of tasks has "
                f"any: {why}; set it to metric"
            )
        return {key: likelihood for key, likelihood in found.items() if likelihood is not None}

    def following(self, signal: Signal) -> TaskSet:
        """Return what a sampler sees that follows a signal, as a task set.

        `likelihood` puts an entry's likelihood in its place, and leaves entries without references
        as they are; `both` adds the likelihoods, so that the objective is the sum of the weighted
        metrics and the weighted likelihoods.

        Raises:
            SearchFileError: see `likelihoods`.
        """
        if signal == "metric":
            return self
        if signal not in self._following:
            followed = copy.copy(self)
            followed.tasks = [self.likelihoods.get(task.key, task) for task in self.tasks]
            if signal == "both":
                followed.tasks = [*self.tasks, *self.likelihoods.values()]
            self._following[signal] = followed
        return self._following[signal]

    def shared_faults(self, searched: TaskSet) -> list[str]:
        """List the entries that ask what candidates are searched on: a task, as it is or in a group, or
        a text, whatever is measured on it.

        Args:
            searched: the entries of `tasks:`; this set's own are those of another section.
        """
        faults = []
        for i, spec, leaves in self._leaf_names():
            for j, other, others in searched._leaf_names():
                if shared := [name for name in leaves if name in others]:
                    more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                    faults.append(
                        f"report_only[{i}].name is {spec.name!r}, which asks {shared[0]}{more} like "
                        f"tasks[{j}].name {other.name!r}; what is searched on is not unseen, remove one "
                        f"of them"
                    )
        for i, spec in enumerate(self._specs):
            for j, other in enumerate(searched._specs):
                if spec.text and other.text and Path(spec.text).resolve() == Path(other.text).resolve():
                    faults.append(
                        f"report_only[{i}].text is {spec.text!r}, which tasks[{j}].name {other.name!r} "
                        f"is scored on; what is searched on is not unseen, name another text or remove "
                        f"one of them"
                    )
        return faults

    def _leaf_names(self) -> Iterator[tuple[int, TaskSpec, list[str]]]:
        """Yield the entries that lm-eval knows, by number, with the names of their leaves."""
        for i, (spec, task) in enumerate(zip(self._specs, self.tasks, strict=True)):
            if spec.kind == "task":
                yield i, spec, [leaf.task.task_name for leaf in task.leaves]

    def notices(self) -> list[str]:
        """Say of each benchmark that candidates are scored on what others are measured on."""
        return [
            f"searched on {name}:{split}: not a leaderboard result" for name, split in self.public.items()
        ]

    def scores(self, outcomes: Outcomes) -> dict[str, float]:
        """Return each task's score over the given outcomes."""
        return {task.key: task.score(outcomes[task.key]) for task in self.tasks}

    def objective(self, scores: Mapping[str, float]) -> float:
        """Return the weighted sum, maximised: what is better when it is less counts negative."""
        return sum(task.sign * task.weight * scores[task.key] for task in self.tasks)

    def objective_error(self, standard_errors: Mapping[str, float]) -> float:
        """Return the standard error of the weighted sum of scores that are estimates; else 0."""
        return math.hypot(*(task.weight * standard_errors.get(task.key, 0.0) for task in self.tasks))


def report_set(
    specs: Sequence[TaskSpec],
    scoring: ScoringSettings,
    seed: int,
    *,
    searched: Sequence[TaskSpec],
    allow_unsafe_code: bool = False,
) -> TaskSet:
    """Load the tasks of `report_only:`. No candidate is chosen by them, so none of their documents are
    held out: all that are drawn are their `search` documents.

    Args:
        searched: the entries of `tasks:`, from which these are told apart by their keys.

    Raises:
        SearchFileError, HubUnreachableError: as TaskSet.
    """
    scoring = scoring.model_copy(update={"holdout": 0.0})
    return TaskSet(
        specs,
        scoring,
        seed,
        allow_unsafe_code=allow_unsafe_code,
        section="report_only",
        beside=searched,
    )


def _key(spec: TaskSpec, task: ScoredTask, specs: Sequence[TaskSpec]) -> str:
    """Name an entry: by its name alone where it stands once, else by what tells it from the others."""
    same = [other for other in specs if other.name == spec.name]
    if len(same) == 1:
        return spec.name
    parts = [spec.name]
    if spec.kind in ("task", "perplexity"):
        parts.append(f"{task.metric},{task.filter}")
    for key in ("reference", "text"):
        if len({getattr(other, key) for other in same}) > 1:
            parts.append(getattr(spec, key))
    return ":".join(parts)


def _against_direction(field: str, spec: TaskSpec, task: ScoredTask) -> list[str]:
    """Refuse a direction that is not the metric's own."""
    own = "maximize" if task.higher_is_better else "minimize"
    if spec.direction in (None, own):
        return []
    what = spec.name if task.metric == spec.name else f"{task.metric} of {spec.name}"
    return [
        f"{field}.direction is {spec.direction!r}, but {what} is better when it is "
        f"{'higher' if task.higher_is_better else 'lower'}; remove direction"
    ]


def _kept_without_examples(loaded: Mapping[str, Loaded], scoring: ScoringSettings) -> list[str]:
    """Say where lm-eval gives no examples though some are wanted: a task that declares 0 keeps 0."""
    names = [
        name
        for name, item in loaded.items()
        if any(leaf.get_config("num_fewshot") == 0 for leaf in item.leaves)
    ]
    if not scoring.num_fewshot or not names:
        return []
    return [
        f"scoring.num_fewshot is {scoring.num_fewshot}; it does not hold for {', '.join(names)}: "
        f"num_fewshot: 0 in a task's own file stays, as in lm-eval"
    ]


def _notes(
    specs: Sequence[TaskSpec], found: Mapping[int, ScoredTask], scoring: ScoringSettings
) -> Iterator[str]:
    """Say where a weight's sign asks for the worse end of a metric, and why there is no holdout."""
    for i, task in found.items():
        if specs[i].is_signed and task.is_against_metric:
            which, asks = ("less", "more") if task.higher_is_better else ("more", "less")
            yield (
                f"tasks[{i}].weight is {specs[i].weight:g}: {which} {task.metric} of {specs[i].name} is "
                f"better, and this search asks for {asks}, as weight * value says"
            )
    whole = [task.key for task in found.values() if not task.n_documents("holdout")]
    if not scoring.holdout or not whole:
        return
    if scoring.limit is None:
        yield "without a limit every document is searched on: there is no holdout and no verdict"
    else:
        yield (
            f"limit is {scoring.limit}, which takes every document of {', '.join(whole)}: there is no "
            f"holdout and no verdict"
        )


def _without_holdout(task: ScoredTask) -> ScoredTask:
    leaves = (replace(leaf, documents={**leaf.documents, "holdout": ()}) for leaf in task.leaves)
    return replace(task, leaves=tuple(leaves))


def _scored(field: str, spec: TaskSpec, item: Loaded, leaves: tuple[Leaf, ...]) -> ScoredTask:
    """Find the metric, filter and direction that an entry means.

    Raises:
        SearchFileError: the task has no such metric or filter, or the metric no direction.
    """
    metrics: list[str] = list(item.leaves[0].aggregation())
    filters = [each.name for each in item.leaves[0]._filters]
    weight_by_size = None
    if item.group is not None:
        aggregates = {each.metric: each for each in item.group.aggregate_metric_list or []}
        metrics = list(aggregates)
        if not metrics:
            raise SearchFileError(
                f"{field}.name is {spec.name!r}, a group without a score of its own; name its "
                f"tasks: {', '.join(task.task_name for task in item.leaves[:8])}"
            )
    metric, _, filter_name = (spec.metric or metrics[0]).partition(",")
    if item.group is not None and metric in metrics:
        filters = aggregates[metric].filter_list or filters
        weight_by_size = bool(aggregates[metric].weight_by_size)
    filter_name = filter_name or filters[0]
    # With a direction a metric may be meant that only shows in a task's results.
    is_declared = metric in metrics or (spec.direction is not None and item.group is None)
    # As in lm-eval, a group's score is that of the leaves that have the metric.
    having = [leaf for leaf in leaves if _has(leaf, metric, filter_name, spec.direction is not None)]
    if not is_declared or not having or filter_name not in filters:
        known = ", ".join(f"{m},{f}" for m in metrics for f in filters)
        raise SearchFileError(
            f"{field}.metric is {spec.metric!r}; {spec.name} has no such metric, use one of: {known}"
        )
    if any(not leaf.documents["search"] for leaf in having):
        raise SearchFileError(f"{field}.name is {spec.name!r}, which has no documents to search on")
    return ScoredTask(
        key=spec.name,
        weight=abs(spec.weight),
        metric=metric,
        filter=filter_name,
        leaves=tuple(having),
        higher_is_better=_is_higher_better(field, spec, metric, having),
        weight_by_size=weight_by_size,
    )


def _has(leaf: Leaf, metric: str, filter_name: str, may_show_later: bool) -> bool:
    names = [each.name for each in leaf.task._filters]
    return filter_name in names and (metric in leaf.task.aggregation() or may_show_later)


def _is_higher_better(field: str, spec: TaskSpec, metric: str, leaves: Sequence[Leaf]) -> bool:
    """Return what the sign of a signed entry says, else the metric's own direction, or the entry's
    where it has none."""
    if spec.is_signed:
        return spec.weight >= 0
    own: set[Any] = {leaf.task.higher_is_better().get(metric) for leaf in leaves}
    if own == {None} and spec.direction is not None:
        return spec.direction == "maximize"
    if len(own) == 1 and None not in own:
        return bool(own.pop())
    what = f"{field}.metric is {metric!r}, for which {spec.name} "
    if own == {None}:
        raise SearchFileError(
            f"{what}does not say whether higher or lower is better; add direction: maximize or "
            f"minimize to the entry, or higher_is_better to the task's file"
        )
    raise SearchFileError(
        f"{what}has leaves that differ in whether higher is better; name its tasks one by one"
    )
