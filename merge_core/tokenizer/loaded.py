"""Tokenizers of models, loaded once, and what can be told of them without loading."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from merge_core.errors import CheckpointError, reason


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    Raises:
        CheckpointError: the folder has none that Transformers can load.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library raises the bare class
        raise CheckpointError(
            f"no tokenizer can be loaded from {folder} ({reason(error)}); add the "
            f"model's tokenizer files there"
        ) from error


@cache
def _scratch() -> TemporaryDirectory[str]:
    """Where merged tokenizers lie until this process ends; whoever has a folder may read it late."""
    return TemporaryDirectory(prefix="evolve-tokenizer-")


class Tokenizers:
    """Loaded tokenizers by folder, and the folders of merged ones."""

    def __init__(self) -> None:
        self._loaded: dict[Path, Any] = {}
        self._merged: dict[str, Path] = {}

    def of(self, folder: Path) -> Any:
        """Return a folder's tokenizer, which is not to be changed.

        Raises:
            CheckpointError: see `load_tokenizer`.
        """
        if folder not in self._loaded:
            self._loaded[folder] = load_tokenizer(folder)
        return self._loaded[folder]

    def new_folder(self, key: str) -> tuple[Path, bool]:
        """Return the folder for a merged tokenizer, and whether it was made just now and is empty."""
        is_new = key not in self._merged
        if is_new:
            self._merged[key] = Path(mkdtemp(dir=_scratch().name))
        return self._merged[key], is_new


def special_token(folder: Path, which: str) -> str | None:
    """Read a special token such as `eos_token` from tokenizer_config.json; None where it has none."""
    value = _json(folder / "tokenizer_config.json").get(which)
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def chat_template(folder: Path) -> str | None:
    """Read a folder's default chat template; None where it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = _json(folder / "chat_template.json").get("chat_template")
    found = found or _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; what is no such file says nothing. Loading the tokenizer tells why."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
