"""The likelihood of reference answers: a signal where a task's own metric is zero.

For a reference answer y of n tokens behind the prompt x that its task builds, a document's value is

    exp( 1/n * sum over i of log P(y_i | x, y_1 .. y_(i-1)) ),

the geometric mean of the tokens' probabilities. It lies in [0, 1], more is better whatever the
task's metric, and takes one forward pass: nothing is generated. An entry's value is the mean over
its documents. Of several references the likeliest counts, as metrics take any of them for right.

The reference is what lm-eval would write into a few-shot example, without what follows it there:
an answer that goes on for too long is as likely as one that ends. Where a task compares options,
the right option's own request is the one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from evolve.errors import SearchFileError
from evolve.tasks.draw import Leaf, Split
from evolve.tasks.measures import Mean
from evolve.tasks.outcome import Outcome
from evolve.tasks.requests import Asked, RequestList, builds_as_usual
from evolve.tasks.scored import ScoredTask

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

METRIC = "likelihood"


@dataclass(frozen=True)
class Likelihood(Mean):
    """The likelihood of an entry's references, with the entry's weight.

    Its leaves hold only those documents that have a reference.
    """

    is_asked: ClassVar[bool] = False


@dataclass(frozen=True)
class Target:
    """One reference of a document, as it is asked for.

    Attributes:
        asked: the request; its replies are (log-likelihood in nats, whether greedy).
        n_tokens: of the reference behind the prompt, as the engine tokenises them.
    """

    asked: Asked
    n_tokens: int


Targets = Mapping[tuple[str, int], Sequence[Target]]
"""The references of documents, by leaf and document."""


def likelihood_of(task: ScoredTask) -> Likelihood | None:
    """Make the likelihood of an entry's references; None where it has none to search on.

    Raises:
        SearchFileError: a reference cannot be read.
    """
    leaves = []
    # What is taken over other tasks' documents has their references, not its own.
    for leaf in task.leaves if type(task) is ScoredTask else ():
        documents: dict[Split, tuple[int, ...]] = {
            split: tuple(number for number in numbers if _has_reference(leaf, number))
            for split, numbers in leaf.documents.items()
        }
        if documents["search"]:
            leaves.append(replace(leaf, documents=documents))
    if not leaves:
        return None
    return Likelihood(
        key=f"{task.key}:{METRIC}",
        weight=task.weight,
        metric=METRIC,
        filter="none",
        leaves=tuple(leaves),
        higher_is_better=not task.is_against_metric,
    )


def why_none(task: ScoredTask) -> str:
    """Say why an entry has no references."""
    if type(task) is not ScoredTask:
        return "is no task with answers"
    if any(_runs_answers(leaf) for leaf in task.leaves):
        return "runs what the model writes; its targets are tests, not answers"
    if all(leaf.task.OUTPUT_TYPE == "loglikelihood_rolling" for leaf in task.leaves):
        return "scores whole texts"
    return "has no answers in its doc_to_target"


def _has_reference(leaf: Leaf, number: int) -> bool:
    kind = leaf.task.OUTPUT_TYPE
    try:
        if kind == "generate_until":
            return bool(reference_texts(leaf, leaf.docs[number]))
        if kind == "multiple_choice":
            return bool(_right_options(leaf.task, leaf.docs[number]))
    except Exception as error:
        raise SearchFileError(
            f"tasks: {leaf.name}, document {number}: its reference cannot be read "
            f"({type(error).__name__}: {error!s:.200}); correct doc_to_target, or use "
            f"search.signal: metric"
        ) from error
    return bool(kind == "loglikelihood")


def _runs_answers(leaf: Leaf) -> bool:
    return bool(getattr(leaf.task, "UNSAFE_CODE", False))


def reference_texts(leaf: Leaf, doc: Any) -> list[str]:
    """List the reference answers of a document of a task that generates; without empty ones."""
    task = leaf.task
    # A constant number, as tasks write that score answers by rules, is no answer.
    is_rule = isinstance(task.config.doc_to_target, int) and task.config.doc_to_choice is None
    if is_rule or _runs_answers(leaf):
        return []
    target = task.doc_to_target(doc)
    each = list(target) if isinstance(target, list | tuple) else [target]
    if task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(doc)
        each = [choices[one] if isinstance(one, int) else one for one in each]
    texts = [str(one) for one in each if isinstance(one, str | int | float)]
    return [text for text in dict.fromkeys(texts) if text.strip()]


def _right_options(task: Any, doc: Any) -> list[int]:
    """List the numbers of a question's right options, as lm-eval reads them."""
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    numbers = [
        choices.index(one) if isinstance(one, str) and one in choices else one
        for one in (gold if isinstance(gold, list | tuple) else [gold])
    ]
    return [n for n in numbers if isinstance(n, int) and 0 <= n < len(choices)]


