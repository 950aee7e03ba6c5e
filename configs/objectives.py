"""Objectives as Python functions, for configs/objectives.yml.

A function gets all documents of the search's tasks as a list of evolve.tasks.AnsweredDocument and
returns a list with one number a document, or one number for all of them.
"""

from collections import defaultdict

from evolve.tasks import AnsweredDocument


def letters_right(documents: list[AnsweredDocument]) -> list[float]:
    """Score each generated answer by the share of letters that stand where they should.

    A document that is no generation counts as its task scores it.
    """
    scores = []
    for document in documents:
        if "answer" not in document.doc:
            scores.append(document.values["acc,none"])
            continue
        right = document.doc["answer"]
        given = document.answers[0].strip()
        scores.append(sum(a == b for a, b in zip(right, given, strict=False)) / len(right))
    return scores


def worst_task(documents: list[AnsweredDocument]) -> float:
    """Score a candidate by the task it is worst at: a merge that forgets nothing is wanted."""
    by_task = defaultdict(list)
    for document in documents:
        by_task[document.task].append(next(iter(document.values.values())))
    return min(sum(values) / len(values) for values in by_task.values())
