"""How checkpoints spell the experts of a mixture: a tensor for each, or one for all.

Transformers 5 holds all experts of a layer in two tensors, `experts.gate_up_proj` (experts, 2 x
intermediate, hidden) and `experts.down_proj` (experts, hidden, intermediate). Most checkpoints, and
vLLM's loaders, have three matrices for each expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Spelling:
    """Names of the matrices of one expert.

    Attributes:
        block: what a layer calls its MLP: `mlp`.
        gate, up, down: the matrices' names.
    """

    block: str
    gate: str
    up: str
    down: str

    def names(self, layer: str, expert: int) -> tuple[str, str, str]:
        """Spell gate, up and down of an expert; `layer` ends with a dot."""
        return self._matrices(f"{layer}{self.block}.experts.{expert}")

    def shared_names(self, layer: str) -> tuple[str, str, str]:
        """Spell gate, up and down of the shared expert."""
        return self._matrices(f"{layer}{self.block}.shared_expert")

    def _matrices(self, at: str) -> tuple[str, str, str]:
        return f"{at}.{self.gate}.weight", f"{at}.{self.up}.weight", f"{at}.{self.down}.weight"

    def router(self, layer: str) -> str:
        """Spell a layer's router."""
        return f"{layer}{self.block}.gate.weight"

    def shared_router(self, layer: str) -> str:
        """Spell what says how much a token gets of the shared expert."""
        return f"{layer}{self.block}.shared_expert_gate.weight"


MIXTRAL = Spelling("block_sparse_moe", "w1", "w3", "w2")
QWEN = Spelling("mlp", "gate_proj", "up_proj", "down_proj")


_ROUTER = f".{QWEN.block}.gate.weight"


def other_spellings(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a parameter's views under the names that checkpoints may give them.

    Args:
        name: in a Transformers model; most have no other spelling.
    """
    found = {
        n: part for spelling in (QWEN, MIXTRAL) for n, part in single_experts(name, tensor, spelling)
    }
    if name.endswith(_ROUTER):
        found[MIXTRAL.router(name.removesuffix(_ROUTER) + ".")] = tensor
    return found


def respelled(stream: Iterable[tuple[str, Tensor]], spelling: Spelling) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on, those of a Transformers model's experts and routers as a spelling has them."""
    for name, tensor in stream:
        parts = list(single_experts(name, tensor, spelling))
        if name.endswith(_ROUTER):
            parts = [(spelling.router(name.removesuffix(_ROUTER) + "."), tensor)]
        yield from parts or [(name, tensor)]


def single_experts(name: str, tensor: Tensor, spelling: Spelling = QWEN) -> Iterator[tuple[str, Tensor]]:
    """Yield views of a fused tensor, one for each matrix.

    Args:
        name: in a Transformers model, such as `model.layers.0.mlp.experts.down_proj`; for any other
            name nothing is yielded.
        tensor: shape (experts, rows, columns).
        spelling: of the names that are yielded.
    """
    is_down = name.endswith(f".{QWEN.block}.experts.down_proj")
    if tensor.dim() != 3 or not (is_down or name.endswith(f".{QWEN.block}.experts.gate_up_proj")):
        return
    layer = name.rsplit(".", 3)[0] + "."
    half = tensor.shape[1] // 2
    for expert in range(tensor.shape[0]):
        gate, up, down = spelling.names(layer, expert)
        if is_down:
            yield down, tensor[expert]
        else:
            yield gate, tensor[expert, :half]
            yield up, tensor[expert, half:]
