"""The likelihood of reference answers: its value, its requests, searches that follow it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import TemplateLM
from optuna.trial import TrialState

from evolve.engines.hf import HfEngine, ResidentLM
from evolve.errors import ResumeRefusedError, SearchFileError, SearchStoppedError
from evolve.evaluation import EvalOptions, evaluate_models
from evolve.loop import StudyResult, run
from evolve.report import print_result, result_json, study_json
from evolve.search_file import ScoringSettings, SearchFile, Signal, TaskSpec
from evolve.study import Study, load_outcomes, save_outcomes
from evolve.tasks import RequestBank, TaskSet

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs/quickstart/models"
NAMES = ["qs_reverse", "qs_sort", "qs_largest"]
N = 6
SIGNALS: tuple[Signal, ...] = ("likelihood", "both")


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def task_set(entries: list[dict[str, Any] | str], *folders: str, **scoring: Any) -> TaskSet:
    settings = {"task_paths": [str(ROOT / "tasks"), *folders], "limit": 20, "holdout": 0, **scoring}
    specs = [TaskSpec(**({"name": e} if isinstance(e, str) else e)) for e in entries]
    return TaskSet(specs, ScoringSettings(**settings), 0)


@pytest.fixture(scope="module")
def lm() -> ResidentLM:
    """Of a blend, which is sure of little."""
    from merge_core.recipe import Recipe

    models = [
        {"model": str(MODELS / name), "parameters": {"weight": 0.5}} for name in ("reverse", "sort")
    ]
    return HfEngine.of(
        Recipe.parse({"merge_method": "linear", "models": models, "dtype": "float32"}), "cpu"
    ).lm()


# ---- the value -----------------------------------------------------------------------------------


def geometric_mean(lm: ResidentLM, prompt: str, answer: str) -> float:
    """By one plain forward pass of the model, token by token."""
    tokens, n = lm.tokenizer.encode(prompt + answer), len(lm.tokenizer.encode(prompt))
    with torch.no_grad():
        logprobs = lm.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    found = [float(logprobs[i - 1, tokens[i]]) for i in range(n, len(tokens))]
    return math.exp(sum(found) / len(found))


@pytest.mark.parametrize("signal", SIGNALS)
def test_it_is_the_geometric_mean_probability_of_the_references_tokens(
    lm: ResidentLM, signal: Signal
) -> None:
    tasks = task_set([*NAMES])
    outcomes = RequestBank(tasks, lm, False).answer("search", signal)
    for task in tasks.tasks:
        (leaf,) = task.leaves
        found = outcomes[f"{task.key}:likelihood"]
        assert [o.document for o in found] == list(leaf.documents["search"])
        assert {o.metric for o in found} == {"likelihood"}
        for outcome in found:
            doc = leaf.docs[outcome.document]
            answer = doc["answer"] if "answer" in doc else doc["choices"][doc["label"]]
            assert outcome.value == pytest.approx(geometric_mean(lm, doc["prompt"], answer), abs=1e-5)
        mean = sum(o.value for o in found) / len(found)
        scores = tasks.following(signal).scores(outcomes)
        assert scores[f"{task.key}:likelihood"] == pytest.approx(mean)


def test_metric_outcomes_are_the_same_when_both_are_asked(lm: ResidentLM) -> None:
    tasks = task_set([*NAMES])
    bank = RequestBank(tasks, lm, False)
    metric, both = bank.answer("search"), bank.answer("search", "both")
    assert list(both) == [*metric, *(f"{name}:likelihood" for name in NAMES)]
    assert {key: both[key] for key in metric} == metric
    assert bank.answer("search", "both", in_reverse=True)["qs_sort"] == metric["qs_sort"]


def test_what_is_recorded_is_read_again(lm: ResidentLM, tmp_path: Path) -> None:
    outcomes = RequestBank(task_set([*NAMES]), lm, False).answer("search", "both")
    save_outcomes(tmp_path / "o.parquet", {"search": outcomes})
    assert load_outcomes(tmp_path / "o.parquet")["search"] == outcomes


# ---- its requests --------------------------------------------------------------------------------


class CharacterLM(TemplateLM):
    """Every character is a token; how probable, its place in the alphabet says."""

    tokenizer_name = "characters"
    eot_token_id = prefix_token_id = 0

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, list[tuple[str, str]]] = {"generate": [], "score": []}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return [ord(character) for character in string]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.asked["score"] += [texts for texts, _, _ in requests]
        return [(sum(logprob(token) for token in answer), False) for _, _, answer in requests]

    def loglikelihood_rolling(self, requests: Any, **kwargs: Any) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: Any, **kwargs: Any) -> list[str]:
        self.asked["generate"] += [request.args for request in requests]
        return ["a" for _ in requests]

    def apply_chat_template(self, history: Any, add_generation_prompt: bool = True) -> str:
        turns = [f"<{turn['role']}>{turn['content']}" for turn in history]
        return "".join(turns) + ("<assistant>" if add_generation_prompt else "")


def logprob(token: int) -> float:
    return -(token % 32) / 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": f"question {i}:",
            "a": "zyx"[i % 3] + "b",
            "many": ["zz", "ab", "yy"],
            "some": "" if i % 2 else "ab",
            "options": ["z", "yy", "a"],
            "right": i % 3,
            "rights": [1, 0],
        }
        for i in range(N)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(name: str, kind: str, target: str, *more: str, metric: str = "exact_match") -> None:
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
            f"fewshot_split: test\noutput_type: {kind}\ndoc_to_text: q\ndoc_to_target: {target}\n"
            + "".join(f"{line}\n" for line in more)
            + f"metric_list:\n  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}\n"
        )

    write("plain", "generate_until", "a")
    write("tight", "generate_until", "a", 'target_delimiter: "|"')
    write("prefixed", "generate_until", "a", 'gen_prefix: "So"')
    write("many", "generate_until", "many")
    write("some", "generate_until", "some")
    write("named", "generate_until", "right", "doc_to_choice: options")
    write("rules", "generate_until", "0")
    write("empty", "generate_until", "''")
    write("unsafe", "generate_until", "a", "unsafe_code: true")
    write("wrong", "generate_until", "'{{1 / (right - 1)}}'")
    write("choice", "multiple_choice", "right", "doc_to_choice: options", metric="acc")
    write("choices", "multiple_choice", "rights", "doc_to_choice: options", metric="acc")
    write("word", "loglikelihood", "' {{a}}'", metric="acc")
    write("whole", "loglikelihood_rolling", "q", metric="word_perplexity")
    rolling = (
        (folder / "whole.yaml")
        .read_text()
        .replace("mean", "weighted_perplexity")
        .replace("true", "false")
    )
    (folder / "whole.yaml").write_text(rolling.replace("doc_to_text: q", "doc_to_text: ''"))
    return str(folder)


def bank_of(folder: str, *entries: dict[str, Any] | str, **scoring: Any) -> RequestBank:
    tasks = task_set([*entries], folder, limit=None, **scoring)
    return RequestBank(tasks, CharacterLM(), bool(scoring.get("apply_chat_template")))


@pytest.mark.parametrize(
    ("name", "scoring", "prompt", "target"),
    [
        ("plain", {}, "question 0:", " zb"),
        ("tight", {}, "question 0:", "|zb"),
        ("prefixed", {}, "question 0: So", " zb"),
        ("plain", {"apply_chat_template": True}, "<user>question 0:<assistant>", "zb"),
        ("prefixed", {"apply_chat_template": True}, "<user>question 0:<assistant>So", " zb"),
        ("named", {}, "question 0:", " z"),
    ],
)
def test_a_reference_follows_the_tasks_own_prompt_as_in_its_examples(
    folder: str, name: str, scoring: dict[str, Any], prompt: str, target: str
) -> None:
    bank = bank_of(folder, name, **scoring)
    bank.answer("search", "both")
    generated, scored = bank.lm.asked["generate"], bank.lm.asked["score"]
    assert prompt in [args[0] for args in generated]
    assert (prompt, target) in scored
    if name != "named":  # lm-eval joins an example to its answer in just this way
        shots = bank_of(folder, name, num_fewshot=1, **scoring)
        shots.answer("search")
        text = (prompt + target).removeprefix("<user>")
        assert any(text in args[0] for args in shots.lm.asked["generate"])


def test_with_the_likelihood_alone_nothing_is_generated(folder: str) -> None:
    bank = bank_of(folder, "plain", "choice", "word")
    outcomes = bank.answer("search", "likelihood")
    assert list(outcomes) == ["plain:likelihood", "choice:likelihood", "word:likelihood"]
    assert not bank.lm.asked["generate"]
    assert len(bank.lm.asked["score"]) == 3 * N - N  # `word` and `plain` ask for the same


def test_options_that_are_asked_anyway_are_not_asked_again(folder: str) -> None:
    bank = bank_of(folder, "choice", "word")
    bank.answer("search")
    n_asked = len(bank.lm.asked["score"])
    outcomes = bank.answer("search", "both")
    assert len(bank.lm.asked["score"]) == 2 * n_asked
    for outcome in outcomes["choice:likelihood"]:
        option = " " + ["z", "yy", "a"][outcome.document % 3]
        expected = math.exp(sum(logprob(ord(c)) for c in option) / len(option))
        assert outcome.value == pytest.approx(expected)


@pytest.mark.parametrize(("name", "best"), [("many", " ab"), ("choices", " z")])
def test_of_several_references_the_likeliest_counts(folder: str, name: str, best: str) -> None:
    bank = bank_of(folder, name)
    outcomes = bank.answer("search", "likelihood")[f"{name}:likelihood"]
    expected = math.exp(sum(logprob(ord(c)) for c in best) / len(best))
    assert [o.value for o in outcomes] == pytest.approx([expected] * N)


def test_documents_without_a_reference_are_left_out(folder: str) -> None:
    bank = bank_of(folder, "some")
    outcomes = bank.answer("search", "both")
    assert [o.document for o in outcomes["some:likelihood"]] == [0, 2, 4]
    assert len(outcomes["some"]) == N
    # What a candidate is asked of the task, which a search's limit counts.
    counted = {signal: bank.tasks.following(signal).n_documents for signal in SIGNALS}
    assert counted == {"likelihood": 3, "both": N}


# ---- what has no references ----------------------------------------------------------------------


def test_an_entry_without_references_keeps_its_metric(folder: str) -> None:
    entries = ["plain", "whole", {"name": "output_tokens", "weight": 0.1}]
    tasks = task_set([*entries], folder)
    assert [task.key for task in tasks.following("likelihood").tasks] == [
        "plain:likelihood",
        "whole",
        "output_tokens",
    ]
    scores = {"plain": 0.5, "whole": 3.0, "output_tokens": 7.0, "plain:likelihood": 0.25}
    assert tasks.objective(scores) == pytest.approx(0.5 - 3.0 - 0.7)
    assert tasks.following("likelihood").objective(scores) == pytest.approx(0.25 - 3.0 - 0.7)
    assert tasks.following("both").objective(scores) == pytest.approx(0.5 + 0.25 - 3.0 - 0.7)


def test_weights_are_the_entries_own_and_more_is_better_also_where_the_metric_is_less(
    folder: str,
) -> None:
    (task,) = task_set([{"name": "plain", "weight": 3.0}], folder).following("likelihood").tasks
    assert (task.weight, task.sign) == (3.0, 1)


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["rules"], ["rules has no answers in its doc_to_target"]),
        (["empty"], ["empty has no answers in its doc_to_target"]),
        (["whole"], ["whole scores whole texts"]),
        (["rules", "whole"], ["rules has no", "whole scores"]),
    ],
)
def test_without_any_reference_the_signal_is_refused_and_why(
    folder: str, names: list[str], texts: list[str]
) -> None:
    tasks = task_set([*names], folder)
    for signal in SIGNALS:
        with pytest.raises(SearchFileError) as error:
            tasks.following(signal)
        assert all(text in str(error.value) for text in ["search.signal", *texts])
    assert tasks.following("metric") is tasks


def test_targets_of_tasks_that_run_answers_are_no_references(folder: str) -> None:
    settings = ScoringSettings(task_paths=[folder], holdout=0)
    tasks = TaskSet([TaskSpec(name="unsafe")], settings, 0, allow_unsafe_code=True)
    with pytest.raises(SearchFileError, match="unsafe runs what the model writes"):
        tasks.following("likelihood")


def test_a_reference_that_cannot_be_read_is_an_error_that_names_its_document(folder: str) -> None:
    with pytest.raises(SearchFileError, match="wrong, document 1: its reference cannot be read"):
        task_set(["wrong"], folder).following("likelihood")


# ---- searches ------------------------------------------------------------------------------------


def small(n: int = 8, signal: str = "likelihood", **changes: Any) -> SearchFile:
    file = SearchFile.load(ROOT / "configs/quickstart.yml")
    return file.changed(
        search={"n_iterations": n, "signal": signal, **changes.pop("search", {})},
        scoring={"limit": 10, "holdout": 10, **changes},
    )


def told(study: Study) -> list[tuple[Any, ...]]:
    return [(t.number, t.params, t.value, t.user_attrs["scores"]) for t in study.trials()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    with contextlib.chdir(ROOT):
        return run(small(), folder=tmp_path_factory.mktemp("whole") / "s")


def test_the_sampler_follows_the_likelihood(finished: StudyResult) -> None:
    for trial in finished.study.trials():
        scores = trial.user_attrs["scores"]
        assert list(scores) == [f"{name}:likelihood" for name in NAMES]
        assert trial.value == pytest.approx(sum(scores.values()))
        outcomes = load_outcomes(finished.study.outcomes.path(f"trial-{trial.number}"))["search"]
        assert list(outcomes) == list(scores)


def test_the_winner_is_the_best_finalist_by_metric(finished: StudyResult) -> None:
    study = finished.study
    finalists = list(study.finalists().values())
    by_signal = sorted(study.trials(), key=lambda trial: -(trial.value or 0))
    assert {f.number for f in finalists} == {trial.number for trial in by_signal[:3]}
    assert finalists[0].rating.objective == max(f.rating.objective for f in finalists)
    assert finished.best is not None
    assert finished.verdict is not None
    assert [m.trial for m in finished.verdict.shortlist] == [f.number for f in finalists]
    assert finished.best.number == finished.verdict.trial
    data = result_json(finished)["best"]
    assert list(data["scores"]) == NAMES
    assert data["objective"] == pytest.approx(sum(data["scores"].values()))
    assert list(data["holdout"]) == NAMES
    others = [trial.number for trial in by_signal if trial.number not in study.finalists()]
    assert [trial.number for trial in study.ranked()] == [*study.finalists(), *others]
    for finalist in finalists:
        outcomes = load_outcomes(study.outcomes.path(f"final-{finalist.number}"))["search"]
        assert {k: sum(o.value for o in v) / 10 for k, v in outcomes.items()} == finalist.scores


def test_the_winner_ships_as_scored(finished: StudyResult) -> None:
    folder = finished.study.folder
    (scored,) = evaluate_models([str(folder / "best.yml")], EvalOptions(like=folder))
    assert finished.best is not None
    assert scored["scores"] == finished.study.scores(finished.best)
    for name in NAMES:
        assert f"# search  {name}: {scored['scores'][name]:.4f}\n" in (folder / "best.yml").read_text()


def test_it_resumes_to_the_same_end(finished: StudyResult, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    run(small(3), folder=folder)
    again = run(small(8), folder=folder)
    assert told(again.study) == told(finished.study)
    assert again.study.finalists() == finished.study.finalists()
    assert again.best is not None
    assert finished.best is not None
    assert again.best.number == finished.best.number
    # The head differs: intervals count the finalists of the first end too.
    assert again.recipe == finished.recipe
    assert run(small(8), folder=folder).was_complete


def test_finals_that_were_interrupted_score_only_what_is_missing(
    finished: StudyResult, tmp_path: Path
) -> None:
    scored: list[str] = []

    def kill(event: str, study: Study | None, plan: Any) -> None:
        scored.append(event)
        if scored.count("final") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(small(), folder=tmp_path / "s", progress=kill)
    study = Study.open(tmp_path / "s")
    best = study.best()
    assert best is not None
    assert best.number == study.ranked()[0].number
    assert all(key.endswith(":likelihood") for key in study.scores(best))
    print_result(study_json(study, None, None), "s")
    events: list[str] = []
    again = run(small(), folder=tmp_path / "s", progress=lambda event, *_: events.append(event))
    assert events.count("final") == 1
    assert again.study.finalists() == finished.study.finalists()
    assert again.best is not None
    assert finished.best is not None
    assert again.best.number == finished.best.number


def test_a_finalist_that_cannot_be_scored_makes_way_for_the_next(
    finished: StudyResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = ResidentLM.generate_until
    ranked = finished.study.ranked()
    fails = {tuple(ranked[0].params.values())}
    held: list[tuple[Any, ...]] = []

    def failing(self: ResidentLM, requests: Any, **kwargs: Any) -> list[str]:
        from evolve.errors import TrialEngineError

        if held and held[-1] in fails:
            raise TrialEngineError("not this one")
        return generate(self, requests, **kwargs)

    load = HfEngine.load_recipe

    def loading(self: HfEngine, recipe: Any, sources: Any = None) -> tuple[float, float]:
        held.append(tuple(m.get("parameters", {}).get("weight") for m in recipe.as_config()["models"]))
        return load(self, recipe, sources)

    monkeypatch.setattr(ResidentLM, "generate_until", failing)
    monkeypatch.setattr(HfEngine, "load_recipe", loading)
    result = run(small(holdout=0), folder=tmp_path / "s")
    by_signal = sorted(result.study.trials(), key=lambda trial: -(trial.value or 0))
    able = [trial.number for trial in by_signal if tuple(trial.params.values()) not in fails]
    assert sorted(result.study.finalists()) == sorted(able[:3])
    fails |= {tuple(trial.params.values()) for trial in ranked}
    with pytest.raises(SearchStoppedError, match="not this one"):
        run(small(), folder=tmp_path / "t")


def test_with_both_the_sampler_sees_the_sum_and_nothing_is_scored_again(tmp_path: Path) -> None:
    events: list[str] = []
    result = run(small(4, "both"), folder=tmp_path / "s", progress=lambda event, *_: events.append(event))
    assert "final" not in events
    for trial in result.study.trials():
        assert trial.state == TrialState.COMPLETE
        scores = trial.user_attrs["scores"]
        assert len(scores) == 6
        assert trial.value == pytest.approx(sum(scores.values()))
    assert list(result_json(result)["best"]["scores"]) == NAMES


def test_without_a_holdout_the_finals_decide_too(tmp_path: Path) -> None:
    result = run(small(4, holdout=0), folder=tmp_path / "s")
    data = result_json(result)
    assert list(data["best"]["scores"]) == NAMES
    assert data["noise"]["floor"] == 0
    assert data["verdict"] == "no gain shown: no holdout"


def test_another_signal_is_another_search(finished: StudyResult) -> None:
    for signal in ("metric", "both"):
        with pytest.raises(ResumeRefusedError, match="signal"):
            run(small(signal=signal), folder=finished.study.folder)


# ---- vLLM ----------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_finds_the_likelihoods_that_hf_finds(tied_pair: Path) -> None:
    from evolve.engines import EngineSettings
    from evolve.engines.vllm import VllmEngine
    from merge_core.plan import Sources, merged_config, model_alone

    recipe = model_alone(str(tied_pair / "a"))
    options = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 26}
    config = merged_config(recipe, Sources())
    engine = VllmEngine(EngineSettings(config, tied_pair / "a", options=options))
    try:
        engine.load_recipe(recipe)
        tasks = task_set([*NAMES])
        hf = RequestBank(tasks, HfEngine.of(recipe, "cpu").lm(), False)
        vllm = RequestBank(tasks, engine.lm(), False)
        for signal in SIGNALS:
            ours, theirs = vllm.answer("search", signal), hf.answer("search", signal)
            for key in (f"{name}:likelihood" for name in NAMES):
                values = [outcome.value for outcome in ours[key]]
                assert values == pytest.approx([outcome.value for outcome in theirs[key]], rel=1e-3)
    finally:
        engine.close()
