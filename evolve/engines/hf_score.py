"""Log-probabilities of tokens, read off a token tree: of given continuations, of the next token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evolve.engines.token_tree import TreeReader, tree_of

if TYPE_CHECKING:
    from torch import Tensor

    from evolve.engines.token_tree import Indices, Sequences

# Rows of logits whose log-probabilities are computed at once, in float32.
_ROWS_AT_ONCE = 128


def score_ends(
    reader: TreeReader, sequences: Sequences, scored: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Score the last `scored[i]` tokens of each sequence, given those before them.

    Returns:
        For each sequence the sum of these tokens' log-probabilities in nats, and whether each of
        them is the likeliest one.
    """
    tree = tree_of(tuple(sequence[:-1] for sequence in sequences))
    # One entry for each token that is scored: whose it is, which node predicts it, what it is.
    owners = np.repeat(np.arange(len(sequences)), scored)
    nodes = np.concatenate([path[-n:] for path, n in zip(tree.paths, scored, strict=True)])
    targets = np.concatenate([sequence[-n:] for sequence, n in zip(sequences, scored, strict=True)])
    logprobs, is_greedy = np.empty(len(nodes)), np.empty(len(nodes), dtype=bool)
    for piece in reader.read(tree, np.unique(nodes)):
        entries = np.flatnonzero(np.isin(nodes, piece.wanted))
        rows = np.searchsorted(piece.wanted, nodes[entries])
        for start in range(0, len(piece.wanted), _ROWS_AT_ONCE):
            stop = start + _ROWS_AT_ONCE
            here = (rows >= start) & (rows < stop)
            found = _look_up(piece.logits[start:stop], rows[here] - start, targets[entries[here]])
            logprobs[entries[here]], is_greedy[entries[here]] = found
    sums = np.bincount(owners, weights=logprobs, minlength=len(sequences))
    misses = np.bincount(owners, weights=~is_greedy, minlength=len(sequences))
    return sums.tolist(), (misses == 0).tolist()


@torch.inference_mode()
def _look_up(logits: Tensor, rows: Indices, targets: Indices) -> tuple[Indices, Indices]:
    """Look up tokens in rows of logits: their log-probabilities, and whether they are the likeliest.

    Args:
        logits: (k, vocabulary).
        rows, targets: row and token of each entry, (m,).
    """
    logits = logits.float()
    row, token = (torch.from_numpy(x).to(logits.device) for x in (rows, targets))
    logprobs = logits[row, token] - logits.logsumexp(-1)[row]
    return logprobs.cpu().numpy(), (logits.max(-1).indices[row] == token).cpu().numpy()


def next_token_logits(reader: TreeReader, prompts: Sequences) -> Iterator[tuple[int, Tensor]]:
    """Yield for each prompt, in any order, its place and the logits of its next token, (vocabulary,)."""
    if not prompts:
        return
    tree = tree_of(prompts)
    last = np.array([path[-1] for path in tree.paths])
    for piece in reader.read(tree, np.unique(last)):
        for i in np.flatnonzero(np.isin(last, piece.wanted)):
            yield int(i), piece.logits[np.searchsorted(piece.wanted, last[i])]


def pick(
    found: Iterable[tuple[int, Tensor]], n: int, wanted: Sequence[Sequence[int]] | int
) -> list[dict[int, float]]:
    """Pick log-probabilities out of n prompts' logits: of wanted tokens, or of the likeliest ones."""
    picked: list[dict[int, float]] = [{} for _ in range(n)]
    for i, logits in found:
        logprobs = logits.float().log_softmax(-1)
        if isinstance(wanted, int):
            tokens = logprobs.topk(min(wanted, len(logprobs))).indices
        else:
            tokens = torch.tensor(list(wanted[i]), dtype=torch.long, device=logits.device)
        picked[i] = dict(zip(tokens.tolist(), logprobs[tokens].tolist(), strict=True))
    return picked
