"""A real vLLM engine on CPU with tiny tied_pair: weights, requests, sampling, refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from evolve.engines import EngineSettings
from evolve.errors import SearchFileError, TrialEngineError
from merge_core.merge import merged_tensors
from merge_core.plan import Sources, merged_config, model_alone
from merge_core.recipe import Recipe

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
TESTBED = Path(os.environ.get("EVOLVE_TESTBED", "/tmp/testbed"))
MAX_MODEL_LEN = 96


@dataclass
class Request:
    """What the adapters read of an lm-eval request."""

    args: tuple[Any, ...]


def settings(tied_pair: Path, **options: Any) -> EngineSettings:
    recipe = model_alone(str(tied_pair / "a"))
    options = {"max_model_len": MAX_MODEL_LEN, "kv_cache_memory_bytes": 1 << 26, **options}
    return EngineSettings(merged_config(recipe, Sources()), tied_pair / "a", options=options)


@pytest.fixture(scope="module")
def engine(tied_pair: Path) -> Iterator[Any]:
    """One engine for all tests here; a test loads what it needs."""
    from evolve.engines.vllm import VllmEngine

    running = VllmEngine(settings(tied_pair))
    yield running
    running.close()


@pytest.fixture(scope="module")
def hf_lm(tied_pair: Path) -> Any:
    """The same model in the hf engine, which is shown as many tokens."""
    from evolve.engines.hf import HfEngine

    running = HfEngine(
        EngineSettings(
            merged_config(model_alone(str(tied_pair / "a")), Sources()),
            tied_pair / "a",
            options={"max_length": MAX_MODEL_LEN - 1, "batch_size": 1},
        )
    )
    running.load(tensors(tied_pair, "a"))
    return running.lm()


def tensors(tied_pair: Path, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    return merged_tensors(model_alone(str(tied_pair / name)), Sources())


def blend(tied_pair: Path, weight: float) -> Recipe:
    sources = [
        {"model": str(tied_pair / name), "parameters": {"weight": share}}
        for name, share in (("a", 1 - weight), ("b", weight))
    ]
    return Recipe.parse({"merge_method": "linear", "models": sources, "dtype": "float32"})


def likelihoods(lm: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = lm.loglikelihood([Request(pair) for pair in pairs])
    return found


QUESTION = "the quick brown fox jumps over the lazy dog and then it sat down"
OPTIONS = ("a", "b", "abc", "abd", "ab", "cab says no")
PAIRS = [(QUESTION, option) for option in OPTIONS] + [("x", "yz"), ("", "abc")]


def test_nothing_is_answered_before_a_candidate_is_loaded(tied_pair: Path, engine: Any) -> None:
    with pytest.raises(TrialEngineError, match="holds nothing"):
        likelihoods(engine.lm(), PAIRS)


def test_options_are_scored_as_hf_scores_them(tied_pair: Path, engine: Any, hf_lm: Any) -> None:
    """After another model's weights, whose tied head must not stay."""
    engine.load(tensors(tied_pair, "b"))
    engine.load(tensors(tied_pair, "a"))
    for ours, theirs in zip(likelihoods(engine.lm(), PAIRS), likelihoods(hf_lm, PAIRS), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=2e-4)
        assert ours[1] == theirs[1]


