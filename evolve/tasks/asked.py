"""Which documents a task is asked on: lm-eval's own choice, or another split of its data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

# By preference, what is taken where a task has it; after them lm-eval's own choice, which is the test
# split, else the validation split.
_TAKEN = {"test": (), "validation": ("validation",), "train": ("training", "validation")}


def asked_split(task: Any) -> str:
    """Name the split that a task is asked on, as its data set does."""
    config = task.config
    name: str | None = config.test_split or config.validation_split
    return name or ("test" if task.has_test_docs() else "validation")


def ask_on(task: Any, preferred: Literal["test", "validation", "train"]) -> bool:
    """Have a task ask the documents of the preferred split, where it has that.

    Prompts are made of them as of any others. No document is an example in its own prompt: lm-eval
    leaves it out where examples come from the split that is asked, and documents that a task's file
    spells out as examples are not asked.

    Returns:
        Whether it now asks other documents than lm-eval would.
    """
    for kind in _TAKEN[preferred]:
        name = getattr(task.config, f"{kind}_split") or kind
        has_docs: Callable[[], bool] = getattr(task, f"has_{kind}_docs")
        if not has_docs() or not _can_leave_out(task, kind, name):
            continue
        if name == asked_split(task):
            return False
        docs = _without_examples(task, getattr(task, f"{kind}_docs")())
        if _examples_come_from(task, kind, name):
            task.fewshot_cfg.split = name
        task.set_config(key="test_split", value=name)
        task.has_test_docs = lambda: True
        task.test_docs = partial(_same, docs)
        return True
    return False


def _same(docs: Any) -> Any:
    return docs


def _examples_come_from(task: Any, kind: str, name: str) -> bool:
    """Tell whether few-shot examples are drawn from a split; lm-eval prefers training documents."""
    if task.fewshot_cfg.split is not None:
        return bool(task.fewshot_cfg.split == name)
    if task.fewshot_cfg.samples is not None:
        return False
    return kind == "training" or not task.has_training_docs()


def _can_leave_out(task: Any, kind: str, name: str) -> bool:
    """Tell whether lm-eval knows a document among the examples: not where they are changed first."""
    is_same = task.fewshot_cfg.process_docs is task.config.process_docs
    return is_same or not task.config.num_fewshot or not _examples_come_from(task, kind, name)


def _without_examples(task: Any, docs: Any) -> Any:
    """Leave out the documents that the task's file spells out as examples."""
    samples = task.fewshot_cfg.samples if task.fewshot_cfg.split is None else None
    if not samples or not task.config.num_fewshot:
        return docs
    spelled: Sequence[Any] = samples() if callable(samples) else samples
    questions = [task.doc_to_text(doc, task.fewshot_cfg.doc_to_text) for doc in spelled]
    kept = [i for i, doc in enumerate(docs) if task.doc_to_text(doc) not in questions]
    return docs.select(kept) if hasattr(docs, "select") else [docs[i] for i in kept]
