"""Errors of the merge core: each is a list of faults, and each fault is one readable line.

A fault names the field, its value, the rule it breaks and the repair. Faults are collected and
raised together, so that a user repairs a file in one go.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class MergeError(Exception):
    """Base of the merge core's errors; `faults` holds one line a fault."""

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.faults,)


class RecipeError(MergeError):
    """The recipe's text is at fault."""


class CheckpointError(MergeError):
    """A model's files are missing, damaged or do not fit the others."""


class HubUnreachableError(MergeError):
    """The Hub did not answer; not the user's fault."""


class OutputError(MergeError):
    """The output folder cannot be written as asked."""


class ResourceError(MergeError):
    """The machine has not enough disk or memory."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known name `word` is probably meant to be, or list them all."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(names)}"


def shown(value: Any) -> str:
    """Quote a value, shortened to a glance."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def reason(error: BaseException, length: int = 200) -> str:
    """Quote what another library says went wrong: its first words, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 3] + "..."


def field_path(loc: Sequence[str | int]) -> str:
    """Spell a pydantic location as a user would: `models[0].parameters.weight`."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "file"


# Where pydantic would speak of its own types.
_KINDS = {
    "bool_type": "it must be true or false, without quotes",
    "int_type": "it must be a whole number such as 5, without quotes",
    "float_type": "it must be a number such as 0.5, without quotes",
    "list_type": "it must be a list, such as [A, B]",
    "dict_type": "it must be a mapping, such as {KEY: VALUE}",
    "model_type": "it must be a mapping, such as {KEY: VALUE}",
}


def schema_faults(error: ValidationError, known_keys: Mapping[str, Iterable[str]]) -> list[str]:
    """Turn pydantic's findings into fault lines.

    Args:
        error: what pydantic raised.
        known_keys: for each nesting (the path without indices, "" at the top) the keys that
            exist there, to name the nearest one for an unknown key.
    """
    faults = []
    items = error.errors(include_url=False)
    inner = {item["loc"] for item in items}
    for item in items:
        # A list whose entry is at fault is also "too short" to pydantic: say the cause alone.
        if item["type"] == "too_short" and any(
            loc[: len(item["loc"])] == item["loc"] != loc for loc in inner
        ):
            continue
        loc, value = item["loc"], item["input"]
        field = field_path(loc)
        if item["type"] == "extra_forbidden":
            place = ".".join(str(part) for part in loc[:-1] if not isinstance(part, int))
            repair = nearest(str(loc[-1]), known_keys.get(place, ()))
            faults.append(f"{field}: unknown key {str(loc[-1])!r}; {repair}")
        elif item["type"] == "missing":
            faults.append(f"{field} is missing; it is required, add it")
        else:
            message = _KINDS.get(item["type"], item["msg"].removeprefix("Value error, "))
            faults.append(f"{field} is {shown(value)}; {message[:1].lower() + message[1:]}")
    return faults
