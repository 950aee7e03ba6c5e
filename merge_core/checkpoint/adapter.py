"""A LoRA adapter as PEFT writes it: adapter_config.json beside adapter_model.safetensors or .bin.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) changes a weight W to W + s B A; rank-stabilised
LoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732) has another s, DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353) scales each row of the sum to a length of its own.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from merge_core.checkpoint.locate import ADAPTER_FILES, locate
from merge_core.checkpoint.read import ADAPTER_CONFIG, Checkpoint
from merge_core.errors import CheckpointError, shown

# What PEFT's wrapper puts before a module's name, and inside it around the model's own module.
PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|original_module)(?=\.)")
# A module's name, what of it, and the name of the adapter, which some tools leave in.
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<kind>\.weight|\.bias)?"
)
# Settings that change what is computed and are not merged here, with what to do instead.
_OTHER_KIND = "only LoRA, rsLoRA and DoRA are merged; merge it with PEFT and name the result"
_REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only and cannot be merged",
    "arrow_config": "it chooses among adapters for each token and cannot be merged",
    "kasa_config": _OTHER_KIND,
    "layer_replication": "it repeats layers; merge it with PEFT and name the result",
    "monteclora_config": _OTHER_KIND,
    "target_parameters": "fused experts are not adapted; merge it with PEFT and name the result",
    "trainable_token_indices": "single rows are not merged; merge it with PEFT and name the result",
    "use_bdlora": _OTHER_KIND,
    "use_qalora": _OTHER_KIND,
}
# Ways to begin a training that change the base's weights, so that the factors belong to others.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")
_SHOWN = 3


@dataclass(frozen=True)
class Factors:
    """The tensors of one adapted module, by their names in the adapter.

    Attributes:
        a, b: shapes (r, n) and (m, r); B A has the shape of a linear layer's weight, and for an
            embedding that of its transpose.
        rank: r.
        scaling: what B A is multiplied by.
        magnitude: DoRA's lengths, shape (m,); None for plain LoRA.
        bias: what is added, scaled likewise, to the module's bias, shape (m,); None if nothing.
        of_embedding: whether the module is an embedding, whose weight is always transposed.
    """

    a: str
    b: str
    rank: int
    scaling: float
    magnitude: str | None = None
    bias: str | None = None
    of_embedding: bool = False


@dataclass(frozen=True)
class _Settings:
    """What adapter_config.json says, as far as a merge depends on it."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    modules_to_save: Collection[str]
    target_modules: str | Collection[str]
    exclude_modules: str | Collection[str]
    layers_to_transform: Collection[int]
    layers_pattern: Collection[str]
    keeps_tied: bool

    def scaling(self, module: str) -> float:
        """Return the s of W + s B A."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank) if rank else 0.0

    def rank_of(self, module: str) -> int:
        """Return how many rows a module's A should have."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def targets(self, module: str) -> bool:
        """Tell whether the module of that name has factors, as PEFT decides it."""
        if _is_named(module, self.exclude_modules) or self.saves(module):
            return False
        if not _is_named(module, self.target_modules):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if found:
                return int(found[1]) in self.layers_to_transform
        return False

    def saves(self, module: str) -> bool:
        """Tell whether a module was trained as a whole."""
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)


