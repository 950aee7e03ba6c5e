"""The merged model's tokens with their ids, and the row that each model has for each of them.

The rules are mergekit's: the ids are those of the base, or of the model that `source` names; a union
appends what only other models have, then their added tokens, then the tokens that the recipe names.
Where mergekit's order depends on string hashing, it is here that of the recipe and of the models' ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merge_core.checkpoint.write import has_tokenizer
from merge_core.errors import CheckpointError
from merge_core.tokenizer.loaded import Tokenizers
from merge_core.tokenizer.settings import TokenizerSettings, TokenSource

if TYPE_CHECKING:
    from tokenizers import AddedToken

# How many tokens a message names; the rest is counted.
_SHOWN = 5


@dataclass(frozen=True)
class ModelTokens:
    """A model's tokens that have a row in its tables.

    Attributes:
        model: reference as written.
        folder: where the tokenizer is.
        n_rows: rows of the model's tables.
        ids: by token.
        added: tokens that are matched before the tokenizer's own rule, with how, by id.
    """

    model: str
    folder: Path
    n_rows: int
    ids: Mapping[str, int]
    added: Mapping[int, AddedToken]


@dataclass(frozen=True)
class GivenRow:
    """A row that the recipe gives; `model` None means zeros."""

    model: str | None
    row: int
    force: bool


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The merged model's tokens, and how each model's tables are brought into their order.

    Attributes:
        key: tells it from others.
        source: the model whose ids it has.
        folder: where the source's tokenizer is.
        base: the model whose rows stand in for missing ones.
        n_tokens: rows up to the last token.
        size: rows of the merged tables; those behind the tokens are padding.
        ids: by token.
        appended: tokens that the source's tokenizer has not, or has as plain ones only, as they are to
            be added to it, in the order of their ids.
        dropped: tokens of the source's tokenizer without a row in its tables.
        rows: by model, the model's row for each id, -1 for none; int64, shape (n_tokens,).
        given: rows that the recipe gives, by id.
        warnings: what a user should know, one line each.
    """

    key: str
    source: str
    folder: Path
    base: str
    n_tokens: int
    size: int
    ids: Mapping[str, int]
    appended: tuple[str | AddedToken, ...]
    dropped: frozenset[str]
    rows: Mapping[str, np.ndarray]
    given: Mapping[int, GivenRow]
    warnings: tuple[str, ...] = ()
    tables: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_the_sources(self) -> bool:
        """Whether the source's tokenizer is the merge's, as it is."""
        return not self.appended and not self.dropped

    def keeps_rows(self, model: str) -> bool:
        """Tell whether a model's tables are merged as they are, or their leading rows."""
        is_forced = any(given.force for given in self.given.values())
        n, rows = self.n_tokens, self.rows[model]
        return self.size == n and not is_forced and bool((rows == np.arange(n)).all())

    def has_token(self) -> np.ndarray:
        """Return for each id whether it has a token; bool, shape (n_tokens,)."""
        found = np.zeros(self.n_tokens, bool)
        found[list(self.ids.values())] = True
        return found


def model_tokens(model: str, folder: Path, n_rows: int, tokenizers: Tokenizers) -> ModelTokens:
    """Read a model's tokens; those without a row are left out.

    Raises:
        CheckpointError: its tokenizer cannot be loaded.
    """
    tokenizer = tokenizers.of(folder)
    ids = {token: i for token, i in tokenizer.get_vocab().items() if i < n_rows}
    ids = dict(sorted(ids.items(), key=lambda entry: entry[1]))
    added = {i: token for i, token in sorted(tokenizer.added_tokens_decoder.items()) if i < n_rows}
    return ModelTokens(model, folder, n_rows, ids, added)


