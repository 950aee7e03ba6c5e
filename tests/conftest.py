"""Tiny random models, built once a session: a base and two fine-tunes of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

torch.set_num_threads(1)

# Odd sizes: no dimension divides another by chance, and no tensor is a power of two.
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Family:
    """Folders of a base and of two fine-tunes, base + 0.02 randn."""

    base: str
    x: str
    y: str


def fine_tuned(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Copy a model and move every parameter by 0.02 times a standard normal."""
    generator = torch.Generator().manual_seed(seed)
    model = type(base)(base.config)
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def save_family(folder: Path, base: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Family:
    """Save a base and two fine-tunes of it."""
    models = {"base": base, "x": fine_tuned(base, 1), "y": fine_tuned(base, 2)}
    for name, model in models.items():
        model.to(dtype).save_pretrained(folder / name)
    return Family(*(str(folder / name) for name in models))


def build_llama(tied: bool = False, **changes: Any) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": tied, **changes}))


@pytest.fixture(scope="session")
def llama_builder() -> Callable[..., PreTrainedModel]:
    """Build the tiny Llama anew, with other sizes where given; the same weights every time."""
    return build_llama


@pytest.fixture(scope="session")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Float32, with an output head of its own."""
    return save_family(tmp_path_factory.mktemp("llamas"), build_llama())


@pytest.fixture(scope="session")
def tied_llamas(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Float32, the output head is the embedding."""
    return save_family(tmp_path_factory.mktemp("tied"), build_llama(tied=True))


@pytest.fixture(scope="session")
def bf16_llamas(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Bfloat16, with an output head of its own."""
    return save_family(tmp_path_factory.mktemp("bf16"), build_llama(), torch.bfloat16)


@pytest.fixture(scope="session")
def qwens(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Float32 Qwen2, whose config.json lists a type for each layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        **SIZES, layer_types=types, use_sliding_window=True, sliding_window=8, tie_word_embeddings=False
    )
    return save_family(tmp_path_factory.mktemp("qwens"), Qwen2ForCausalLM(config))