def target_requests(
    leaf: Leaf, number: int, instances: Sequence[Instance], has_chat_template: bool
) -> list[Instance]:
    """Build the requests for the references of one document.

    Args:
        instances: the document's own requests; those that are a reference's already are reused.
        has_chat_template: whether prompts are wrapped in a chat template.

    Raises:
        SearchFileError: no prompt is there for a reference to follow.
    """
    if leaf.task.OUTPUT_TYPE == "multiple_choice":
        return [instances[i] for i in _right_options(leaf.task, leaf.docs[number])]
    if leaf.task.OUTPUT_TYPE == "loglikelihood":
        return list(instances[:1])
    prompt = next((each for each in instances if each.request_type == "generate_until"), None)
    if prompt is None:
        raise SearchFileError(
            f"tasks: {leaf.name} asks in a way of its own, without a prompt that a reference could "
            f"follow; use search.signal: metric"
        )
    return [
        type(prompt)(
            request_type="loglikelihood",
            doc=prompt.doc,
            arguments=(prompt.args[0], _delimiter(leaf, number, text, has_chat_template) + text),
            idx=i,
            metadata=(prompt.task_name, prompt.doc_id, 1),
        )
        for i, text in enumerate(reference_texts(leaf, leaf.docs[number]))
    ]


def _delimiter(leaf: Leaf, number: int, text: str, has_chat_template: bool) -> str:
    """Return what stands between a prompt and its answer in lm-eval's few-shot examples."""
    if not builds_as_usual(leaf.task):
        return ""
    prefix = leaf.task.doc_to_prefix(leaf.docs[number])
    if prefix:
        return "" if prefix[-1].isspace() or text[0].isspace() else " "
    return "" if has_chat_template else str(leaf.task.config.target_delimiter)


def n_target_tokens(leaf: Leaf, number: int, lm: LM, request: Instance) -> int:
    """Count the tokens of a reference behind its prompt, as the LM cuts them.

    Raises:
        SearchFileError: the reference adds no token to the prompt.
    """
    context, target = request.args
    if context:
        n = len(lm._encode_pair(context, target)[1])
    else:
        tokens = lm.tok_encode(target, add_special_tokens=False)
        n = len(tokens) - (tokens[:1] == [lm.prefix_token_id])
    if n < 1:
        raise SearchFileError(
            f"tasks: {leaf.name}, document {number}: its reference {target!r:.80} adds no token to the "
            f"prompt; correct the task's target_delimiter, or use search.signal: metric"
        )
    return n


def list_targets(
    likelihoods: Sequence[Likelihood],
    split: Split,
    built: Mapping[tuple[str, int], Sequence[Instance]],
    own: RequestList,
    lm: LM,
    has_chat_template: bool,
) -> tuple[RequestList, Targets]:
    """List the references of a split's documents, and what must be sent for them.

    Args:
        built: every document's own requests.
        own: those that are sent anyway; a reference among them is not sent again.

    Raises:
        SearchFileError: a reference cannot follow its prompt.
    """
    wanted = {
        (leaf.name, number): (
            leaf,
            target_requests(leaf, number, built[leaf.name, number], has_chat_template),
        )
        for task in likelihoods
        for leaf in task.leaves
        for number in leaf.documents[split]
    }

    def is_sent(place: tuple[str, int]) -> bool:
        return place in own.users and not wanted[place][0].generates

    sent = RequestList({place: requests for place, (_, requests) in wanted.items() if not is_sent(place)})
    targets = {
        place: [
            Target(
                own.users[place][request.idx] if is_sent(place) else sent.users[place][i],
                n_target_tokens(leaf, place[1], lm, request),
            )
            for i, request in enumerate(requests)
        ]
        for place, (leaf, requests) in wanted.items()
    }
    return sent, targets


def likelihood_outcomes(
    task: Likelihood, split: Split, targets: Targets, replies: Mapping[int, Sequence[Any]]
) -> list[Outcome]:
    """Return each document's likelihood.

    Args:
        replies: by id of what was asked, the model's.
    """
    return [
        Outcome(
            leaf.name,
            number,
            max(_probability(target, replies) for target in targets[leaf.name, number]),
            metric=METRIC,
        )
        for leaf in task.leaves
        for number in leaf.documents[split]
    ]


def _probability(target: Target, replies: Mapping[int, Sequence[Any]]) -> float:
    ((logprob, _), *_) = replies[id(target.asked)]
    # Rounding may put a certain answer's log-likelihood just above zero.
    return math.exp(min(float(logprob) / target.n_tokens, 0.0))
