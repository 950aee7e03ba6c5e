"""The hf engine's adapter gives what lm-eval's own HFLM gives, for every kind of request and model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolve.engines import EngineSettings, token_tree
from evolve.engines.hf import HfEngine
from evolve.engines.hf_lm import ResidentLM
from evolve.engines.token_tree import TreeReader, tree_of
from evolve.errors import SearchFileError, TrialEngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 47,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    # Large weights: answers that differ from each other, and end.
    "initializer_range": 0.4,
}
GPT2 = {"vocab_size": 47, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
        "eos_token_id": 1, "initializer_range": 0.4}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", SIZES),
    "Llama, eager": ("LlamaConfig", {**SIZES, "attn_implementation": "eager"}),
    "Llama, all heads": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "Qwen2": ("Qwen2Config", SIZES),
    "Qwen3": ("Qwen3Config", {**SIZES, "head_dim": 10}),
    "Gemma": ("GemmaConfig", {**SIZES, "head_dim": 12}),
    "Mistral, window of 9": ("MistralConfig", {**SIZES, "sliding_window": 9}),
    "GPT-NeoX": ("GPTNeoXConfig", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "GPT-2": ("GPT2Config", GPT2),
    "Mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 3}),
    "Bloom (ALiBi)": ("BloomConfig", {"vocab_size": 47, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                                      "eos_token_id": 1, "pad_token_id": 0}),
    "Mamba": ("MambaConfig", {"vocab_size": 47, "hidden_size": 32, "num_hidden_layers": 2,
                              "eos_token_id": 1, "pad_token_id": 0, "state_size": 8}),
}  # fmt: skip
WITHOUT_TREES = ("Bloom (ALiBi)", "Mamba")


@dataclass
class Request:
    args: tuple[Any, ...]
    task_name: str = "a task"


def build(name: str) -> PreTrainedModel:
    config, sizes = MODELS[name]
    sizes = dict(sizes)
    attention = sizes.pop("attn_implementation", None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**sizes), attn_implementation=attention
    ).eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "configs/quickstart/models/base")


def pair(model: PreTrainedModel, **options: Any) -> tuple[ResidentLM, HFLM]:
    return (
        ResidentLM(model, tokenizer(), **options),
        HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=8, **options),
    )


def texts(n: int, longest: int = 40, seed: int = 0) -> list[str]:
    """Random texts; most begin alike."""
    draw = random.Random(seed)
    heads = ["", "the cat sat on", "the cat sat on a mat, the dog"]
    return [
        draw.choice(heads) + "".join(draw.choices("abcde ", k=draw.randint(1, longest))).rstrip() + "x"
        for _ in range(n)
    ]


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut trees into many pieces, in the middle of sequences too."""
    monkeypatch.setitem(token_tree.TOKENS_A_PASS, "cpu", 23)


def assert_likelihoods_equal(ours: ResidentLM, theirs: HFLM, requests: list[Request]) -> None:
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_continuations_are_scored_as_by_hflm(name: str) -> None:
    """Single tokens, several tokens, contexts that share beginnings, an empty context."""
    ours, theirs = pair(build(name))
    assert (ours._reader.longest > 0) == (name not in WITHOUT_TREES)
    contexts = [*texts(12), ""]
    options = [" a", " b", " cab", " dead beef", "e"]
    requests = [Request((context, option)) for context in contexts for option in options]
    assert_likelihoods_equal(ours, theirs, requests)


# None is part of a special token's own text, which HFLM takes for an answer's.
UNTIL = [["\n"], ["c", "22"], ["rt", "t", "sor"], [" ", "xx", "<eos>"], []]


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_generated_as_by_hflm(name: str) -> None:
    """Several stop sequences, none, end tokens, several lengths; one batch of ours, many of HFLM's."""
    model = build(name)
    ours, theirs = pair(model)
    n = 6 if name in WITHOUT_TREES else 24  # Mistral's window of 9 ends within the longer ones
    requests = [
        Request((text, {"until": list(until), "max_gen_toks": n_new, "do_sample": False}))
        for until in UNTIL
        for n_new in (1, n)
        for text in texts(9, longest=12)
    ]
    found = ours.generate_until(requests)
    # Each alone: in a batch HFLM goes on until all of its texts have stopped.
    theirs.batch_size_per_gpu = 1
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > (2 if name in WITHOUT_TREES else 15)
    theirs.batch_size_per_gpu = 8
    assert found == theirs.generate_until(requests, disable_tqdm=True)


