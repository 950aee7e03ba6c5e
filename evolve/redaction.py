"""Secrets: taken out of everything that is said or written, refused in files that are kept.

What is known to be one: passwords in URLs, Hub tokens, and whatever the environment holds as a
token or password.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
# Variables that hold nothing but a secret.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PGPASSWORD", "WANDB_API_KEY", "OPENAI_API_KEY")
# Shorter ones would be found in ordinary words; in what is refused for them, all the more.
_SHORTEST, _SHORTEST_REFUSED = 6, 16
_PATTERNS = (
    # scheme://user:password@host keeps its user; https://token@host has none.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"(\bhttps?://)[^\s/:@'\"]+(?=@)", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_" + HIDDEN),
    (re.compile(r"(\bbearer\s+)[\w.~+/-]{8,}=*", re.IGNORECASE), r"\1" + HIDDEN),
    (
        re.compile(r"([?&][\w-]*(?:password|passwd|token|secret|api_?key)=)[^&\s'\"]+", re.IGNORECASE),
        r"\1" + HIDDEN,
    ),
)


def redacted(text: str, shortest: int = _SHORTEST) -> str:
    """Return a text without its secrets.

    Args:
        shortest: characters from which on the value of an environment variable counts.
    """
    for variable in _VARIABLES:
        secret = os.environ.get(variable, "")
        if len(secret) >= shortest:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str) -> str:
    """Return a text without secrets, and without what would steer the terminal that shows it."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in redacted(text))


def secrets_in(data: Any, at: str = "") -> Iterator[str]:
    """Walk plain data for texts that hold a secret; yield where they stand: `scoring.engine.token`."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            name = redacted(str(key), _SHORTEST_REFUSED)
            if name != str(key):
                yield f"a key of {at or 'the file'}"
            yield from secrets_in(value, f"{at}.{name}" if at else name)
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            yield from secrets_in(value, f"{at}[{i}]")
    elif isinstance(data, str) and redacted(data, _SHORTEST_REFUSED) != data:
        yield at


def secret_faults(data: Any) -> list[str]:
    """Say of each secret in a file how else to give it; the file is copied into what is kept."""
    return [
        f"{place} holds a token or password, and what is kept of this file would hold it too; take it "
        f"out, give a Hub token as HF_TOKEN or by `hf auth login`, a password as PGPASSWORD"
        for place in secrets_in(data)
    ]
