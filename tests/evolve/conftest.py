from collections.abc import Iterator
from pathlib import Path

import pytest

from .postgres import PostgreSQL, programs, server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server with an empty database."""
    if programs() is None:
        pytest.skip("needs PostgreSQL's server programs, and there are none on this machine")
    with server() as running:
        yield running


@pytest.fixture(scope="session")
def wider_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the quickstart's base, only with another hidden size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = Path(__file__).resolve().parents[2]
    config = AutoConfig.from_pretrained(root / "configs/quickstart/models/base")
    config.hidden_size *= 2
    folder = tmp_path_factory.mktemp("wider")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny tied Llamas in float32 whose embeddings differ, with the quickstart's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    root = Path(__file__).resolve().parents[2]
    folder = tmp_path_factory.mktemp("tied")
    tokenizer = AutoTokenizer.from_pretrained(root / "configs/quickstart/models/base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder
