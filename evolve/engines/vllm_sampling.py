"""A task's generation arguments, as vLLM understands them.

Tasks write them for Transformers' `generate`; what the `hf` engine would do with them is done here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import SamplingParams

from evolve.errors import TrialEngineError

# Transformers' name, where vLLM's differs.
_RENAMED = {"min_new_tokens": "min_tokens"}
# What Transformers takes from generation_config.json where the task says nothing.
_INHERITED = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
# Only where tokens are drawn; without drawing the most likely one is taken whatever these say.
_FOR_DRAWING = ("temperature", "top_k", "top_p", "min_p")
# Values that mean "nothing special"; any other asks for what vLLM cannot do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "n": (1, None),
    "use_cache": (True, False, None),
    "pad_token_id": (),
    "early_stopping": (True, False, None),
}
# Transformers draws from the 50 most likely tokens unless told otherwise.
_TRANSFORMERS_TOP_K = 50
_FIELDS = frozenset(SamplingParams.__struct_fields__) - {
    "output_kind",
    "skip_clone",
    "detokenize",
    "prompt_logprobs",
    "logprobs",
    "n",
}


def generation_defaults(folder: Path) -> dict[str, Any]:
    """Read what a model's generation_config.json sets of the arguments that `generate` inherits."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except (ValueError, OSError):
        return {}
    return {key: data[key] for key in _INHERITED if data.get(key) is not None}


def sampling_arguments(arguments: dict[str, Any], defaults: dict[str, Any], seed: int) -> dict[str, Any]:
    """Translate generation arguments, lm-eval's own (`until`, lengths) left out.

    Args:
        arguments: as lm-eval normalised them: `do_sample` is always there.
        defaults: of the model's generation_config.json.
        seed: for drawing, where the task gives none.

    Returns:
        Arguments of `vllm.SamplingParams`: greedy unless the task samples.

    Raises:
        TrialEngineError: an argument that vLLM has not, or a value that it refuses.
    """
    given = {_RENAMED.get(key, key): value for key, value in arguments.items()}
    is_drawn = bool(given.pop("do_sample", False))
    for key, neutral in _NEUTRAL.items():
        if key in given and given.pop(key) not in neutral and neutral:
            raise _refused(key, arguments[key], "vLLM generates one answer, token by token")
    unknown = sorted(set(given) - _FIELDS)
    if unknown:
        raise _refused(unknown[0], given[unknown[0]], "vLLM has no such argument")
    values = {**defaults, **{key: value for key, value in given.items() if value is not None}}
    if not is_drawn:
        return {**{k: v for k, v in values.items() if k not in _FOR_DRAWING}, "temperature": 0.0}
    values.setdefault("top_k", _TRANSFORMERS_TOP_K)
    temperature = given.get("temperature")
    values["temperature"] = float(
        defaults.get("temperature", 1.0) if temperature is None else temperature
    )
    return {"seed": seed, **values}


def request_seed(prompt: Sequence[int], occurrence: int) -> int:
    """Derive a request's seed from what is asked, and how often it was asked before.

    The same candidate then gives the same answers in any order of the requests, and a document that
    is asked several times gets several answers.
    """
    content = json.dumps([list(prompt), occurrence]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big")


def _refused(key: str, value: Any, why: str) -> TrialEngineError:
    return TrialEngineError(
        f"generation_kwargs.{key} is {value!r}; {why}; remove it from the task or use --backend hf"
    )
