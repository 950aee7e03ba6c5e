"""Objectives beside tasks: tokens, seconds, perplexity of a text, divergence, functions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evolve.engines.hf import HfEngine, ResidentLM
from evolve.errors import SearchFileError, TrialTaskError
from evolve.intervals import gain_interval, score_interval
from evolve.plan import make_plan
from evolve.search_file import ScoringSettings, SearchFile, TaskSpec
from evolve.study import load_outcomes, save_outcomes
from evolve.tasks import AnsweredDocument, Outcomes, RequestBank, TaskSet, evaluate, report_set
from evolve.tasks.divergence import coarse_divergence
from evolve.tasks.text import read_documents

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs/quickstart/models"
TEXT = str(ROOT / "configs/objectives.txt")


class NextTokenLM(ResidentLM):
    """The hf engine's LM with next-token distributions by plain forward passes."""

    def next_token_logprobs(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]] | int
    ) -> list[dict[int, float]]:
        found = []
        for i, prompt in enumerate(prompts):
            with torch.no_grad():
                logits = self.model(torch.tensor([list(prompt)])).logits[0, -1]
            logprobs = logits.double().log_softmax(-1)
            tokens = logprobs.topk(wanted).indices.tolist() if isinstance(wanted, int) else wanted[i]
            found.append({token: float(logprobs[token]) for token in tokens})
        return found


def lm_of(name: str) -> NextTokenLM:
    engine = HfEngine.of(str(MODELS / name), "cpu")
    return NextTokenLM(engine.model, engine.lm().tokenizer, batch_size=64)


@pytest.fixture(scope="module")
def reverse() -> NextTokenLM:
    return lm_of("reverse")


@pytest.fixture(scope="module")
def base() -> NextTokenLM:
    return lm_of("base")


def task_set(entries: list[dict[str, Any] | str], **scoring: Any) -> TaskSet:
    settings = {"task_paths": [str(ROOT / "tasks")], "limit": 20, "holdout": 0.25, **scoring}
    specs = [TaskSpec(**({"name": e} if isinstance(e, str) else e)) for e in entries]
    return TaskSet(specs, ScoringSettings(**settings), 0)