def build_vocabulary(
    settings: TokenizerSettings,
    base: str,
    models: Sequence[str],
    folders: Mapping[str, Path],
    n_rows: Mapping[str, int],
    tokenizers: Tokenizers,
) -> Vocabulary:
    """Find the merged model's tokens and every model's rows for them.

    Args:
        settings: see TokenizerSettings.
        base: the model that "base" means; its ids come first in a union.
        models: whose tables are merged, in the recipe's order.
        folders: where the tokenizer of each of these is, and of the settings' own models.
        n_rows: rows of their tables.
        tokenizers: loads them.

    Raises:
        CheckpointError: a tokenizer cannot be loaded, or a token that the recipe names has no row.
    """
    warnings = []
    known: dict[str, ModelTokens] = {}
    for model in dict.fromkeys([base, *models, *settings.references()]):
        folder = folders[model]
        if model != base and not has_tokenizer(folder):
            warnings.append(f"{folder} has no tokenizer; its ids are taken to be those of {base!r}")
            folder = folders[base]
        known[model] = model_tokens(model, folder, n_rows[model], tokenizers)
    is_union = settings.source == "union"
    source = known[base if settings.source in ("base", "union") else settings.source]
    ids = dict(source.ids)
    appended: dict[str, str | AddedToken] = {}
    end = max(ids.values(), default=-1) + 1
    if is_union:
        others = [known[model] for model in models]
        added: dict[str, AddedToken] = {}
        for token in (token for model in others for token in model.added.values()):
            added.setdefault(str(token), token)
        appended |= {t: t for model in others for t in model.ids if t not in ids and t not in added}
        own = {str(token) for token in source.added.values()}
        appended |= {text: token for text, token in added.items() if text not in own}
    appended |= {t: t for t in settings.tokens if t not in ids and t not in appended}
    new = [token for token in appended if token not in ids]
    ids |= {token: end + i for i, token in enumerate(new)}
    n_tokens = end + len(new)
    if new and len(source.ids) < end:
        gaps = sorted(set(range(end)) - set(source.ids.values()))
        raise CheckpointError(
            f"tokenizer: the ids of {source.model!r} have gaps (no token has id {gaps[0]}), so that "
            f"{_listed(new)} cannot be added behind them; use tokenizer_source: base"
        )
    multiple = settings.pad_to_multiple_of or 1
    dropped = frozenset(t for t in tokenizers.of(source.folder).get_vocab() if t not in source.ids)
    warnings += _said(source, new, dropped, [known[m] for m in models] if is_union else [])
    given = dict(_given(settings, ids, known))
    said = [base, source.model, list(ids.items()), repr(appended), sorted(dropped), settings.model_dump()]
    digest = hashlib.sha256(json.dumps(said).encode())
    return Vocabulary(
        key=digest.hexdigest()[:16],
        source=source.model,
        folder=source.folder,
        base=base,
        n_tokens=n_tokens,
        size=-(-n_tokens // multiple) * multiple,
        ids=ids,
        appended=tuple(appended.values()),
        dropped=dropped,
        rows={model: _rows(ids, n_tokens, known[model].ids) for model in dict.fromkeys([base, *models])},
        given=given,
        warnings=tuple(warnings),
    )


def _rows(ids: Mapping[str, int], n_tokens: int, own: Mapping[str, int]) -> np.ndarray:
    rows = np.full(n_tokens, -1, np.int64)
    for token, i in ids.items():
        rows[i] = own.get(token, -1)
    return rows


def _given(
    settings: TokenizerSettings, ids: Mapping[str, int], known: Mapping[str, ModelTokens]
) -> Iterator[tuple[int, GivenRow]]:
    faults = []
    for token, entry in settings.tokens.items():
        source: TokenSource = entry.source
        if source.model is None:
            yield ids[token], GivenRow(None, 0, entry.force)
            continue
        model = known[source.model]
        wanted = token if source.kind == "model" else source.token
        row = source.token_id if wanted is None else model.ids.get(wanted)
        if row is None:
            faults.append(
                f"tokenizer.tokens.{token}: {model.model!r} has no token {wanted!r}; name one that it has"
            )
        elif row >= model.n_rows:
            faults.append(
                f"tokenizer.tokens.{token}: token_id is {row}; {model.model!r} has {model.n_rows} rows, "
                f"name a smaller one"
            )
        else:
            yield ids[token], GivenRow(model.model, row, entry.force)
    if faults:
        raise CheckpointError(faults)


def _said(
    source: ModelTokens, new: Sequence[str], dropped: frozenset[str], others: Sequence[ModelTokens]
) -> Iterator[str]:
    """Warn of what changes how texts are cut into tokens."""
    if dropped:
        yield (
            f"{len(dropped)} tokens of {source.model!r} have no row in its tables and are left out of "
            f"the merged tokenizer: {_listed(sorted(dropped))}"
        )
    appended = set(new)
    for model in others:
        special = {str(token) for token in model.added.values()}
        plain = [token for token in model.ids if token in appended and token not in special]
        if plain:
            yield (
                f"{len(plain)} tokens of {model.model!r} are none of {source.model!r} "
                f"({_listed(plain)}); as in mergekit they are added whole, without their merge rules, so "
                f"that the merged tokenizer may cut texts as no model's does; tokenizer_source: base "
                f"keeps the base's"
            )


def _listed(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return ", ".join(map(repr, tokens[:_SHOWN])) + more
