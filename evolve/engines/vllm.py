"""The `vllm` engine: one resident vLLM engine in this process, its weights reloaded in place.

lm-eval's own VLLM class builds a new engine each time and refuses the CPU build, so the adapter
between lm-eval's requests and `vllm.LLM` is ours. It sends one request a question where the
options of a multiple choice are single tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# The engine core in this process: weights reach it without being pickled.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import vllm
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from evolve.engines import EngineSettings
from evolve.engines.hf import load_tokenizer
from evolve.errors import SearchFileError, TrialEngineError
from merge_core.architecture import is_embedding
from merge_core.checkpoint.write import copy_tokenizer

Tokens = tuple[tuple[str, str] | None, list[int], list[int]]
DEFAULT_MAX_GEN_TOKS = 256


class VllmEngine:
    """A vLLM engine that stays up while its weights change.

    `options` go to `vllm.LLM` as they are.

    Raises:
        SearchFileError, TrialEngineError: vLLM cannot start with this model and these options.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        on_cpu = settings.device == "cpu"
        # Left to itself vLLM runs float32 models in 16 bits.
        dtype = settings.config.get("dtype") or settings.config.get("torch_dtype") or "float32"
        options = {"enforce_eager": on_cpu, "dtype": dtype, **settings.options}
        self._folder = tempfile.TemporaryDirectory(prefix="evolve-vllm-")
        # vLLM reads config and tokenizer from a folder; the weights come with the first candidate.
        folder = Path(self._folder.name)
        config = dict(settings.config)
        self._unties_head = _has_stale_head(config)
        if self._unties_head:
            config["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config))
        copy_tokenizer(settings.folder, folder)
        try:
            self._llm = vllm.LLM(
                model=str(folder),
                load_format="dummy",
                trust_remote_code=settings.trust_remote_code,
                disable_log_stats=True,
                **options,
            )
        except (ValueError, RuntimeError, TypeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            # With options of the user's they are the likelier cause.
            kind = SearchFileError if settings.options else TrialEngineError
            raise kind(
                f"scoring.engine: vLLM cannot start with this model ({reason:.300}); change "
                f"max_model_len, gpu_memory_utilization or another setting there, or use --backend hf"
            ) from error
        self._lms: dict[Path, VllmLM] = {}

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Reload the weights in place, and forget cached prefixes of the last candidate."""
        weights = _with_head(stream) if self._unties_head else iter(stream)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        # vLLM keys its prefix cache on tokens, not on weights.
        if not self._llm.reset_prefix_cache():
            raise TrialEngineError("vLLM kept cached prefixes of the previous candidate")

    def memory_gb(self) -> dict[str, float]:
        """Return what the key-value cache takes."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return {"kv_cache": (cache.kv_cache_memory_bytes or 0) / 1e9}

    def lm(self, tokenizer: Path | None = None) -> VllmLM:
        """Return lm-eval's view of the engine, with the tokenizer of a folder."""
        folder = tokenizer or self._settings.folder
        if folder not in self._lms:
            self._lms[folder] = VllmLM(
                self._llm, load_tokenizer(folder, self._settings.trust_remote_code)
            )
        return self._lms[folder]


def _has_stale_head(config: dict[str, Any]) -> bool:
    """Tell whether vLLM would keep a tied output head of the old weights after a reload.

    Its reload repacks modules that get tensors of their own, and a tied head gets none. Gemma's
    classes have no head module: they use the embedding itself.
    """
    is_tied = bool(config.get("tie_word_embeddings", False))
    return is_tied and not str(config.get("model_type", "")).startswith("gemma")


def _with_head(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Send the input embedding a second time, as the output head."""
    for name, tensor in stream:
        yield name, tensor
        if is_embedding(name) and tensor.dim() == 2 and "position" not in name and "wpe" not in name:
            yield "lm_head.weight", tensor


class VllmLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's requests, answered by a live `vllm.LLM`; every text is tokenised once."""

    def __init__(self, llm: vllm.LLM, tokenizer: Any) -> None:
        super().__init__()
        self._llm = llm
        self.tokenizer = tokenizer
        self.max_length = int(llm.llm_engine.model_config.max_model_len)
        self._encode_pair = cache(super()._encode_pair)
        self._encode = cache(lambda text, special: tokenizer.encode(text, **dict(special)))

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as lm-eval keys prompts by it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenise a text; one that begins with BOS gets no second one."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self._encode(string, tuple(special.items())))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the tokenizer's chat template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _generate(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
        outputs: list[Any] = self._llm.generate(inputs, list(params), use_tqdm=False)
        return outputs

    def _loglikelihood_tokens(
        self, requests: Sequence[Tokens], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations: (sum of log-probabilities, whether greedy decoding gives it)."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        questions: dict[tuple[int, ...], list[int]] = {}
        longer = []
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) == 1:
                questions.setdefault(tuple(context[-(self.max_length - 1) :]), []).append(i)
            else:
                longer.append(i)
        self._answer_questions(requests, questions, answers)
        self._answer_longer(requests, longer, answers)
        return answers

    def _answer_questions(
        self,
        requests: Sequence[Tokens],
        questions: dict[tuple[int, ...], list[int]],
        answers: list[tuple[float, bool]],
    ) -> None:
        """Score all single-token continuations of a context by one request."""
        params = [
            vllm.SamplingParams(
                temperature=0,
                max_tokens=1,
                logprob_token_ids=sorted({requests[i][2][0] for i in members}),
                detokenize=False,
            )
            for members in questions.values()
        ]
        outputs = self._generate([list(context) for context in questions], params)
        for members, output in zip(questions.values(), outputs, strict=True):
            (logprobs,) = output.outputs[0].logprobs
            (greedy,) = output.outputs[0].token_ids
            for i in members:
                token = requests[i][2][0]
                answers[i] = (float(logprobs[token].logprob), token == greedy)

    def _answer_longer(
        self, requests: Sequence[Tokens], members: Sequence[int], answers: list[tuple[float, bool]]
    ) -> None:
        """Score continuations of several tokens by the log-probabilities of the prompt."""
        params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        prompts = [(requests[i][1] + requests[i][2])[-(self.max_length - 1) :] for i in members]
        outputs = self._generate(prompts, [params] * len(prompts))
        for i, prompt, output in zip(members, prompts, outputs, strict=True):
            n = len(requests[i][2])
            scored = list(zip(prompt[-n:], output.prompt_logprobs[-n:], strict=True))
            total = sum(float(logprobs[token].logprob) for token, logprobs in scored)
            answers[i] = (total, all(logprobs[token].rank == 1 for token, logprobs in scored))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """Score continuations; no progress bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Score whole texts, in windows of the engine's context length."""
        windows: list[Tokens] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Generate answers up to a stop sequence or length."""
        eos = self.tokenizer.decode([self.eot_token_id])
        prompts, params, stops = [], [], []
        for request in requests:
            text, arguments = request.args
            arguments = normalize_gen_kwargs(arguments, DEFAULT_MAX_GEN_TOKS)
            until = handle_stop_sequences(arguments.pop("until", None), eos=eos)
            max_tokens = min(int(arguments.pop("max_gen_toks")), self.max_length - 1)
            prompts.append(self.tok_encode(text)[-(self.max_length - max_tokens) :])
            params.append(vllm.SamplingParams(max_tokens=max_tokens, stop=until, **_sampling(arguments)))
            stops.append(until)
        outputs = self._generate(prompts, params)
        return [
            postprocess_generated_text(output.outputs[0].text, until, None)
            for output, until in zip(outputs, stops, strict=True)
        ]


def _sampling(arguments: dict[str, Any]) -> dict[str, Any]:
    """Translate Transformers' generation arguments into vLLM's; greedy unless sampling is asked for."""
    is_sampled = arguments.get("do_sample", False)
    taken = {k: v for k, v in arguments.items() if k in ("top_p", "top_k", "min_p", "repetition_penalty")}
    return {
        **(taken if is_sampled else {}),
        "temperature": float(arguments.get("temperature") or 1.0) if is_sampled else 0.0,
        "spaces_between_special_tokens": False,
    }
