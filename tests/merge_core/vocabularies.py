"""Tiny models with BPE tokenizers of their own: other tokens, other ids, other added tokens.

Their merges are read back by token, ours and mergekit's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merge_core.merge import save_merged
from merge_core.plan import Sources
from merge_core.recipe import Recipe

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ENGLISH = ["the cat sat on the mat the cat ate the rat"] * 3
GERMAN = ["der hund und der mann und das land the cat"] * 3
TEXTS = (
    "the cat <tool> sat under the hund",
    "under der mann and the cat ate <x><|im_start|>",
    "<new> the<z> cat",
)
TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
Named = dict[str, str]


def bpe(corpus: Sequence[str], size: int, special: Sequence[str], **keywords: Any) -> Any:
    """Train a tokenizer; `keywords` name its special tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **keywords)


def save_model(folder: Path, tokenizer: Any, seed: int, n_rows: int | None = None, **sizes: Any) -> None:
    """Save a random Llama with a tokenizer; of `n_rows` rows, else one a token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_rows or len(tokenizer),
        hidden_size=12,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": False, **sizes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_vocabularies(root: Path) -> Named:
    """Save the models; folders by short name.

    a English; b German, with another order, added tokens and a template; c is a with two more;
    d adds what b adds, but otherwise; padded, tied, short (fewer rows than tokens) and plain (an added
    token of b's is an ordinary one) are a in other ways; tied_b is b, tied; gaps lacks some ids.
    """
    common = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    a = bpe(ENGLISH, 40, ["<unk>", "<s>", "</s>"], **common)
    b = bpe(GERMAN, 45, ["<pad>", "<s>", "</s>", "<unk>"], pad_token="<pad>", **common)
    b.add_tokens(["<tool>"])
    b.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    b.chat_template, b.eos_token = TURNS, "<|im_end|>"
    save_model(root / "a", a, 0)
    save_model(root / "b", b, 1)
    save_model(root / "padded", a, 3, n_rows=64)
    save_model(root / "tied", a, 4, tie_word_embeddings=True)
    save_model(root / "tied_b", b, 5, tie_word_embeddings=True)
    save_model(root / "short", a, 6, n_rows=28)
    save_model(root / "short_b", b, 7, n_rows=40)

    def changed(name: str, ids: Mapping[str, int], *added: Any, seed: int) -> None:
        folder = root / name
        a.save_pretrained(folder)
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"] = dict(ids)
        path.write_text(json.dumps(data))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_tokens(list(added))
        save_model(folder, tokenizer, seed, n_rows=max(tokenizer.get_vocab().values()) + 1)

    own = a.get_vocab()
    z = AddedToken("<z>", rstrip=True, single_word=True)
    tool = AddedToken("<tool>", special=True, lstrip=True, normalized=False)
    changed("c", own, "<x>", "<y>", seed=2)
    changed("d", own, tool, z, seed=8)
    changed("plain", {**own, "<tool>": 30, "<|im_end|>": 31}, seed=9)
    changed("gaps", {token: i if i < 25 else i + 5 for token, i in own.items()}, seed=10)
    bare = shutil.copytree(root / "a", root / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    return {path.name: str(path) for path in sorted(root.iterdir())}


def recipe_of(names: Named, models: str, base: str | None = None, **keys: Any) -> dict[str, Any]:
    """A linear recipe of models with different weights, short names put right everywhere."""

    def resolved(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: resolved(value) for key, value in node.items()}
        return names.get(node, node) if isinstance(node, str) else node

    config = {
        "merge_method": "linear",
        "models": [
            {"model": model, "parameters": {"weight": 0.3 + 0.2 * i}}
            for i, model in enumerate(models.split())
        ],
        "dtype": "float32",
        **({"base_model": base} if base else {}),
        **keys,
    }
    config["models"] = [resolved(entry) for entry in config["models"]]
    return {key: value if key == "models" else resolved(value) for key, value in config.items()}


class Merged(NamedTuple):
    """What a merge wrote."""

    tensors: dict[str, Tensor]
    tokenizer: Any
    config: dict[str, Any]


def read(folder: Path) -> Merged:
    config = json.loads((folder / "config.json").read_text())
    return Merged(load_file(folder / "model.safetensors"), AutoTokenizer.from_pretrained(folder), config)


def saved(config: dict[str, Any], folder: Path, sources: Sources | None = None) -> Merged:
    save_merged(Recipe.parse(config), folder, sources=sources)
    return read(folder)


def saved_by_mergekit(config: dict[str, Any], folder: Path) -> Merged:
    """Have mergekit merge the recipe; skip the test where it is not installed."""
    pytest.importorskip("mergekit", reason="mergekit is the oracle")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(folder), options)
    return read(folder)


def rows(merged: Merged, name: str) -> dict[str, Tensor]:
    """Return a table's rows by token."""
    return {token: merged.tensors[name][i] for token, i in merged.tokenizer.get_vocab().items()}


def assert_same_rows(ours: Merged, theirs: Merged) -> None:
    """Compare all tensors, tables by token: mergekit appends tokens in the order of their hashes."""
    assert set(ours.tensors) == set(theirs.tensors)
    assert ours.config["vocab_size"] == theirs.config["vocab_size"] == len(ours.tensors[EMBEDDING])
    ids, their_ids = ours.tokenizer.get_vocab(), theirs.tokenizer.get_vocab()
    assert set(ids) == set(their_ids)
    for name, tensor in ours.tensors.items():
        expected = theirs.tensors[name]
        if name in (EMBEDDING, HEAD):
            order = list(range(len(expected)))  # padding stays at the end
            for token, i in ids.items():
                order[i] = their_ids[token]
            expected = expected[order]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
