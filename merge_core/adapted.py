"""A model with a LoRA adapter, as one checkpoint: each tensor is made when it is read.

What is stored stays as it is, the base's tensors and the adapter's factors; W + s B A is computed in
float32, block of rows by block of rows, and rounded once to the dtype in which it is wanted. That
is bit for bit the tensor that a merge of this model alone would write in that dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_core.architecture import Architecture, with_text_config
from merge_core.checkpoint.adapter import Adapter, Factors, first_faults
from merge_core.checkpoint.locate import has_tokenizer
from merge_core.checkpoint.read import Checkpoint, TensorInfo, Update
from merge_core.errors import CheckpointError

# Entries of a block: what is computed on stays in cache, and no bit depends on how many threads or
# tensors there are.
_BLOCK = 1 << 18
_SHOWN = 3
# What the output head is called where the base has none of its own.
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Term:
    """One product B A on its way into a weight.

    Attributes:
        transposed: whether the weight is stored as the transpose of B A.
    """

    factors: Factors
    transposed: bool


class LowRankUpdate:
    """Adds products of factors to a weight.

    Args:
        adapter: holds the factors.
        terms: what is added, one after the other.
    """

    def __init__(self, adapter: Adapter, terms: Sequence[_Term]) -> None:
        self.adapter = adapter
        self.terms = tuple(terms)
        self._on_device: dict[torch.device, list[tuple[Tensor, ...]]] = {}

    @torch.no_grad()
    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum.

        Args:
            stored: shape (n, m).
            dtype: of the result.
        """
        out = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        if not out.numel():
            return out
        work = torch.float64 if stored.dtype == torch.float64 else torch.float32
        loaded = self._loaded(stored.device, work)
        step = max(1, _BLOCK // stored.shape[1])
        blocks = [(i, min(i + step, stored.shape[0])) for i in range(0, stored.shape[0], step)]
        if any(term.transposed and term.factors.magnitude for term in self.terms):
            blocks = [(0, stored.shape[0])]  # lengths are of columns
        # Two places for all blocks: the C library leaves gaps between blocks that come and go.
        n_rows = blocks[0][1]
        first, second = torch.empty((2, n_rows, stored.shape[1]), dtype=work, device=stored.device)
        for start, stop in blocks:
            block, free = first[: stop - start].copy_(stored[start:stop]), second[: stop - start]
            for term, (left, right, magnitude) in zip(self.terms, loaded, strict=True):
                product = torch.mm(left[start:stop], right, out=free)
                block, free = product.mul_(term.factors.scaling).add_(block), block
                if term.factors.magnitude and term.transposed:
                    block.mul_((magnitude / block.norm(dim=0))[None, :])
                elif term.factors.magnitude:
                    block.mul_((magnitude[start:stop] / block.norm(dim=1))[:, None])
            out[start:stop] = block
        return out

    def _loaded(self, device: torch.device, work: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Return left (n, r), right (r, m) and lengths of each term; kept on an accelerator alone."""
        known = self._on_device.get(device)
        if known is not None:
            return known
        found = [self._of(term, device, work) for term in self.terms]
        if device.type != "cpu":
            self._on_device[device] = found
        return found

    def _of(self, term: _Term, device: torch.device, work: torch.dtype) -> tuple[Tensor, ...]:
        a, b = (
            # New memory: a mapped file's place in memory could choose another order of sums.
            torch.empty(info.shape, dtype=work, device=device).copy_(self.adapter.read(name))
            for name in (term.factors.a, term.factors.b)
            for info in (self.adapter.tensors[name],)
        )
        left, right = (a.T, b.T) if term.transposed else (b, a)
        magnitude = torch.empty(0)
        if term.factors.magnitude:
            magnitude = self.adapter.read(term.factors.magnitude).reshape(-1).to(device, work)
        return left, right, magnitude


class BiasUpdate:
    """Adds what a module's B adds, whatever the input, to its bias."""

    def __init__(self, adapter: Adapter, factors: Factors) -> None:
        self.adapter, self.factors = adapter, factors

    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum.

        Args:
            stored: shape (m,).
            dtype: of the result.
        """
        assert self.factors.bias is not None
        work = torch.float64 if stored.dtype == torch.float64 else torch.float32
        added = self.adapter.read(self.factors.bias).to(stored.device, work)
        return (added * self.factors.scaling).add_(stored).to(dtype)


class AdaptedCheckpoint(Checkpoint):
    """A base and an adapter, with a checkpoint's interface.

    As PEFT's merge_and_unload leaves the model: factors of a tied output head change the embedding,
    too; an embedding or head that was trained as a whole unties them.

    Attributes:
        base: what the adapter is for.
        adapter: its files.

    Raises:
        CheckpointError: they do not fit each other.
    """

    is_mapped = False

    def __init__(self, reference: str, base: Architecture, adapter: Adapter) -> None:
        self.reference = reference
        self.base, self.adapter = base.checkpoint, adapter
        self.folder, self.is_state_dict = self.base.folder, self.base.is_state_dict
        self._views = {}
        self.tensors = dict(self.base.tensors)
        self._origins: dict[str, tuple[Checkpoint, str]] = {}
        self._updates: dict[str, Update] = {}
        self._unties = False
        self._n_rows: int | None = None
        fitting = _Fitting(self, base)
        faults = fitting.faults()
        if faults:
            raise CheckpointError(first_faults(f"model {reference!r}", faults))

    @property
    def identity(self) -> str:
        """The base's with the adapter, which tell its tensors from another's."""
        return f"{self.base.identity}+{self.adapter.identity}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json, with a resized vocabulary or an untied head as the adapter has it."""
        config = self.base.config
        if self._n_rows is not None:
            config = with_text_config(config, vocab_size=self._n_rows)
        if self._unties:
            config = {**with_text_config(config, tie_word_embeddings=False), "tie_word_embeddings": False}
        return config

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder where it has a tokenizer, else the base's."""
        return self.adapter.folder if has_tokenizer(self.adapter.folder) else self.base.tokenizer_folder

    def origin(self, name: str) -> tuple[Checkpoint, str, Update | None]:
        """Say where a tensor is stored, under which name, and what is done to it on its way."""
        store, own_name = self._origins.get(name, (self.base, name))
        return store, own_name, self._updates.get(name)

    def stores(self) -> list[Checkpoint]:
        """List the folders whose files are read for this model."""
        return [*self.base.stores(), self.adapter]

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU in the dtype that `tensors` says; never write into it."""
        store, own_name, update = self.origin(name)
        stored = store.read(own_name)
        dtype: torch.dtype = getattr(torch, self.tensors[name].dtype)
        return stored.to(dtype) if update is None else update(stored, dtype)

    def prefetch(self, name: str) -> None:
        """Tell the system that a tensor's bytes will be wanted."""
        store, own_name, _ = self.origin(name)
        store.prefetch(own_name)

    def fingerprint(self) -> str:
        """Hash of both."""
        both = self.base.fingerprint() + self.adapter.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()[:16]


class _Fitting:
    """Finds the base's tensor for each of the adapter's."""

    def __init__(self, model: AdaptedCheckpoint, base: Architecture) -> None:
        self.model, self.base, self.adapter = model, base, model.adapter
        self.own = base.checkpoint.tensors
        self._by_ending: dict[str, str | None] = {}
        for name in self.own:
            for ending in _endings(name):
                # Two tensors with one ending: neither is meant.
                self._by_ending[ending] = None if ending in self._by_ending else name

    def faults(self) -> list[str]:
        """Fill in the model's tensors; return what does not fit."""
        faults = [*self._replace(), *self._update(), *self._lacking()]
        return faults or list(self._vocabulary_faults())

    def _find(self, name: str) -> str | None:
        """Find the base's name of a tensor; it may have been saved from the bare model, or with more."""
        if name in self.own:
            return name
        if found := self._by_ending.get(name):
            return found
        return next((ending for ending in _endings(name) if ending in self.own), None)

    def _replace(self) -> Iterator[str]:
        """Take the tensors that were trained as a whole."""
        taken: dict[str, str] = {}
        beside: dict[str, str] = {}
        for name, own_name in self.adapter.whole.items():
            tied = self.base.stand_in(name)
            target = tied or self._find(name)
            if target is None:
                yield self._unmatched(name)
                continue
            info = self.adapter.tensors[own_name]
            if len(info.shape) != len(self.own[target].shape) or (
                info.shape != self.own[target].shape
                and not (self.base.is_vocabulary(target) and info.shape[1:] == self.own[target].shape[1:])
            ):
                yield self._misfit(name, info.shape, target)
            elif tied:
                beside[name] = own_name
            else:
                taken[target] = own_name
        for target, own_name in taken.items():
            self._set(target, own_name)
        embedding = self.base.token_embedding
        if self.base.ties_embeddings and embedding is not None:
            self._untie(embedding, taken.get(embedding), next(iter(beside.values()), None))

    def _untie(self, embedding: str, new: str | None, head: str | None) -> None:
        """Give a tied model a head of its own where the adapter leaves the two different."""
        settings, tensors = self.adapter.settings, self.adapter.tensors
        if (new is None and head is None) or settings.keeps_tied:
            return
        if head is None:
            is_resized = new is not None and tensors[new].shape != self.own[embedding].shape
            if is_resized or not settings.saves(embedding.removesuffix(".weight")):
                return  # loaded into the tied weight itself
        elif new is not None and torch.equal(self.adapter.read(new), self.adapter.read(head)):
            return
        elif new is None and not settings.saves(_HEAD.removesuffix(".weight")):
            self._set(embedding, head)
            return
        self.model._unties = True
        self.model.tensors[_HEAD] = self.own[embedding]
        if head is None:
            self.model._origins[_HEAD] = (self.base.checkpoint, embedding)
        else:
            self._set(_HEAD, head)

    def _set(self, target: str, own_name: str) -> None:
        """Put a tensor of the adapter in the place of the base's, in the base's dtype."""
        like = self.model.tensors[target]
        shape = self.adapter.tensors[own_name].shape
        self.model.tensors[target] = replace(like, shape=shape)
        self.model._origins[target] = (self.adapter, own_name)

    def _update(self) -> Iterator[str]:
        """Take the factors."""
        terms: dict[str, list[_Term]] = {}
        for module, factors in self.adapter.factors.items():
            name = f"{module}.weight"
            target = (None if self.model._unties else self.base.stand_in(name)) or self._find(name)
            if target is None and self.model._unties and name in self.model.tensors:
                target = name
            if target is None:
                yield self._unmatched(f"{module} (lora_A, lora_B)")
                continue
            transposed = self._transposed(factors, self.model.tensors[target])
            if transposed is None:
                yield self._misfit(f"B A of {module}", self._product(factors), target)
                continue
            if factors.rank:
                terms.setdefault(target, []).append(_Term(factors, transposed))
            if factors.bias is not None:
                yield from self._add_bias(module, factors)
        for target, of in terms.items():
            self.model._updates[target] = LowRankUpdate(self.adapter, of)

    def _add_bias(self, module: str, factors: Factors) -> Iterator[str]:
        target = self._find(f"{module}.bias")
        shape = self.adapter.tensors[factors.bias or ""].shape
        if target is None:
            yield self._unmatched(f"{module} (lora_B.bias)")
        elif shape != self.own[target].shape:
            yield self._misfit(f"lora_B.bias of {module}", shape, target)
        else:
            self.model._updates[target] = BiasUpdate(self.adapter, factors)

    def _transposed(self, factors: Factors, info: TensorInfo) -> bool | None:
        """Tell how B A lies in a weight; None where it has another shape."""
        product = self._product(factors)
        fits, fits_transposed = info.shape == product, info.shape == product[::-1]
        if not info.is_floating or not (fits or fits_transposed):
            return None
        if factors.of_embedding:
            return True if fits_transposed else None
        if fits and fits_transposed:
            return self.adapter.settings.fan_in_fan_out or self._stores_transposes
        return fits_transposed

    def _product(self, factors: Factors) -> tuple[int, int]:
        """Return the shape of B A."""
        tensors = self.adapter.tensors
        return tensors[factors.b].shape[0], tensors[factors.a].shape[1]

    @cached_property
    def _stores_transposes(self) -> bool:
        """Whether the base's layers keep weights as (in, out), as GPT-2's do; their biases tell."""
        for name, info in self.own.items():
            bias = self.own.get(f"{name.removesuffix('.weight')}.bias")
            if bias is not None and len(info.shape) == 2 and info.shape[0] != info.shape[1]:
                return bias.shape == info.shape[1:]
        return False

    def _lacking(self) -> Iterator[str]:
        """Find modules that adapter_config.json names and that have no factors."""
        known = {self._find(f"{module}.weight") for module in self.adapter.factors}
        known |= {self.base.stand_in(f"{module}.weight") for module in self.adapter.factors}
        lacking = [
            name
            for name, info in self.own.items()
            if name.endswith(".weight")
            and len(info.shape) == 2
            and name not in known
            and self.base.info(name) is not None
            and self.adapter.settings.targets(name.removesuffix(".weight"))
        ]
        if lacking:
            yield (
                f"adapter {self.adapter.reference!r} has no factors of {_listed(lacking)}, which "
                f"its target_modules name; download it again, or save it whole"
            )

    def _vocabulary_faults(self) -> Iterator[str]:
        """Refuse a vocabulary of which only one end was resized."""
        tensors = self.model.tensors
        names = [name for name in self.own if self.base.is_vocabulary(name)]
        names += [name for name in tensors if name not in self.own]
        rows = {name: tensors[name].shape[0] for name in names}
        if len(set(rows.values())) > 1:
            yield (
                f"adapter {self.adapter.reference!r} leaves vocabularies of different sizes "
                f"({', '.join(f'{name} {n}' for name, n in rows.items())}); save it with both embedding "
                f"and output head"
            )
        for name in names[:1]:
            if tensors[name].shape[0] != self.own.get(name, tensors[name]).shape[0]:
                self.model._n_rows = tensors[name].shape[0]

    def _unmatched(self, what: str) -> str:
        named = self.model.base.reference
        return (
            f"adapter {self.adapter.reference!r}: {what} has no place in {named!r}; name the base that "
            f"it was trained on"
        )

    def _misfit(self, what: str, shape: Sequence[int], target: str) -> str:
        named = self.model.base.reference
        return (
            f"adapter {self.adapter.reference!r}: {what} is {list(shape)} where {target} of {named!r} is "
            f"{list(self.model.tensors[target].shape)}; name the base that it was trained on"
        )


def _endings(name: str) -> Iterator[str]:
    """List what is left of a dotted name without its first parts."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
