"""From a model and its base to a LoRA adapter: each weight's change, cut to its largest directions.

The best approximation of rank r to a change D = U S V^T keeps the r largest singular values
(Eckart and Young 1936). B is U S^1/2 and A is S^1/2 V^T, so that with alpha = r nothing is scaled.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from merge_core.checkpoint.adapter import PREFIX
from merge_core.checkpoint.locate import ADAPTER_FILES
from merge_core.checkpoint.read import ADAPTER_CONFIG
from merge_core.checkpoint.write import complete_folder
from merge_core.errors import CheckpointError
from merge_core.merge import merged_tensors
from merge_core.plan import donor, merged_config, model_alone
from merge_core.recipe import Recipe
from merge_core.resident import build_model
from merge_core.sources import Sources

if TYPE_CHECKING:
    from torch.nn import Module

# Matrices up to this short side are decomposed exactly, which takes a minute for the longest.
_EXACT = 2048
# Further directions that are followed, and how often, where only the largest are found: Halko,
# Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061, section 4.
_OVERSAMPLED, _ITERATIONS = 32, 8


@dataclass(frozen=True)
class ExtractOptions:
    """What of the change is kept, and how.

    Attributes:
        max_rank: largest rank of a module's factors.
        sv_epsilon: singular values up to this are dropped, too.
        distribute_scale: singular values go half to A and half to B, else to A.
        embed_lora: decompose embeddings; else they are saved whole.
        save_modules: names, or their ends, of modules to save whole.
        include, exclude: regular expressions for names of modules; without `include` all are meant.
        skip_undecomposable: leave out what has no factors (norms), where it is saved whole otherwise.
    """

    max_rank: int = 128
    sv_epsilon: float = 0.0
    distribute_scale: bool = True
    embed_lora: bool = False
    save_modules: Collection[str] = ()
    include: Collection[str] = ()
    exclude: Collection[str] = ()
    skip_undecomposable: bool = False

    def takes(self, module: str) -> bool:
        """Tell whether a module is extracted at all."""
        if any(re.search(pattern, module) for pattern in self.exclude):
            return False
        return not self.include or any(re.search(pattern, module) for pattern in self.include)


@dataclass
class Extracted:
    """An adapter in memory.

    Attributes:
        tensors: by PEFT's names; factors float32, the rest as the model has it.
        ranks: of the factors, by module.
        whole: modules that are saved whole.
        in_place: of these, embeddings that are the output head too, and are to stay it: PEFT loads
            them into the model itself and not beside it.
        has_biases: whether all biases are among the tensors.
        transposed: whether weights are stored as (in, out), as GPT-2's are.
        left_out: tensors that differ and are not extracted.
        error: of all weights that have factors, ||D - B A|| / ||D||, Frobenius norms.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    in_place: list[str] = field(default_factory=list)
    has_biases: bool = False
    transposed: bool = False
    left_out: list[str] = field(default_factory=list)
    error: float = 0.0


