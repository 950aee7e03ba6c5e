"""The router of a mixture: for each layer and expert one row, whose product with a token's hidden
state says how much that expert is wanted.

In the hidden modes a row is the base's own hidden state behind the expert's prompts, so that tokens
which look like the prompts find the expert. The prompts are run in bfloat16 and on the CPU, as
mergekit does by default, on one thread: the rows are part of the merged model, and must not depend
on the machine that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from merge_core.errors import CheckpointError
from merge_core.moe.recipe import RANDOM_GATES, Expert, MoeRecipe
from merge_core.randomness import MaskKey, normals, uniforms
from merge_core.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from merge_core.sources import Sources

Prompts = tuple[tuple[str, ...], tuple[str, ...]]
# vLLM replaces this function by one that does nothing when it starts on a CPU.
_set_num_threads = torch.set_num_threads
# Norms below this are taken for it, as in mergekit.
_LEAST_NORM = 1e-8


class Router:
    """Rows of some experts, computed when the first is wanted.

    Args:
        experts: in their order.
        recipe: gives gate_mode, random_seed, and the base that runs the prompts.
        sources: keeps what prompts gave, for later candidates of a search.
    """

    def __init__(self, experts: Sequence[Expert], recipe: MoeRecipe, sources: Sources) -> None:
        self._experts, self._recipe, self._sources = experts, recipe, sources
        self._mode = recipe.gate_mode
        self._lock = Lock()

    def prepare(self) -> None:
        """Run the prompts that have not been run before."""
        if self._mode in RANDOM_GATES:
            return
        with self._lock:
            known = self._known()
            wanted = [expert.prompts for expert in self._experts if expert.prompts not in known]
            if wanted:
                known |= prompt_rows(self._recipe, wanted, self._sources)

    def rows(self, layer: int) -> Tensor:
        """Return a layer's rows, shape (experts, hidden), on the CPU."""
        if self._mode in RANDOM_GATES:
            return torch.stack(self._random(layer))
        self.prepare()
        known = self._known()
        return torch.stack([known[expert.prompts][layer] for expert in self._experts])

    def _known(self) -> dict[Prompts, Tensor]:
        key = self._mode, _base_alone(self._recipe, self._sources).to_yaml()
        found: dict[Prompts, Tensor] = self._sources.prompted.get(key, dict)
        return found

    def _random(self, layer: int) -> list[Tensor]:
        """Draw rows by hash: of one expert the same whatever others there are."""
        architecture = self._sources.architecture(str(self._recipe.base_model))
        width = int(architecture.checkpoint.config["hidden_size"])
        names = [expert.source_model for expert in self._experts]
        rows = []
        for i, name in enumerate(names):
            key = MaskKey(self._recipe.random_seed, name, names[:i].count(name), f"router.{layer}")
            if self._mode == "random":
                rows.append(normals(key, 0, width).float())
            else:
                rows.append(((2 * uniforms(key, 0, width) - 1) / math.sqrt(width)).float())
        return rows


def _base_alone(recipe: MoeRecipe, sources: Sources) -> Recipe:
    """Return the recipe of the base as it is run, in bfloat16; it may be an intermediate result."""
    base = str(recipe.base_model)
    alone = Recipe.parse(
        {"merge_method": "passthrough", "models": [{"model": base}], "dtype": "bfloat16"}
    ).model_copy(update={"intermediate": sources.results})
    # No more than it is made of: the prompts are not run anew where another expert has changed.
    return alone.model_copy(update={"intermediate": alone.results()})


