"""A model's embedding or output head with a row for each token of the merged vocabulary.

A row that the model lacks is, in this order: the one that the recipe gives; zeros where no merged
model has the token; that of the only one that has it; the base's; the mean of those that have it.
Rows behind the tokens are the mean of all before. As in mergekit, rows are filled in before the
method is applied, so that shared tokens' rows are merged as any numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_core.checkpoint.read import Checkpoint
from merge_core.sources import Sources
from merge_core.tokenizer.vocabulary import Vocabulary

# Rows of a block where means are taken: little memory, and always the same sums.
_BLOCK_ROWS = 1 << 12


class Table(NamedTuple):
    """A tensor with a row for each token of its own model."""

    checkpoint: Checkpoint
    name: str

    def rows(self, wanted: np.ndarray | slice, dtype: torch.dtype) -> Tensor:
        """Return rows of it on the CPU, cast; a slice of what has the dtype already is a view."""
        stored = self.checkpoint.read(self.name)
        return stored[wanted if isinstance(wanted, slice) else _index(wanted)].to(dtype)


class RebuiltTable(Checkpoint):
    """One tensor of one model, in the order of the merged vocabulary.

    Args:
        model: whose it is.
        tables: the tensor in every model that is merged into the same output tensor.
        vocabulary: gives the order.
        dtype: torch's name of the dtype that all are taken in; one model's rows may be another's.
    """

    def __init__(
        self, model: str, tables: Mapping[str, Table], vocabulary: Vocabulary, dtype: str
    ) -> None:
        own = tables[model]
        info = own.checkpoint.tensors[own.name]
        self.reference = model
        self.folder = own.checkpoint.folder
        self.tensors = {own.name: replace(info, dtype=dtype, shape=(vocabulary.size, *info.shape[1:]))}
        self._own, self._tables, self._vocabulary = own, tables, vocabulary
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._keeps = vocabulary.keeps_rows(model)
        # But the leading rows of the stored tensor, in its dtype: no work and no memory.
        self.is_mapped = own.checkpoint.is_mapped and info.dtype == dtype and self._keeps
        said = [f"{table.checkpoint.identity} {table.name}" for table in tables.values()]
        text = "\0".join([vocabulary.key, *said])
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def identity(self) -> str:
        """The model with a hash of what has a say in its rows."""
        return f"{self.reference}#{self._digest}"

    def read(self, name: str) -> Tensor:
        """Return the table, shape (vocabulary.size, ...); never write into it."""
        vocabulary = self._vocabulary
        if self._keeps:
            return self._own.rows(slice(vocabulary.size), self._dtype)
        rows = vocabulary.rows[self.reference].copy()
        rows[[i for i, given in vocabulary.given.items() if given.force]] = -1
        table = torch.zeros(self.tensors[name].shape, dtype=self._dtype)
        has_row = np.flatnonzero(rows >= 0)
        for start in range(0, len(has_row), _BLOCK_ROWS):
            block = has_row[start : start + _BLOCK_ROWS]
            table[_index(block)] = self._own.rows(rows[block], self._dtype)
        self._fill(table, np.flatnonzero(rows < 0))
        self._pad(table)
        return table

    def prefetch(self, name: str) -> None:
        """Start to read what the rows are taken from."""
        for table in self._tables.values():
            table.checkpoint.prefetch(table.name)

    def _fill(self, table: Tensor, missing: np.ndarray) -> None:
        """Fill in the rows that the model lacks; zeros are there already."""
        given = self._vocabulary.given
        for i in (int(i) for i in missing if int(i) in given):
            row = given[i]
            if row.model is not None:
                table[i] = self._tables[row.model].rows(slice(row.row, row.row + 1), self._dtype)[0]
        missing = np.array([i for i in missing if int(i) not in given], np.int64)
        for start in range(0, len(missing), _BLOCK_ROWS):
            block = missing[start : start + _BLOCK_ROWS]
            owned = {model: self._vocabulary.rows[model][block] for model in self._tables}
            n_owners = np.sum([rows >= 0 for rows in owned.values()], axis=0)
            by_base = (n_owners > 1) & (owned.get(self._vocabulary.base, np.array(-1)) >= 0)
            total = torch.zeros((len(block), *table.shape[1:]), dtype=torch.float64)
            for model, rows in owned.items():
                takes = (rows >= 0) & (~by_base | (model == self._vocabulary.base))
                total[_index(np.flatnonzero(takes))] += self._tables[model].rows(rows[takes], self._dtype)
            n_taken = np.where(by_base, 1, n_owners.clip(min=1))
            mean = total / torch.from_numpy(n_taken).view(-1, *[1] * (total.dim() - 1))
            table[_index(block)] = mean.to(table.dtype)

    def _pad(self, table: Tensor) -> None:
        """Give rows without a token the mean of those with one."""
        has_token = self._vocabulary.has_token()
        if table.shape[0] == len(has_token) and has_token.all():
            return
        real, total = np.flatnonzero(has_token), torch.zeros(table.shape[1:], dtype=torch.float64)
        for start in range(0, len(real), _BLOCK_ROWS):
            total += table[_index(real[start : start + _BLOCK_ROWS])].sum(dim=0, dtype=torch.float64)
        mean = (total / len(real)).to(table.dtype)
        table[_index(np.flatnonzero(~has_token))] = mean
        table[len(has_token) :] = mean


def _index(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))


def rebuilt(
    vocabulary: Vocabulary, model: str, tables: Mapping[str, Table], dtype: str, sources: Sources
) -> RebuiltTable:
    """Return a model's rebuilt table, the same object each time.

    That of an intermediate result's former state is forgotten with all that is kept of it.
    """
    key = (model, dtype, *((other, table.name) for other, table in tables.items()))
    made = RebuiltTable(model, tables, vocabulary, dtype)
    known: RebuiltTable | None = vocabulary.tables.get(key)
    if known is not None and known.identity == made.identity:
        return known
    if known is not None:
        sources.residence.forget(known)
        sources.statistics.forget(known.identity)
    vocabulary.tables[key] = made
    return made
