"""Rows of tokens that grow one token at a time, and leave when their text is settled.

What makes a step cheap here: keys and values are written in place, where Transformers' cache copies
all of them for every token; heads that share keys are computed together, where Transformers first
copies the keys for each of them; and rows that are done are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evolve.engines.token_tree import Piece, TreeReader, attention_mask, tree_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Tokens for which room is made at once.
_ROOM = 64
_GROUPED = "evolve_grouped"


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, (rows, heads, room, head size), of which `n` tokens are in use."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Join keys and values of groups of rows, each (rows, heads, tokens, head size)."""
        super().__init__()
        keys, values = zip(*parts, strict=True)
        self.lazy_initialization(keys[0], values[0])
        self.n = keys[0].shape[2]
        self.keys, self.values = self._with_room(keys), self._with_room(values)

    def _with_room(self, parts: Sequence[Tensor]) -> Tensor:
        """Copy groups of rows into one tensor that has room for more tokens."""
        _, heads, n, size = parts[0].shape
        joined = parts[0].new_empty(sum(map(len, parts)), heads, n + _ROOM, size)
        torch.cat(tuple(parts), out=joined[:, :, :n])
        return joined

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens behind those in use; return all in use."""
        start, self.n = self.n, self.n + keys.shape[2]
        if self.n > self.keys.shape[2]:
            self.keys, self.values = self._with_room([self.keys]), self._with_room([self.values])
        self.keys[:, :, start : self.n] = keys
        self.values[:, :, start : self.n] = values
        return self.keys[:, :, : self.n], self.values[:, :, : self.n]

    def get_seq_length(self) -> int:
        """Return the tokens in use."""
        return int(self.n)

    def keep(self, rows: Tensor, first: int) -> None:
        """Drop other rows, and the tokens before `first`."""
        self.keys = self.keys.index_select(0, rows)[:, :, first:]
        self.values = self.values.index_select(0, rows)[:, :, first:]
        self.n -= first


def _grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from one token a row; heads with the same keys are laid out as queries of one head.

    Shapes: query (rows, heads, 1, size), key and value (rows, key heads, tokens, size), mask
    (rows, 1, 1, tokens); returns (rows, 1, heads, size).
    """
    if kwargs.get("position_bias") is not None:
        usual: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return usual
    rows, heads, _, size = query.shape
    groups = key.shape[1]
    grouped = query.reshape(rows, groups, heads // groups, size)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(_GROUPED, _grouped_attention)


@dataclass
class Rows:
    """A batch that grows.

    Attributes:
        prompts: which prompt each row continues, (rows,).
        lengths: tokens that each row holds, (rows,).
        visible: False where a row is padded, on the left, bool (rows, tokens).
        cache: keys and values of these tokens.
        tokens: the newest token of each row, not in the cache yet, (rows,).
    """

    prompts: list[int]
    lengths: Tensor
    visible: Tensor
    cache: Cache
    tokens: Tensor

    @classmethod
    def read(cls, reader: TreeReader, prompts: tuple[tuple[int, ...], ...]) -> Rows:
        """Compute the prompts as a tree, lay them out as rows, choose each row's first new token."""
        device = reader.model.device
        tree = tree_of(prompts)
        last = np.array([path[-1] for path in tree.paths])
        width = max(map(len, prompts))
        order: list[int] = []
        tokens: list[Tensor] = []
        parts: list[list[tuple[Tensor, Tensor]]] = []
        for piece in reader.read(tree, np.unique(last)):
            ending = np.flatnonzero(np.isin(last, piece.wanted))
            if len(ending):
                order += ending.tolist()
                places = torch.from_numpy(np.searchsorted(piece.wanted, last[ending])).to(device)
                tokens.append(_likeliest(piece.logits)[places])
                parts.append(_spread(piece, [tree.paths[i] for i in ending], width))
        layers = [_RoomyLayer(layer) for layer in zip(*parts, strict=True)]
        lengths = torch.tensor([len(prompts[i]) for i in order], device=device)
        visible = torch.arange(width, device=device)[None] >= width - lengths[:, None]
        return cls(order, lengths, visible, Cache(layers=layers), torch.cat(tokens))

    def step(self, model: PreTrainedModel) -> None:
        """Put the newest tokens into the cache and choose the next ones."""
        self.visible = torch.nn.functional.pad(self.visible, (0, 1), value=True)
        usual = model.config._attn_implementation
        mask = attention_mask(model, self.visible[:, None, None])
        if usual == "sdpa":
            model.config._attn_implementation = _GROUPED
        try:
            output = model(
                input_ids=self.tokens[:, None],
                position_ids=self.lengths[:, None],
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            model.config._attn_implementation = usual
        self.lengths = self.lengths + 1
        self.tokens = _likeliest(output.logits[:, -1])

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but those in the given places, and padding that none of them needs."""
        index = torch.tensor(places, device=self.tokens.device)
        self.prompts = [self.prompts[i] for i in places]
        self.lengths, self.tokens = self.lengths[index], self.tokens[index]
        first = self.visible.shape[1] - int(self.lengths.max())
        self.visible = self.visible[index, first:]
        for layer in self.cache.layers:
            layer.keep(index, first)


def _likeliest(logits: Tensor) -> Tensor:
    """Return the first of each row's largest logits; `argmax` takes five times longer in bfloat16."""
    return logits.max(-1).indices


def _spread(piece: Piece, paths: Sequence[Any], width: int) -> list[tuple[Tensor, Tensor]]:
    """Copy a tree's keys and values to one row for each path.

    Returns:
        For each layer keys and values, (paths, heads, width, head size); short paths are padded on
        the left by copies of the piece's first token.
    """
    index = np.zeros((len(paths), width), dtype=np.int64)
    for row, path in zip(index, paths, strict=True):
        row[width - len(path) :] = np.searchsorted(piece.nodes, path)
    flat = torch.from_numpy(index.ravel()).to(piece.logits.device)

    def spread(tensor: Tensor) -> Tensor:
        heads, size = tensor.shape[1], tensor.shape[3]
        return tensor[0].index_select(1, flat).view(heads, len(paths), width, size).transpose(0, 1)

    return [(spread(layer.keys), spread(layer.values)) for layer in piece.cache.layers]
