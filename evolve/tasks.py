"""lm-eval tasks: loaded once, documents split by seed, requests built once, outcomes per document.

The tasks' own functions build prompts, filter answers, score documents and aggregate them, so that
a score here is lm-eval's score on the same documents. What this module adds is the draw of
documents and that nothing is built twice.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evolve.errors import SearchFileError, TrialTaskError, boundary
from evolve.search_file import ScoringSettings, TaskSpec
from merge_core.errors import HubUnreachableError, nearest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel

    from merge_core.recipe import Recipe

Split = Literal["search", "holdout"]
SPLITS: tuple[Split, ...] = ("search", "holdout")
# lm-eval's own default seed for few-shot examples, so that prompts equal its own.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Leaf:
    """One lm-eval task and the documents drawn from it, as sorted indices.

    `name` is the task's name, behind its group's where it belongs to one: `mmlu/mmlu_anatomy`.
    """

    name: str
    task: Any
    documents: Mapping[Split, tuple[int, ...]]


@dataclass(frozen=True)
class ScoredTask:
    """One entry of `tasks:`: what is scored, on which leaves, by which metric.

    Attributes:
        key: how the score is called.
        weight: share in the objective, > 0.
        metric, filter: which of the task's values counts.
        leaves: one for a plain task, several for a group.
        higher_is_better: the metric's own direction.
        weight_by_size: how a group averages its leaves; None for a plain task.
    """

    key: str
    weight: float
    metric: str
    filter: str
    leaves: tuple[Leaf, ...]
    higher_is_better: bool
    weight_by_size: bool | None = None

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.higher_is_better else -1

    @cached_property
    def is_mean(self) -> bool:
        """Whether each leaf's score is the plain mean of its documents' values."""
        from lm_eval.api.metrics import mean

        return all(self._aggregation(leaf) is mean for leaf in self.leaves)

    def _aggregation(self, leaf: Leaf) -> Any:
        return leaf.task.aggregation()[self.metric]

    def score(self, outcomes: Sequence[Outcome]) -> float:
        """Aggregate outcomes by the task's own functions.

        Raises:
            TrialTaskError: the metric fails, or its value is not finite.
        """
        values = defaultdict(list)
        for outcome in outcomes:
            values[outcome.leaf].append(outcome.value)
        with boundary(TrialTaskError, f"aggregating {self.key}"):
            # A small holdout may leave a group's small leaf without documents.
            leaves = [leaf for leaf in self.leaves if values[leaf.name]]
            scores = [float(self._aggregation(leaf)(values[leaf.name])) for leaf in leaves]
            if self.weight_by_size is None:
                total = scores[0]
            else:
                from lm_eval.api.metrics import aggregate_subtask_metrics

                sizes = [len(values[leaf.name]) for leaf in leaves]
                total = float(aggregate_subtask_metrics(scores, sizes, self.weight_by_size))
        if not math.isfinite(total):
            raise TrialTaskError(f"{self.key}: the score is {total}, not a finite number")
        return total

    def n_documents(self, split: Split) -> int:
        """Count the documents of a split."""
        return sum(len(leaf.documents[split]) for leaf in self.leaves)


@dataclass(frozen=True)
class Outcome:
    """What one document gave under one task's metric; `value` is a number, or what lm-eval keeps
    where the metric is no mean (a pair of log-likelihood and words, of gold and prediction)."""

    leaf: str
    document: int
    value: Any


Outcomes = dict[str, list[Outcome]]


class TaskSet:
    """The tasks of a search.

    Args:
        specs: entries of `tasks:`.
        scoring: limits, few-shot, task paths.
        seed: draws the documents; few-shot examples keep lm-eval's own seed.
        allow_unsafe_code: allow tasks that execute what a model wrote.

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
    ) -> None:
        if not specs:
            raise SearchFileError("tasks: no task is named; list at least one, or give --task NAME")
        self.scoring = scoring
        self.seed = seed
        faults: list[str] = []
        places: dict[str, int] = {}
        for i, spec in enumerate(specs):
            places.setdefault(spec.name, i)
        loaded = _load(places, scoring, allow_unsafe_code, faults)
        self.tasks: list[ScoredTask] = []
        repeated = Counter(spec.name for spec in specs)
        drawn: dict[str, tuple[Leaf, ...]] = {}
        for i, spec in enumerate(specs):
            if spec.name in loaded:
                item = loaded[spec.name]
                if spec.name not in drawn:
                    drawn[spec.name] = self._draw(spec.name, item.leaves)
                try:
                    task = _scored(f"tasks[{i}]", spec, item, drawn[spec.name], repeated[spec.name] > 1)
                    self.tasks.append(task)
                    if self.scoring.holdout and not task.n_documents("holdout"):
                        faults.append(
                            f"scoring.holdout is {self.scoring.holdout:g}, which keeps no document of "
                            f"{spec.name}; raise it, or set it to 0"
                        )
                except SearchFileError as error:
                    faults += error.faults
        keys = Counter(task.key for task in self.tasks)
        faults += [f"tasks: {key} stands {n} times; name it once" for key, n in keys.items() if n > 1]
        if faults:
            raise SearchFileError(faults)

    def _draw(self, name: str, tasks: Sequence[Any]) -> tuple[Leaf, ...]:
        """Split each leaf's documents by seed: holdout first, then at most `limit` for the search.

        For a group both counts are spread over its leaves in proportion, with at least one search
        document a leaf.
        """
        sizes = [len(task.eval_docs) for task in tasks]
        total = sum(sizes)
        share = self.scoring.holdout
        wanted = math.floor(share * total) if share < 1 else int(share)
        held = _spread(min(wanted, total // 2), sizes, [max(n - 1, 0) for n in sizes], floor=0)
        rest = [n - h for n, h in zip(sizes, held, strict=True)]
        limit = sum(rest) if self.scoring.limit is None else self.scoring.limit
        searched = _spread(limit, rest, rest, floor=1)
        leaves = []
        for task, n, h, s in zip(tasks, sizes, held, searched, strict=True):
            order = list(range(n))
            random.Random(f"{self.seed}:{name}:{task.task_name}").shuffle(order)
            leaves.append(
                Leaf(
                    name if task.task_name == name else f"{name}/{task.task_name}",
                    task,
                    {
                        "holdout": tuple(sorted(order[:h])),
                        "search": tuple(sorted(order[h : h + s])),
                    },
                )
            )
        return tuple(leaves)

    @property
    def n_documents(self) -> int:
        """Search documents that one candidate is scored on, over all tasks."""
        return sum(task.n_documents("search") for task in self.tasks)

    def scores(self, outcomes: Outcomes) -> dict[str, float]:
        """Return each task's score over the given outcomes."""
        return {task.key: task.score(outcomes[task.key]) for task in self.tasks}

    def objective(self, scores: Mapping[str, float]) -> float:
        """Return the weighted sum, maximised: lower-is-better metrics count negative."""
        return sum(task.sign * task.weight * scores[task.key] for task in self.tasks)


def _spread(count: int, sizes: Sequence[int], most: Sequence[int], floor: int) -> list[int]:
    """Split `count` in proportion to `sizes` (largest remainders), within [floor, most] each."""
    total = sum(sizes)
    if total == 0:
        return [0] * len(sizes)
    count = min(count, sum(most))
    exact = [count * n / total for n in sizes]
    given = [min(max(math.floor(x), floor), m) for x, m in zip(exact, most, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(exact[i] - math.floor(exact[i])), i))
    while sum(given) < count:
        for i in by_remainder:
            if sum(given) < count and given[i] < most[i]:
                given[i] += 1
    return given


@dataclass(frozen=True)
class _Loaded:
    """What a name stands for: its leaf tasks, and the group if it is one."""

    leaves: tuple[Any, ...]
    group: Any = None


def _load(
    places: Mapping[str, int], scoring: ScoringSettings, allow_unsafe_code: bool, faults: list[str]
) -> dict[str, _Loaded]:
    """Load tasks by name, from `task_paths` first, then from lm-eval's own.

    `places` says where in `tasks:` each name stands first.
    """
    _quiet_lm_eval()
    from lm_eval.api.group import Group
    from lm_eval.tasks import TaskManager

    default = ScoringSettings().task_paths
    paths = [Path(path) for path in scoring.task_paths]
    if scoring.task_paths != default:
        faults += [
            f"scoring.task_paths: {path} is no folder; name a folder of task files, or remove it"
            for path in paths
            if not path.is_dir()
        ]
    paths = [path.resolve() for path in paths if path.is_dir()]
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = [name for name in places if name not in manager.all_tasks]
    known: Iterable[str] = manager.all_tasks
    if missing:
        known = {*known, *_names_in_lm_eval()}
        # Parsing lm-eval's own 14,000 files takes seconds, so only where one of them is asked for.
        if any(name in known for name in missing):
            manager = TaskManager(include_path=paths, include_defaults=True)
            known = manager.all_tasks
    loaded: dict[str, _Loaded] = {}
    for name, i in places.items():
        if name not in known or name not in manager.all_tasks:
            folders = ", ".join(str(path) for path in scoring.task_paths)
            faults.append(
                f"tasks[{i}].name is {name!r}; neither lm-eval nor the task paths ({folders}) have "
                f"such a task; {_near_task(name, known)}"
            )
            continue
        if name in manager.all_tags:
            faults.append(
                f"tasks[{i}].name is {name!r}, a tag of several tasks; name its tasks or a group"
            )
            continue
        try:
            tasks = manager.load([name])
        except Exception as error:
            _raise_if_unreachable(name, error)
            faults.append(
                f"tasks[{i}].name is {name!r}, which lm-eval cannot load: {type(error).__name__}: "
                f"{error!s:.300}; correct the task's file or its data"
            )
            continue
        group = tasks.get("groups", {}).get(name)
        assert group is None or isinstance(group, Group)
        leaves = tuple(group.get_all_tasks() if group else tasks["tasks"].values())
        for task in leaves:
            if getattr(task, "UNSAFE_CODE", False) and not allow_unsafe_code:
                faults.append(
                    f"tasks[{i}].name is {name!r}, which executes code that the model writes; add "
                    f"--allow-unsafe-code if that is what you want"
                )
                break
            _set_fewshot(task, scoring.num_fewshot)
        loaded[name] = _Loaded(leaves, group)
    return loaded


def _names_in_lm_eval() -> set[str]:
    """Scan lm-eval's own files for what may be a task's or group's name, without parsing them."""
    import lm_eval.tasks

    key = r"""["']?(?:task|group|tag)["']?\s*:"""
    named = re.compile(rf"""^\s*(?:-\s+)?(?:{key}|-)[ \t]*["']?([^\s"'\[\]{{}}#]+)""", re.M)
    found: set[str] = set()
    for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        found.update(named.findall(text))
    return found


def _near_task(name: str, known: Iterable[str]) -> str:
    close = nearest(name, known)
    return (
        close if close.startswith("did you mean") else "correct the name or add its folder to task_paths"
    )


def _raise_if_unreachable(name: str, error: Exception) -> None:
    """Tell a data set that cannot be fetched from a task that is wrong."""
    from datasets.exceptions import DatasetNotFoundError

    unreachable = isinstance(error, ConnectionError | TimeoutError) or "offline" in str(error).lower()
    if unreachable and not isinstance(error, DatasetNotFoundError | FileNotFoundError):
        raise HubUnreachableError(
            f"task {name}: its data set could not be fetched ({error!s:.200}); try again with a "
            f"connection to the Hub, or use a task with local data"
        ) from error


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of shots as lm-eval does: a task that declares 0 keeps 0; none means 0."""
    declared = task.get_config("num_fewshot")
    if num_fewshot is not None and declared != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif declared is None:
        task.set_config(key="num_fewshot", value=0)


def _scored(
    field_name: str, spec: TaskSpec, item: _Loaded, leaves: tuple[Leaf, ...], is_repeated: bool
) -> ScoredTask:
    """Find the metric and filter that an entry means.

    Raises:
        SearchFileError: the task has no such metric or filter.
    """
    first = item.leaves[0]
    metrics = list(first.aggregation())
    filters = [f.name for f in first._filters]
    weight_by_size = None
    if item.group is not None:
        aggregates = item.group.aggregate_metric_list or []
        metrics = [aggregate.metric for aggregate in aggregates]
        if not metrics:
            raise SearchFileError(
                f"{field_name}.name is {spec.name!r}, a group without a score of its own; name its "
                f"tasks: {', '.join(task.task_name for task in item.leaves[:8])}"
            )
    metric, _, filter_name = (spec.metric or metrics[0]).partition(",")
    filter_name = filter_name or filters[0]
    has_it = metric in metrics and all(
        metric in leaf.aggregation() and filter_name in [f.name for f in leaf._filters]
        for leaf in item.leaves
    )
    if not has_it:
        known = ", ".join(f"{m},{f}" for m in metrics for f in filters)
        raise SearchFileError(
            f"{field_name}.metric is {spec.metric!r}; {spec.name} has no such metric, use one of: {known}"
        )
    if item.group is not None:
        weight_by_size = next(
            bool(a.weight_by_size) for a in item.group.aggregate_metric_list if a.metric == metric
        )
    if any(not leaf.documents["search"] for leaf in leaves):
        raise SearchFileError(f"{field_name}.name is {spec.name!r}, which has no documents to search on")
    return ScoredTask(
        key=f"{spec.name}:{metric},{filter_name}" if is_repeated else spec.name,
        weight=spec.weight,
        metric=metric,
        filter=filter_name,
        leaves=leaves,
        higher_is_better=bool(first.higher_is_better()[metric]),
        weight_by_size=weight_by_size,
    )


def _quiet_lm_eval() -> None:
    """Silence lm-eval's progress bars and notices: the search has its own."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass
class RequestBank:
    """Every request of a task set under one way of prompting, built once.

    Args:
        tasks: the task set.
        lm: gives chat template and tokenizer, and answers.
        apply_chat_template: wrap prompts in the tokenizer's chat template.
        splits: which documents' requests to build.
    """

    tasks: TaskSet
    lm: LM
    apply_chat_template: bool
    splits: tuple[Split, ...] = SPLITS
    _instances: dict[str, dict[int, list[Instance]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._instances = {leaf.name: self._build(leaf) for leaf in self._leaves()}

    def _leaves(self) -> list[Leaf]:
        found = {leaf.name: leaf for task in self.tasks.tasks for leaf in task.leaves}
        return list(found.values())

    def _build(self, leaf: Leaf) -> dict[int, list[Instance]]:
        """Build the requests of a leaf's documents, by document.

        Few-shot examples are drawn by lm-eval from one sequence, so a document's prompt depends
        on its position; the whole task is then built, and a limit changes no prompt.
        """
        task = leaf.task
        wanted = sorted({i for split in self.splits for i in leaf.documents[split]})
        is_zero_shot = not task.get_config("num_fewshot")
        task.set_fewshot_seed(_FEWSHOT_SEED)
        task.build_all_requests(
            samples=wanted if is_zero_shot else None,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,  # lm-eval's default
            chat_template=self.lm.apply_chat_template if self.apply_chat_template else None,
            tokenizer_name=self.lm.tokenizer_name if self.apply_chat_template else "",
        )
        by_document: dict[int, list[Instance]] = defaultdict(list)
        for instance in task.instances:
            # With `samples` lm-eval numbers documents by their place in the (sorted) list.
            number = wanted[instance.doc_id] if is_zero_shot else instance.doc_id
            by_document[number].append(instance)
        return {number: by_document[number] for number in wanted}

    def answer(self, split: Split, *, in_reverse: bool = False) -> Outcomes:
        """Have the model answer every request of a split and score each document.

        Args:
            split: which documents.
            in_reverse: send the requests in another order, so that they meet in other batches.

        Returns:
            Per task key the outcomes in document order.

        Raises:
            TrialTaskError: a filter or metric of the task fails.
        """
        asked = self._clones(split)
        by_type: dict[str, list[Instance]] = defaultdict(list)
        for instances in asked.values():
            for instance in instances:
                by_type[instance.request_type] += [instance] * instance.repeats
        for request_type, instances in by_type.items():
            instances = instances[::-1] if in_reverse else instances
            responses = getattr(self.lm, request_type)(instances)
            for instance, response in zip(instances, responses, strict=True):
                instance.resps.append(response)
        return {task.key: self._outcomes(task, split, asked) for task in self.tasks.tasks}

    def _clones(self, split: Split) -> dict[tuple[str, int], list[Instance]]:
        """Copy the requests, so that answers of one candidate never meet those of another."""
        return {
            (leaf.name, document): [
                replace(instance, resps=[], filtered_resps={})
                for instance in self._instances[leaf.name][document]
            ]
            for leaf in self._leaves()
            for document in leaf.documents[split]
        }

    def _outcomes(
        self, task: ScoredTask, split: Split, asked: Mapping[tuple[str, int], list[Instance]]
    ) -> list[Outcome]:
        outcomes = []
        with boundary(TrialTaskError, f"scoring {task.key}"):
            for leaf in task.leaves:
                documents = leaf.documents[split]
                requests = [i for number in documents for i in asked[leaf.name, number]]
                if not requests:
                    continue
                next(f for f in leaf.task._filters if f.name == task.filter).apply(requests)
                for number in documents:
                    instances = sorted(asked[leaf.name, number], key=lambda instance: instance.idx)
                    answers = [instance.filtered_resps[task.filter] for instance in instances]
                    values = leaf.task.process_results(instances[0].doc, answers)
                    outcomes.append(Outcome(leaf.name, number, values[task.metric]))
        return outcomes


def evaluate(
    model: str | Path | Recipe | PreTrainedModel,
    tasks: Sequence[str | TaskSpec],
    *,
    limit: int | None = None,
    seed: int = 0,
    task_paths: Sequence[str] = ("tasks",),
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Score one model on lm-eval tasks.

    Args:
        model: a folder or Hub id, a recipe (merged in memory), or a Transformers model that knows
            where its tokenizer is (`load_merged` gives such).
        tasks: names or TaskSpecs.
        limit: documents a task, drawn by seed; None = all.

    Returns:
        Score by task key.
    """
    from evolve.engines.hf import HfEngine

    specs = [TaskSpec(name=task) if isinstance(task, str) else task for task in tasks]
    scoring = ScoringSettings(
        limit=limit,
        holdout=0.0,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        task_paths=list(task_paths),
    )
    task_set = TaskSet(specs, scoring, seed)
    engine = HfEngine.of(model, device)
    bank = RequestBank(task_set, engine.lm(), apply_chat_template, ("search",))
    return task_set.scores(bank.answer("search"))
