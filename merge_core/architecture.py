"""What a model is made of, read from its config and tensor names; no table of model families.

Layers are the numbered blocks (`model.layers.7.`, `transformer.h.7.`); everything else lies before
them (embeddings) or after them (final norm, output head).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from merge_core.checkpoint.read import Checkpoint, TensorInfo, split_layer
from merge_core.errors import CheckpointError

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("lm_head.", "embed_out.", "output_embedding", "output.weight", "output_projection")
_EMBEDDINGS = ("embed", "wte", "wpe", "word_emb")


class Architecture:
    """Layers and other tensors of one checkpoint.

    Attributes:
        prefix: what stands before a layer's number in its tensors' names.
        n_layers: how many layers there are.
        before, after: names of tensors outside the layers, in the file's order.
        layers: for each layer the names of its tensors without prefix and number.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        names = self._used_names()
        self._names = frozenset(names)
        counts = Counter(found[0] for name in names if (found := split_layer(name)))
        if not counts:
            raise CheckpointError(
                f"model {checkpoint.reference!r} has no numbered layers among its tensors "
                f"({', '.join(list(names)[:3])} ...); only models with numbered layers can be merged"
            )
        self.prefix = counts.most_common(1)[0][0]
        layers: dict[int, list[str]] = {}
        self.before: list[str] = []
        self.after: list[str] = []
        for name in names:
            found = split_layer(name)
            if found and found[0] == self.prefix:
                layers.setdefault(found[1], []).append(found[2])
            elif is_embedding(name):
                self.before.append(name)
            else:
                self.after.append(name)
        self.n_layers = max(layers) + 1
        self.layers = [layers.get(i, []) for i in range(self.n_layers)]
        declared = layer_count(checkpoint.config)
        if declared is not None and declared != self.n_layers:
            raise CheckpointError(
                f"model {checkpoint.reference!r}: config.json says {declared} layers, the tensors "
                f"have {self.n_layers}; restore the matching files"
            )

    @property
    def ties_embeddings(self) -> bool:
        """Whether the output head is the input embedding."""
        return bool(text_config(self.checkpoint.config).get("tie_word_embeddings", False))

    def _used_names(self) -> list[str]:
        """Tensor names in file order, without buffers that Transformers recomputes and without an
        output head that a tied model also stored.
        """
        tensors = self.checkpoint.tensors
        names = [name for name, info in tensors.items() if not _is_recomputed(name, info)]
        if self.ties_embeddings and any(is_embedding(name) for name in names):
            names = [name for name in names if not _is_head(name)]
        return names

    def layer_name(self, layer: int, suffix: str) -> str:
        """Spell a layer's tensor name."""
        return f"{self.prefix}{layer}{suffix}"

    def info(self, name: str) -> TensorInfo | None:
        """What the header says of a tensor; None where the model has none of that name."""
        return self.checkpoint.tensors.get(name) if name in self._names else None


def _is_recomputed(name: str, info: TensorInfo) -> bool:
    """Tell buffers that old checkpoints store: rotary frequencies and causal masks."""
    is_mask = name.endswith((".attn.bias", ".attention.bias")) and len(info.shape) == 4
    return name.endswith((".inv_freq", ".masked_bias")) or is_mask


def _is_head(name: str) -> bool:
    return any(name.startswith(head) or f".{head}" in name for head in _HEADS)


def is_embedding(name: str) -> bool:
    """Tell whether a tensor outside the layers belongs to the input: token or position embeddings."""
    return not _is_head(name) and any(word in name for word in _EMBEDDINGS)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and layer_count_key(config) is None else config


def layer_count_key(config: dict[str, Any]) -> str | None:
    """Name the key that holds the number of layers."""
    return next((key for key in LAYER_COUNT_KEYS if isinstance(config.get(key), int)), None)


def layer_count(config: dict[str, Any]) -> int | None:
    """Read the number of layers; None where config.json does not say."""
    config = text_config(config)
    key = layer_count_key(config)
    return int(config[key]) if key else None


def with_layers(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the config of a model made of the base's layers `kept`, in that order.

    Lists with one entry a layer (`layer_types` and the like) follow their layers.
    """
    part = text_config(config)
    key = layer_count_key(part)
    if key is None or kept == list(range(part[key])):
        return config
    n = part[key]
    changed = {
        name: [value[i] for i in kept]
        if isinstance(value, list) and len(value) == n and max(kept) < n and "layer" in name
        else value
        for name, value in part.items()
    }
    changed[key] = len(kept)
    return changed if part is config else {**config, "text_config": changed}