def answered(tasks: TaskSet, lm: ResidentLM) -> Outcomes:
    return RequestBank(tasks, lm, False).answer("search")


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of functions where a command would be run, and name it."""
    monkeypatch.chdir(tmp_path)
    modules = iter(f"functions_{i}_{tmp_path.name}" for i in range(9))

    def write(code: str) -> str:
        module = next(modules)
        (tmp_path / f"{module}.py").write_text(code)
        return module

    return write


# ---- the search file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"name": "perplexity", "txt": "a"}, "tasks[0].txt: unknown key 'txt'; did you mean 'text'?"),
        ({"name": "perplexity"}, "tasks[0].text is missing; perplexity needs it, write text: FILE"),
        ({"name": "kl_divergence", "text": "a"}, "tasks[0].reference is missing"),
        ({"name": "output_tokens", "text": "a"}, "tasks[0].text is 'a'; output_tokens takes no text"),
        ({"name": "qs_sort", "reference": "m"}, "tasks[0].reference is 'm'; a task takes no reference"),
        ({"name": "m:f"}, "tasks[0].direction is missing; a function needs it, write direction: max"),
        ({"name": "m:f", "direction": "up"}, "tasks[0].direction is 'up'; input should be 'maximize'"),
        (
            {"name": "m:f", "direction": "minimize", "metric": "x"},
            "tasks[0].metric is 'x'; a function takes no metric",
        ),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_loaded(entry: dict[str, Any], fault: str) -> None:
    with pytest.raises(SearchFileError) as error:
        SearchFile({"merge_method": "linear", "tasks": [entry]})
    assert error.value.faults[0].startswith(fault)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        (["output_tokens"], "taken over the documents of other tasks; name a task that generates text"),
        (["qs_largest", "output_tokens"], "name a task that generates text"),
        (["seconds_per_document"], "name an lm-eval task beside it"),
        ([{"name": "perplexity", "text": "gone.txt"}], "tasks[0].text is 'gone.txt', which cannot be"),
        (
            ["qs_sort", {"name": "no.such:f", "direction": "maximize"}],
            "tasks[1].name is 'no.such:f', whose module cannot be imported (ModuleNotFoundError",
        ),
        (
            ["qs_sort", {"name": "json:load_all", "direction": "maximize"}],
            "tasks[1].name is 'json:load_all'; json has no such function, its functions: detect_enc",
        ),
        (
            ["qs_sort", {"name": "output_tokens", "direction": "maximize"}],
            "tasks[1].direction is 'maximize', but output_tokens is better when it is lower",
        ),
        (
            [{"name": "qs_sort", "direction": "minimize"}],
            "tasks[0].direction is 'minimize', but exact_match of qs_sort is better when it is higher",
        ),
        (
            [{"name": "perplexity", "text": TEXT, "metric": "perplexity"}],
            "use one of: byte_perplexity,none, word_perplexity,none, bits_per_byte,none",
        ),
    ],
)
def test_an_entry_that_cannot_be_scored_is_refused(entries: list[Any], fault: str) -> None:
    with pytest.raises(SearchFileError) as error:
        task_set(entries)
    assert len(error.value.faults) == 1
    assert fault in error.value.faults[0]


def test_entries_of_one_name_are_told_apart() -> None:
    text = {"text": TEXT}
    tasks = task_set(
        [
            {"name": "perplexity", **text},
            {"name": "perplexity", **text, "metric": "word_perplexity"},
            {"name": "kl_divergence", **text, "reference": "a"},
            {"name": "kl_divergence", **text, "reference": "b"},
        ]
    )
    assert [task.key for task in tasks.tasks] == [
        "perplexity:byte_perplexity,none",
        "perplexity:word_perplexity,none",
        "kl_divergence:a",
        "kl_divergence:b",
    ]
    assert tasks.n_documents == 20  # one text, drawn once

    assert tasks.references() == ["a", "b"]


def test_a_reported_entry_is_told_apart_from_a_searched_one_of_its_name(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("One.\n\nTwo.\n")
    reported = report_set(
        [TaskSpec(name="perplexity", text=str(other))],
        ScoringSettings(),
        0,
        searched=[TaskSpec(name="perplexity", text=TEXT)],
    )
    assert [task.key for task in reported.tasks] == [f"perplexity:byte_perplexity,none:{other}"]


def test_a_searched_text_cannot_be_only_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the same text by whatever measure, and however its path is written."""
    monkeypatch.chdir(ROOT)
    searched = [TaskSpec(name="kl_divergence", text=TEXT, reference="a")]
    file = str(Path(TEXT).relative_to(ROOT))
    specs = [TaskSpec(name="perplexity", text=file)]
    reported = report_set(specs, ScoringSettings(), 0, searched=searched)
    (fault,) = reported.shared_faults(TaskSet(searched, ScoringSettings(), 0))
    assert fault.startswith(f"report_only[0].text is {file!r}, which tasks[0].name 'kl_divergence' is")


# ---- tokens and seconds ---------------------------------------------------------------------------


def test_output_tokens_are_those_of_the_generated_texts(
    reverse: NextTokenLM, functions: Callable[[str], str]
) -> None:
    module = functions(
        "def count(documents):\n"
        "    return [float(len(d.answers[0]) if d.task == 'qs_reverse' else 0) for d in documents]\n"
    )
    own = {"name": f"{module}:count", "direction": "minimize"}
    tasks = task_set(["qs_reverse", "qs_largest", "output_tokens", own])
    outcomes = answered(tasks, reverse)
    scores = tasks.scores(outcomes)
    assert [o.leaf for o in outcomes["output_tokens"]] == ["qs_reverse"] * 20
    # The quickstart's tokenizer makes a token of each letter, which `reverse` answers with.
    assert scores["output_tokens"] == pytest.approx(5, abs=0.5)
    assert scores["output_tokens"] == 2 * scores[own["name"]]
    assert tasks.objective({**dict.fromkeys(scores, 0.0), "output_tokens": 5.0}) == -5.0
    assert tasks.n_documents == 40


