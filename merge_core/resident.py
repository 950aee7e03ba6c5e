"""A live Transformers model whose weights are replaced in place, without building it again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from merge_core.errors import CheckpointError, reason
from merge_core.experts import other_spellings, single_experts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def build_model(
    config: dict[str, Any], folder: Path, device: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that config.json describes, in its dtype, with weights yet to be filled in.

    Args:
        config: content of config.json.
        folder: where generation_config.json and remote code, if any, are.
        device: torch device.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        CheckpointError: Transformers knows no causal language model of this kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    try:
        if "auto_map" in config:
            parsed = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            parsed.update(config)
        else:
            parsed = AutoConfig.for_model(**config)
        with no_init_weights(), torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                parsed, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a wrong value can end in any exception, at any depth
        if "memory" in str(error).lower():  # the caller knows of which device
            raise
        raise CheckpointError(
            f"{folder / 'config.json'}: Transformers cannot build this model ({reason(error)}); use a "
            f"causal language model that the installed version knows"
        ) from error
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"{folder / 'generation_config.json'} cannot be read ({reason(error)}); correct or "
                f"remove it"
            ) from error
    # Where lm-eval and users look for the tokenizer.
    model.config._name_or_path = model.name_or_path = str(folder)
    return model.eval()


def places(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by the names that checkpoints give them.

    A checkpoint may have been saved from the model with its head or without, and may have a tensor
    for each expert where the model has one for all: all spellings are there.
    """
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    prefix = f"{model.base_model_prefix}."
    found = {name: tensor.detach() for name, tensor in named.items()}
    for name, tensor in list(found.items()):
        found |= other_spellings(name, tensor)
    for name, tensor in list(found.items()):
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        found.setdefault(other, tensor)
    return found


@torch.no_grad()
def fill(model: PreTrainedModel, stream: Iterable[tuple[str, Tensor]]) -> None:
    """Copy a stream of checkpoint tensors into the model's parameters, in place.

    What has been merged into its place already is not copied.

    Raises:
        CheckpointError: tensors without a place, of another shape, or places left unfilled.
    """
    known = places(model)
    filled: set[tuple[int, int]] = set()
    faults = []
    for name, tensor in _copied_by_one_thread(stream):
        place = known.get(name)
        if place is None:
            faults.append(f"tensor {name} has no place in the model built from config.json")
        elif place.shape != tensor.shape:
            faults.append(
                f"tensor {name} is {list(tensor.shape)}; the model built from config.json has "
                f"{list(place.shape)}"
            )
        else:
            if tensor.data_ptr() != place.data_ptr():
                place.copy_(tensor)
            filled.add(_extent(place))
    faults += [
        f"{name} of the model built from config.json is in no checkpoint tensor"
        for name, parameter in model.named_parameters()
        if not _is_filled(name, parameter, filled)
    ]
    if faults:
        shown = faults[:5] + ([f"... and {len(faults) - 5} more"] if len(faults) > 5 else [])
        raise CheckpointError(
            "the checkpoint does not fit its config.json: "
            + "; ".join(shown)
            + "; use a model whose files belong together"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _is_filled(name: str, parameter: Tensor, filled: set[tuple[int, int]]) -> bool:
    """Tell whether a parameter got its values, whole or expert by expert."""
    if _extent(parameter) in filled:
        return True
    parts = list(single_experts(name, parameter))
    return bool(parts) and all(_extent(part) in filled for _, part in parts)


def _copied_by_one_thread(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Use one thread between the tensors: the others are merging the next ones meanwhile."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from stream
    finally:
        torch.set_num_threads(n_threads)