def test_contexts_that_are_too_long_lose_their_beginning_as_in_hflm() -> None:
    ours, theirs = pair(build("Llama"), max_length=24)
    assert ours.max_length == 24
    contexts = texts(10, longest=60)
    requests = [Request((context, option)) for context in contexts for option in (" a", " cabbed")]
    assert_likelihoods_equal(ours, theirs, requests)
    asked = [Request((context, {"until": ["\n"], "max_gen_toks": 9})) for context in contexts]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    whole = [Request((context,)) for context in contexts]
    assert ours.loglikelihood_rolling(whole) == theirs.loglikelihood_rolling(whole, disable_tqdm=True)


def test_whole_texts_and_unshared_requests_are_scored_to_the_last_digit() -> None:
    model = build("Llama")
    ours = ResidentLM(model, tokenizer(), shared_prefixes=False, batch_size=8)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=8)
    whole = [Request((text,)) for text in texts(20)]
    expected = theirs.loglikelihood_rolling(whole, disable_tqdm=True)
    assert ours.loglikelihood_rolling(whole) == expected
    assert ResidentLM(model, tokenizer()).loglikelihood_rolling(whole) == pytest.approx(
        expected, abs=1e-4
    )
    requests = [Request((text, " cab")) for text in texts(20)]
    assert ours.loglikelihood(requests) == theirs.loglikelihood(requests, disable_tqdm=True)


def test_sampled_texts_are_lm_evals_own_and_the_same_again() -> None:
    """Among greedy requests, whatever torch's own seed is; and they leave that seed alone."""
    ours, theirs = pair(build("Llama"), max_length=256)
    sampled = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = [Request((text, sampled)) for text in texts(8)]
    greedy = [Request((text, {"until": ["\n"], "max_gen_toks": 8})) for text in texts(8)]
    torch.manual_seed(1234)  # simple_evaluate's
    expected = theirs.generate_until(requests, disable_tqdm=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert ours.generate_until(greedy + requests)[8:] == expected
    assert ours.generate_until(requests) == expected
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "batch_size"),
    [({"repetition_penalty": 1.5}, 64), ({"no_repeat_ngram_size": 2}, 64), ({"eos_token_id": 5}, 1)],
)
def test_generation_settings_of_the_model_count_as_in_hflm(
    settings: dict[str, Any], batch_size: int
) -> None:
    """A penalty counts padding too, so what goes HFLM's own way goes in HFLM's batches."""
    model = build("Llama")
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    ours, theirs = pair(model)
    theirs.batch_size_per_gpu = batch_size
    requests = [Request((text, {"until": ["\n"], "max_gen_toks": 16})) for text in texts(8)]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_special_token_that_is_a_stop_sequence_ends_an_answer_as_in_hflm() -> None:
    """`<pad>` is one, and has an "a" in it."""
    ours, theirs = pair(build("Llama"))
    theirs.batch_size_per_gpu = 1
    for until in (["<pad>"], ["a", "2"]):
        asked = [Request((text, {"until": until, "max_gen_toks": 60})) for text in texts(12)]
        found = ours.generate_until(asked)
        assert found == theirs.generate_until(asked, disable_tqdm=True)
        assert any(len(text) < 20 for text in found)


def test_a_tokenizer_without_pad_token_and_an_empty_prompt_are_answered() -> None:
    model, bare = build("Llama"), tokenizer()
    bare.pad_token = None
    ours = ResidentLM(model, bare)
    asked = [
        Request((text, {"until": ["\n"], "max_gen_toks": 5})) for text in ["", "a cat", "the dog sat"]
    ]
    answers = ours.generate_until(asked)
    assert answers[1:] == ResidentLM(model, tokenizer()).generate_until(asked[1:])
    assert answers[0] == ours.generate_until(asked[:1])[0]


def test_a_model_without_end_stops_at_the_length_asked_for() -> None:
    """Long after the room first made for keys and values is used up."""
    model = build("Llama")
    with torch.no_grad():
        model.lm_head.weight[:2] = 0.0  # special tokens are never the likeliest
    ours, theirs = pair(model)
    asked = [Request((text, {"until": ["zzzz"], "max_gen_toks": 150})) for text in texts(5)]
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert all(len(text) >= 150 for text in found)


