"""Tiny LoRA adapters as PEFT saves them, and the models that PEFT makes of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def saved_adapter(
    model: PreTrainedModel, folder: Path, seed: int = 0, **config: Any
) -> dict[str, Tensor]:
    """Save an adapter of random numbers; return the weights of what PEFT merges it to.

    Args:
        model: the base; PEFT changes it.
        config: of PEFT's LoraConfig.

    Returns:
        The merged model's tensors, the output head beside a tied embedding included.
    """
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights and save_embedding_layers
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += noise * (0.1 if "lora_" in name else 0.02)
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}
