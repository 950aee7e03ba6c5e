"""Candidates served as adapters by one vLLM engine: they answer as their merges do; searches of them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from optuna.trial import TrialState

from evolve.engines import EngineSettings
from evolve.errors import PausedError
from evolve.loop import run
from evolve.plan import make_plan
from evolve.search_file import SearchFile
from evolve.study import Study
from evolve.workers.population import PopulationPool
from evolve.workers.start import Workers, start_pool
from evolve.workers.worker import Job
from merge_core.combined import combined_adapter
from merge_core.plan import Sources, files_folder, merged_config, model_alone
from merge_core.recipe import Recipe

from ..merge_core.adapters import saved_adapter
from .failing import write_tasks

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
pytest.importorskip("peft", reason="PEFT writes the adapters")

pytestmark = pytest.mark.vllm
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {"max_model_len": 96, "kv_cache_memory_bytes": 1 << 26}
STEM = "the quick brown fox jumps over the lazy dog and then "  # of more than a block of cache
PAIRS = [(STEM, "it sat"), (STEM, "it ran"), ("x", "yz"), ("", "abc"), ("sort cab:", " abc")]
TEXTS = ["sort cab:", STEM, "7 3 9"]


class Request(NamedTuple):
    """What the adapters read of an lm-eval request."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def models(tied_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base and an untied one, `one` and `two` with adapters of both by base's name."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = AutoTokenizer.from_pretrained(tied_pair / "a")
    for name, is_tied in (("tied", True), ("untied", False)):
        base = LlamaForCausalLM.from_pretrained(tied_pair / "a")
        if not is_tied:
            base.config.tie_word_embeddings = False
            state = base.state_dict()
            base = LlamaForCausalLM(base.config)
            base.load_state_dict({**state, "lm_head.weight": state["lm_head.weight"].flip(0)})
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        for seed, (adapter, config) in enumerate(
            {
                "one": {"target_modules": EVERYTHING},
                "two": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 7, "lora_alpha": 9},
            }.items()
        ):
            model = LlamaForCausalLM.from_pretrained(folder / name)
            saved_adapter(model, folder / f"{name}-{adapter}", seed, **config)
    return folder


def recipe(models: Path, base: str, one: Any, two: Any) -> Recipe:
    entries = [
        {"model": f"{models}/{base}+{models}/{base}-{name}", "parameters": {"weight": weight}}
        for name, weight in (("one", one), ("two", two))
    ]
    return Recipe.parse(
        {
            "merge_method": "task_arithmetic",
            "base_model": f"{models}/{base}",
            "models": entries,
            "dtype": "float32",
        }
    )


def answers(lm: Any) -> tuple[list[tuple[float, bool]], list[str]]:
    asked = {"until": ["\n"], "max_gen_toks": 12}
    return (
        lm.loglikelihood([Request(pair) for pair in PAIRS]),
        lm.generate_until([Request((text, dict(asked))) for text in TEXTS]),
    )


def settings(like: Recipe, sources: Sources) -> EngineSettings:
    return EngineSettings(merged_config(like, sources), files_folder(like, sources), options=OPTIONS)


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_adapters_answer_as_their_merges_do(models: Path, base: str) -> None:
    """Two generations, so that numbers, names and caches of the first could be taken for the second's."""
    from evolve.engines.vllm import VllmEngine
    from evolve.engines.vllm_adapters import VllmAdapters

    by_layer = [{"filter": "mlp", "value": [0.0, 1.5]}, {"value": [1.0, -0.5]}]
    generations = [
        [recipe(models, base, 1.0, 0.0), recipe(models, base, 0.0, 1.0)],
        [recipe(models, base, by_layer, 0.6), recipe(models, base, 0.3, by_layer)],
    ]
    sources = Sources(keep=True)
    first = generations[0][0]
    example = combined_adapter(first, sources)
    engine = VllmAdapters(
        settings(first, sources), 2, [example], model_alone(f"{models}/{base}", first), sources
    )
    served: list[Any] = []
    for generation in generations:
        held = [engine.hold(combined_adapter(each, sources)) for each in generation]
        n_calls = len(calls := counted(engine))
        served += engine.together([(place, lambda view: answers(view(engine.lm()))) for place in held])
        assert len(calls) - n_calls == 2, "both candidates' requests go into one call"
        engine.forget()
    engine.close()
    merged = []
    ordinary = VllmEngine(settings(first, sources))
    for each in [each for generation in generations for each in generation]:
        ordinary.load_recipe(each, sources)
        merged.append(answers(ordinary.lm()))
    ordinary.close()
    for (scores, texts), (wanted_scores, wanted_texts) in zip(served, merged, strict=True):
        assert texts == wanted_texts
        for (ours, is_greedy), (theirs, is_theirs) in zip(scores, wanted_scores, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
            assert is_greedy == is_theirs
    # Or nothing was told apart.
    assert len({scores[0][0] for scores, _ in merged}) == len(merged)


def counted(engine: Any) -> list[int]:
    """Have the engine note how many prompts each of its calls has."""
    calls: list[int] = []
    generate = engine._llm.generate

    def noting(prompts: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return generate(prompts, *arguments, **options)

    engine._llm.generate = noting
    return calls


# ---- searches -------------------------------------------------------------------------------------


def search(models: Path, tasks: Path, n_iterations: int = 7, **settings: Any) -> SearchFile:
    """Over two adapters of the tied base; the letters that answers begin with are scored."""
    entries = [
        {
            "model": f"{models}/tied+{models}/tied-{name}",
            "parameters": {"weight": {"low": -1.0, "high": 1.0, "start": 0.5}},
        }
        for name in ("one", "two")
    ]
    return SearchFile(
        {
            "merge_method": "linear",
            "models": entries,
            "dtype": "float32",
            "tasks": ["option"],
            "search": {"n_iterations": n_iterations, "sampler": "cma", "adapters_at_once": 3, **settings},
            "scoring": {
                "backend": "vllm",
                "limit": 5,
                "holdout": 5,
                "task_paths": [str(tasks)],
                "engine": {**OPTIONS, "max_model_len": 128},
            },
        }
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
    text = (folder / "long_option.yaml").read_text()
    text = text.replace("long_option", "option").replace("a" * 300, "a" * 2)
    (folder / "option.yaml").write_text(text)
    return folder


def test_a_search_scores_adapters_and_decides_on_merges(
    models: Path, tasks: Path, tmp_path: Path
) -> None:
    """One cannot be merged, the centre of all ranges, where weights sum to zero; it fails alone."""
    found = run(search(models, tasks), folder=tmp_path / "s")
    (failed,) = (trial for trial in found.study.trials() if trial.state != TrialState.COMPLETE)
    assert failed.user_attrs["known"] == "centres"
    assert failed.user_attrs["failure"]["kind"] == "merge"
    others = [trial for trial in found.study.trials() if trial is not failed]
    assert {trial.user_attrs["scored_as"] for trial in others} == {"adapter"}
    assert found.study.has_finals
    for trial in found.study.ranked()[:3]:
        by_merge = found.study.outcomes.load(f"final-{trial.number}")["search"]
        as_adapter = found.study.outcomes.load(f"trial-{trial.number}")["search"]
        assert by_merge == as_adapter
    assert found.verdict is not None
    finalists = found.study.finalists()
    assert all(found.study.is_scored_as_adapter(t) != (t.number in finalists) for t in others)
    assert "as an adapter" not in (tmp_path / "s/best.yml").read_text()


def test_a_search_that_was_interrupted_proposes_the_same(
    models: Path, tasks: Path, tmp_path: Path
) -> None:
    """In the middle of a generation, whose other candidates were scored and not told."""
    whole = run(search(models, tasks), folder=tmp_path / "whole").study
    n_told = 0

    def interrupt(event: str, study: Study | None, plan: Any) -> None:
        nonlocal n_told
        n_told += event == "told"
        if n_told == 4:
            raise PausedError

    with pytest.raises(PausedError):
        run(search(models, tasks), folder=tmp_path / "cut", progress=interrupt)
    resumed = run(search(models, tasks), folder=tmp_path / "cut").study
    for one, other in zip(whole.trials(), resumed.trials(), strict=True):
        assert one.params == other.params
        assert one.values == other.values


def test_what_is_no_adapter_is_merged(models: Path, tasks: Path) -> None:
    plan = make_plan(search(models, tasks), device="cpu")
    pool = start_pool(plan, Workers())
    assert isinstance(pool, PopulationPool)
    blend = recipe(models, "tied", 0.3, 0.6)
    job = Job("0", "trial", blend, ("search",), (plan.setup.prompting,), signal="likelihood")
    data = job.recipe.as_config() | {"merge_method": "linear", "parameters": {"normalize": False}}
    for each in (job, replace(job, recipe=Recipe.parse(data)), replace(job, kind="winner")):
        pool.submit(each)
    results = [pool.wait() for _ in range(3)]
    pool.submit(job)
    results.append(pool.wait())
    pool.close()
    assert [result.failure for result in results] == [None] * 4
    assert [result.as_adapter for result in results] == [True, False, False, True]
    values = [
        [
            outcome.value
            for outcome in result.outcomes[plan.setup.prompting]["search"]["option:likelihood"]
        ]
        for result in results
    ]
    assert values[0] == values[3]
    assert values[0] == pytest.approx(values[2], rel=1e-3)
    assert values[0] != pytest.approx(values[1], rel=1e-2)
