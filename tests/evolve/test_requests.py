"""Requests: built once, sent once, in one order; and what is said when a task fails on an answer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from evolve.errors import SearchFileError, TrialEngineError, TrialTaskError
from evolve.search_file import ScoringSettings, TaskSpec
from evolve.study import load_outcomes, save_outcomes
from evolve.tasks import RequestBank, TaskSet

N = 30


class RecordingLM(LM):
    """Answers by hash of the request, and remembers what it was asked."""

    tokenizer_name = "recording"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[tuple[Any, ...]]] = []

    def loglikelihood(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.asked.append([r.args for r in requests])
        return [(-_number(*r.args), False) for r in requests]

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> list[float]:
        self.asked.append([r.args for r in requests])
        return [-_number(*r.args) for r in requests]

    def generate_until(self, requests: Any, **kwargs: Any) -> list[str]:
        self.asked.append([r.args for r in requests])
        return ["" if _number(r.args[0]) > 0.5 else str(len(r.args[0])) for r in requests]

    def apply_chat_template(self, history: Any, add_generation_prompt: bool = True) -> str:
        raise ValueError("there is no template")


def _number(*texts: str) -> float:
    return int.from_bytes(hashlib.sha256("|".join(texts).encode()).digest()[:4], "big") / 2**32


METRICS = """
def half(references, predictions, **kwargs):
    return 0.5

def demanding(references, predictions, **kwargs):
    return 1 / len(predictions[0])

def not_a_number(references, predictions, **kwargs):
    return float("nan")

def broken(values):
    return float("nan")

def picky(resps, docs):
    return [[answer[0] for answer in r] and r[0] for r in resps]

def by_parts(doc, results):
    return {"mean_of_all": 1.0, "seldom": 3.0} if doc["i"] % 2 else {"mean_of_all": 0.0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"i": i, "q": f"question {i * 37}:", "a": str(i), "b": ["yes", "no"]} for i in range(N)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.py").write_text(METRICS)

    def write(name: str, kind: str, rest: str) -> None:
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
            f"fewshot_split: test\noutput_type: {kind}\ndoc_to_text: q\ndoc_to_target: a\n{rest}"
        )

    exact = "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    own = "metric_list:\n  - {metric: !function metrics.%s, aggregation: mean%s}\n"
    better = ", higher_is_better: true"
    write("plain", "generate_until", exact)
    write("again", "generate_until", exact)
    write("thrice", "generate_until", f"{exact}repeats: 3\n")
    write(
        "choice",
        "multiple_choice",
        "doc_to_choice: b\nnum_fewshot: 2\n" + exact.replace("exact_match", "acc"),
    )
    write(
        "first",
        "multiple_choice",
        "doc_to_choice: b\nnum_fewshot: 2\nfewshot_config: {sampler: first_n, split: test}\n"
        + exact.replace("exact_match", "acc"),
    )
    write("demanding", "generate_until", own % ("demanding", better))
    write("nan", "generate_until", own % ("not_a_number", better))
    write("aimless", "generate_until", own % ("half", ""))
    write("broken", "generate_until", own.replace("mean", "!function metrics.broken") % ("half", better))
    picky = "filter_list:\n  - name: picky\n    filter:\n"
    picky += "      - {function: custom, filter_fn: !function metrics.picky}\n"
    write("picky", "generate_until", exact + picky)
    parts = "process_results: !function metrics.by_parts\nmetric_list:\n"
    parts += "  - {metric: mean_of_all, aggregation: mean, higher_is_better: true}\n"
    parts += "  - {metric: seldom, aggregation: mean, higher_is_better: false}\n"
    write("parts", "generate_until", parts)
    write(
        "template",
        "generate_until",
        exact.replace("metric_list", "description: '{{1 / i}}'\nmetric_list"),
    )
    return str(folder)


def bank_of(folder: str, *entries: str | TaskSpec, **scoring: Any) -> RequestBank:
    settings = {"task_paths": [folder], "limit": None, "holdout": 0, **scoring}
    specs = [TaskSpec(name=e) if isinstance(e, str) else e for e in entries]
    tasks = TaskSet(specs, ScoringSettings(**settings), 0)
    return RequestBank(tasks, RecordingLM(), bool(scoring.get("apply_chat_template")))


def test_equal_requests_of_two_tasks_and_two_metrics_are_sent_once(folder: str) -> None:
    bank = bank_of(folder, "plain", "again")
    outcomes = bank.answer("search")
    (asked,) = bank.lm.asked
    assert len(asked) == N
    assert [o.value for o in outcomes["plain"]] == [o.value for o in outcomes["again"]]


def test_repeats_are_sent_as_often_as_the_most_demanding_task_wants(folder: str) -> None:
    bank = bank_of(folder, "plain", "thrice")
    bank.answer("search")
    (asked,) = bank.lm.asked
    assert len(asked) == 3 * N
    assert len({args[0] for args in asked}) == N


