"""Which tensors of which models make each output tensor, and that they fit: all but the numbers.

Nothing is read here but configs and headers. The wiring of a recipe depends on its methods, models
and layer ranges alone, so that candidates of a search share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from merge_core.architecture import Architecture
from merge_core.checkpoint.read import TensorInfo
from merge_core.errors import CheckpointError
from merge_core.leniency import Leniency
from merge_core.methods import METHODS
from merge_core.parts import Part, PartSource
from merge_core.sources import Sources
from merge_core.tokenizer.vocabulary import Vocabulary

# How many differing tensors a message names; the rest is counted.
_SHOWN = 5


class Wire(NamedTuple):
    """One model's tensor on its way into an output tensor.

    Attributes:
        model: reference as written.
        name: the tensor's name in that model.
        filter_name: what filters match: `name`, or the head's where an embedding stands in for it.
        occurrence: how often the same reference came before among the sources.
        source: number of the source in its part.
    """

    model: str
    name: str
    filter_name: str
    occurrence: int = 0
    source: int = 0


class Wired(NamedTuple):
    """An output tensor: what goes into it, and what it will be.

    Attributes:
        part: number of the part whose parameters it reads; None for a tensor taken as it is.
        dtype: of the first input on disk, torch's name.
        by_token: whether its rows are brought into the order of the merged vocabulary.
    """

    name: str
    method: str
    t: float
    base: Wire | None
    inputs: tuple[Wire, ...]
    part: int | None
    shape: tuple[int, ...]
    dtype: str
    is_floating: bool
    by_token: bool


class Wiring(NamedTuple):
    """The output tensors in the order of the model, and what a user should know of them."""

    tensors: tuple[Wired, ...]
    warnings: tuple[str, ...]


def wire(
    parts: Sequence[Part],
    donor: str,
    sources: Sources,
    leniency: Leniency,
    vocabulary: Vocabulary | None = None,
) -> Wiring:
    """Wire up a recipe whose models are open.

    Args:
        vocabulary: the merged model's tokens; None where every model has the same ids.

    Raises:
        CheckpointError: models differ in family, layers, tensors or shapes.
    """
    return _Wirer(parts, donor, sources, leniency, vocabulary).wiring()


def layers_of(source: PartSource, architecture: Architecture) -> tuple[int, int]:
    """Return the layers [start, end) that a source gives."""
    return source.layer_range or (0, architecture.n_layers)


def vocabulary_rows(architectures: Iterable[Architecture]) -> int | None:
    """Return the size of the smallest vocabulary among embeddings that have a row for each token."""
    names = [(architecture, architecture.token_embedding) for architecture in architectures]
    sizes = [a.vocabulary_size for a, name in names if name is not None and a.is_vocabulary(name)]
    return min((size for size in sizes if size is not None), default=None)


class _Draft(NamedTuple):
    """An output tensor whose inputs have not been compared.

    Attributes:
        names: one a source of the part, None where that model lacks it.
        spelled: how each source would call it.
    """

    name: str
    part: int
    t: float
    names: list[str | None]
    spelled: list[str]
    donor_has_it: bool


class _Wirer:
    def __init__(
        self,
        parts: Sequence[Part],
        donor: str,
        sources: Sources,
        leniency: Leniency,
        vocabulary: Vocabulary | None,
    ) -> None:
        self.parts = parts
        self.donor = donor
        self.model = sources.architecture(donor)
        self.architectures = [[sources.architecture(s.model) for s in part.sources] for part in parts]
        self.sources = sources
        self.leniency = leniency
        self.vocabulary = vocabulary
        self.donors_suffixes = {suffix for layer in self.model.layers for suffix in layer}
        self.n_rows = vocabulary_rows([*self.architectures[0], *self.architectures[-1]])
        self.differing: dict[tuple[str, str], list[str]] = {}
        self.rows: dict[int, str] = {}
        self.dropped: list[str] = []
        self.without_given: list[str] = []

    def wiring(self) -> Wiring:
        faults = [
            *self._form_faults(),
            *self._family_faults(),
            *self._range_faults(),
            *self._table_faults(),
        ]
        if faults:
            raise CheckpointError(faults)
        tensors = tuple(wired for draft in self._drafts() if (wired := self._wired(draft)))
        faults = [*self._difference_faults(), *self._vocabulary_faults()]
        if faults:
            raise CheckpointError(faults)
        return Wiring(tensors, tuple(self._warnings()))

    # ---- what comes out ----

    def _drafts(self) -> Iterator[_Draft]:
        yield from self._outside("before", 0)
        n_done = 0
        for k, (part, row) in enumerate(zip(self.parts, self.architectures, strict=True)):
            ranges = [layers_of(source, a) for source, a in zip(part.sources, row, strict=True)]
            n_layers = ranges[0][1] - ranges[0][0]
            for i in range(n_layers):
                # A slice of one layer sits at its end, as in mergekit.
                t = i / (n_layers - 1) if n_layers > 1 else 1.0
                yield from self._layer(k, n_done + i, [start + i for start, _ in ranges], t)
            n_done += n_layers
        yield from self._outside("after", len(self.parts) - 1)

    def _outside(self, where: str, k: int) -> Iterator[_Draft]:
        """Draft the tensors outside the layers, also those that the donor or one source lacks."""
        row = self.architectures[k]
        everyone = [self.model, *row]
        for common in dict.fromkeys(a.common_name(n) for a in everyone for n in getattr(a, where)):
            own = [a.own_name(common) for a in everyone]
            name = next(name for name in own if name)
            names = [found or a.stand_in(common) for found, a in zip(own, everyone, strict=True)]
            spelled = [found or name for found in own]
            yield _Draft(name, k, 0.0, names[1:], spelled[1:], names[0] is not None)

    def _layer(self, k: int, output: int, numbers: list[int], t: float) -> Iterator[_Draft]:
        """Draft the tensors of one output layer; each model names them by its own layer's number."""
        row = self.architectures[k]
        known = [set(a.layers[n]) for a, n in zip(row, numbers, strict=True)]
        # Which layer of a donor that is not among the sources this would be is anyone's guess.
        donors = [there for a, there in zip(row, known, strict=True) if a is self.model]
        for suffix in dict.fromkeys(s for a, n in zip(row, numbers, strict=True) for s in a.layers[n]):
            spelled = [a.layer_name(n, suffix) for a, n in zip(row, numbers, strict=True)]
            names = [s if suffix in there else None for s, there in zip(spelled, known, strict=True)]
            donor_has_it = any(suffix in there for there in donors or [self.donors_suffixes])
            yield _Draft(self.model.layer_name(output, suffix), k, t, names, spelled, donor_has_it)

    # ---- what goes in ----

    def _wired(self, draft: _Draft) -> Wired | None:
        part = self.parts[draft.part]
        method = METHODS[part.method or ""]
        seen: Counter[str] = Counter()
        base, inputs, lacking = None, [], []
        for i, source in enumerate(part.sources):
            name = draft.names[i]
            if name is None:
                lacking.append((source.model, draft.spelled[i]))
                continue
            entry = Wire(source.model, name, draft.spelled[i], seen[source.model], i)
            seen[source.model] += 1
            if source.model == part.base:
                base = entry
            else:
                inputs.append(entry)
        present = [*([base] if base else []), *inputs]
        if lacking and self.leniency.tensors == "intersection":
            self.dropped.append(draft.name)
            return None
        is_union = self.leniency.tensors == "union"
        if lacking and not (self.leniency.allow_crimes or is_union):
            other = present[0].model if present else self.donor
            for model, name in lacking:
                self.differing.setdefault((model, other), []).append(f"{name} is missing in {model}")
            return None
        if lacking and not (draft.donor_has_it or is_union):
            self.dropped.append(draft.name)
            return None
        if not present:
            present = [Wire(self.donor, draft.name, draft.name)]
        self._compare(present)
        self._look_for_given_rows(draft.name, present)
        if lacking and (len(inputs) < method.n_models[0] or (method.base == "required" and not base)):
            # Too few for the method: the base's own, or that of the only model that has it.
            own = base or next((entry for entry in present if entry.model == self.donor), present[0])
            return self._finished(draft, "passthrough", None, [own], None)
        return self._finished(draft, method.name, base, inputs, draft.part)

    def _finished(
        self, draft: _Draft, method: str, base: Wire | None, inputs: list[Wire], part: int | None
    ) -> Wired:
        first = base or inputs[0]
        info, shape = self._info(first), self._shape(first)
        is_table = self._is_table(first)
        if is_table:
            self.rows.setdefault(shape[0], draft.name)
        return Wired(
            draft.name,
            method,
            draft.t,
            base,
            tuple(inputs),
            part,
            shape,
            info.dtype,
            info.is_floating,
            by_token=is_table and self.vocabulary is not None,
        )

    def _is_table(self, entry: Wire) -> bool:
        """Tell whether a tensor has a row for each token of its model."""
        return self.sources.architecture(entry.model).is_vocabulary(entry.name)

    def _info(self, entry: Wire) -> TensorInfo:
        info = self.sources.architecture(entry.model).info(entry.name)
        assert info is not None
        return info

    def _shape(self, entry: Wire) -> tuple[int, ...]:
        """Return what of a tensor is merged: all, the rows of the merged vocabulary, or the leading ones
        that all vocabularies have."""
        shape = self._info(entry).shape
        if self.vocabulary is not None:
            return (self.vocabulary.size, *shape[1:]) if self._is_table(entry) else shape
        is_cut = self.leniency.unsafe_truncate_embeddings and self._is_table(entry)
        if is_cut and self.n_rows is not None and shape[0] > self.n_rows:
            return (self.n_rows, *shape[1:])
        return shape

    # ---- what does not fit ----

    def _look_for_given_rows(self, name: str, present: list[Wire]) -> None:
        """Find rows that the recipe takes from a model whose table is not among those merged."""
        if self.vocabulary is None or not self._is_table(present[0]):
            return
        models = {entry.model for entry in present}
        for row in self.vocabulary.given.values():
            if row.model is not None and row.model not in models:
                self.without_given.append(f"{name} of {row.model!r}")

    def _table_faults(self) -> Iterator[str]:
        """Refuse tables whose rows are not those that config.json speaks of."""
        if self.vocabulary is None:
            return
        for architecture in {id(a): a for row in self.architectures for a in row}.values():
            name = architecture.token_embedding
            if name is None or not architecture.is_vocabulary(name):
                info = architecture.info(name) if name else None
                found = f"{name} has {info.shape[0]} rows" if info else "it has no table of tokens"
                yield (
                    f"model {architecture.checkpoint.reference!r}: config.json has vocab_size "
                    f"{architecture.vocabulary_size}, but {found}; restore the matching files, or leave "
                    f"the tokenizer out of the recipe"
                )

    def _compare(self, present: list[Wire]) -> None:
        expected = self._shape(present[0])
        for entry in present[1:]:
            found = self._shape(entry)
            if found != expected:
                text = f"{entry.name} is {list(found)} against {list(expected)}"
                self.differing.setdefault((entry.model, present[0].model), []).append(text)

    def _form_faults(self) -> Iterator[str]:
        """Refuse files of weights beside whole models, and options that only files have."""
        everyone = {a.checkpoint.reference: a.checkpoint for row in self.architectures for a in row}
        kinds = {reference: c.is_state_dict for reference, c in everyone.items()}
        if len(set(kinds.values())) > 1:
            file = next(reference for reference, is_file in kinds.items() if is_file)
            folder = next(reference for reference, is_file in kinds.items() if not is_file)
            yield (
                f"model {file!r} is a file of weights and {folder!r} a whole model; name files alone, or "
                f"folders alone"
            )
        elif any(kinds.values()) and any(s.layer_range for part in self.parts for s in part.sources):
            yield "slices: files of weights have no layers to choose from; write `models:`"
        elif self.leniency.tensors != "same" and not any(kinds.values()):
            yield (
                f"--tensor-{self.leniency.tensors} is for files of weights; for whole models use "
                f"allow_crimes"
            )

    def _family_faults(self) -> Iterator[str]:
        if self.leniency.allow_crimes:
            return
        own = self.model.checkpoint.config
        others = {a.checkpoint.reference: a.checkpoint.config for row in self.architectures for a in row}
        for reference, config in others.items():
            for key in ("model_type", "architectures"):
                theirs, ours = config.get(key), own.get(key)
                if theirs and ours and theirs != ours:
                    yield (
                        f"model {reference!r} has {key} {theirs} where {self.donor!r} has {ours}; merge "
                        f"models of one architecture, or insist with allow_crimes"
                    )
                    break

    def _range_faults(self) -> Iterator[str]:
        for part, row in zip(self.parts, self.architectures, strict=True):
            ranges = [(s.model, *layers_of(s, a)) for s, a in zip(part.sources, row, strict=True)]
            for (model, start, end), architecture in zip(ranges, row, strict=True):
                if end > architecture.n_layers:
                    yield (
                        f"{part.place}: layers [{start}, {end}) of {model} are asked for; it has "
                        f"{architecture.n_layers} layers, shorten the range"
                    )
            if len({end - start for _, start, end in ranges}) > 1:
                yield (
                    "models have different numbers of layers: "
                    + ", ".join(f"{model} {end - start}" for model, start, end in ranges)
                    + "; merge models of one architecture, or choose layers with slices"
                )

    def _difference_faults(self) -> Iterator[str]:
        for (model, other), texts in self.differing.items():
            lacks = any("is missing in" in text for text in texts)
            hint = ", or keep the donor's tensors alone with allow_crimes" if lacks else ""
            if lacks and self.model.checkpoint.is_state_dict:
                hint = ", or choose --tensor-intersection or --tensor-union"
            if any(self.sources.architecture(model).is_vocabulary(text.split()[0]) for text in texts):
                hint += (
                    ", give the merge one vocabulary with tokenizer_source, or cut vocabularies to their "
                    "common rows with unsafe_truncate_embeddings"
                )
            yield (
                f"model {model!r} does not fit {other!r}: {_shown(texts, '; ')}; "
                f"merge fine-tunes of one base with the same shapes{hint}"
            )

    def _vocabulary_faults(self) -> Iterator[str]:
        """Refuse an embedding and an output head of different vocabularies, from different slices."""
        if self.without_given:
            found = _shown(list(dict.fromkeys(self.without_given)), ", ")
            yield (
                f"tokenizer.tokens takes rows from tables that are not merged ({found}); name models "
                f"that are merged there"
            )
        if len(self.rows) > 1 and not self.differing:
            sizes = ", ".join(f"{name} {n}" for n, name in self.rows.items())
            yield (
                f"the merged model would have vocabularies of different sizes ({sizes}); merge models of "
                f"one vocabulary, give the merge one with tokenizer_source, or cut to the common rows "
                f"with unsafe_truncate_embeddings"
            )

    def _warnings(self) -> Iterator[str]:
        if self.dropped:
            who = "some model" if self.leniency.tensors == "intersection" else repr(self.donor)
            yield f"tensors that {who} lacks are left out: {_shown(self.dropped, ', ')}"
        if self.vocabulary is not None:
            yield from self.vocabulary.warnings
        elif self.leniency.unsafe_truncate_embeddings and self.n_rows is not None:
            used = {a.checkpoint.reference: a for row in self.architectures for a in row}
            for reference, architecture in used.items():
                n_cut = (architecture.vocabulary_size or 0) - self.n_rows
                if n_cut > 0:
                    yield f"the last {n_cut} rows of the vocabulary of {reference!r} are left out"


def _shown(texts: list[str], separator: str) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more
