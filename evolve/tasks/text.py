"""Text files as tasks: cut in documents, and scored by lm-eval's own perplexities."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from evolve.errors import SearchFileError


def read_documents(field: str, file: str) -> list[str]:
    """Cut a text file in documents.

    A `.jsonl` file has one JSON object a line, with the document under `text`; in any other file
    blank lines stand between documents.

    Args:
        field: where the file is named: `tasks[0].text`.

    Raises:
        SearchFileError: the file cannot be read or has no documents.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SearchFileError(
            f"{field} is {file!r}, which cannot be read ({reason}); name a text file"
        ) from None
    if Path(file).suffix == ".jsonl":
        documents = [
            _text_of(field, file, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    else:
        documents = [part.strip("\n") for part in re.split(r"\n[^\S\n]*(?=\n)", text)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SearchFileError(f"{field} is {file!r}, which holds no text; name a file with documents")
    return documents


def _text_of(field: str, file: str, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SearchFileError(
            f"{field} is {file!r}, whose line {number} is no JSON ({error}); correct it, or name the "
            f"file otherwise than .jsonl"
        ) from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise SearchFileError(
            f"{field} is {file!r}, whose line {number} has no `text`; write one object a line, "
            f'such as {{"text": "..."}}'
        )
    return str(row["text"])


def fingerprint(file: Path | str) -> str:
    """Return the first 16 digits of a file's SHA-256."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def text_task(field: str, file: str) -> Any:
    """Make an lm-eval task of a text file: rolling log-likelihoods of its documents.

    Its metrics are lm-eval's `byte_perplexity` (the first), `word_perplexity` and `bits_per_byte`;
    in all of them less is better.

    Raises:
        SearchFileError: the file cannot be read or has no documents.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = read_documents(field, file)
    return ConfigurableTask(
        config={
            "task": file,
            "custom_dataset": lambda **kwargs: {"test": Dataset.from_dict({"text": documents})},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
                for metric, aggregation in (
                    ("byte_perplexity", "weighted_perplexity"),
                    ("word_perplexity", "weighted_perplexity"),
                    ("bits_per_byte", "bits_per_byte"),
                )
            ],
            "num_fewshot": 0,
        }
    )