def test_contexts_and_options_beyond_the_engines_length_are_cut_as_hf_cuts_them(
    tied_pair: Path, engine: Any, hf_lm: Any
) -> None:
    engine.load(tensors(tied_pair, "a"))
    long = QUESTION * 4
    pairs = [(long, "a"), (long, "abc"), ("x", long[: MAX_MODEL_LEN // 2]), (long, long[:60])]
    for ours, theirs in zip(likelihoods(engine.lm(), pairs), likelihoods(hf_lm, pairs), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
    texts = [Request((text,)) for text in (long, "short", "")]
    rolled = engine.lm().loglikelihood_rolling(texts)
    assert rolled == pytest.approx(hf_lm.loglikelihood_rolling(texts), abs=2e-3)
    n_tokens = len(engine.lm().tok_encode(long))
    assert n_tokens > MAX_MODEL_LEN  # or nothing was cut
    with pytest.raises(TrialEngineError, match=r"scoring\.engine\.max_model_len"):
        likelihoods(engine.lm(), [("x", long)])


def test_one_request_a_question_and_one_for_options_that_share_all_but_the_end(
    tied_pair: Path, engine: Any
) -> None:
    engine.load(tensors(tied_pair, "a"))
    lm = engine.lm()
    before = lm.n_requests
    single = [(f"question {i}", option) for i in range(7) for option in "abcd"]
    likelihoods(lm, single)
    assert lm.n_requests - before == 7
    likelihoods(lm, [(QUESTION, "abc"), (QUESTION, "abd")])
    assert lm.n_requests - before == 8


def test_options_with_more_than_a_block_in_common(tied_pair: Path, engine: Any, hf_lm: Any) -> None:
    """The prefix cache then holds rows that are wanted; they must be computed all the same."""
    engine.load(tensors(tied_pair, "a"))
    stem = "the same words at first, forty or so letters, "
    pairs = [(QUESTION[:20], stem + ending) for ending in ("one", "two", "three")]
    for _ in range(2):
        for ours, theirs in zip(likelihoods(engine.lm(), pairs), likelihoods(hf_lm, pairs), strict=True):
            assert ours[0] == pytest.approx(theirs[0], abs=1e-3)


def test_generation_is_that_of_hf(tied_pair: Path, engine: Any, hf_lm: Any) -> None:
    engine.load(tensors(tied_pair, "a"))
    requests = [
        Request((text, arguments))
        for text in ("abc", QUESTION, QUESTION * 4)
        for arguments in (
            {"until": [], "max_gen_toks": 20},
            {"until": ["e"], "max_new_tokens": 12, "do_sample": False, "temperature": 0.7},
            {"until": [], "max_gen_toks": 20, "repetition_penalty": 1.3},
        )
    ]
    ours = engine.lm().generate_until(requests)
    assert ours == hf_lm.generate_until(requests)
    assert len(set(ours)) > 3
    # Asked for more than it has room for, a model that does not stop is stopped.
    endless = engine.lm().generate_until([Request(("", {"until": [], "max_gen_toks": 90}))])
    assert len(engine.lm().tok_encode(endless[0])) <= 90


def test_drawn_answers_depend_on_the_request_alone(tied_pair: Path, engine: Any) -> None:
    engine.load(tensors(tied_pair, "a"))
    drawn = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    requests = [Request((text, drawn)) for text in ("abc", "abc", "abd", QUESTION)]
    first = engine.lm().generate_until(requests)
    assert first[0] != first[1]  # asked twice, drawn twice
    assert engine.lm().generate_until(requests) == first
    backwards = engine.lm().generate_until(requests[::-1])[::-1]
    assert backwards[2:] == first[2:]
    assert sorted(backwards[:2]) == sorted(first[:2])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams"),
        ({"typical_p": 0.5}, "generation_kwargs.typical_p"),
        ({"max_gen_toks": 1000}, "max_gen_toks is 1000"),
        ({"do_sample": True, "temperature": 9.0}, "temperature"),
    ],
)
def test_what_the_engine_cannot_generate_is_said(
    tied_pair: Path, engine: Any, arguments: dict[str, Any], told: str
) -> None:
    engine.load(tensors(tied_pair, "a"))
    with pytest.raises(TrialEngineError, match=told):
        engine.lm().generate_until([Request(("abc", {"until": [], "max_gen_toks": 5, **arguments}))])
    assert engine.lm().generate_until([Request(("abc", {"until": [], "max_gen_toks": 3}))])


def test_next_token_logprobs_are_those_of_transformers(tied_pair: Path, engine: Any) -> None:
    from transformers import AutoModelForCausalLM

    engine.load(tensors(tied_pair, "a"))
    lm = engine.lm()
    prompts = [lm.tok_encode(text) for text in (QUESTION, "abc")]
    reference = AutoModelForCausalLM.from_pretrained(tied_pair / "a", dtype=torch.float32)
    everything = list(range(reference.config.vocab_size))
    likeliest = lm.next_token_logprobs(prompts, 3)
    wanted = lm.next_token_logprobs(prompts, [everything, [5]])
    assert list(wanted[1]) == [5]
    for prompt, few, some in zip(prompts, likeliest, wanted, strict=True):
        expected = reference(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert list(few) == expected.topk(3).indices.tolist()
        for token, value in {**few, **some}.items():
            assert value == pytest.approx(expected[token].item(), abs=2e-4)


def test_a_tokenizer_without_special_tokens(tied_pair: Path, engine: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = tmp_path / "bare"
    PreTrainedTokenizerFast(tokenizer_file=str(tied_pair / "a/tokenizer.json")).save_pretrained(bare)
    engine.load(tensors(tied_pair, "a"))
    lm = engine.lm(bare)
    assert lm.tokenizer.eos_token_id is None
    assert likelihoods(lm, [("x", "yz")])[0][0] < 0
    assert lm.generate_until([Request(("abc", {"until": [], "max_gen_toks": 4}))])
    for ask in (
        lambda: likelihoods(lm, [("", "abc")]),
        lambda: lm.generate_until([Request(("", {"until": [], "max_gen_toks": 4}))]),
        lambda: lm.loglikelihood_rolling([Request(("abc",))]),
    ):
        with pytest.raises(TrialEngineError, match="neither a bos nor an eos"):
            ask()
    with pytest.raises(TrialEngineError, match="empty continuation"):
        likelihoods(lm, [("x", "")])


def test_a_chat_template_that_knows_no_system_message(
    tied_pair: Path, engine: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tied_pair / "a")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    lm = engine.lm(tmp_path)
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(history) == "[user] hello[assistant]"


def test_the_51st_candidate_equals_a_fresh_engine(tied_pair: Path, engine: Any) -> None:
    """No answer comes from an old prefix, no weight from an old candidate."""
    from evolve.engines.vllm import VllmEngine

    sources = Sources(keep=True)
    for i in range(50):
        engine.load(merged_tensors(blend(tied_pair, i / 50), sources))
        likelihoods(engine.lm(), PAIRS[:2])
    last = blend(tied_pair, 0.77)
    engine.load(merged_tensors(last, sources))
    generation = [Request((text, {"until": [], "max_gen_toks": 30})) for text in (QUESTION, "abc")]
    answers = (likelihoods(engine.lm(), PAIRS), engine.lm().generate_until(generation))
    assert engine.verify(last) == []
    fresh = VllmEngine(settings(tied_pair))
    try:
        fresh.load(merged_tensors(last, sources))
        assert fresh.checksum() == engine.checksum()
        assert (likelihoods(fresh.lm(), PAIRS), fresh.lm().generate_until(generation)) == answers
    finally:
        fresh.close()


def test_a_swapped_tensor_is_found(tied_pair: Path, engine: Any) -> None:
    swapped = dict(tensors(tied_pair, "a"))
    one, other = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
    swapped[one], swapped[other] = swapped[other], swapped[one]
    engine.load(swapped.items())
    found = engine.verify(tensors(tied_pair, "a"))
    assert [line.split(":")[0] for line in found] == [one, other]
    engine.load(tensors(tied_pair, "a"))
    assert engine.verify(tensors(tied_pair, "a")) == []


def test_a_head_that_kept_its_old_weights_is_found(tied_pair: Path, engine: Any) -> None:
    """What vLLM's own reload leaves behind in a tied model on CPU."""
    engine.load(tensors(tied_pair, "a"))
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors(tied_pair, "b")})
    assert [line.split(":")[0] for line in engine.verify(tensors(tied_pair, "b"))] == ["lm_head.weight"]


def test_a_candidate_that_cannot_be_loaded_leaves_nothing_behind(tied_pair: Path, engine: Any) -> None:
    engine.load(tensors(tied_pair, "b"))

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors(tied_pair, "b"):
            if name.endswith("layers.1.self_attn.v_proj.weight"):
                raise ValueError("no such tensor")
            yield name, tensor

    with pytest.raises(ValueError, match="no such tensor"):
        engine.load(broken())
    with pytest.raises(TrialEngineError, match="could not be loaded"):
        likelihoods(engine.lm(), PAIRS)
    incomplete = [(name, t) for name, t in tensors(tied_pair, "b") if "layers.1.mlp" not in name]
    with pytest.raises(ValueError, match="in no tensor of the merge"):
        engine.load(incomplete)
    engine.load(tensors(tied_pair, "a"))
    assert engine.verify(tensors(tied_pair, "a")) == []


def test_memory_is_known(tied_pair: Path, engine: Any) -> None:
    held = engine.memory_gb()
    assert held["weights"] > 1e-5
    assert held["kv_cache"] == pytest.approx(0.067, rel=0.2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"load_format": "auto"}, "scoring.engine.load_format is 'auto'"),
        ({"hf_overrides": {"vocab_size": 5}}, "scoring.engine.hf_overrides"),
        ({"max_model_length": 64}, "did you mean 'max_model_len'"),
        ({"max_model_len": 4096}, "lower scoring.engine.max_model_len"),
        ({"kv_cache_memory_bytes": 1000}, "scoring.engine.kv_cache_memory_bytes"),
        ({"tensor_parallel_size": 3}, "scoring.engine.tensor_parallel_size"),
    ],
)
def test_an_engine_that_cannot_start_names_the_setting(
    tied_pair: Path, options: dict[str, Any], told: str
) -> None:
    from evolve.engines.vllm import VllmEngine

    with pytest.raises(SearchFileError) as caught:
        VllmEngine(settings(tied_pair, **options))
    (line,) = caught.value.faults
    assert told in line
    assert "\n" not in line


def test_an_architecture_that_vllm_does_not_know(tied_pair: Path, tmp_path: Path) -> None:
    from evolve.engines.vllm import VllmEngine

    config = json.loads((tied_pair / "a/config.json").read_text())
    config |= {"architectures": ["NobodysForCausalLM"], "model_type": "nobody"}
    with pytest.raises(TrialEngineError, match="--backend hf"):
        VllmEngine(EngineSettings(config, tied_pair / "a"))


@pytest.mark.slow
@pytest.mark.skipif(not (TESTBED / "base").is_dir(), reason="the testbed is not built")
def test_200_questions_with_four_letters_take_200_requests() -> None:
    """On a real model: as hf scores them, and at least twice as fast as a request a choice."""
    script = ROOT / "tests/benchmarks/multiple_choice.py"
    command = [sys.executable, str(script), str(TESTBED / "base"), "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["documents"] == figures["requests"] == 200
    assert figures["same_as_hf"] >= 0.99
    assert figures["times_faster"] >= 2
