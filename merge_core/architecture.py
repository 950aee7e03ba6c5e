"""What a model is made of, read from its config and tensor names; no table of model families.

Layers are the numbered blocks of the language model (`model.layers.7.`, `transformer.h.7.`);
everything else lies before them (embeddings, towers for other senses) or after them (final norm,
output head).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from merge_core.checkpoint.apart import has_joined_experts, spelling_of
from merge_core.checkpoint.read import Checkpoint, TensorInfo, split_layer
from merge_core.errors import CheckpointError
from merge_core.experts import Spelling

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("lm_head.", "embed_out.", "output_embedding", "output.weight", "output_projection")
_EMBEDDINGS = ("embed", "wte", "wpe", "word_emb")
_POSITIONS = ("wpe", "position", "embed_pos")
# What stands in names of blocks that feed a language model, or guess ahead of it.
_TOWERS = ("vision", "visual", "audio", "image", "speech", "multi_modal", "multimodal", "mm_", "mtp")


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
        if checkpoint.is_state_dict:
            self._take_as_they_are(list(checkpoint.tensors))
            return
        names = [name for name, info in checkpoint.tensors.items() if not _is_recomputed(name, info)]
        declared = layer_count(checkpoint.config)
        self.prefix = _layer_prefix(names, declared, checkpoint.reference)
        layers: dict[int, list[str]] = {}
        outside = []
        for name in names:
            found = split_layer(name)
            if found and found[0] == self.prefix:
                layers.setdefault(found[1], []).append(found[2])
            else:
                outside.append(name)
        self.n_layers = max(layers) + 1
        self.layers = [layers.get(i, []) for i in range(self.n_layers)]
        if declared is not None and declared != self.n_layers:
            raise CheckpointError(
                f"model {checkpoint.reference!r}: config.json says {declared} layers, the tensors "
                f"have {self.n_layers}; restore the matching files"
            )
        heads = [name for name in outside if _is_head(name)]
        flag = _tie_flag(checkpoint.config)
        self.ties_embeddings = not heads if flag is None else flag
        if self.ties_embeddings and any(is_embedding(name) for name in outside):
            # What a tied model stored as its head beside the embedding is not read by anyone.
            outside = [name for name in outside if name not in heads]
        self.before = [name for name in outside if is_embedding(name) or _is_tower(name)]
        self.after = [name for name in outside if not (is_embedding(name) or _is_tower(name))]
        self._names = frozenset(outside).union(
            self.layer_name(i, suffix) for i, suffixes in layers.items() for suffix in suffixes
        )
        self._own = {self.common_name(name): name for name in outside}

    def _take_as_they_are(self, names: list[str]) -> None:
        """Take a state_dict of any kind: tensors by name, no layers, none before another."""
        self.prefix, self.n_layers, self.layers = "", 0, []
        self.before, self.after = names, []
        self.ties_embeddings = False
        self._names, self._own = frozenset(names), {name: name for name in names}

    def layer_name(self, layer: int, suffix: str) -> str:
        """Spell a layer's tensor name."""
        return f"{self.prefix}{layer}{suffix}"

    def info(self, name: str) -> TensorInfo | None:
        """What the header says of a tensor; None where the model has none of that name."""
        return self.checkpoint.tensors.get(name) if name in self._names else None

    def common_name(self, name: str) -> str:
        """Return the name of a tensor outside the layers without what saving the bare model leaves out.

        Fine-tunes of one model may call a tensor `transformer.wte.weight` or `wte.weight`.
        """
        stem = self.prefix.rsplit(".", 2)[0] if self.prefix.count(".") > 1 else ""
        return name.removeprefix(f"{stem}.") if stem else name

    def own_name(self, common_name: str) -> str | None:
        """Spell a tensor outside the layers as this model does; None where it has none."""
        return self._own.get(common_name)

    @cached_property
    def token_embedding(self) -> str | None:
        """Name of the input embedding's table."""
        tables = [name for name in self.before if is_embedding(name) and not _is_tower(name)]
        tables = [name for name in tables if not _is_of_positions(name)]
        return next((name for name in tables if len(self.checkpoint.tensors[name].shape) == 2), None)

    @cached_property
    def expert_spelling(self) -> Spelling | None:
        """How single experts are spelled; None where they are joined or there are none."""
        return spelling_of(self.checkpoint.tensors)

    @cached_property
    def has_joined_experts(self) -> bool:
        """Whether all experts of a layer are in one tensor."""
        return has_joined_experts(self.checkpoint.tensors)

    @property
    def has_head(self) -> bool:
        """Whether the model has an output head of its own."""
        return any(_is_head(name) for name in self.after)

    def stand_in(self, head_name: str) -> str | None:
        """Name what a tied model uses as the output head's weight, its input embedding."""
        if self.ties_embeddings and _is_head(head_name) and head_name.endswith(".weight"):
            return self.token_embedding
        return None

    def is_vocabulary(self, name: str) -> bool:
        """Tell whether a tensor outside the layers has a row for each token of the vocabulary."""
        info = self.info(name)
        if info is None or not self.layers or name.startswith(self.prefix):
            return False
        if _is_tower(name) or _is_of_positions(name):
            return False
        is_table = _is_head(name) or is_embedding(name)
        return is_table and info.shape[:1] == (self.vocabulary_size,)

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens config.json speaks of."""
        size = text_config(self.checkpoint.config).get("vocab_size")
        return size if isinstance(size, int) else None


def _layer_prefix(names: Iterable[str], declared: int | None, reference: str) -> str:
    """Find the numbered blocks that are the language model's layers.

    Those of which there are as many as config.json says; of several the one that is no tower for
    another sense, with most tensors.
    """
    counts: Counter[str] = Counter()
    depth: dict[str, int] = {}
    for name in names:
        if found := split_layer(name):
            counts[found[0]] += 1
            depth[found[0]] = max(depth.get(found[0], 0), found[1] + 1)
    if not counts:
        raise CheckpointError(
            f"model {reference!r} has no numbered layers among its tensors "
            f"({', '.join(list(names)[:3])} ...); only models with numbered layers can be merged"
        )
    return max(counts, key=lambda p: (not _is_tower(p), depth[p] == declared, counts[p]))


def _is_recomputed(name: str, info: TensorInfo) -> bool:
    """Tell buffers that old checkpoints store: rotary frequencies and causal masks."""
    is_mask = name.endswith((".attn.bias", ".attention.bias")) and len(info.shape) == 4
    is_rotary = name.endswith((".inv_freq", ".cos_cached", ".sin_cached"))
    return is_rotary or is_mask or name.endswith(".masked_bias")


def _is_head(name: str) -> bool:
    return any(name.startswith(head) or f".{head}" in name for head in _HEADS)


def _is_tower(name: str) -> bool:
    return any(word in name for word in _TOWERS)


def _is_of_positions(name: str) -> bool:
    return any(word in name for word in _POSITIONS)


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


def _tie_flag(config: dict[str, Any]) -> bool | None:
    """Read whether the output head is the input embedding; None where config.json does not say.

    Transformers leaves the key out where it is the family's default.
    """
    for part in (config, text_config(config)):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


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
    return with_text_config(config, **changed)


def with_text_config(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return config.json with changes to the part that describes the language model."""
    part = text_config(config)
    return {**config, **changes} if part is config else {**config, "text_config": {**part, **changes}}
