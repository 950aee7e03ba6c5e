"""Greedy decoding of many prompts at once, with as little work as the texts allow.

The prompts are read as a token tree, so that what they share is computed once. Then the rows of a
batch grow token by token; a row whose text is settled leaves the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lm_eval.models.utils import postprocess_generated_text

from evolve.engines.hf_rows import Rows
from evolve.engines.token_tree import TreeReader

# A batch is made smaller when at most this share of its rows still grows: making it smaller copies
# the cache, computing finished rows costs their share of every pass.
_LIVE_SHARE = 0.8


class StopCheck:
    """Tells whether an answer is settled: whether more tokens could still change its text.

    lm-eval cuts the text at the first stop sequence, and by its own rule where there are several;
    that rule is used here too. Tokens generated behind the cut make no difference.

    A special token, of which nothing stays in the text, ends an answer where its own text contains a
    stop sequence: `ends` holds these. So HFLM does it for a request alone; in a batch it goes on
    until all rows have stopped, so that there the text depends on its neighbours.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._until = [stop for stop in until if stop]
        # A stop sequence may be tokenised in another way than by itself, hence two more.
        n_tokens = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self._until]
        self._window = max(n_tokens, default=0) + 2
        self.ends = {
            token
            for token in tokenizer.all_special_ids
            if any(stop in tokenizer.decode([token]) for stop in self._until)
        }

    def settled(self, answers: Sequence[list[int]]) -> list[bool]:
        """Tell for each answer, as token ids, whether its text is settled."""
        if not answers:
            return []
        tails = self._tokenizer.batch_decode(
            [answer[-self._window :] for answer in answers], skip_special_tokens=True
        )
        return [
            any(stop in tail for stop in self._until) and self._is_settled(answer)
            for answer, tail in zip(answers, tails, strict=True)
        ]

    def _is_settled(self, answer: list[int]) -> bool:
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        cut = len(postprocess_generated_text(text, self._until, None))
        # A stop sequence that begins before the cut and is not yet complete would cut earlier.
        return cut < len(text) and not any(
            stop.startswith(text[start:])
            for stop in self._until
            for start in range(max(0, len(text) - len(stop) + 1), cut)
        )


@torch.inference_mode()
def decode_greedily(
    reader: TreeReader,
    prompts: tuple[tuple[int, ...], ...],
    max_new_tokens: int,
    ends: Collection[int],
    check: StopCheck,
) -> list[list[int]]:
    """Continue each prompt by its likeliest token, again and again.

    Args:
        prompts: token ids, at least one a prompt; all in one batch.
        max_new_tokens: at least 1.
        ends: tokens after which a model's answer is over.
        check: tells whether an answer needs no further token.

    Returns:
        New token ids for each prompt, up to and with the token at which it ended.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    ends = {*ends, *check.ends}
    rows = Rows.read(reader, prompts)
    is_live = [True] * len(prompts)
    for n in range(max_new_tokens):
        if n:
            rows.step(reader.model)
        for prompt, token in zip(rows.prompts, rows.tokens.tolist(), strict=True):
            if is_live[prompt]:
                answers[prompt].append(token)
                is_live[prompt] = token not in ends
        growing = [prompt for prompt in rows.prompts if is_live[prompt]]
        for prompt, is_settled in zip(growing, check.settled([answers[i] for i in growing]), strict=True):
            is_live[prompt] = not is_settled
        live = [place for place, prompt in enumerate(rows.prompts) if is_live[prompt]]
        if not live:
            break
        if len(live) <= _LIVE_SHARE * len(rows.prompts):
            rows.keep(live)
    return answers