class Adapter(Checkpoint):
    """One adapter's folder, opened for reading.

    Attributes:
        settings: of adapter_config.json.
        factors: by module, as the adapted model calls it.
        whole: tensors that replace the model's: its name of them to the name here.
        in_wrapper: of these, the ones that stand beside the model's own and not in their place.

    Raises:
        CheckpointError: files are missing or damaged, or it is no adapter that can be merged.
    """

    _weights: ClassVar = ADAPTER_FILES
    _repair: ClassVar = "name the folder of an adapter that PEFT has saved"

    def __init__(self, reference: str) -> None:
        super().__init__(reference)
        self._where = f"adapter {reference!r}"
        self.settings = self._read_settings()
        self.factors: dict[str, Factors] = {}
        self.whole: dict[str, str] = {}
        parts: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            plain = name.removeprefix(PREFIX)
            found = _FACTOR.fullmatch(plain)
            if found:
                part = found["part"] + (".bias" if found["kind"] == ".bias" else "")
                parts.setdefault(_WRAPPERS.sub("", found["module"]), {})[part] = name
            elif "lora_" in plain:
                raise CheckpointError(
                    f"{self._where} has a tensor {name}, which no LoRA has; save it again with PEFT"
                )
            else:
                self.whole[_WRAPPERS.sub("", plain)] = name
        faults = [fault for module in parts for fault in self._take(module, parts[module])]
        if faults:
            raise CheckpointError(first_faults(self._where, faults))
        if not self.tensors:
            raise CheckpointError(f"{self._where} has no tensors; save it again with PEFT")

    def fingerprint(self) -> str:
        """Hash of files and settings."""
        settings = (self.folder / ADAPTER_CONFIG).read_bytes()
        return hashlib.sha256(super().fingerprint().encode() + settings).hexdigest()[:16]

    def _file(self) -> None:
        return None

    def _located(self) -> Path:
        return locate(self.reference, is_adapter=True)

    def _take(self, module: str, parts: Mapping[str, str]) -> Iterator[str]:
        """Take a module's tensors, or say what is wrong with them."""
        of_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        pair = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A", "lora_B")
        for part in pair:
            if part not in parts:
                yield f"{self._where} has no {part} of {module}; download it again or save it whole"
                return
        a, b = (self.tensors[parts[part]] for part in pair)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            yield (
                f"{self._where}: {pair[0]} of {module} is {list(a.shape)} and {pair[1]} {list(b.shape)}; "
                f"only linear layers and embeddings, with [r, n] and [m, r], can be merged"
            )
            return
        rank = self.settings.rank_of(module)
        if a.shape[0] != rank:
            yield (
                f"{self._where}: {module} has rank {a.shape[0]} where {ADAPTER_CONFIG} says {rank}; "
                f"restore the matching files"
            )
            return
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is None) == self.settings.use_dora or (
            magnitude is not None and math.prod(self.tensors[magnitude].shape) != b.shape[0]
        ):
            yield (
                f"{self._where}: {module} and use_dora do not agree about lora_magnitude_vector; "
                f"restore the matching files"
            )
            return
        self.factors[module] = Factors(
            a=parts[pair[0]],
            b=parts[pair[1]],
            rank=rank,
            scaling=self.settings.scaling(module),
            magnitude=magnitude,
            bias=parts.get("lora_B.bias"),
            of_embedding=of_embedding,
        )

    def _read_settings(self) -> _Settings:
        config = self._json(ADAPTER_CONFIG, self._repair)
        where = f"{self.folder / ADAPTER_CONFIG}"
        faults = []
        if str(config.get("peft_type", "LORA")).upper() != "LORA":
            faults.append(
                f"{where}: peft_type is {shown(config['peft_type'])}; only LORA can be merged, merge "
                f"it with PEFT and name the result"
            )
        faults += [
            f"{where}: {key} is {shown(config[key])}; {why}"
            for key, why in _REFUSED.items()
            if config.get(key)
        ]
        beginning = config.get("init_lora_weights")
        if isinstance(beginning, str) and beginning.lower().startswith(_OTHER_BASE):
            faults.append(
                f"{where}: init_lora_weights is {beginning!r}, which changes the base's weights; convert "
                f"it to plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
            )
        if faults:
            raise CheckpointError(faults)
        return _parsed(config, where)


def _parsed(config: Mapping[str, Any], where: str) -> _Settings:
    """Check the types of what a merge reads.

    Raises:
        CheckpointError: some are wrong.
    """

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it must be a number, correct it")
        return value

    def names(key: str) -> Collection[str]:
        value = config.get(key) or ()
        value = (value,) if isinstance(value, str | int) else value
        if not isinstance(value, list | tuple):
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it must be a list, correct it")
        return tuple(value)

    def pattern(key: str) -> dict[str, Any]:
        value = config.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it must be a mapping, correct it")
        return {name: number(f"{key}.{name}", of) for name, of in value.items()}

    def text_or_names(key: str) -> str | Collection[str]:
        value = config.get(key)
        return value if isinstance(value, str) else names(key)

    return _Settings(
        rank=int(number("r", config.get("r", 8))),
        alpha=number("lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern=pattern("rank_pattern"),
        alpha_pattern=pattern("alpha_pattern"),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        modules_to_save=names("modules_to_save"),
        target_modules=text_or_names("target_modules"),
        exclude_modules=text_or_names("exclude_modules"),
        layers_to_transform=[int(number("layers_to_transform", n)) for n in names("layers_to_transform")],
        layers_pattern=names("layers_pattern"),
        keeps_tied=bool(config.get("ensure_weight_tying")),
    )


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Look a module up as PEFT does: the first pattern that fits the end of its name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _is_named(module: str, names: str | Collection[str]) -> bool:
    """Tell whether a regular expression fits a module's whole name, or a name of a list its end."""
    if isinstance(names, str):
        return names != "all-linear" and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def first_faults(where: str, faults: Sequence[str]) -> list[str]:
    """Keep the first faults of many of one kind, and count the others."""
    more = len(faults) - _SHOWN
    return [*faults[:_SHOWN], *([f"{where}: and {more} more"] if more > 0 else [])]