def test_seconds_are_those_of_answering_and_shared_by_length(reverse: NextTokenLM) -> None:
    import time

    tasks = task_set(["qs_reverse", "qs_largest", "seconds_per_document"])
    bank = RequestBank(tasks, reverse, False)
    began = time.perf_counter()
    outcomes = bank.answer("search")
    took = time.perf_counter() - began
    seconds = [outcome.value for outcome in outcomes["seconds_per_document"]]
    assert len(seconds) == 40
    assert min(seconds) > 0
    assert 0.3 * took < sum(seconds) <= took
    interval = score_interval(tasks.tasks[2], outcomes["seconds_per_document"], 0)
    assert interval.low <= interval.value <= interval.high


# ---- texts ----------------------------------------------------------------------------------------


def test_a_text_is_cut_at_blank_lines_and_jsonl_by_lines(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("\n one\nmore\n\n \n\ntwo\n\n\nthree ")
    assert read_documents("text", str(plain)) == [" one\nmore", "two", "three "]
    lines.write_text('{"text": "one\\n\\ntwo"}\n\n{"text": "three"}\n')
    assert read_documents("text", str(lines)) == ["one\n\ntwo", "three"]
    lines.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_documents("text", str(lines)) == ["one\u2028two"]
    lines.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(SearchFileError, match="line 2 has no `text`"):
        read_documents("tasks[0].text", str(lines))
    plain.write_text(" \n")
    with pytest.raises(SearchFileError, match="holds no text"):
        read_documents("tasks[0].text", str(plain))


def test_perplexity_is_lm_evals_of_the_same_documents(base: NextTokenLM, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    metrics = ("byte_perplexity", "word_perplexity")
    entries = [{"name": "perplexity", "text": TEXT, "metric": metric} for metric in metrics]
    tasks = task_set(list(entries), limit=None, holdout=0)
    scores = tasks.scores(answered(tasks, base))
    rows = "".join(json.dumps({"text": d}) + "\n" for d in read_documents("text", TEXT))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "text.yaml").write_text(
        "task: my_text\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = lm_eval.simple_evaluate(base, tasks=["my_text"], task_manager=manager, bootstrap_iters=0)
    for metric in metrics:
        key = f"perplexity:{metric},none"
        assert scores[key] == theirs["results"]["my_text"][f"{metric},none"]
    assert not any(task.higher_is_better for task in tasks.tasks)


# ---- divergence -----------------------------------------------------------------------------------


def divergence(reference: NextTokenLM, candidate: NextTokenLM, **entry: Any) -> tuple[TaskSet, Outcomes]:
    spec = {"name": "kl_divergence", "text": TEXT, "reference": "given", **entry}
    tasks = task_set([spec])
    bank = RequestBank(tasks, candidate, False)
    assert bank.needs_references() == ["given"]
    bank.learn_reference("given", reference)
    assert bank.needs_references() == []
    return tasks, bank.answer("search")


def test_a_model_does_not_diverge_from_itself(base: NextTokenLM) -> None:
    tasks, outcomes = divergence(base, base)
    assert tasks.scores(outcomes) == {"kl_divergence": 0.0}


def test_divergence_is_the_mean_over_positions_of_kl(base: NextTokenLM, reverse: NextTokenLM) -> None:
    tasks, outcomes = divergence(base, reverse, positions=3)
    (task,) = tasks.tasks
    expected = []
    for number in task.leaves[0].documents["search"]:
        tokens = base.tok_encode(task.leaves[0].docs[number]["text"])
        each = []
        for length in (round(len(tokens) / 3), round(len(tokens) * 2 / 3), len(tokens)):
            ids = torch.tensor([tokens[:length]])
            with torch.no_grad():
                p, q = (m.model(ids).logits[0, -1].double().log_softmax(-1) for m in (base, reverse))
            each.append(float((p.exp() * (p - q)).sum()))  # 47 tokens, fewer than the 64 kept
        expected.append(sum(each) / 3)
    assert [o.value for o in outcomes["kl_divergence"]] == pytest.approx(expected, rel=1e-6)
    assert tasks.objective(tasks.scores(outcomes)) < -0.1
    interval = score_interval(task, outcomes["kl_divergence"], 0)
    assert 0 < interval.low < interval.value < interval.high


def test_a_bucket_for_the_rest_makes_it_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (3 * torch.randn(1000, generator=generator).double() for _ in range(2))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        full = float((p.exp() * (p - q)).sum())
        bounds = []
        for k in (1, 8, 64, 512):
            top = p.topk(k).indices.tolist()
            parts = [{t: float(logprobs[t]) for t in top} for logprobs in (p, q)]
            bounds.append(coarse_divergence(*parts))
        assert 0 <= bounds[0] <= bounds[1] <= bounds[2] <= bounds[3] <= full + 1e-9
        assert bounds[3] > 0.9 * full


def test_a_candidate_without_distributions_fails_by_name(base: NextTokenLM) -> None:
    class Broken(NextTokenLM):
        def next_token_logprobs(self, prompts: Any, wanted: Any) -> Any:
            return [{token: math.nan for token in tokens} for tokens in wanted]

    tasks, outcomes = divergence(base, Broken(base.model, base.tokenizer, batch_size=64))
    first = outcomes["kl_divergence"][0].document
    with pytest.raises(TrialTaskError, match=rf"kl_divergence: the score is nan.* document {first} nan"):
        tasks.scores(outcomes)


def quickstart(**changes: Any) -> SearchFile:
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return SearchFile({**file.as_dict(), **changes}, "quickstart")


def test_a_reference_of_another_shape_is_refused_at_the_start(wider_model: Path) -> None:
    entry = {"name": "kl_divergence", "reference": str(wider_model), "text": TEXT}
    with pytest.raises(SearchFileError) as error:
        make_plan(quickstart(tasks=[entry]))
    (fault,) = error.value.faults
    assert "whose tensors are not those of the merge" in fault
    assert fault.endswith("name a model of the same architecture and vocabulary")
    entry["reference"] = "no/such"
    with pytest.raises(SearchFileError, match="kl_divergence: reference is 'no/such'"):
        make_plan(quickstart(tasks=[entry]))


def test_a_changed_text_function_or_reference_makes_another_search(
    tmp_path: Path, functions: Callable[[str], str]
) -> None:
    import shutil

    module = functions("def f(documents):\n    return 1.0\n")
    text = tmp_path / "text.txt"
    text.write_text("one\n\ntwo\n")
    reference = tmp_path / "reference"
    shutil.copytree(MODELS / "base", reference)
    tasks = [
        "qs_sort",
        {"name": "perplexity", "text": str(text)},
        {"name": "kl_divergence", "text": str(text), "reference": str(reference)},
        {"name": f"{module}:f", "direction": "maximize"},
    ]
    scoring = {"task_paths": [str(ROOT / "tasks")], "limit": 10}
    data = quickstart().as_dict() | {"tasks": tasks, "scoring": scoring}
    data["base_model"] = str(MODELS / "base")
    for entry in data["models"]:
        entry["model"] = str(ROOT / entry["model"])

    def identity() -> dict[str, Any]:
        return make_plan(SearchFile(data, "s")).identity()

    before = identity()
    assert set(before["files"]) == {"qs_sort", str(text), f"{module}:f"}
    text.write_text("one\n\ntwo!\n")
    assert identity()["files"][str(text)] != before["files"][str(text)]
    with (tmp_path / f"{module}.py").open("a") as file:
        file.write("# changed\n")
    assert identity()["files"][f"{module}:f"] != before["files"][f"{module}:f"]
    weights = reference / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "by": "another"})
    assert identity()["checkpoints"][str(reference)] != before["checkpoints"][str(reference)]