def test_requests_are_sent_longest_first_and_options_together(folder: str) -> None:
    bank = bank_of(folder, "plain", "choice")
    bank.answer("search")
    texts, choices = bank.lm.asked
    lengths = [len(args[0]) for args in texts]
    assert lengths == sorted(lengths, reverse=True)
    contexts = [args[0] for args in choices]
    assert contexts[::2] == contexts[1::2]
    assert len(set(contexts)) == N


def test_in_reverse_the_same_is_asked_in_another_order_and_in_two_halves(folder: str) -> None:
    bank = bank_of(folder, "plain")
    outcomes = bank.answer("search")
    assert bank.answer("search", in_reverse=True) == outcomes
    forth, *back = bank.lm.asked
    assert len(back) == 2
    assert [*back[0], *back[1]] == forth[::-1]


@pytest.mark.parametrize("name", ["choice", "first"])
def test_few_shot_prompts_do_not_depend_on_limits(folder: str, name: str) -> None:
    def prompts(**scoring: Any) -> dict[tuple[str, int], list[Any]]:
        bank = bank_of(folder, name, **scoring)
        found = {}
        for split in ("search", "holdout"):
            bank.answer(split)
            for place, requests in bank._instances(split).items():
                found[place] = [request.args for request in requests]
        return found

    whole, some, fewer = prompts(), prompts(limit=5, holdout=0.3), prompts(limit=2)
    assert len(whole) == N
    assert len(some) == 14
    assert some.items() <= whole.items()
    assert fewer.items() <= whole.items()
    # Two different examples, never the document itself where they are drawn.
    if name == "choice":
        assert len({requests[0][0].split(":")[0] for requests in whole.values()}) > 5
        assert all(requests[0][0].count(f"question {37 * n}:") == 1 for (_, n), requests in whole.items())


def test_every_metric_of_a_document_is_kept_and_stored(folder: str, tmp_path: Path) -> None:
    bank = bank_of(folder, "parts", TaskSpec(name="parts", metric="seldom"))
    outcomes = bank.answer("search")
    first, second = outcomes.values()
    assert list(outcomes) == ["parts:mean_of_all,none", "parts:seldom,none"]
    assert [dict(o.others) for o in first[:2]] == [{}, {"seldom,none": 3.0}]
    # Documents without a value are left out of the metric, as in lm-eval.
    assert [o.value for o in second[:2]] == [None, 3.0]
    assert bank.tasks.scores(outcomes) == {"parts:mean_of_all,none": 0.5, "parts:seldom,none": 3.0}
    save_outcomes(tmp_path / "o.parquet", {"search": outcomes})
    assert load_outcomes(tmp_path / "o.parquet")["search"] == outcomes


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("demanding", ["demanding, document ", "(its answer is empty)", "ZeroDivisionError"]),
        ("picky", ["picky, document ", "(its answer is empty): filter 'picky' failed: IndexError"]),
    ],
)
def test_a_metric_or_filter_that_raises_names_task_document_and_cause(
    folder: str, name: str, texts: list[str]
) -> None:
    with pytest.raises(TrialTaskError) as error:
        bank_of(folder, name).answer("search")
    assert all(text in str(error.value) for text in texts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan", "nan: the score is nan, not a finite number; not_a_number gives document 0 nan"),
        ("broken", "broken: the score is nan, not a finite number; half aggregates 30 documents to that"),
    ],
)
def test_a_score_that_is_no_number_says_where_it_comes_from(folder: str, name: str, text: str) -> None:
    bank = bank_of(folder, name)
    with pytest.raises(TrialTaskError) as error:
        bank.tasks.scores(bank.answer("search"))
    assert str(error.value) == text


def test_an_answer_too_few_is_the_engines_fault(folder: str) -> None:
    bank = bank_of(folder, "plain")
    bank.lm.generate_until = lambda requests: ["one"]
    with pytest.raises(TrialEngineError, match="gave 1 answers to 30 requests"):
        bank.answer("search")


def test_a_metric_without_direction_wants_one(folder: str) -> None:
    with pytest.raises(SearchFileError) as error:
        bank_of(folder, "aimless")
    assert error.value.faults == [
        "tasks[0].metric is 'half', for which aimless does not say whether higher or lower is better; "
        "add direction: maximize or minimize to the entry, or higher_is_better to the task's file"
    ]
    for direction, sign in (("maximize", 1), ("minimize", -1)):
        spec = TaskSpec.model_validate({"name": "aimless", "direction": direction})
        assert bank_of(folder, spec).tasks.tasks[0].sign == sign


@pytest.mark.parametrize(
    ("name", "scoring", "text"),
    [
        ("template", {}, "tasks: template, document 0: its prompt cannot be built (ZeroDivisionError"),
        ("plain", {"apply_chat_template": True}, "cannot be built (ValueError: there is no template)"),
    ],
)
def test_a_prompt_that_cannot_be_built_is_an_error_at_the_start(
    folder: str, name: str, scoring: dict[str, Any], text: str
) -> None:
    with pytest.raises(SearchFileError) as error:
        bank_of(folder, name, **scoring)
    assert text in error.value.faults[0]