def extract(
    recipe: Recipe,
    base: Recipe,
    options: ExtractOptions,
    sources: Sources | None = None,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Extracted:
    """Extract what a recipe's model has that the base has not.

    Args:
        recipe: of the model; `model_alone` for one as it is.
        base: of the base.
        on_tensor: called with name and bytes of each tensor that is done.

    Raises:
        CheckpointError: the two differ in more than their numbers.
    """
    sources = sources or Sources()
    modules = _Modules(base, sources)
    is_tied = sources.architecture(donor(base)).ties_embeddings
    found = Extracted()
    lost = total = 0.0
    biases: dict[str, Tensor] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for name, tensor, own in _pairs(recipe, base, sources):
        module, part = modules.of(name)
        kind = modules.kind(module)
        is_changed = not torch.equal(tensor, own)
        is_taken = options.takes(module)
        if is_changed and (not is_taken or (kind == "other" and options.skip_undecomposable)):
            found.left_out.append(name)
        elif is_taken and (kind == "other" or _saved(module, kind, options)):
            # Of a module that is saved whole PEFT wants every tensor.
            whole.setdefault(module, {})[part] = tensor
            if is_changed and kind == "embedding" and is_tied:
                found.in_place.append(module)
            elif is_changed and module not in found.whole:
                found.whole.append(module)
        elif part == "bias":
            biases[module] = tensor
            found.has_biases |= is_changed
        elif is_changed:
            change = tensor.to(torch.float32) - own.to(torch.float32)
            found.transposed |= kind == "transposed"
            lost += _factorise(change, module, kind, options, found)
            total += float(change.double().square().sum())
        if on_tensor:
            on_tensor(name, tensor.nbytes)
    for module in (*found.whole, *found.in_place):
        for part, tensor in whole[module].items():
            found.tensors[f"{PREFIX}{module}.{part}"] = tensor
    for module, tensor in biases.items() if found.has_biases else ():
        inside = ".base_layer" if module in found.ranks else ""
        found.tensors[f"{PREFIX}{module}{inside}.bias"] = tensor
    found.error = (max(0.0, lost) / total) ** 0.5 if total else 0.0
    if not found.tensors:
        raise CheckpointError(
            f"{_named(recipe)} has no change against {donor(base)!r} to extract; name a "
            f"fine-tune, or other modules"
        )
    return found


def save_adapter(found: Extracted, folder: Path, base: str, overwrite: bool = False) -> None:
    """Write an adapter's folder, which PEFT loads; it appears only when complete.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.torch import save_file

    with complete_folder(folder, overwrite) as part:
        tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
        save_file(tensors, part / ADAPTER_FILES[0], metadata={"format": "pt"})
        text = json.dumps(_config(found, base), indent=2)
        (part / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
        (part / "README.md").write_text(_card(found, base), encoding="utf-8")


def low_rank(change: Tensor, max_rank: int, sv_epsilon: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of a matrix and their directions.

    Args:
        change: shape (m, n), float32.

    Returns:
        U (m, r), S (r,) and V (n, r), float32; r may be 0.
    """
    rank = min(max_rank, *change.shape)
    if min(change.shape) <= _EXACT or rank + _OVERSAMPLED >= min(change.shape) // 2:
        u, s, v = _exact(change.double(), rank)
    else:
        # The directions that it starts from are random, and no part of the result depends on them.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(change, rank + _OVERSAMPLED, niter=_ITERATIONS)
    n = int((s[:rank] > sv_epsilon).sum())
    return u[:, :n].float(), s[:n].float(), v[:, :n].float()


def _exact(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose by the eigenvectors of the smaller of D D^T and D^T D, in float64.

    Several times faster than a singular value decomposition; what float64 loses by squaring lies
    below float32's precision.
    """
    if change.shape[0] > change.shape[1]:
        v, s, u = _exact(change.T, rank)
        return u, s, v
    values, vectors = torch.linalg.eigh(change @ change.T)
    u = vectors.flip(1)[:, :rank]
    s = values.flip(0)[:rank].clamp(min=0).sqrt()
    return u, s, (change.T @ u) / s.clamp(min=torch.finfo(s.dtype).tiny)


def _factorise(
    change: Tensor, module: str, kind: str, options: ExtractOptions, found: Extracted
) -> float:
    """Add a module's factors; return the sum of squares of what they leave."""
    is_transposed = kind in ("transposed", "embedding")
    u, s, v = low_rank(change.T if is_transposed else change, options.max_rank, options.sv_epsilon)
    lost = float(change.double().square().sum() - s.double().square().sum())
    if not s.numel():
        return lost
    of_a, of_b = (s.sqrt(), s.sqrt()) if options.distribute_scale else (s, torch.ones_like(s))
    a, b = of_a[:, None] * v.T, u * of_b
    names = ("lora_embedding_A", "lora_embedding_B")
    if kind != "embedding":
        names = ("lora_A.weight", "lora_B.weight")
    for name, factor in zip(names, (a, b), strict=True):
        found.tensors[f"{PREFIX}{module}.{name}"] = factor.contiguous()
    found.ranks[module] = s.numel()
    return lost


def _saved(module: str, kind: str, options: ExtractOptions) -> bool:
    """Tell whether a module that could have factors is saved whole."""
    if any(module == name or module.endswith(f".{name}") for name in options.save_modules):
        return True
    return kind in ("embedding", "head") and not options.embed_lora


def _named(recipe: Recipe) -> str:
    """Name what is extracted from: a model, or a recipe's result."""
    model = donor(recipe)
    return f"model {model!r}" if recipe == model_alone(model) else "the recipe's result"


def _pairs(recipe: Recipe, base: Recipe, sources: Sources) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Walk over the tensors of both models together: name, the model's, the base's.

    Raises:
        CheckpointError: names or shapes differ.
    """
    theirs = merged_tensors(base, sources)
    known = dict(_shapes(base, sources))
    wanted = dict(_shapes(recipe, sources))
    where = f"{_named(recipe)} and its base {donor(base)!r}"
    lacking = [name for name in (*known, *wanted) if name not in known or name not in wanted]
    if lacking:
        raise CheckpointError(
            f"{where} do not have the same tensors ({lacking[0]}); name the base that it was made from"
        )
    for name, shape in wanted.items():
        if shape != known[name]:
            raise CheckpointError(
                f"{where} differ in {name}: {list(shape)} against {list(known[name])}; an adapter "
                f"keeps shapes, name models of one vocabulary and one architecture"
            )
    waiting: dict[str, Tensor] = {}
    for name, tensor in merged_tensors(recipe, sources):
        while name not in waiting:
            other, own = next(theirs)
            waiting[other] = own
        yield name, tensor, waiting.pop(name)


def _shapes(recipe: Recipe, sources: Sources) -> Iterable[tuple[str, tuple[int, ...]]]:
    from merge_core.plan import plan_merge

    return ((planned.name, planned.shape) for planned in plan_merge(recipe, sources))


class _Modules:
    """The base's modules as Transformers builds them, without memory for their weights."""

    def __init__(self, base: Recipe, sources: Sources) -> None:
        from transformers.pytorch_utils import Conv1D

        folder = sources.architecture(donor(base)).checkpoint.folder
        model = build_model(merged_config(base, sources), folder, "meta")
        self._modules: dict[str, Module] = dict(model.named_modules())
        self._prefix = f"{model.base_model_prefix}."
        self._head: Any = model.get_output_embeddings()
        self._kinds: Mapping[type[Module], str] = {
            torch.nn.Embedding: "embedding",
            torch.nn.Linear: "linear",
            Conv1D: "transposed",
        }

    def of(self, tensor: str) -> tuple[str, str]:
        """Return a tensor's module, as the live model calls it, and its name there."""
        module, _, part = tensor.rpartition(".")
        for name in (module, self._prefix + module, module.removeprefix(self._prefix)):
            if name in self._modules:
                return name, part
        raise CheckpointError(
            f"tensor {tensor} has no module in the model built from config.json; extract from a model "
            f"whose files and installed Transformers agree"
        )

    def kind(self, module: str) -> str:
        """Tell how a module's weight is decomposed: linear, transposed, embedding, head, other."""
        live = self._modules[module]
        if live is self._head:
            return "head"
        return next((kind for of, kind in self._kinds.items() if isinstance(live, of)), "other")


def _config(found: Extracted, base: str) -> dict[str, Any]:
    """Return adapter_config.json: alpha is the rank everywhere, so that nothing is scaled."""
    common = Counter(found.ranks.values()).most_common(1)
    rank = common[0][0] if common else 1
    others = {module: n for module, n in found.ranks.items() if n != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(found.ranks),
        "modules_to_save": found.whole or None,
        "bias": "all" if found.has_biases else "none",
        "fan_in_fan_out": found.transposed,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _card(found: Extracted, base: str) -> str:
    ranks = sorted(set(found.ranks.values()))
    shown = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else "".join(map(str, ranks)) or "none"
    whole = ", ".join(f"`{name}`" for name in (*found.whole, *found.in_place)) or "none"
    hub = [f"base_model: {base}"] if not Path(base).expanduser().exists() else []
    head = "\n".join(["---", *hub, "library_name: peft", "tags: [lora, merge]", "---"])
    return (
        f"{head}\n\nA LoRA adapter for `{base}`, extracted from a model by truncated singular value "
        f"decomposition.\n\n- rank: {shown}, of {len(found.ranks)} modules\n- saved whole: {whole}\n"
        f"- relative error of the factored changes (Frobenius): {found.error:.4f}\n"
    )