# ---- functions ------------------------------------------------------------------------------------


def test_a_function_sees_every_document_and_gives_each_a_number(
    reverse: NextTokenLM, functions: Callable[[str], str]
) -> None:
    module = functions(
        "from evolve.tasks import AnsweredDocument\n"
        "def same(documents):\n"
        "    assert all(type(d) is AnsweredDocument for d in documents)\n"
        "    assert {d.task for d in documents} == {'qs_reverse', 'qs_largest'}\n"
        "    assert all(d.seconds > 0 for d in documents)\n"
        "    return [d.values['exact_match,none'] if d.tokens else d.values['acc,none']\n"
        "            for d in documents]\n"
    )
    name = f"{module}:same"
    tasks = task_set(["qs_reverse", "qs_largest", {"name": name, "direction": "maximize"}])
    outcomes = answered(tasks, reverse)
    both = [o.value for key in ("qs_reverse", "qs_largest") for o in outcomes[key]]
    assert [o.value for o in outcomes[name]] == both
    assert tasks.scores(outcomes)[name] == pytest.approx(sum(both) / 40)


def test_a_function_of_one_number_has_intervals_and_survives_storage(
    reverse: NextTokenLM, base: NextTokenLM, functions: Callable[[str], str], tmp_path: Path
) -> None:
    module = functions(
        "def spread(documents):\n"
        "    wrong = [d.answers[0].strip() != d.doc['answer'] for d in documents]\n"
        "    return sum(wrong) ** 0.5 + sum(d.tokens for d in documents) / len(documents)\n"
    )
    name = f"{module}:spread"
    tasks = task_set(["qs_reverse", {"name": name, "direction": "minimize"}])
    one, other = answered(tasks, reverse), answered(tasks, base)
    scores = tasks.scores(one)
    save_outcomes(tmp_path / "o.parquet", {"search": one})
    recalled = load_outcomes(tmp_path / "o.parquet")["search"]
    assert recalled == one
    assert tasks.scores(recalled) == scores
    interval = score_interval(tasks.tasks[1], recalled[name], 0)
    assert interval.value == scores[name]
    assert interval.low <= interval.high
    gain = gain_interval(tasks, recalled, other)
    assert gain.value == pytest.approx(
        tasks.objective(scores) - tasks.objective(tasks.scores(other)), abs=1e-12
    )
    assert gain.low < gain.high


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return [1.0]", "returned 1 numbers for 20 documents; return one a document, or one number"),
        ("return float('nan')", "returned nan, not a finite number"),
        ("return None", "TypeError"),
        ("return [float('inf')] * len(documents)", "returned inf for document"),
    ],
)
def test_a_function_that_fails_makes_a_failed_candidate(
    body: str, text: str, reverse: NextTokenLM, functions: Callable[[str], str]
) -> None:
    name = f"{functions(f'def f(documents):{chr(10)}    {body}')}:f"
    tasks = task_set(["qs_reverse", {"name": name, "direction": "maximize"}])
    with pytest.raises(TrialTaskError) as error:
        answered(tasks, reverse)
    assert str(error.value).startswith(name)
    assert text in str(error.value)


