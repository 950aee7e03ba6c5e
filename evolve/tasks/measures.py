"""Objectives beside tasks: what answering costs, and functions of the user's own.

They are taken over the documents of the lm-eval tasks of the same search, whose requests are
answered anyway.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evolve.errors import SearchFileError, TrialTaskError, boundary
from evolve.search_file import TaskSpec
from evolve.tasks.draw import Leaf, Split
from evolve.tasks.outcome import AnsweredDocument, Outcome
from evolve.tasks.scored import Answered, ScoredTask


@dataclass(frozen=True)
class Mean(ScoredTask):
    """An objective whose score is the plain mean over all documents of its leaves."""

    may_be_share: ClassVar[bool] = False

    @property
    def is_raced(self) -> bool:
        """Whether a part of the documents tells of all."""
        return True

    def averages(self, outcomes: Sequence[Outcome]) -> bool:
        """Tell that the score is the plain mean of the values."""
        return True

    def score(self, outcomes: Sequence[Outcome]) -> float:
        """Return the mean value.

        Raises:
            TrialTaskError: it is not finite.
        """
        total = math.fsum(float(outcome.value) for outcome in outcomes) / len(outcomes)
        if not math.isfinite(total):
            raise self._not_finite(self.key, total, outcomes)
        return total


class OutputTokens(Mean):
    """`output_tokens`: tokens a document of the texts that the model generated; less is better.

    Tokens are those of the answers' texts by the prompting tokenizer, without special ones, summed
    over a document's requests and repeats. Documents of tasks that generate count, no others.
    """

    def outcomes(self, split: Split, answered: Answered) -> list[Outcome]:
        """Count each document's tokens."""
        return [
            Outcome(leaf.name, number, float(answered[leaf.name, number].tokens))
            for leaf in self.leaves
            for number in leaf.documents[split]
        ]


class SecondsPerDocument(Mean):
    """`seconds_per_document`: wall seconds of answering, a document; less is better.

    Not reproducible: it depends on the machine, on what else runs there, and on the engine's
    batches. Engines answer many documents at once, so a call's seconds are shared out by the
    length of request and answer. The interval says how much another draw of documents would
    change, not how much the clock would at another time.
    """

    @property
    def is_raced(self) -> bool:
        """Tell that few documents take other seconds each than many."""
        return False

    def outcomes(self, split: Split, answered: Answered) -> list[Outcome]:
        """Give each document its share of the seconds."""
        return [
            Outcome(leaf.name, number, answered[leaf.name, number].seconds)
            for leaf in self.leaves
            for number in leaf.documents[split]
        ]


@dataclass(frozen=True)
class FunctionScore(ScoredTask):
    """`module:function`: a function of the user's own, of all documents of the search's tasks.

    It is called with a list of AnsweredDocument and returns a list with one number a document (the
    score is their mean), or one number, the score. It must depend on nothing else: to score the
    same documents again it is called again, in any process. For the interval of one number it is
    called with resampled documents, some of them twice.
    """

    n_resamples: ClassVar[int] = 200

    @property
    def is_raced(self) -> bool:
        """Tell that a part of the documents is not known to tell of all: it may return one number."""
        return False

    def averages(self, outcomes: Sequence[Outcome]) -> bool:
        """Tell whether the function gave a number for each document."""
        return not any(isinstance(outcome.value, Mapping) for outcome in outcomes)

    def score(self, outcomes: Sequence[Outcome]) -> float:
        """Return the mean of the function's values, or its one number.

        Raises:
            TrialTaskError: the function fails or gives no finite number.
        """
        if self.averages(outcomes):
            return math.fsum(outcome.value for outcome in outcomes) / len(outcomes)
        leaves = {leaf.name: leaf for leaf in self.leaves}
        value = self._call([_recalled(leaves[outcome.leaf], outcome) for outcome in outcomes])
        if isinstance(value, list):
            raise TrialTaskError(f"{self.metric} gave one number before, and now a list")
        return value

    def outcomes(self, split: Split, answered: Answered) -> list[Outcome]:
        """Call the function; where it gives one number keep what it saw of each document.

        Raises:
            TrialTaskError: the function fails or gives no finite number.
        """
        places = [(leaf, number) for leaf in self.leaves for number in leaf.documents[split]]
        seen = [Outcome(leaf.name, number, _kept(answered[leaf.name, number])) for leaf, number in places]
        value = self._call(
            [_recalled(leaf, outcome) for (leaf, _), outcome in zip(places, seen, strict=True)]
        )
        if isinstance(value, float):
            return seen
        return [Outcome(o.leaf, o.document, v) for o, v in zip(seen, value, strict=True)]

    def _call(self, documents: list[AnsweredDocument]) -> float | list[float]:
        with boundary(TrialTaskError, self.metric):
            value = load_function(self.metric)(documents)
            if hasattr(value, "tolist"):
                value = value.tolist()
            if not isinstance(value, list | tuple):
                total = float(value)
                if not math.isfinite(total):
                    raise TrialTaskError(f"{self.metric} returned {total}, not a finite number")
                return total
            if len(value) != len(documents):
                raise TrialTaskError(
                    f"{self.metric} returned {len(value)} numbers for {len(documents)} documents; "
                    f"return one a document, or one number"
                )
            values = [float(item) for item in value]
            for document, item in zip(documents, values, strict=True):
                if not math.isfinite(item):
                    raise TrialTaskError(
                        f"{self.metric} returned {item} for document {document.document} of "
                        f"{document.task}, not a finite number"
                    )
            return values


