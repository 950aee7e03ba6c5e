"""Token sequences as one tree, and a model's forward pass over it.

Prompts share much: the examples before every question, the question before its options, the first
words of a task's prompts. In a tree what several sequences share stands once, and is computed once:

    the cat sat        the ─ cat ─ sat
    the cat ran    →          │     └ (nothing of its own: only the last token differs)
    the dog sat         │     └ ran
                        └ dog ─ sat

The tree's tokens go through the model as one row, without padding. Each token gets the position
that it has in its sequence, and an attention mask that lets it see its ancestors only. A tree that
is too large for one pass is cut into pieces; what a piece needs of the earlier ones are the
ancestors of its first token, whose keys and values are carried over.

Against a pass for every sequence only rounding changes (1e-5 and less in float32).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    Indices = NDArray[np.int64]
    Sequences = tuple[tuple[int, ...], ...]

# Tokens a pass: enough to keep the device busy, and no more, for attention grows with its square.
TOKENS_A_PASS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class TokenTree:
    """Sequences merged where they begin alike; its n nodes are in depth-first order.

    Attributes:
        tokens: token of each node, (n,).
        depth: position of each node's token in its sequences, (n,).
        end: index behind the last descendant of each node, (n,); so node j is an ancestor of i, or
            i itself, where j <= i < end[j].
        paths: for each sequence its nodes, from the first token to the last.
    """

    tokens: Indices
    depth: Indices
    end: Indices
    paths: tuple[Indices, ...]


# The requests of a search are the same for every candidate, so their trees are kept.
@lru_cache(maxsize=64)
def tree_of(sequences: Sequences) -> TokenTree:
    """Merge token sequences, none of them empty, into a tree."""
    tokens: list[Indices] = []
    depth: list[Indices] = []
    end = np.zeros(sum(map(len, sequences)), dtype=np.int64)
    paths: list[Indices] = [np.empty(0, dtype=np.int64)] * len(sequences)
    n = 0
    path, previous = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    # Sorted, sequences that begin alike stand together.
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = np.array(sequences[i], dtype=np.int64)
        shared = _n_shared(previous, sequence)
        end[path[shared:]] = n
        n_new = len(sequence) - shared
        tokens.append(sequence[shared:])
        depth.append(np.arange(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(n, n + n_new)])
        paths[i] = path
        previous = sequence
        n += n_new
    end[path] = n
    return TokenTree(np.concatenate(tokens), np.concatenate(depth), end[:n], tuple(paths))


def _n_shared(a: Indices, b: Indices) -> int:
    """Count the tokens that two sequences have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


@dataclass(frozen=True)
class Piece:
    """What one pass computed.

    Attributes:
        nodes: the tree's nodes whose keys and values are in `cache`, in its order, ascending.
        wanted: the nodes asked for that were computed in this pass, (k,).
        logits: of the token that follows each of them, (k, vocabulary).
        cache: keys and values, one row.
    """

    nodes: Indices
    wanted: Indices
    logits: Tensor
    cache: DynamicCache


class TreeReader:
    """Runs a model over token trees.

    `longest` says how long the sequences may be: where the model attends to a window of the last
    tokens only, no longer than this window; 0 where it cannot be run over trees at all.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.longest = _longest(model)
        self._limit = TOKENS_A_PASS.get(model.device.type, TOKENS_A_PASS["cuda"])

    def read(self, tree: TokenTree, wanted: Indices) -> Iterator[Piece]:
        """Compute the whole tree, piece by piece.

        Args:
            wanted: nodes whose logits are asked for, ascending, each once.
        """
        n, device = len(tree.tokens), self.model.device
        carried, cache = np.empty(0, dtype=np.int64), DynamicCache()
        for start in range(0, n, self._limit):
            stop = min(start + self._limit, n)
            nodes = np.concatenate([carried, np.arange(start, stop)])
            asked = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, stop)]
            kept = np.flatnonzero(tree.end[nodes] > stop)
            # Never none: not every model takes an empty selection.
            places = asked - start if len(asked) else np.zeros(1, dtype=np.int64)
            with torch.inference_mode():
                output = self.model(
                    input_ids=torch.from_numpy(tree.tokens[None, start:stop]).to(device),
                    position_ids=torch.from_numpy(tree.depth[None, start:stop]).to(device),
                    attention_mask=self._mask(tree, nodes, stop - start),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=torch.from_numpy(places).to(device),
                )
            yield Piece(nodes, asked, output.logits[0, : len(asked)], cache)
            if stop < n:
                carried, cache = nodes[kept], _select(cache, kept)

    def _mask(self, tree: TokenTree, nodes: Indices, n_new: int) -> Tensor | None:
        """Let each new node see its ancestors and itself, (1, 1, n_new, all nodes).

        None where every node sees all before it, which the model does by itself, and faster.
        """
        new = nodes[-n_new:]
        if (tree.end[nodes] > new[-1]).all():
            return None
        device = self.model.device
        columns, rows = (torch.from_numpy(x).to(device) for x in (nodes, new))
        ends = torch.from_numpy(tree.end[nodes]).to(device)
        visible = (columns[None] <= rows[:, None]) & (rows[:, None] < ends[None])
        return attention_mask(self.model, visible[None, None])


def attention_mask(model: PreTrainedModel, visible: Tensor) -> Tensor:
    """Turn what may be seen, bool (batch, 1, queries, keys), into what the model's attention takes."""
    if model.config._attn_implementation == "sdpa":
        return visible
    hidden = torch.finfo(model.dtype).min
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill_(~visible, hidden)


@torch.inference_mode()
def _select(cache: DynamicCache, kept: Indices) -> DynamicCache:
    """Copy some tokens' keys and values into a new cache."""
    selected = DynamicCache()
    for i, layer in enumerate(cache.layers):
        index = torch.from_numpy(kept).to(layer.keys.device)
        selected.update(layer.keys.index_select(2, index), layer.values.index_select(2, index), i)
    return selected


def _longest(model: PreTrainedModel) -> int:
    """Find out how long a tree's sequences may be for this model; 0 where it takes no trees.

    A tree needs a decoder of Transformers' own that takes its attention function, positions and
    visibility from outside. That excludes recurrent layers, positions built into the attention
    (ALiBi) and rotary embeddings that change with the length of the batch.
    """
    config: Any = model.config.get_text_config(decoder=True)
    needed = {"position_ids", "attention_mask", "past_key_values", "logits_to_keep"}
    if (
        not type(model).__module__.startswith("transformers.")
        or model.config.is_encoder_decoder
        or model._is_stateful
        or not model._supports_attention_backend
        or model.config._attn_implementation not in ("sdpa", "eager")
        or not needed <= set(inspect.signature(model.forward).parameters)
        or getattr(config, "alibi", False)
        or any(kind in str(getattr(config, "rope_parameters", "")) for kind in ("dynamic", "longrope"))
    ):
        return 0
    layers = DynamicCache(config=config).layers
    windows = [layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return 0
    return int(min(windows, default=1 << 62))
