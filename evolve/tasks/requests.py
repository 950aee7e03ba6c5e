"""Documents to requests, as lm-eval builds them, and the one order in which they are sent.

lm-eval draws few-shot examples from one sequence of random numbers, document after document. A
document's prompt is here the one it has when the whole task is built, whatever the limits: where
examples are drawn, the draws of the documents between are made too, and only those.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evolve.errors import SearchFileError
from evolve.tasks.draw import Leaf
from merge_core.errors import MergeError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

# lm-eval's own default seed for few-shot examples, so that prompts equal its own.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Prompts:
    """How prompts are made of documents.

    Attributes:
        lm: gives the chat template.
        apply_chat_template: wrap prompts in it.
        fewshot_as_multiturn: few-shot examples then are turns of a conversation, as lm-eval does
            by default.
        system_instruction: stands before every prompt.
    """

    lm: LM
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None

    def build(self, leaf: Leaf, numbers: Iterable[int]) -> dict[int, list[Instance]]:
        """Build the requests of a leaf's documents, by document.

        Raises:
            SearchFileError: a prompt cannot be built.
        """
        wanted = set(numbers)
        task = leaf.task
        task.set_fewshot_seed(FEWSHOT_SEED)
        n_shots = task.config.num_fewshot or 0
        has_draws = n_shots and not _takes_the_first(task)
        between = _draws_between(task, n_shots) if has_draws else None
        requests = {}
        for number in range(max(wanted, default=-1) + 1) if has_draws else sorted(wanted):
            try:
                if number in wanted:
                    requests[number] = self._of_document(task, number, leaf.docs[number], n_shots)
                elif between is None:
                    self._context(task, leaf.docs[number], n_shots)
                else:
                    task.sampler.sample(n=n_shots, eval_doc=leaf.docs[number] if between else None)
            except MergeError:
                raise
            except Exception as error:
                raise SearchFileError(
                    f"tasks: {leaf.name}, document {number}: its prompt cannot be built "
                    f"({type(error).__name__}: {error!s:.200}); correct the task, or num_fewshot, "
                    f"apply_chat_template or system_instruction in scoring"
                ) from error
        return requests

    def _context(self, task: Any, doc: Any, n_shots: int) -> Any:
        template = self.lm.apply_chat_template if self.apply_chat_template else None
        return task.fewshot_context(
            doc,
            num_fewshot=n_shots,
            system_instruction=self.system_instruction,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template and self.fewshot_as_multiturn,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(doc),
        )

    def _of_document(self, task: Any, number: int, doc: Any, n_shots: int) -> list[Instance]:
        built = task.construct_requests(
            doc=doc,
            ctx=self._context(task, doc, n_shots),
            metadata=(task.config.task, number, task.config.repeats),
            apply_chat_template=self.apply_chat_template,
            chat_template=self.lm.apply_chat_template if self.apply_chat_template else None,
        )
        instances = built if isinstance(built, list) else [built]
        return sorted(instances, key=lambda instance: instance.idx)


def _takes_the_first(task: Any) -> bool:
    """Tell whether a task's examples are the first ones for every document."""
    from lm_eval.api.samplers import FirstNSampler

    return builds_as_usual(task) and type(getattr(task, "sampler", None)) is FirstNSampler


def builds_as_usual(task: Any) -> bool:
    """Tell whether a task joins prompts, examples and answers as its file says, by no code of its own."""
    from lm_eval.api.task import ConfigurableTask

    return getattr(type(task), "fewshot_context", None) is ConfigurableTask.fewshot_context


def _draws_between(task: Any, n_shots: int) -> bool | None:
    """Tell how to make the draws of a document whose prompt is not wanted.

    Returns:
        Whether the document itself takes part (it is never its own example); None where a task
        draws in a way of its own, and the prompt must be built.
    """
    if not builds_as_usual(task):
        return None
    return bool(task.fewshot_cfg.split == task.config.test_split)


@dataclass
class Asked:
    """One request as it is sent: once, whoever wants it.

    Attributes:
        instance: of the first document that wants it.
        repeats: how many answers are wanted.
        n_users: how many requests of documents it stands for.
    """

    instance: Instance
    repeats: int
    n_users: int = 0


@dataclass
class RequestList:
    """All requests of a split, by leaf and document, and each different one once.

    Args:
        by_document: what `Prompts.build` made, by leaf name and document.
    """

    by_document: Mapping[tuple[str, int], Sequence[Instance]]
    asked: dict[str, list[Asked]] = field(init=False)
    users: dict[tuple[str, int], list[Asked]] = field(init=False)

    def __post_init__(self) -> None:
        unique: dict[tuple[str, str], Asked] = {}
        self.users = {}
        for place, instances in self.by_document.items():
            self.users[place] = []
            for instance in instances:
                key = instance.request_type, json.dumps(instance.args, default=repr)
                asked = unique.setdefault(key, Asked(instance, 1))
                asked.repeats = max(asked.repeats, instance.repeats or 1)
                asked.n_users += 1
                self.users[place].append(asked)
        self.asked = {}
        for (kind, _), asked in unique.items():
            self.asked.setdefault(kind, []).append(asked)
        # One order for every candidate; options of one question stay together.
        for every in self.asked.values():
            every.sort(key=lambda asked: _by_length(asked.instance))
        self.asked = {kind: self.asked[kind] for kind in sorted(self.asked)}


def _by_length(instance: Instance) -> tuple[int, str]:
    context = instance.args[0]
    return -len(context), context


def n_characters(instance: Instance) -> int:
    """Count the characters of a request's texts."""
    return sum(len(part) for part in instance.args if isinstance(part, str))
