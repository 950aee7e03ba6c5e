"""The split that is asked: documents of the preferred one, prompts as lm-eval makes them of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from evolve.search_file import ScoringSettings, TaskSpec
from evolve.tasks import TaskSet
from evolve.tasks.requests import Prompts

SIZES = {"train": 12, "validation": 9, "test": 15}
FEW = "num_fewshot: 2\n"
SPELLED = (
    FEW + "fewshot_config:\n  samples:\n    - {q: 'train 3:', a: '3'}\n    - {q: 'train 5:', a: '5'}\n"
)


class Silent(LM):
    """Answers with nothing, and keeps nothing."""

    def loglikelihood(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return [(0.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> list[float]:
        return [0.0 for _ in requests]

    def generate_until(self, requests: Any, **kwargs: Any) -> list[str]:
        return ["" for _ in requests]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits")
    for split, n in SIZES.items():
        rows = [{"q": f"{split} {i}:", "a": str(i)} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, splits: Mapping[str, str], rest: str = "") -> None:
        files = ", ".join(f"{split}: {folder}/{split}.jsonl" for split in SIZES)
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{{files}}}}}\n"
            + "".join(f"{key}: {split}\n" for key, split in splits.items())
            + "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\nmetric_list:\n"
            + "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
            + rest
        )

    every = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    write("zero", every)
    write("few", every, FEW)
    write("spelled", every, SPELLED)
    write("validated", {"training_split": "train", "validation_split": "validation"}, FEW)
    write("tested", {"test_split": "test"})
    write("valid_few", {**every, "test_split": "validation", "fewshot_split": "train"}, FEW)
    write("train_few", {**every, "test_split": "train", "fewshot_split": "train"}, FEW)
    return folder


def asked(folder: Path, name: str, split: str) -> list[str]:
    """The prompts of all documents, in their order."""
    scoring = ScoringSettings(task_paths=[str(folder)], limit=None, holdout=0, split=split)  # type: ignore[arg-type]
    tasks = TaskSet([TaskSpec(name=name)], scoring, 0)
    (leaf,) = tasks.tasks[0].leaves
    requests = Prompts(Silent()).build(leaf, leaf.documents["search"])
    return [instance.args[0] for number in sorted(requests) for instance in requests[number]]


def questions(prompts: list[str]) -> list[str]:
    return [prompt.rsplit("\n\n", 1)[-1] for prompt in prompts]


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("name", ["zero", "few"])
def test_the_documents_are_those_of_the_preferred_split(folder: Path, name: str, split: str) -> None:
    assert questions(asked(folder, name, split)) == [f"{split} {i}:" for i in range(SIZES[split])]


@pytest.mark.parametrize(
    ("name", "split", "taken"),
    [
        ("tested", "validation", "test"),
        ("tested", "train", "test"),
        ("validated", "test", "validation"),
        ("validated", "train", "train"),
    ],
)
def test_a_task_without_the_split_is_asked_on_what_it_has(
    folder: Path, name: str, split: str, taken: str
) -> None:
    assert questions(asked(folder, name, split))[0] == f"{taken} 0:"


@pytest.mark.parametrize(("split", "twin"), [("validation", "valid_few"), ("train", "train_few")])
def test_prompts_are_those_of_a_task_whose_test_split_it_is(folder: Path, split: str, twin: str) -> None:
    assert asked(folder, "few", split) == asked(folder, twin, "test")


def test_no_document_is_an_example_in_its_own_prompt(folder: Path) -> None:
    prompts = asked(folder, "few", "train")
    assert all(prompt.count("train ") == 3 for prompt in prompts)  # two examples and the question
    for prompt, question in zip(prompts, questions(prompts), strict=True):
        assert prompt.count(question) == 1


def test_documents_that_a_task_spells_out_as_examples_are_not_asked(folder: Path) -> None:
    expected = [f"train {i}:" for i in range(12) if i not in (3, 5)]
    assert questions(asked(folder, "spelled", "train")) == expected
    assert len(asked(folder, "spelled", "validation")) == SIZES["validation"]


def test_search_and_holdout_come_from_the_split_and_are_named_after_it(folder: Path) -> None:
    scoring = ScoringSettings(task_paths=[str(folder)], limit=4, holdout=3, split="validation")
    tasks = TaskSet([TaskSpec(name="zero"), TaskSpec(name="tested")], scoring, 0)
    zero, tested = (task.leaves[0] for task in tasks.tasks)
    assert (zero.split, tested.split) == ("validation", "test")
    assert len(zero.docs) == SIZES["validation"]
    assert not set(zero.documents["search"]) & set(zero.documents["holdout"])
    assert tasks.notices() == []  # of one's own data nobody publishes results
