"""lm-eval's requests, answered by a live `vllm.LLM`.

lm-eval's own VLLM class builds a new engine each time and refuses the CPU build. This one asks less
of the engine, too: one request for all options of a question that are single tokens, and for longer
options one each, of which only the option's own tokens are computed where the context is cached.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import vllm
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evolve.engines.vllm_sampling import generation_defaults, request_seed, sampling_arguments
from evolve.errors import TrialEngineError

Tokens = tuple[tuple[str, str] | None, list[int], list[int]]
# Has the engine answer prompts, each with its parameters; one output a prompt, in their order.
Generate = Callable[[list[dict[str, list[int]]], list[Any]], Sequence[Any]]
DEFAULT_MAX_GEN_TOKS = 256
# By token id, or by position: log-probability, and whether it is the likeliest token there.
_Scores = dict[int, tuple[float, bool]]
# vLLM's limit of token ids whose log-probabilities one request may ask for.
_MAX_WANTED = 128


@dataclass
class _Stem:
    """What several continuations have in common: all tokens but each one's last.

    Attributes:
        n_scored: how many tokens at its end belong to continuations, at most.
        members: for each continuation its place among the requests and its length.
    """

    n_scored: int = 0
    members: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    """One request for scores.

    Attributes:
        stem: the number of the stem.
        tokens: the prompt.
        ids: tokens that may follow it.
        n_scored: how many tokens at the prompt's end are scored as well.
    """

    stem: int
    tokens: tuple[int, ...]
    ids: list[int]
    n_scored: int

    @property
    def first_row(self) -> int:
        """The first position whose prediction is wanted; the cache must not reach beyond it."""
        return len(self.tokens) - self.n_scored - 1


class VllmLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of an engine; every text is tokenised once.

    Args:
        llm: the engine.
        tokenizer: texts to tokens; pad, bos and eos tokens may be missing.
        folder: where generation_config.json is, if there is one.
        why_not: says why the engine cannot answer now; empty where it can.

    Attributes:
        max_length: tokens the model can be shown, one less than the engine's: it reserves one for
            the answer. Longer contexts lose their beginning, as in lm-eval's HFLM.
        n_requests: how many requests were sent to the engine so far.
    """

    def __init__(
        self, llm: vllm.LLM, tokenizer: Any, folder: Path, why_not: Callable[[], str] = str
    ) -> None:
        super().__init__()
        self._llm = llm
        self._generate: Generate = partial(llm.generate, use_tqdm=False)
        self._why_not = why_not
        self.tokenizer = tokenizer
        engine = llm.llm_engine
        self.max_length = int(engine.model_config.max_model_len) - 1
        self.n_requests = 0
        self._block_tokens = int(engine.vllm_config.cache_config.block_size)
        self._vocabulary_size = int(engine.model_config.get_vocab_size())
        self._defaults = generation_defaults(folder)
        # The engine finds stop sequences with its own tokenizer.
        self._shares_tokenizer = tokenizer.get_vocab() == llm.get_tokenizer().get_vocab()
        self._encode_pair = cache(super()._encode_pair)
        self._encode = cache(lambda text, special: tokenizer.encode(text, **dict(special)))

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token; None where the tokenizer has none."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: bos, else eos.

        Raises:
            TrialEngineError: the tokenizer has neither.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise TrialEngineError(
                "the tokenizer has neither a bos nor an eos token, one of which stands before a text "
                "without context; add bos_token to tokenizer_config.json"
            )
        return int(eos if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as lm-eval keys prompts by it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text; one that begins with the prefix token gets no second one."""
        if add_special_tokens is None and self._begins_with_prefix(string):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._encode(string, tuple(special.items())))

    def _begins_with_prefix(self, string: str) -> bool:
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            return False
        return bool(has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the tokenizer's chat template.

        A template that knows no system message gets the conversation without it, as in HFLM.
        """

        def render(history: list[dict[str, str]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])

    def _ask(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Have the engine answer; the outputs are in the order of the prompts.

        Raises:
            TrialEngineError: the engine holds no candidate, or fails.
        """
        if why_not := self._why_not():
            raise TrialEngineError(f"the engine holds {why_not}; load one before asking")
        if not prompts:
            return []
        self.n_requests += len(prompts)
        inputs = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        try:
            outputs = self._generate(inputs, list(params))
        except Exception as error:
            forget_requests(self._llm)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TrialEngineError(f"vLLM cannot answer ({reason[0]:.300})") from error
        return list(outputs)

    def through(self, generate: Generate) -> VllmLM:
        """Return this view with another way to the engine; what was tokenised is shared."""
        other = copy.copy(self)
        other._generate = generate
        return other

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (sum of log-probabilities, whether greedy decoding gives it).

        Raises:
            TrialEngineError: a continuation is empty, or longer than the model can be shown.
        """
        stems: dict[tuple[int, ...], _Stem] = defaultdict(_Stem)
        for i, (_, context, continuation) in enumerate(requests):
            n = len(continuation)
            if n == 0 or not context:
                raise TrialEngineError(
                    "a task asks for the likelihood of an empty continuation; correct its choices"
                )
            if n > self.max_length:
                raise TrialEngineError(
                    f"a continuation has {n} tokens; the engine can be shown {self.max_length}, raise "
                    f"scoring.engine.max_model_len above {n}"
                )
            stem = stems[tuple((context + continuation)[-(self.max_length + 1) :][:-1])]
            stem.n_scored = max(stem.n_scored, n - 1)
            stem.members.append((i, n))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for (tokens, stem), (last, before) in zip(
            stems.items(), self._score_stems(requests, stems), strict=True
        ):
            for i, n in stem.members:
                final = requests[i][2][-1]
                logprob, is_greedy = last[final]
                for j in range(len(tokens) - (n - 1), len(tokens)):
                    step, is_likeliest = before[j]
                    logprob += step
                    is_greedy &= is_likeliest
                answers[i] = (logprob, is_greedy)
        return answers

    def _score_stems(
        self, requests: Sequence[Tokens], stems: dict[tuple[int, ...], _Stem]
    ) -> list[tuple[_Scores, _Scores]]:
        """For each stem score the tokens that may follow it, and its own last `n_scored` ones.

        Returns:
            For each stem the scores by token id, and those by position.
        """
        asked: list[_Asked] = []
        for number, (tokens, stem) in enumerate(stems.items()):
            ids = sorted({requests[i][2][-1] for i, _ in stem.members})
            for start in range(0, len(ids), _MAX_WANTED):
                n_scored = stem.n_scored if start == 0 else 0
                asked.append(_Asked(number, tokens, ids[start : start + _MAX_WANTED], n_scored))
        outputs = self._ask(
            [one.tokens for one in asked],
            [_scoring(one.ids, one.n_scored, one.first_row < self._block_tokens) for one in asked],
        )
        # Where options have more than a block in common, the cache may have swallowed scored rows.
        again = [
            k
            for k, one in enumerate(asked)
            if one.n_scored and (outputs[k].num_cached_tokens or 0) > one.first_row
        ]
        repeated = self._ask(
            [asked[k].tokens for k in again],
            [_scoring(asked[k].ids, asked[k].n_scored, skips_cache=True) for k in again],
        )
        for k, output in zip(again, repeated, strict=True):
            outputs[k] = output
        scores: list[tuple[_Scores, _Scores]] = [({}, {}) for _ in stems]
        for one, output in zip(asked, outputs, strict=True):
            last, before = scores[one.stem]
            (logprobs,), (greedy,) = output.outputs[0].logprobs, output.outputs[0].token_ids
            for token in one.ids:
                last[token] = (float(logprobs[token].logprob), token == greedy)
            for position in range(len(one.tokens) - one.n_scored, len(one.tokens)):
                row = output.prompt_logprobs[position]
                entry = row[one.tokens[position]]
                # A row holds this token and the likeliest one; with one entry they are the same.
                before[position] = (float(entry.logprob), len(row) == 1 or entry.rank == 1)
        return scores

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score continuations; no progress bar."""
        for request in requests:
            if not request.args[1]:
                raise TrialEngineError(
                    "a task asks for the likelihood of an empty continuation; correct its choices"
                )
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, in windows of what the model can be shown; an empty text scores 0."""
        windows: list[Tokens] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logprob
        return totals

    def next_token_logprobs(
        self, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]] | int
    ) -> list[dict[int, float]]:
        """Natural-log probabilities, over the whole vocabulary, of the token after each prompt.

        Args:
            prompts: token ids; a longer one than `max_length` loses its beginning, an empty one is
                the prefix token.
            wanted: for each prompt the token ids asked for, or k: the k likeliest.

        Returns:
            By token id, for each prompt.

        Raises:
            TrialEngineError: the engine cannot answer.
        """
        shown = [list(prompt)[-self.max_length :] or [self.prefix_token_id] for prompt in prompts]
        if isinstance(wanted, int):
            if wanted < 1:
                return [{} for _ in prompts]
            params = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=wanted, detokenize=False)
            outputs = self._ask(shown, [params] * len(shown))
            return [_likeliest(output.outputs[0].logprobs[0], wanted) for output in outputs]
        asked = [
            (i, list(ids)[start : start + _MAX_WANTED])
            for i, ids in enumerate(wanted)
            for start in range(0, len(ids), _MAX_WANTED)
        ]
        outputs = self._ask([shown[i] for i, _ in asked], [_scoring(ids) for _, ids in asked])
        answers: list[dict[int, float]] = [{} for _ in prompts]
        for (i, ids), output in zip(asked, outputs, strict=True):
            (logprobs,) = output.outputs[0].logprobs
            answers[i].update({token: float(logprobs[token].logprob) for token in ids})
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generate answers up to a stop sequence, the end-of-text token, or their length.

        Raises:
            TrialEngineError: no room is left for the prompt, or an argument is not vLLM's.
        """
        prompts, params, stops = [], [], []
        seen: Counter[tuple[int, ...]] = Counter()
        for request in requests:
            text, arguments = request.args
            prompt, asked, until = self._generation(text, arguments, seen)
            prompts.append(prompt)
            params.append(asked)
            stops.append(until)
        outputs = self._ask(prompts, params)
        return [
            postprocess_generated_text(
                self.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True), until, None
            )
            for output, until in zip(outputs, stops, strict=True)
        ]

    def _generation(
        self, text: str, arguments: dict[str, Any], seen: Counter[tuple[int, ...]]
    ) -> tuple[list[int], Any, list[str]]:
        """Prepare one generation: prompt, sampling parameters, stop sequences."""
        given = dict(normalize_gen_kwargs(arguments, DEFAULT_MAX_GEN_TOKS))
        until = [stop for stop in given.pop("until") if stop]
        n_most = int(given.pop("max_gen_toks"))
        if not 0 < n_most < self.max_length:
            raise TrialEngineError(
                f"generation_kwargs.max_gen_toks is {n_most}; it must be from 1 to "
                f"{self.max_length - 1}, which leaves room for the prompt; change it or "
                f"scoring.engine.max_model_len"
            )
        bos = {"add_special_tokens": False} if has_bos_prefix(text, self.tokenizer.bos_token) else {}
        prompt = list(self._encode(text, tuple(bos.items())))[-(self.max_length - n_most) :]
        prompt = prompt or [self.prefix_token_id]
        if "max_length" in given:
            n_most = min(int(given.pop("max_length")), self.max_length) - len(prompt)
            if n_most < 1:
                raise TrialEngineError(
                    f"generation_kwargs.max_length leaves no room behind a prompt of {len(prompt)} "
                    f"tokens; use max_gen_toks"
                )
        key = tuple(prompt)
        values = sampling_arguments(given, self._defaults, request_seed(prompt, seen[key]))
        seen[key] += 1
        eos = self.eot_token_id
        if eos is not None:
            until.append(self.tokenizer.decode([eos]))
        stop_tokens = set(values.pop("stop_token_ids", None) or ())
        if eos is not None and eos < self._vocabulary_size:
            stop_tokens.add(eos)
        stops = until if self._shares_tokenizer else []
        try:
            asked = vllm.SamplingParams(
                max_tokens=n_most,
                stop=stops,
                stop_token_ids=sorted(stop_tokens),
                detokenize=bool(stops),
                **values,
            )
        except Exception as error:
            raise TrialEngineError(
                f"vLLM refuses the task's generation_kwargs ({str(error).splitlines()[0]:.200}); change "
                f"them or use --backend hf"
            ) from error
        return prompt, asked, until


def forget_requests(llm: vllm.LLM) -> None:
    """Drop requests that a failure left behind: their answers would be the next candidate's."""
    engine = llm.llm_engine
    unfinished = list(engine.output_processor.request_states)
    if unfinished:
        engine.abort_request(unfinished, internal=True)


def _scoring(ids: list[int], n_scored: int = 0, skips_cache: bool = False) -> Any:
    """Ask for the log-probabilities of the next token's candidates, and of the prompt's own tokens."""
    return vllm.SamplingParams(
        temperature=0,
        max_tokens=1,
        logprob_token_ids=ids,
        prompt_logprobs=1 if n_scored else None,
        skip_reading_prefix_cache=bool(n_scored) and skips_cache,
        detokenize=False,
    )


def _likeliest(logprobs: Any, k: int) -> dict[int, float]:
    """The k likeliest tokens; vLLM adds the one it took, which may be no more than an equal."""
    ordered = sorted(logprobs.items(), key=lambda item: (-item[1].logprob, item[0]))
    return {int(token): float(entry.logprob) for token, entry in ordered[:k]}
