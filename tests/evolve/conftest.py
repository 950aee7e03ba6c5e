from pathlib import Path

import pytest


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
