"""Tensor parallelism on CPU: two ranks, each a process that merges for itself."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evolve.engines import EngineSettings
from evolve.errors import TrialEngineError, TrialMergeError
from merge_core.merge import merged_tensors
from merge_core.plan import Sources, merged_config, model_alone
from merge_core.recipe import Recipe

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@dataclass
class Request:
    """What the adapter reads of an lm-eval request."""

    args: tuple[Any, ...]


PAIRS = [Request(pair) for pair in (("the cat", " dog"), ("the cat", "a"), ("a long text", " ends"))]


def start(tied_pair: Path, **options: Any) -> Any:
    from evolve.engines.vllm import VllmEngine

    config = merged_config(model_alone(str(tied_pair / "a")), Sources())
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 26, **options}
    return VllmEngine(EngineSettings(config, tied_pair / "a", options=options))


def answers(engine: Any) -> list[float]:
    return [logprob for logprob, _ in engine.lm().loglikelihood(PAIRS)]


@pytest.fixture(scope="module")
def ranks(tied_pair: Path) -> Iterator[Any]:
    engine = start(tied_pair, tensor_parallel_size=2)
    yield engine
    engine.close()


def blend(tied_pair: Path, weight: float) -> Recipe:
    models = [
        {"model": str(tied_pair / name), "parameters": {"weight": share}}
        for name, share in (("a", 1 - weight), ("b", weight))
    ]
    return Recipe.parse({"merge_method": "linear", "models": models, "dtype": "float32"})


def test_two_ranks_answer_as_one_does(tied_pair: Path, ranks: Any) -> None:
    alone = start(tied_pair)
    found = []
    for weight in (0.2, 0.7, 0.2):
        recipe = blend(tied_pair, weight)
        alone.load(merged_tensors(recipe, Sources()))
        ranks.load_recipe(recipe)
        found.append(answers(ranks))
        assert found[-1] == pytest.approx(answers(alone), abs=2e-4)
        assert ranks.verify(recipe) == []
    alone.close()
    assert found[0] == found[2]
    assert found[0] != pytest.approx(found[1], abs=0.1)
    assert ranks.verify(blend(tied_pair, 0.7)) != []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_ranks_have_cores_of_their_own(ranks: Any) -> None:
    first, second = ranks.rank_cores()
    assert not set(first) & set(second)


def test_a_merge_that_fails_in_a_rank_leaves_the_engine_usable(tied_pair: Path, ranks: Any) -> None:
    with pytest.raises(TrialMergeError, match="no such folder"):
        ranks.load_recipe(model_alone(str(tied_pair / "nowhere")))
    with pytest.raises(TrialEngineError, match="could not be loaded"):
        answers(ranks)
    with pytest.raises(TrialEngineError, match="takes recipes"):
        ranks.load(iter(()))
    with pytest.raises(TrialEngineError, match="no such folder"):
        ranks.verify(model_alone(str(tied_pair / "nowhere")))
    ranks.load_recipe(blend(tied_pair, 0.5))
    assert ranks.verify(blend(tied_pair, 0.5)) == []


def test_a_rank_that_dies_is_an_error_and_no_wait(tied_pair: Path, ranks: Any) -> None:
    import psutil

    children = psutil.Process().children(recursive=True)
    processes = {child.name(): child for child in children if "Worker_TP" in child.name()}
    assert len(processes) == 2
    processes["VLLM::Worker_TP1"].kill()
    with pytest.raises(TrialEngineError, match="rank of the vLLM engine has died"):
        ranks.load_recipe(blend(tied_pair, 0.5))
    with pytest.raises(TrialEngineError):
        answers(ranks)
    assert not psutil.wait_procs(list(processes.values()), timeout=20)[1]
