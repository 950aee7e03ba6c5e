"""Lazy reading of a safetensors checkpoint: names, shapes and dtypes first, bytes when asked.

Files stay memory-mapped: a tensor that is read is a view of the page cache, shared by every
process that reads the same file, and costs no private memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.checkpoint.locate import locate
from merge_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
# safetensors' own limit for a header.
MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}

_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: its file, torch dtype name and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Whether a merge computes with it; integer and boolean buffers are only copied."""
        return self.dtype in _DTYPES.values()


class Checkpoint:
    """One model's folder, opened for reading.

    Attributes:
        reference: the model as written in the recipe.
        folder: where its files are.
        tensors: name to TensorInfo, of every tensor in every shard.

    Raises:
        CheckpointError: files are missing, damaged, or in another format.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self.folder = locate(reference)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._files():
            self.tensors.update(_read_header(self.reference, self.folder / file))
        self._handles: dict[str, Any] = {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"model {self.reference!r} has no config.json in {self.folder}; name the folder of "
                f"a Transformers model"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); restore the file") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a JSON object; restore the file")
        return config

    def _files(self) -> list[str]:
        index = self.folder / INDEX
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is not a valid index ({error!r}); restore it") from None
            for file in files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise CheckpointError(
                        f"{index} names {file!r}; shards must lie in the model's own folder"
                    )
                if not (self.folder / file).is_file():
                    raise CheckpointError(
                        f"model {self.reference!r}: shard {file} is missing in {self.folder}; "
                        f"download it again"
                    )
            return files
        if list(self.folder.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"model {self.reference!r} is stored as .bin (pickle), which is not read; convert it "
                f"to safetensors with save_pretrained"
            )
        raise CheckpointError(
            f"model {self.reference!r} has no model.safetensors or {INDEX} in {self.folder}; name "
            f"a model saved as safetensors (.bin is not read; convert it with save_pretrained)"
        )

    def read(self, name: str) -> Tensor:
        """Return a tensor as a read-only view of its file, on the CPU; never write into it."""
        from safetensors import safe_open

        file = self.tensors[name].file
        if file not in self._handles:
            self._handles[file] = safe_open(self.folder / file, framework="pt", device="cpu")
        tensor: Tensor = self._handles[file].get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        """Hash of file names, sizes and headers: changes when another checkpoint lies there."""
        digest = hashlib.sha256()
        for file in self._files():
            path = self.folder / file
            with path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                digest.update(f"{file}\0{path.stat().st_size}\0".encode() + f.read(length))
        return digest.hexdigest()[:16]


def _entry(info: dict[str, Any]) -> tuple[str, tuple[int, ...], int]:
    """Check what a header says of one tensor: dtype, shape and where its bytes end.

    Raises:
        ValueError, KeyError, TypeError: it is not a tensor.
    """
    dtype, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("not a number")
    size = _BYTES.get(dtype)
    if size is not None and math.prod(shape) * size != stop - start:
        raise ValueError("shape and bytes differ")
    return dtype, shape, stop


def _read_header(reference: str, path: Path) -> dict[str, TensorInfo]:
    """Read a safetensors header; its format is https://github.com/huggingface/safetensors#format."""
    damaged = f"model {reference!r}: {path} is damaged"
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{damaged}: its header does not fit its {size} bytes; download it again"
            )
        try:
            header = json.loads(f.read(length))
            entries = {name: _entry(info) for name, info in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise CheckpointError(f"{damaged}: its header cannot be read; download it again") from None
    end = max((stop for _, _, stop in entries.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{damaged}: it has {size} bytes where its header says {8 + length + end}; download it again"
        )
    return {
        name: TensorInfo(path.name, _DTYPES.get(dtype, dtype), shape)
        for name, (dtype, shape, _) in entries.items()
    }


_LAYER = re.compile(r"^(.*?\.|)(\d+)(\..+)$")


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split `model.layers.7.mlp.up.weight` at its first number; None where it has none."""
    match = _LAYER.match(name)
    return (match[1], int(match[2]), match[3]) if match else None