def _kept(document: AnsweredDocument) -> dict[str, Any]:
    """Return what must be kept of a document for the function to see it again: plain data."""
    kept = {
        "answers": list(document.answers),
        "values": dict(document.values),
        "tokens": document.tokens,
        "seconds": document.seconds,
    }
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=lambda array: array.tolist()))
    return plain


def _recalled(leaf: Leaf, outcome: Outcome) -> AnsweredDocument:
    return AnsweredDocument(leaf.name, outcome.document, leaf.docs[outcome.document], **outcome.value)


def load_function(name: str) -> Callable[[list[AnsweredDocument]], Any]:
    """Import `module:function`, from the working directory too.

    Raises:
        SearchFileError: there is no such module, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    # A command's path does not hold the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SearchFileError(
            f"{name!r}, whose module cannot be imported ({type(error).__name__}: {error!s:.200}); "
            f"correct it, or run where it lies"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(sorted(n for n, f in inspect.getmembers(module, inspect.isfunction))) or "none"
        raise SearchFileError(
            f"{name!r}; {module_name} has no such function, its functions: {there:.200}"
        )
    return function  # type: ignore[no-any-return]


def function_file(name: str) -> Path | None:
    """Return the file that a function is written in; None where it has none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(load_function(name)))
    except TypeError:  # a callable object, or one of Python's own
        return None
    return Path(file) if file else None


def measure(field: str, spec: TaskSpec, asked: Sequence[ScoredTask]) -> ScoredTask:
    """Make the objective of an entry that is taken over the documents of other entries.

    Args:
        field: where the entry stands.
        asked: the search's entries that are lm-eval tasks.

    Raises:
        SearchFileError: it cannot be taken, or a function cannot be loaded.
    """
    leaves = {leaf.name: leaf for task in asked for leaf in task.leaves}
    if spec.kind == "output_tokens":
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.generates}
    if not leaves:
        what = "a task that generates text" if spec.kind == "output_tokens" else "an lm-eval task"
        raise SearchFileError(
            f"{field}.name is {spec.name!r}, which is taken over the documents of other tasks; name "
            f"{what} beside it"
        )
    if spec.kind == "function":
        try:
            load_function(spec.name)
        except SearchFileError as error:
            raise SearchFileError(f"{field}.name is {error}") from error
    kinds: dict[str, type[ScoredTask]] = {
        "output_tokens": OutputTokens,
        "seconds_per_document": SecondsPerDocument,
        "function": FunctionScore,
    }
    return kinds[spec.kind](
        key=spec.name,
        weight=spec.weight,
        metric=spec.name,
        filter="none",
        leaves=tuple(leaves.values()),
        higher_is_better=spec.kind == "function" and spec.direction == "maximize",
    )
