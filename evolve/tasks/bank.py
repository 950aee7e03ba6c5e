"""The request bank: every request of a search built once, answered by each candidate."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evolve.errors import TrialEngineError, TrialTaskError
from evolve.search_file import Signal
from evolve.tasks.divergence import Divergence, References
from evolve.tasks.draw import SPLITS, Documents, Leaf, Split
from evolve.tasks.likelihood import Likelihood, Targets, likelihood_outcomes, list_targets
from evolve.tasks.measures import FunctionScore, OutputTokens
from evolve.tasks.outcome import AnsweredDocument, Outcome, Outcomes
from evolve.tasks.requests import Asked, Prompts, RequestList, n_characters
from evolve.tasks.scored import ScoredTask
from evolve.tasks.task_set import TaskSet

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM


@dataclass(frozen=True)
class _Lists:
    """What is sent for one split and signal.

    Attributes:
        leaves: by name, those whose documents are scored.
        own: their documents' own requests.
        others: requests for references, sent apart from them and after them, so that the tasks' own
            meet the same others in a batch whatever the signal.
        targets: the references of each document, in either list.
    """

    leaves: Mapping[str, Leaf]
    own: RequestList
    others: RequestList
    targets: Targets


def _asked_leaves(tasks: Iterable[ScoredTask]) -> dict[str, Leaf]:
    """The leaves, by name, whose documents' own requests are to be answered."""
    return {leaf.name: leaf for task in tasks if task.is_asked for leaf in task.leaves}


@dataclass
class RequestBank:
    """Every request of a task set under one way of prompting, built once.

    Requests of the first split and its signal are built at once, others when they are first answered.

    Args:
        tasks: the task set.
        lm: gives chat template and tokenizer, and answers.
        apply_chat_template: wrap prompts in the tokenizer's chat template.
        splits: which documents' requests are wanted.
        signal: what is wanted of the first split.

    Raises:
        SearchFileError: a prompt cannot be built.
    """

    tasks: TaskSet
    lm: LM
    apply_chat_template: bool
    splits: tuple[Split, ...] = SPLITS
    signal: Signal = "metric"
    _built: dict[Split, dict[tuple[str, int], list[Instance]]] = field(init=False, repr=False)
    _lists: dict[tuple[Split, Signal], _Lists] = field(init=False, repr=False)
    _references: References = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._built = {}
        self._lists = {}
        divergences = [task for task in self.tasks.tasks if isinstance(task, Divergence)]
        self._references = References(divergences, self.lm, self.splits)
        self._counts_tokens = any(
            isinstance(task, OutputTokens | FunctionScore) for task in self.tasks.tasks
        )
        self._list(self.splits[0], self.signal)

    def _instances(self, split: Split) -> dict[tuple[str, int], list[Instance]]:
        """Build the requests of a split's documents, or recall them."""
        if split not in self._built:
            scoring = self.tasks.scoring
            prompts = Prompts(
                self.lm,
                self.apply_chat_template,
                scoring.fewshot_as_multiturn,
                scoring.system_instruction,
            )
            self._built[split] = {
                (leaf.name, number): instances
                for leaf in _asked_leaves(self.tasks.tasks).values()
                for number, instances in prompts.build(leaf, leaf.documents[split]).items()
            }
        return self._built[split]

    def _list(self, split: Split, signal: Signal) -> _Lists:
        """List what is sent for a signal, or recall it."""
        if (split, signal) not in self._lists:
            self._lists[split, signal] = self._listed(split, self.tasks.following(signal).tasks)
        return self._lists[split, signal]

    def _listed(self, split: Split, tasks: Sequence[ScoredTask]) -> _Lists:
        leaves = _asked_leaves(tasks)
        built = self._instances(split)
        places = [(leaf.name, number) for leaf in leaves.values() for number in leaf.documents[split]]
        own = RequestList({place: built[place] for place in places})
        likelihoods = [task for task in tasks if isinstance(task, Likelihood)]
        others, targets = list_targets(likelihoods, split, built, own, self.lm, self.apply_chat_template)
        return _Lists(leaves, own, others, targets)

    def ask(self, lm: LM) -> None:
        """Have another LM of the same tokenizer answer from now on; the requests stay."""
        self.lm = self._references.lm = lm

    def asking(self, lm: LM) -> RequestBank:
        """Return this bank with another LM of the same tokenizer, for two that answer by turns."""
        other = copy.copy(self)
        other.lm = lm
        other._references = replace(self._references, lm=lm)
        return other

    # ---- references -----------------------------------------------------------------------------

    def needs_references(self) -> list[str]:
        """Name the models whose weights must be loaded, and learned, before `answer`."""
        return self._references.needed()

    def learn_reference(self, reference: str, lm: LM | None = None) -> None:
        """Keep what a reference model finds likely, for all splits.

        Args:
            reference: one of `needs_references`.
            lm: holds the reference's weights; by default the bank's own.
        """
        self._references.learn(reference, lm or self.lm)

    # ---- answers --------------------------------------------------------------------------------

    def answer(
        self,
        split: Split,
        signal: Signal = "metric",
        *,
        documents: Documents | None = None,
        in_reverse: bool = False,
    ) -> Outcomes:
        """Have the model answer every request of a split and score each document.

        Args:
            documents: only these of the split.
            signal: what is wanted; with "likelihood" nothing is generated for tasks with references.
            in_reverse: send the same requests in another order and in two halves, so that each
                meets others in its batch: what changes then is the engine's noise.

        Returns:
            Per key of the entries that follow the signal the outcomes in document order.

        Raises:
            TrialTaskError: a filter, metric or objective fails.
            TrialEngineError: the engine cannot answer.
        """
        tasks = self.tasks.following(signal).tasks
        if documents is None:
            lists = self._list(split, signal)
        else:
            tasks = [task.among(documents) for task in tasks]
            lists = self._listed(split, tasks)
        replies: dict[int, list[Any]] = {}
        seconds: dict[int, float] = {}
        for requests in (lists.own, lists.others):
            for kind, asked in requests.asked.items():
                halves = [asked]
                if in_reverse:
                    middle = len(asked) // 2
                    halves = [half[::-1] for half in (asked[middle:], asked[:middle]) if half]
                for half in halves:
                    self._send(kind, half, replies, seconds)
        answered = {
            place: document
            for leaf in lists.leaves.values()
            for place, document in self._score(leaf, split, lists.own, replies, seconds).items()
        }

        def outcomes(task: ScoredTask) -> list[Outcome]:
            if isinstance(task, Likelihood):
                return likelihood_outcomes(task, split, lists.targets, replies)
            if isinstance(task, Divergence):
                return self._references.outcomes(task, split)
            return task.outcomes(split, answered)

        return {task.key: outcomes(task) for task in tasks}

    def _send(
        self,
        kind: str,
        asked: Sequence[Asked],
        replies: dict[int, list[Any]],
        seconds: dict[int, float],
    ) -> None:
        """Ask the model; keep replies, and each user's share of the seconds, by id of the request."""
        sent = [each.instance for each in asked for _ in range(each.repeats)]
        began = time.perf_counter()
        received = list(getattr(self.lm, kind)(sent))
        took = time.perf_counter() - began
        if len(received) != len(sent):
            raise TrialEngineError(f"the engine gave {len(received)} answers to {len(sent)} requests")
        position = 0
        lengths = {}
        for each in asked:
            its = replies[id(each)] = received[position : position + each.repeats]
            position += each.repeats
            texts = sum(len(reply) for reply in its if isinstance(reply, str))
            lengths[id(each)] = each.repeats * n_characters(each.instance) + texts + 1
        total = sum(lengths.values())
        for each in asked:
            seconds[id(each)] = took * lengths[id(each)] / total / each.n_users

    def _score(
        self,
        leaf: Leaf,
        split: Split,
        requests: RequestList,
        replies: dict[int, list[Any]],
        seconds: dict[int, float],
    ) -> dict[tuple[str, int], AnsweredDocument]:
        """Let the task filter and score the answers, with every filter and metric."""
        places = [(leaf.name, number) for number in leaf.documents[split]]
        # Copies: answers of one candidate never meet those of another.
        copies = {
            place: [
                replace(instance, resps=replies[id(asked)][: instance.repeats or 1], filtered_resps={})
                for instance, asked in zip(
                    requests.by_document[place], requests.users[place], strict=True
                )
            ]
            for place in places
        }
        _apply_filters(leaf, copies)
        found = {}
        for place in places:
            answers = [reply for instance in copies[place] for reply in instance.resps]
            found[place] = AnsweredDocument(
                task=leaf.name,
                document=place[1],
                doc=copies[place][0].doc,
                answers=answers,
                values=_values(leaf, place[1], copies[place], answers),
                tokens=self._n_tokens(answers) if self._counts_tokens and leaf.generates else 0,
                seconds=sum(seconds[id(asked)] for asked in requests.users[place]),
            )
        return found

    def _n_tokens(self, answers: Sequence[Any]) -> int:
        encode = self.lm.tokenizer.encode
        return sum(len(encode(text, add_special_tokens=False)) for text in answers)


