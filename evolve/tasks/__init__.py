"""Tasks and other objectives: documents drawn by seed, requests built once, outcomes by document.

The tasks' own functions build prompts, filter answers, score documents and aggregate them, so that
a score here is lm-eval's score on the same documents. What is added is the draw of documents, that
nothing is built twice, and objectives that are no lm-eval task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks.bank import RequestBank
from evolve.tasks.divergence import reference_faults
from evolve.tasks.draw import SPLITS, Documents, Leaf, Split
from evolve.tasks.outcome import AnsweredDocument, Outcome, Outcomes, as_json, n_documents
from evolve.tasks.scored import ScoredTask
from evolve.tasks.task_set import TaskSet, report_set

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from merge_core.recipe import Recipe

__all__ = [
    "SPLITS",
    "AnsweredDocument",
    "Documents",
    "Leaf",
    "Outcome",
    "Outcomes",
    "RequestBank",
    "ScoredTask",
    "Split",
    "TaskSet",
    "as_json",
    "evaluate",
    "n_documents",
    "reference_faults",
    "report_set",
]


def evaluate(
    model: str | Path | Recipe | PreTrainedModel,
    tasks: str | TaskSpec | Sequence[str | TaskSpec],
    *,
    limit: int | None = None,
    seed: int = 0,
    task_paths: Sequence[str] = ("tasks",),
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Score one model on lm-eval tasks and other objectives.

    Args:
        model: a folder or Hub id, a recipe (merged in memory), or a Transformers model that knows
            where its tokenizer is (`load_merged` gives such).
        tasks: names or TaskSpecs, or one of them.
        limit: documents a task, drawn by seed; None = all.
        seed: of the draw.
        task_paths: folders of task files.
        num_fewshot: examples in a prompt; None = as each task says.
        apply_chat_template: wrap prompts in the tokenizer's chat template.
        system_instruction: stands before every prompt.
        device: torch device.

    Returns:
        Score by task key.

    Raises:
        SearchFileError: a task is unknown or at fault.
        TrialTaskError, TrialEngineError: the model cannot be scored.
    """
    from evolve.engines.hf import HfEngine

    listed = [tasks] if isinstance(tasks, str | TaskSpec) else tasks
    specs = [TaskSpec(name=task) if isinstance(task, str) else task for task in listed]
    scoring = ScoringSettings(
        limit=limit,
        holdout=0.0,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        task_paths=list(task_paths),
    )
    task_set = TaskSet(specs, scoring, seed)
    engine = HfEngine.of(model, device)
    bank = RequestBank(task_set, engine.lm(), apply_chat_template, ("search",))
    for reference in bank.needs_references():
        bank.learn_reference(reference, HfEngine.of(reference, device).lm())
    return task_set.scores(bank.answer("search"))
