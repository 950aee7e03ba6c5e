"""Vocabularies of tokenizers trained on real text by the real library: merged by token, as mergekit does.

One is byte-level BPE as Llama 3 has it, one pieces with a mark for spaces as SentencePiece has them
(Unigram with bytes for what it does not know), and one is the first with tokens added for chats.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from merge_core.plan import Sources, plan_merge
from merge_core.recipe import Recipe

from .vocabularies import (
    EMBEDDING,
    HEAD,
    Named,
    assert_same_rows,
    read,
    recipe_of,
    rows,
    save_model,
    saved,
    saved_by_mergekit,
)

ROOT = Path(__file__).resolve().parents[2]
MANUAL = [text for _, text in sorted(pydoc_data.topics.topics.items())][:40]
LICENCE = (ROOT / "LICENSE").read_text().splitlines()
TEXTS = [*MANUAL[0].splitlines()[:12], *LICENCE[:30], "naïve 数字 🙂 don't  stop\n\n  x = 12345", ""]
BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[BEGIN, END, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(MANUAL, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", None, [(BEGIN, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)


def pieces() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", END],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(LICENCE, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Named:
    root = tmp_path_factory.mktemp("trained")
    chat = byte_level()
    chat.add_tokens(["<tool>", "</tool>"])
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.eos_token = "<|im_end|>"
    for seed, (name, tokenizer) in enumerate(
        {"bytes": byte_level(), "pieces": pieces(), "chat": chat}.items()
    ):
        save_model(root / name, tokenizer, seed)
    return {path.name: str(path) for path in root.iterdir()}


CASES = {
    "bytes and pieces": ("bytes pieces", "bytes", "union"),
    "pieces and bytes": ("bytes pieces", "pieces", "union"),
    "all three": ("pieces chat bytes", "bytes", "union"),
    "added for chats": ("chat bytes", "bytes", "union"),
    "the base's": ("pieces bytes", "pieces", "base"),
    "another model's": ("bytes pieces", "bytes", "pieces"),
}


@pytest.mark.parametrize(("models", "base", "source"), CASES.values(), ids=CASES)
def test_rows_and_tokens_are_mergekits(
    models: str, base: str, source: str, names: Named, tmp_path: Path
) -> None:
    config = recipe_of(names, models, base, tokenizer_source=source)
    ours = saved(config, tmp_path / "ours")
    theirs = saved_by_mergekit(config, tmp_path / "theirs")
    assert_same_rows(ours, theirs)
    for text in TEXTS:
        assert ours.tokenizer.tokenize(text) == theirs.tokenizer.tokenize(text)


def test_the_vocabularies_overlap_and_differ(names: Named) -> None:
    a, b = (read(Path(names[name])).tokenizer.get_vocab() for name in ("bytes", "pieces"))
    shared = a.keys() & b.keys()
    assert 100 < len(shared) < len(b) / 2
    assert END in shared
    assert sum(a[token] != b[token] for token in shared) > 100


@pytest.mark.parametrize(("source", "owner"), [("base", "bytes"), ("pieces", "pieces"), ("chat", "chat")])
def test_a_vocabulary_that_is_one_models_cuts_every_text_as_its_owner(
    source: str, owner: str, names: Named, tmp_path: Path
) -> None:
    merged = saved(recipe_of(names, "bytes pieces", "bytes", tokenizer_source=source), tmp_path / "out")
    own = read(Path(names[owner])).tokenizer
    for text in TEXTS:
        assert merged.tokenizer(text).input_ids == own(text).input_ids


def test_a_union_with_a_model_that_added_tokens_cuts_texts_as_both_owners(
    names: Named, tmp_path: Path
) -> None:
    merged = saved(recipe_of(names, "bytes chat", "bytes", tokenizer_source="union"), tmp_path / "out")
    bare, chat = (read(Path(names[name])).tokenizer for name in ("bytes", "chat"))
    for text in TEXTS:
        ids = merged.tokenizer(text).input_ids
        assert ids == bare(text).input_ids == chat(text).input_ids
        asked = f"<|im_start|>user\n{text}<|im_end|>\n<tool>x = 1</tool>"
        assert merged.tokenizer.tokenize(asked) == chat.tokenize(asked)
        assert merged.tokenizer.decode(merged.tokenizer(asked).input_ids[1:]) == asked


def test_a_union_of_strangers_keeps_each_ones_rows_and_says_that_texts_are_cut_otherwise(
    names: Named, tmp_path: Path
) -> None:
    config = recipe_of(names, "bytes pieces", "bytes", tokenizer_source="union")
    warnings = plan_merge(Recipe.parse(config), Sources()).warnings
    own = [set(read(Path(names[name])).tokenizer.get_vocab()) for name in ("bytes", "pieces")]
    special = {"<unk>", "<s>", "</s>", END}
    n_new = len(own[1] - own[0] - special)
    assert warnings[0].startswith(f"{n_new} tokens of")
    assert "may cut texts as no model's does" in warnings[0]
    merged = saved(config, tmp_path / "out")
    owners = [read(Path(names[name])) for name in ("bytes", "pieces")]
    for table in (EMBEDDING, HEAD):
        found, (a, b) = rows(merged, table), (rows(owner, table) for owner in owners)
        for token, row in found.items():
            first, second = a.get(token, b.get(token)), b.get(token, a.get(token))
            torch.testing.assert_close(row, 0.375 * first + 0.625 * second, rtol=0, atol=1e-6)