def prompt_rows(recipe: MoeRecipe, prompts: Iterable[Prompts], sources: Sources) -> dict[Prompts, Tensor]:
    """Compute router rows from prompts.

    `hidden` and `hidden_last` take the last token's hidden states where they enter each layer,
    averaged over the prompts; `hidden_avg` averages over all tokens of a batch of prompts, padding
    on the left included, as mergekit does. Those of the negative prompts are subtracted, and the
    difference has norm 1 in each layer. `cheap_embed` runs no layer: the prompts' input embeddings
    are summed and normalised, once more after subtraction, and are the same for all layers.

    Args:
        recipe: gives the base, and the mode: hidden, hidden_last, hidden_avg or cheap_embed.
        prompts: for each expert its positive and negative ones.
        sources: gives the base.

    Returns:
        For each pair of prompts a tensor (layers, hidden): bfloat16, of `cheap_embed` float32.

    Raises:
        CheckpointError: the base has no tokenizer, or cannot be run.
    """
    run = (_Embeddings if recipe.gate_mode == "cheap_embed" else _HiddenStates)(recipe, sources)
    n_threads = torch.get_num_threads()
    _set_num_threads(1)
    try:
        with torch.no_grad():
            return {pair: run.row(*pair) for pair in dict.fromkeys(prompts)}
    finally:
        _set_num_threads(n_threads)


class _Tokenizer:
    """Prompts to tokens as mergekit does: BOS by hand, padded on the left with EOS."""

    def __init__(self, base: str, sources: Sources) -> None:
        from transformers import AutoTokenizer

        folder = sources.architecture(base).checkpoint.tokenizer_folder
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"model {base!r} has no tokenizer in {folder} that can be loaded "
                f"({str(error).splitlines()[0]:.200}); the prompts need one, add its files"
            ) from error
        self._tokenizer.padding_side = "left"
        padding = self._tokenizer.eos_token or self._tokenizer.bos_token or self._tokenizer.pad_token
        self._tokenizer.pad_token = padding

    def __call__(self, prompts: Sequence[str]) -> Any:
        texts = [f"{self._tokenizer.bos_token or ''}{prompt}" for prompt in prompts]
        return self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


class _HiddenStates:
    def __init__(self, recipe: MoeRecipe, sources: Sources) -> None:
        from merge_core.merge import load_merged

        self._tokens = _Tokenizer(str(recipe.base_model), sources)
        # Over sources of its own, so that its casts are not kept.
        self._model = load_merged(_base_alone(recipe, sources))
        self._averages = recipe.gate_mode == "hidden_avg"

    def row(self, positive: Sequence[str], negative: Sequence[str]) -> Tensor:
        row = self._states(positive)
        if negative:
            row = row - self._states(negative)
        return _normalised(row)

    def _states(self, prompts: Sequence[str]) -> Tensor:
        found = self._model(**self._tokens(prompts), output_hidden_states=True, return_dict=True)
        # (layers, prompts, tokens, hidden); the last layer's output enters none.
        states = torch.stack(found.hidden_states[:-1])
        if self._averages:
            # Sums are rounded to bfloat16 before they are divided; `mean` would round once.
            return (states.sum(dim=2) / states.shape[2]).sum(dim=1) / states.shape[1]
        last: Tensor = states[:, :, -1].mean(dim=1)
        return last


class _Embeddings:
    def __init__(self, recipe: MoeRecipe, sources: Sources) -> None:
        self._tokens = _Tokenizer(str(recipe.base_model), sources)
        architecture = sources.architecture(str(recipe.base_model))
        assert architecture.token_embedding is not None
        self._table = architecture.checkpoint.read(architecture.token_embedding)
        self._n_layers = architecture.n_layers

    def row(self, positive: Sequence[str], negative: Sequence[str]) -> Tensor:
        row = _normalised(self._sum(positive))
        if negative:
            row = _normalised(row - _normalised(self._sum(negative)))
        return row.expand(self._n_layers, -1)

    def _sum(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokens(prompts)
        present = tokens["attention_mask"].unsqueeze(-1)
        total: Tensor = (self._table[tokens["input_ids"]].float() * present).sum(dim=1).sum(dim=0)
        return total


def _normalised(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp(min=_LEAST_NORM)
