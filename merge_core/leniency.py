"""What a merge lets pass that is refused otherwise."""

from __future__ import annotations

from typing import Literal, NamedTuple

Tensors = Literal["same", "intersection", "union"]


class Leniency(NamedTuple):
    """What is let pass that is refused otherwise.

    Attributes:
        tensors: of files of weights: "same", all must have the same tensors; "intersection", those
            that all have; "union", those of any, each merged from the models that have it.
        allow_crimes: models of different families, and tensors that only some models have: the
            donor's tensors come out, each merged from the models that have it.
        unsafe_truncate_embeddings: vocabularies of different sizes: their common leading rows.
    """

    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    tensors: Tensors = "same"
