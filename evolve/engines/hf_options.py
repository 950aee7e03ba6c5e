"""What `scoring.engine` may say to the `hf` engine: settings of lm-eval's HFLM for a live model.

HFLM passes a keyword that it does not know on to the model it would load, and none is loaded here:
a misspelt setting would change nothing, and nobody would hear of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolve.errors import SearchFileError
from merge_core.errors import nearest

OPTIONS = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Check the settings' names, and the counts among their values.

    Raises:
        SearchFileError: with every fault found.
    """
    faults = [
        f"scoring.engine.{name}: the hf engine has no such setting; {nearest(name, OPTIONS)}"
        for name in options
        if name not in OPTIONS
    ]
    for name in ("batch_size", "max_length"):
        value = options.get(name)
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not is_count and (name, value) != ("batch_size", "auto"):
            faults.append(
                f"scoring.engine.{name} is {value!r}; it must be a whole number of at least 1, correct it"
            )
    if faults:
        raise SearchFileError(faults)
