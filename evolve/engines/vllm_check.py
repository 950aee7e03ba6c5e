"""What a vLLM model computes with, read back and compared with checkpoint tensors.

On a GPU a parameter is what the model multiplies with. On a CPU vLLM packs each linear weight into
an opaque copy and drops (linear layers) or keeps (embeddings) the original, so reading parameters
would prove nothing. There the packed weight is recovered by the layer's own multiplication: row k
of the identity gives column k of the weight, bit for bit, since one product is the weight and all
others are zero. Only what such a product cannot show is left out: the sign of a zero, and numbers
too small to be normal, which the CPU's bfloat16 units take for zero. Packed experts, which no
product shows, are compared with what they must be packed to.

Names, fused matrices, shards and padding are sorted out by vLLM's own loaders: checkpoint tensors
are loaded into empty twins of a layer's parameters, and what arrives there is what must be live.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# One-hot rows that are multiplied at once when a packed weight is read back.
_ROWS_AT_ONCE = 256


def live_values(model: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter as the model computes with it; of a packed weight the packed copy.

    Of an embedding table both are yielded, the copy under the name `...weight (packed)`.
    """
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if parameter.numel():
                yield full_name, _comparable(parameter.data)
            if name == "weight" and _is_packed(module):
                packed = f"{full_name} (packed)" if parameter.numel() else full_name
                yield packed, _comparable(_packed_weight(module))