def test_evaluate_takes_other_objectives_too() -> None:
    scores = evaluate(
        str(MODELS / "reverse"),
        ["qs_reverse", "output_tokens", TaskSpec(name="perplexity", text=TEXT)],
        limit=10,
        task_paths=[str(ROOT / "tasks")],
    )
    assert list(scores) == ["qs_reverse", "output_tokens", "perplexity"]
    assert scores["qs_reverse"] > 0.9
    assert scores["perplexity"] > 1


def test_the_example_functions_do_what_they_say() -> None:
    from evolve.tasks.measures import load_function

    def document(task: str, right: str, given: str) -> AnsweredDocument:
        value = {"exact_match,none": float(right == given)}
        return AnsweredDocument(task, 0, {"answer": right}, [given], value, 1, 0.1)

    documents = [document("a", "abcd", "abcd"), document("b", "abcd", " abd"), document("b", "x", "x")]
    assert load_function("configs.objectives:letters_right")(documents) == [1.0, 0.5, 1.0]
    assert load_function("configs.objectives:worst_task")(documents) == 0.5


@pytest.mark.skipif(
    not hasattr(ResidentLM, "next_token_logprobs"), reason="the hf engine gives no distributions yet"
)
def test_a_worker_holds_candidates_against_the_reference() -> None:
    from evolve.workers.worker import Job, Worker
    from merge_core.plan import model_alone

    reference = str(MODELS / "reverse")
    entry = {"name": "kl_divergence", "reference": reference, "text": TEXT}
    scoring = {"task_paths": [str(ROOT / "tasks")], "limit": 10}
    plan = make_plan(quickstart(tasks=["qs_reverse", entry], scoring=scoring))
    worker = Worker(plan.setup, plan.tasks, plan.sources)

    def scores(recipe: Any) -> dict[str, float]:
        result = worker.evaluate(Job("0", "trial", recipe, ("search",), (plan.setup.prompting,)))
        assert result.failure is None
        return plan.tasks.scores(result.outcomes[plan.setup.prompting]["search"])

    alone = model_alone(reference, plan.start)
    assert scores(alone)["kl_divergence"] == 0
    assert scores(plan.start)["kl_divergence"] > 0.1
    assert scores(alone) == {"qs_reverse": 1.0, "kl_divergence": 0.0}
