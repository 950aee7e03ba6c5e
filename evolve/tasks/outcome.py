"""What a document gave: its answers, and its value under each metric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What one document gave under one entry of `tasks:`.

    Attributes:
        leaf: the lm-eval task it belongs to, behind its group's name; or a text file.
        document: its number there.
        value: under the entry's own metric: a number, or what lm-eval keeps where the metric is no
            mean (a pair of log-likelihood and words, of gold and prediction); None where the task
            gave this document no value.
        others: by "metric,filter" what the task's other metrics and filters gave.
        metric: the entry's own, as "metric,filter"; None where the entry's name says it all.
    """

    leaf: str
    document: int
    value: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None


Outcomes = dict[str, list[Outcome]]
"""Per task key the outcomes, in the order of leaves and documents."""


def n_documents(outcomes: Mapping[str, Iterable[Outcome]]) -> int:
    """Count the documents behind outcomes; two metrics of one document count once."""
    return len({(o.leaf, o.document) for values in outcomes.values() for o in values})


def as_json(value: Any) -> str:
    """Spell a metric's value of one document; what JSON does not have, such as a set, as its text."""
    try:
        return json.dumps(value, default=lambda array: array.tolist())
    except (AttributeError, TypeError, ValueError):
        return json.dumps(repr(value))


@dataclass(frozen=True)
class AnsweredDocument:
    """What an objective of the user's own sees of one document.

    Attributes:
        task: the lm-eval task, behind its group's name: "gsm8k", "mmlu/mmlu_anatomy".
        document: its number in the split that the task is asked on.
        doc: the document itself, as the task's data set has it.
        answers: as the model gave them, one a request and repeat: texts where the task generates,
            pairs (log-likelihood, whether greedy decoding gives it) where it compares options,
            log-likelihoods of whole texts.
        values: by "metric,filter" what the task's own metrics gave: {"exact_match,none": 1.0}.
        tokens: how many tokens the generated texts have; 0 where nothing was generated.
        seconds: this document's share of the wall seconds in which the model answered.
    """

    task: str
    document: int
    doc: Mapping[str, Any]
    answers: Sequence[Any]
    values: Mapping[str, Any]
    tokens: int
    seconds: float