def weight_bytes(model: Any) -> int:
    """Count the bytes of all parameters and of the packed copies, shared ones once."""
    storages: dict[int, int] = {}
    packed: dict[int, int] = {}
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False):
            if parameter.numel():
                storages[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
        if _is_packed(module):
            rows, columns = _shape(module)
            packed[id(module.cpu_linear)] = rows * columns * module.weight.element_size()
    return sum(storages.values()) + sum(packed.values())


def differences(model: Any, model_config: Any, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Compare what the model computes with to checkpoint tensors; the weights stay as they are.

    Args:
        model: a live vLLM model.
        model_config: vLLM's configuration of it.
        stream: checkpoint tensors by name, of the whole model.

    Returns:
        A line for each checkpoint tensor that is not what the model computes with, for each
        parameter that no tensor was for, and for each that cannot be read back here.
    """
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        layerwise,
    )

    check = _Check()
    wanted = {name for name, _ in model.named_parameters()}
    names = {module: name for name, module in model.named_modules()}
    process = layerwise._layerwise_process
    initialize_layerwise_reload(model)
    try:
        # vLLM calls this for each layer whose tensors are all there; ours compares and loads nothing.
        layerwise._layerwise_process = lambda layer, info: check.layer(names[layer], layer, info)
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            info.loaded_weights = _Calls(check)
            _empty_bias(layer)
        loaded = model.load_weights(check.following(stream))
    finally:
        finalize_layerwise_reload(model, model_config)
        layerwise._layerwise_process = process
    check.lines += [
        f"{name}: no tensor is for this parameter of the engine"
        for name in sorted(wanted - (loaded or wanted))
    ]
    check.tied_heads(names)
    return check.lines


class _Calls(list[tuple[str, Any]]):
    """The loader calls that vLLM keeps for a layer, with the checkpoint tensor each came from."""

    def __init__(self, check: _Check) -> None:
        super().__init__()
        self._check = check
        self.sources: list[str] = []

    def append(self, call: tuple[str, Any]) -> None:
        super().append(call)
        self.sources.append(self._check.current)


class _Check:
    """The comparison, layer by layer, as vLLM's loader delivers."""

    def __init__(self) -> None:
        self.current = ""
        self.lines: list[str] = []
        self._done: set[Any] = set()

    def following(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass tensors on, noting which one is being loaded."""
        for self.current, tensor in stream:
            yield self.current, tensor

    def layer(self, layer_name: str, layer: Any, info: Any) -> None:
        """Load a layer's tensors into empty twins of its parameters, and compare with the live ones."""
        from vllm.model_executor.model_loader.reload import layerwise

        layerwise.materialize_layer(layer, info)
        if _has_packed_experts(layer):
            self._experts(layer_name, layer, info)
            return
        calls = info.loaded_weights
        arrived: list[tuple[str, str, Tensor, Tensor]] = []
        for (name, arguments), source in zip(calls, getattr(calls, "sources", ()), strict=False):
            twin = getattr(layer, name)
            twin.data.fill_(float("nan"))
            arguments.arguments["param"] = twin
            layerwise._get_original_loader(twin)(*arguments.args, **arguments.kwargs)
            filled = ~twin.data.isnan()
            arrived.append((source, name, filled, twin.data[filled]))
        self._put_back(layer, info)
        for name in dict.fromkeys(name for _, name, _, _ in arrived):
            live = _live(layer, name)
            for source, other, filled, expected in arrived:
                if other == name:
                    self._compare(source, f"{layer_name}.{name}", live, filled, expected)

    def _experts(self, layer_name: str, layer: Any, info: Any) -> None:
        """Load all experts into twins, pack these as vLLM does, and compare the packed ones.

        The CPU's kernel cannot be made to show its weights, but equal weights are packed equally.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        names = ("w13_weight", "w2_weight")
        for name in names:
            getattr(layer, name).data.fill_(float("nan"))
        for name, arguments in info.loaded_weights:
            twin = arguments.arguments["param"] = getattr(layer, name)
            layerwise._get_original_loader(twin)(*arguments.args, **arguments.kwargs)
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)
        packed = {name: getattr(layer, name).data for name in names}
        self._put_back(layer, info)
        for name, expected in packed.items():
            where, live = f"{layer_name}.{name}", getattr(layer, name).data
            everything = torch.ones_like(live, dtype=torch.bool)
            self._compare(f"the experts of {layer_name}", where, [live], everything, expected.flatten())

    def _put_back(self, layer: Any, info: Any) -> None:
        """Put the live parameters in the place of the twins."""
        from vllm.model_executor.model_loader.reload import layerwise

        layerwise._place_kernel_tensors(layer, info)
        info.reset()
        self._done.add(layer)

    def _compare(
        self, source: str, where: str, live: list[Tensor], filled: Tensor, expected: Tensor
    ) -> None:
        if not live or any(values.shape != filled.shape for values in live):
            self.lines.append(f"{source}: not checked, vLLM keeps {where} in a layout of its own")
            return
        expected = _comparable(expected)
        n_wrong = max(int((_comparable(values[filled]) != expected).sum()) for values in live)
        if n_wrong:
            self.lines.append(f"{source}: {n_wrong} of {expected.numel()} entries differ in {where}")

    def tied_heads(self, names: dict[Any, str]) -> None:
        """Check packed copies that no tensor was for: they must be of the weight beside them."""
        for layer, name in names.items():
            if layer not in self._done and _is_packed(layer) and layer.weight.numel():
                packed, kept = _comparable(_packed_weight(layer)), _comparable(layer.weight.data)
                if n_wrong := int((packed != kept).sum()):
                    self.lines.append(
                        f"{name}.weight: {n_wrong} of {kept.numel()} entries of the packed copy differ "
                        f"from the weights it is tied to"
                    )


def _live(layer: Any, name: str) -> list[Tensor]:
    """Return what a layer computes with under a parameter's name; empty where it cannot be read."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(layer, "quant_method", None)
    if method is not None and not isinstance(
        method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod
    ):
        return []
    parameter = getattr(layer, name)
    live = [parameter.data] if parameter.numel() else []
    if name == "weight" and _is_packed(layer):
        live.append(_packed_weight(layer))
    return live


def _has_packed_experts(layer: Any) -> bool:
    """Tell whether a layer holds experts that are packed for the CPU's kernel."""
    weight = getattr(layer, "w13_weight", None)
    kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
    return weight is not None and weight.device.type == "cpu" and kernel is not None


def _is_packed(layer: Any) -> bool:
    """Tell whether a layer multiplies with a packed copy of its weight."""
    return hasattr(layer, "cpu_linear") and layer.weight.dim() < 3


def _shape(layer: Any) -> tuple[int, int]:
    """Rows and columns of this rank's share of a linear or embedding weight."""
    if layer.weight.dim() == 2:
        rows, columns = layer.weight.shape
        return int(rows), int(columns)
    return (
        int(getattr(layer, "output_size_per_partition", layer.output_size)),
        int(getattr(layer, "input_size_per_partition", layer.input_size)),
    )


def _packed_weight(layer: Any) -> Tensor:
    """Recover a packed weight, [rows, columns], by multiplying it with the identity."""
    rows, columns = _shape(layer)
    weight = torch.empty(rows, columns, dtype=layer.weight.dtype)
    for start in range(0, columns, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, columns)
        one_hot = torch.zeros(stop - start, columns, dtype=weight.dtype)
        one_hot[:, start:stop].fill_diagonal_(1)
        weight[:, start:stop] = layer.cpu_linear(one_hot, layer.weight, None).T
    return weight


def _comparable(values: Tensor) -> Tensor:
    """Drop what a product with the identity cannot show: signs of zeros, numbers below the normal."""
    if not values.is_floating_point():
        return values
    tiny = torch.finfo(values.dtype).tiny
    return torch.where(values.abs() < tiny, torch.zeros_like(values), values)


def _empty_bias(layer: Any) -> None:
    """Put a twin in the place of a bias, which vLLM would otherwise overwrite at once."""
    bias = layer._parameters.get("bias")
    if bias is not None and not bias.is_meta:
        twin = torch.empty_like(bias.data)
        twin.__class__ = bias.__class__
        twin.__dict__ = bias.__dict__.copy()
        twin.requires_grad_(False)
        layer._parameters["bias"] = twin