def test_what_cannot_be_answered_is_said() -> None:
    ours = ResidentLM(build("Llama"), tokenizer(), max_length=30)
    with pytest.raises(TrialEngineError, match="has 0 tokens"):
        ours.loglikelihood([Request(("a cat", ""))])
    with pytest.raises(TrialEngineError, match="has 31 tokens"):
        ours.loglikelihood([Request(("a cat", "a" * 31))])
    for n in (0, 30):
        with pytest.raises(TrialEngineError, match=f"max_gen_toks is {n}"):
            ours.generate_until([Request(("a cat", {"max_gen_toks": n}))])
    with pytest.raises(TrialEngineError, match="prompt is empty"):
        ours.next_token_logprobs([[]], 1)


@pytest.mark.parametrize("shared_prefixes", [True, False])
def test_next_token_probabilities_are_those_of_a_plain_pass(shared_prefixes: bool) -> None:
    model = build("Qwen3")
    ours = ResidentLM(model, tokenizer(), shared_prefixes=shared_prefixes)
    text = ours.tok_encode("the cat sat on a mat, the dog ran")
    prompts = [text[:n] for n in range(len(text), 0, -1)] + [[5, 6, 7]]
    with torch.no_grad():
        expected = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in prompts]
    wanted = [[prompt[-1], 3, 40] for prompt in prompts]
    for found, tokens, logprobs in zip(
        ours.next_token_logprobs(prompts, wanted), wanted, expected, strict=True
    ):
        assert found == pytest.approx({token: float(logprobs[token]) for token in tokens}, abs=1e-5)
    for found, logprobs in zip(ours.next_token_logprobs(prompts, 4), expected, strict=True):
        best = logprobs.topk(4)
        likeliest = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        assert found == pytest.approx(likeliest, abs=1e-5)
    assert ours.next_token_logprobs([], 3) == []


def test_a_tree_holds_what_sequences_share_once() -> None:
    tree = tree_of(((5, 6, 7), (5, 6, 8, 9), (5, 6), (4,), (5, 6, 7)))
    assert len(tree.tokens) == 6
    assert [tree.tokens[path].tolist() for path in tree.paths] == [
        [5, 6, 7],
        [5, 6, 8, 9],
        [5, 6],
        [4],
        [5, 6, 7],
    ]
    for path in tree.paths:
        assert tree.depth[path].tolist() == list(range(len(path)))
        for node in path:
            ancestors = [j for j in range(node + 1) if node < tree.end[j]]
            assert ancestors == path[: len(ancestors)].tolist()


def test_shared_tokens_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    reader = TreeReader(model)
    computed = []
    forward = model.forward

    def counted(input_ids: Any, **arguments: Any) -> Any:
        computed.append(input_ids.numel())
        return forward(input_ids=input_ids, **arguments)

    model.forward = counted
    head = tuple(range(2, 42))
    tree = tree_of(tuple((*head, i, j) for i in range(5) for j in range(4)))
    for _ in reader.read(tree, np.array([len(tree.tokens) - 1])):
        pass
    assert sum(computed) == 40 + 5 + 20


def test_an_unknown_option_of_the_engine_is_a_fault_and_the_weights_are_counted() -> None:
    folder = ROOT / "configs/quickstart/models/base"
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(SearchFileError, match=r"'batchsize', which .* did you mean 'batch_size'"):
        HfEngine(EngineSettings(config, folder, options={"batchsize": 8}))
    engine = HfEngine(EngineSettings(config, folder, options={"batch_size": 8, "shared_prefixes": False}))
    tensors = load_file(folder / "model.safetensors").values()
    assert engine.memory_gb()["weights"] == pytest.approx(sum(t.nbytes for t in tensors) / 1e9, rel=0.01)
    assert engine.lm().batch_size == 8


@pytest.mark.parametrize("batch_size", [3, "3", "auto:2"])
def test_whole_texts_are_scored_whatever_way_the_batch_size_is_spelled(batch_size: int | str) -> None:
    folder = ROOT / "configs/quickstart/models/sort"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = [Request((text,)) for text in ("sort bca: abc", "sort dab: abd")]
    expected = ResidentLM(model, tokenizer).loglikelihood_rolling(requests)
    found = ResidentLM(model, tokenizer, batch_size=batch_size).loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-4)
