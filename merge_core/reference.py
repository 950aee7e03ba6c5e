"""How a recipe names a model: text, or a mapping of path and revision."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from merge_core.errors import shown


def reference_text(value: Any) -> Any:
    """Spell {model: {path, revision}, lora: {path, revision}} as `path@revision+path@revision`."""
    if not isinstance(value, Mapping):
        return value
    if "model" not in value or set(value) - {"model", "lora"}:
        raise ValueError(
            "a model is named by text, or by {model: {path: ..., revision: ...}, lora: ...}; name it so"
        )
    return "+".join(_spelled(value[key]) for key in ("model", "lora") if value.get(key) is not None)


def result_in(reference: str, results: Container[str]) -> tuple[str, str | None] | None:
    """Split `RESULT` or `RESULT+adapter`; the second part is None without an adapter.

    Args:
        results: names of other recipes' results.

    Returns:
        None where the reference names none of them.
    """
    name, plus, adapter = reference.partition("+")
    return (name, adapter if plus else None) if name in results else None


def _spelled(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or "path" not in part or set(part) - {"path", "revision"}:
        raise ValueError(f"{shown(part)} is not {{path: ..., revision: ...}}; write it so")
    path, revision = part["path"], part.get("revision")
    if not isinstance(path, str) or not isinstance(revision, str | None):
        raise ValueError(f"path and revision in {shown(part)} must be text; quote them")
    if revision is not None and "@" in path:
        raise ValueError(f"path {path!r} has an '@' beside a revision; name a path without '@'")
    return path if revision is None else f"{path}@{revision}"


Reference = Annotated[str, BeforeValidator(reference_text)]