def _apply_filters(leaf: Leaf, copies: dict[tuple[str, int], list[Instance]]) -> None:
    """Apply each of the task's filters to all answers at once, as lm-eval does.

    Raises:
        TrialTaskError: a filter fails; names the first document whose answers alone make it fail.
    """
    requests = [instance for instances in copies.values() for instance in instances]
    for each in leaf.task._filters if requests else ():
        try:
            each.apply(requests)
        except Exception as error:
            where, cause = _first_failing(leaf, each, copies) or (leaf.name, error)
            raise TrialTaskError(
                f"{where}: filter {each.name!r} failed: {type(cause).__name__}: {cause}"
            ) from cause


def _first_failing(
    leaf: Leaf, its_filter: Any, copies: dict[tuple[str, int], list[Instance]]
) -> tuple[str, Exception] | None:
    """Find the first document on whose answers alone a filter fails, and how; None: on none."""
    for (_, number), instances in copies.items():
        try:
            its_filter.apply(instances)
        except Exception as error:
            answers = [reply for instance in instances for reply in instance.resps]
            return f"{leaf.name}, document {number}{_emptiness(answers)}", error
    return None


def _values(
    leaf: Leaf, number: int, instances: Sequence[Instance], answers: Sequence[Any]
) -> dict[str, Any]:
    """Have the task score one document under each filter; values by "metric,filter".

    Raises:
        TrialTaskError: a metric fails.
    """
    values: dict[str, Any] = {}
    for name in (each.name for each in leaf.task._filters):
        try:
            metrics = leaf.task.process_results(
                instances[0].doc, [instance.filtered_resps[name] for instance in instances]
            )
        except Exception as error:
            raise TrialTaskError(
                f"{leaf.name}, document {number}{_emptiness(answers)}: its metrics failed on the answer "
                f"filtered by {name!r}: {type(error).__name__}: {error}"
            ) from error
        values.update({f"{metric},{name}": value for metric, value in metrics.items()})
    return values


def _emptiness(answers: Sequence[Any]) -> str:
    """Say so where the model answered with nothing."""
    return " (its answer is empty)" if answers and all(answer == "" for answer in answers) else ""
