"""Load a quickstart task's documents from the JSON-lines file next to this module.

A path in a task's YAML is resolved against the working directory; as a ``custom_dataset``, this
module finds the documents from wherever lm-eval is started.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def load(documents: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the documents as the split ``test``.

    lm-eval passes the task's ``dataset_kwargs``, which name the file, together with all of the
    task's metadata, which the documents do not depend on.
    """
    lines = (Path(__file__).parent / documents).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
