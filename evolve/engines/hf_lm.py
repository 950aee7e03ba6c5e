"""lm-eval's requests, answered by a live Transformers model.

`ResidentLM` is lm-eval's own HFLM: the same tokenisation, truncation, stop sequences and results.
It differs in how the model is run. Requests go through it as token trees (see token_tree.py), so
that few-shot examples, questions and beginnings that several requests share are computed once;
finished answers are not computed further; and logits are computed only where they are read.

Against HFLM only rounding changes: in float32 log-likelihoods agree to 1e-4 and outcomes are equal.
In bfloat16 HFLM rounds log-probabilities to bfloat16; here they are float32.

HFLM's own path is taken, and its numbers to the last digit, for whole texts
(`loglikelihood_rolling`), for what the model or an option does not allow otherwise, and for
everything with the option `shared_prefixes: false`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from transformers import PreTrainedModel

from evolve.engines.hf_decode import StopCheck, decode_greedily
from evolve.engines.hf_score import next_token_logits, pick, score_ends
from evolve.engines.token_tree import TreeReader
from evolve.errors import TrialEngineError

Tokens = tuple[tuple[str, str] | None, list[int], list[int]]

# HFLM's rows a batch. Fixed, so that a document meets the same batch, and so the same rounding, in
# every run.
DEFAULT_BATCH_SIZE = 64
# Rows that are decoded together: more answer faster, until their keys and values take too much.
_MOST_ROWS = 256
_CACHE_GB = {"cpu": 2.0, "cuda": 8.0}
# lm-eval seeds torch with it before an evaluation, so that sampled answers equal its own.
_SAMPLING_SEED = 1234
# Generation settings that change nothing in greedy decoding: whatever their value, or with this one.
_HARMLESS = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "eta_cutoff", "epsilon_cutoff"),
    *("eos_token_id", "bos_token_id", "pad_token_id", "use_cache", "max_length", "max_new_tokens"),
    *("transformers_version", "_from_model_config", "cache_implementation", "return_dict_in_generate"),
}
_NEUTRAL = {"repetition_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1}


class ResidentLM(HFLM):  # type: ignore[misc]
    """lm-eval's view of a live model.

    Args:
        model: a causal language model, or one that HFLM takes.
        tokenizer: its tokenizer; one without pad token gets one, as HFLM does it.
        shared_prefixes: run requests as token trees; False = HFLM's own way for everything.
        batch_size: HFLM's rows a batch, and the most rows that are decoded together. Default: 64,
            as many rows decoded together as memory allows, and whole texts one by one.
        options: HFLM's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        shared_prefixes: bool = True,
        batch_size: int | str | None = None,
        **options: Any,
    ) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size or DEFAULT_BATCH_SIZE, **options
        )
        self._encode_pair = cache(super()._encode_pair)
        self._tok_encode = cache(super().tok_encode)
        self._tok_batch_encode = cache(super().tok_batch_encode)
        self._rows_asked = self.batch_size if batch_size else None  # as HFLM reads it
        self._reader = TreeReader(model)
        if not shared_prefixes or self.backend != "causal" or self.mixed_precision_dtype is not None:
            self._reader.longest = 0

    # ---- tokenising, once a search ---------------------------------------------------------------

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise a text, or recall how it was tokenised."""
        if not hasattr(self, "_tok_encode"):  # HFLM's constructor tokenises before it is done
            return list(super().tok_encode(string, *args, **kwargs))
        return list(self._tok_encode(string, *args, **kwargs))

    def tok_batch_encode(
        self, strings: Iterable[str], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenise and pad a batch of texts, or recall it; callers do not write into it."""
        ids, mask = self._tok_batch_encode(tuple(strings), *args, **kwargs)
        return ids, mask

    # ---- log-likelihoods -------------------------------------------------------------------------

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score continuations: (log-likelihood in nats, whether greedy decoding gives it)."""
        with _within_memory():
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score whole texts, in windows of the model's context; HFLM's own way.

        Without a `batch_size` of the user's one window at a time: the logits of a window of 8192
        tokens are 1.6 GB where the vocabulary is 49,152.
        """
        usual = self.batch_size
        self.batch_size_per_gpu = usual if self._rows_asked else 1
        try:
            with _within_memory():
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = usual

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score tokenised continuations; `override_bs` is given for windows of whole texts."""
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise TrialEngineError(
                    f"a continuation has {len(continuation)} tokens, it must have 1 to "
                    f"{self.max_length} (the model's context): {str(texts)[-200:]}; correct the task"
                )
            assert context  # lm-eval puts the prefix token where a context is empty
        # Too long to fit, a context loses its beginning; the last token is only predicted.
        whole = [(context + answer)[-(self.max_length + 1) :] for _, context, answer in requests]
        longest = max(map(len, whole), default=0) - 1
        if override_bs is not None or not requests or longest > self._reader.longest:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            return answers
        scored = [len(answer) for _, _, answer in requests]
        logprobs, is_greedy = score_ends(self._reader, tuple(map(tuple, whole)), scored)
        return list(zip(logprobs, is_greedy, strict=True))

    def next_token_logprobs(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]] | int
    ) -> list[dict[int, float]]:
        """Return natural-log probabilities, over the whole vocabulary, of the next token.

        Prompts that begin alike are computed together, so all positions of one text take one pass.

        Args:
            prompts: token ids, at least one a prompt; the last ones of a prompt longer than the
                model's context count.
            wanted: for each prompt the token ids asked for, or how many of the likeliest.

        Raises:
            TrialEngineError: a prompt is empty.
        """
        if any(not len(prompt) for prompt in prompts):
            raise TrialEngineError("a prompt is empty; the next token needs at least one before it")
        cut = tuple(tuple(prompt[-self.max_length :]) for prompt in prompts)
        if max(map(len, cut), default=0) > self._reader.longest:
            logits = (
                self._model_call(torch.tensor([tokens], device=self.device))[0, -1] for tokens in cut
            )
            return pick(enumerate(logits), len(cut), wanted)
        return pick(next_token_logits(self._reader, cut), len(cut), wanted)

    # ---- generating ------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generate answers up to a stop sequence, the model's end token or `max_gen_toks`.

        Greedy answers are decoded here. Sampled ones, and arguments that are neither, go HFLM's way,
        by lm-eval's own seed: the same requests give the same answers.
        """
        answers = [""] * len(requests)
        own: list[int] = []
        others: list[int] = []
        decodes = self._decodes_plainly()
        for i, request in enumerate(requests):
            arguments = self._arguments(request)
            # One more, where the tokenizer adds BOS to a batch and not to a text.
            longest = len(self.tok_encode(request.args[0])) + 1 + arguments["max_gen_toks"]
            is_own = decodes and _is_greedy(arguments) and longest <= self._reader.longest
            (own if is_own else others).append(i)
        for members, answer in ((own, self._decode), (others, self._generate_as_hflm)):
            if members:
                with _within_memory():
                    texts = answer([requests[i] for i in members])
                for i, text in zip(members, texts, strict=True):
                    answers[i] = text
        return answers

    def _arguments(self, request: Any) -> dict[str, Any]:
        """Return a request's generation arguments as lm-eval reads them, checked."""
        arguments: dict[str, Any] = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
        n = arguments["max_gen_toks"]
        if not 0 < n < self.max_length:
            raise TrialEngineError(
                f"{request.task_name}: max_gen_toks is {n}; it must be at least 1 and less than the "
                f"model's context ({self.max_length}); set it in the task's generation_kwargs, or raise "
                f"scoring.engine.max_length"
            )
        return arguments

    def _decodes_plainly(self) -> bool:
        """Tell whether greedy decoding by this model is what its generation settings make of it."""
        settings = self.model.generation_config
        changed = {k for k, v in settings.to_diff_dict().items() if v and v != _NEUTRAL.get(k)}
        return (
            self._reader.longest > 0
            and self.think_end_token is None
            and not self.truncation
            and changed <= _HARMLESS
        )

    def _generate_as_hflm(self, requests: Sequence[Any]) -> list[str]:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(_SAMPLING_SEED)
            texts: list[str] = super().generate_until(requests, disable_tqdm=True)
        return texts

    def _decode(self, requests: Sequence[Any]) -> list[str]:
        """Answer by greedy decoding; equal prompts are answered once."""
        texts = [""] * len(requests)
        # HFLM's own batches, since a batch's first text decides whether BOS is added to all.
        batches = Collator(
            [(*request.args, i) for i, request in enumerate(requests)],
            sort_fn=lambda asked: (-len(self.tok_encode(asked[0])), asked[0]),
            group_by="gen_kwargs",
            group_fn=lambda asked: asked[1],
        ).get_batched(n=int(self.batch_size) if self.batch_size != "auto" else DEFAULT_BATCH_SIZE)
        # Requests by what they ask for and how: stop sequences, most tokens, prompt.
        asked: dict[tuple[tuple[str, ...], int], dict[tuple[int, ...], list[int]]] = {}
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for batch in batches:
            contexts, all_arguments, members = zip(*batch, strict=True)
            arguments = normalize_gen_kwargs(all_arguments[0], self.max_gen_toks)
            until = tuple(handle_stop_sequences(arguments["until"], eos=eos))
            n_new = arguments["max_gen_toks"]
            ids, mask = self.tok_batch_encode(contexts, left_truncate_len=self.max_length - n_new)
            for i, row, held in zip(members, ids, mask.bool(), strict=True):
                prompts = asked.setdefault((until, n_new), {})
                # A prompt without tokens starts as lm-eval starts a text without context.
                prompt = tuple(row[held].tolist()) or (self.prefix_token_id,)
                prompts.setdefault(prompt, []).append(i)
        ends = _as_set(self.model.generation_config.eos_token_id)
        for (until, n_new), by_prompt in asked.items():
            check = StopCheck(self.tokenizer, until)
            for together in self._decode_batches(sorted(by_prompt, key=len, reverse=True), n_new):
                answers = decode_greedily(self._reader, together, n_new, ends, check)
                for prompt, answer in zip(together, answers, strict=True):
                    text = postprocess_generated_text(self.tok_decode(answer), list(until), None)
                    for i in by_prompt[prompt]:
                        texts[i] = text
        return texts

    def _decode_batches(
        self, prompts: Sequence[tuple[int, ...]], n_new: int
    ) -> Iterable[tuple[tuple[int, ...], ...]]:
        """Cut prompts, longest first, into batches whose keys and values fit in memory."""
        budget = _CACHE_GB.get(self.device.type, _CACHE_GB["cuda"]) * 1e9 / _cache_bytes(self.model)
        most = self._rows_asked if isinstance(self._rows_asked, int) else _MOST_ROWS
        start = 0
        while start < len(prompts):
            n = max(1, min(most, int(budget / (len(prompts[start]) + n_new))))
            yield tuple(prompts[start : start + n])
            start += n


@contextmanager
def _within_memory() -> Iterator[None]:
    """Say what to change where the device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrialEngineError(
            f"the requests do not fit into the device's memory ({error!s:.200}); lower "
            f"scoring.engine.batch_size, or scoring.engine.max_length"
        ) from error


def _cache_bytes(model: PreTrainedModel) -> int:
    """Count the bytes of one token's keys and values."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


def _is_greedy(arguments: Mapping[str, Any]) -> bool:
    """Tell whether generation arguments ask for greedy decoding and nothing else."""
    known = {"until", "max_gen_toks", *_HARMLESS} - {"max_length"}
    return not arguments.get("do_sample") and set(arguments) <= known


def _as_set(tokens: int | Sequence[int] | None) -> set[int]:
    """Return the token ids of a setting that holds one, several or none."""
    if tokens is None:
        return set()
    return {tokens} if isinstance(tokens, int) else set(tokens)
