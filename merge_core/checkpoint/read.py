"""Lazy reading of a checkpoint: names, shapes and dtypes first, bytes when asked.

Files stay memory-mapped: a tensor that is read is a view of the page cache, shared by every
process that reads the same file, and costs no private memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import re
import sys
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from merge_core.checkpoint.bin_file import BinFile
from merge_core.checkpoint.locate import locate, refuse_links_out, state_dict_file
from merge_core.checkpoint.safetensors_file import SafetensorsFile
from merge_core.checkpoint.safetensors_file import TensorInfo as TensorInfo
from merge_core.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAPTER_CONFIG = "adapter_config.json"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
_LFS_POINTER = b"version https://git-lfs"


class Update(Protocol):
    """What is done to a stored tensor on its way to a merge."""

    def __call__(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the updated tensor, new, in `dtype` on the stored one's device."""
        ...


class Checkpoint:
    """One model's folder, opened for reading: safetensors, else .bin; or one file of weights alone.

    Several threads may read at the same time.

    Attributes:
        reference: the model as written in the recipe.
        folder: where its files are.
        is_state_dict: whether it is one file of weights, without config.json.
        tensors: name to TensorInfo, of every tensor in every shard.

    Raises:
        CheckpointError: files are missing, damaged, or in another format.
    """

    # Where weights may lie, the preferred first; each a file or the index of several.
    _weights: ClassVar[Sequence[str]] = ("model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX)
    _repair: ClassVar[str] = "name the folder of a Transformers model with its weights"

    def __init__(self, reference: str) -> None:
        self.reference = reference
        file = self._file()
        self.is_state_dict = file is not None
        self.folder = file.parent if file else self._located()
        if file is None:
            refuse_links_out(reference, self.folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._views: dict[str, Tensor] = {}
        self._files: dict[str, SafetensorsFile | BinFile] = {}
        shards: dict[str, list[str]] = {file.name: []} if file else self._shards()
        for shard, expected in shards.items():
            self._files[shard] = opened = self._open(self.folder / shard)
            lacking = next((name for name in expected if name not in opened.tensors), None)
            if lacking is not None:
                raise CheckpointError(
                    f"model {reference!r}: the index says that {lacking} is in {shard}, which does not "
                    f"hold it; restore the matching files in {self.folder}"
                )
            twice = next((name for name in opened.tensors if name in self.tensors), None)
            if twice is not None:
                raise CheckpointError(
                    f"model {reference!r}: {twice} is in {self.tensors[twice].file} and in {shard}; "
                    f"restore the matching files in {self.folder}"
                )
            self.tensors.update(opened.tensors)

    @property
    def identity(self) -> str:
        """What tells its tensors from another's in one process."""
        return self.reference

    @cached_property
    def structure(self) -> str:
        """Hash of config, names, shapes and dtypes: all but the numbers."""
        tensors = [(name, info.dtype, info.shape) for name, info in self.tensors.items()]
        text = json.dumps([self.config, tensors])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    is_mapped = True
    """Whether reading a tensor costs no work and no memory of this process."""

    def _file(self) -> Path | None:
        """Return the file that the reference names, where it names one of weights alone."""
        return state_dict_file(self.reference)

    def _located(self) -> Path:
        """Find the folder."""
        folder = locate(self.reference)
        is_adapter = not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file()
        if is_adapter:
            raise CheckpointError(
                f"model {self.reference!r} is an adapter without a model; write its base before it: "
                f"BASE+{self.reference}"
            )
        return folder

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json; empty for a file of weights."""
        if self.is_state_dict:
            return {}
        config = self._json("config.json", "name the folder of a Transformers model")
        names = config.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: architectures is {shown(names)}; it must be a list of "
                f"names, correct it"
            )
        return config

    @property
    def tokenizer_folder(self) -> Path:
        """Where the model's tokenizer and chat template are."""
        return self.folder

    def _json(self, file: str, repair: str) -> dict[str, Any]:
        """Read an object from a JSON file of the folder."""
        path = self.folder / file
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"model {self.reference!r} has no {file} in {self.folder}; {repair}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error}); restore the file") from None
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} is not a JSON object; restore the file")
        return found

    def _shards(self) -> dict[str, list[str]]:
        """List the files that hold the weights, and the tensors that an index promises in each."""
        found = next((name for name in self._weights if (self.folder / name).is_file()), None)
        if found is None:
            raise CheckpointError(
                f"model {self.reference!r} has no {', '.join(self._weights[:-1])} or "
                f"{self._weights[-1]} in {self.folder}; {self._repair}"
            )
        return {found: []} if not found.endswith(".json") else self._read_index(self.folder / found)

    def _read_index(self, index: Path) -> dict[str, list[str]]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"].items()
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not a valid index ({error!r}); restore it") from None
        if not weight_map:
            raise CheckpointError(f"{index} names no tensors; restore it")
        shards: dict[str, list[str]] = {}
        for name, file in weight_map:
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{index} names {shown(file)}; shards must lie in the model's own folder"
                )
            shards.setdefault(file, []).append(name)
        for file in shards:
            if not (self.folder / file).is_file():
                raise CheckpointError(
                    f"model {self.reference!r}: shard {file} is missing in {self.folder}; "
                    f"download it again"
                )
        return dict(sorted(shards.items()))

    def _open(self, path: Path) -> SafetensorsFile | BinFile:
        try:
            with path.open("rb") as f:
                begin = f.read(len(_LFS_POINTER))
            if begin == _LFS_POINTER:
                raise CheckpointError(
                    f"model {self.reference!r}: {path} is a Git LFS pointer and not the weights; "
                    f"run `git lfs pull` there"
                )
            kind = SafetensorsFile if path.suffix == ".safetensors" else BinFile
            return kind(self.reference, path)
        except OSError as error:
            raise CheckpointError(
                f"model {self.reference!r}: {path} cannot be read ({error.strerror}); make it readable"
            ) from None

    def origin(self, name: str) -> tuple[Checkpoint, str, Update | None]:
        """Say where a tensor is stored, under which name, and what is done to it on its way."""
        return self, name, None

    def stores(self) -> list[Checkpoint]:
        """List the folders whose files are read for this model."""
        return [self]

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, contiguous and where it can be a view; never write into it."""
        return self._view(name).contiguous()

    def prefetch(self, name: str) -> None:
        """Tell the system that a tensor's bytes will be wanted, so that the disk works meanwhile.

        What has been read before is in memory as long as there is room; it is not asked for again.
        """
        if name not in self._views:
            _will_need(self._view(name))

    def _view(self, name: str) -> Tensor:
        if name not in self._views:
            self._views[name] = self._files[self.tensors[name].file].view(name)
        return self._views[name]

    def fingerprint(self) -> str:
        """Hash of file names, sizes and headers: changes when another checkpoint lies there."""
        digest = hashlib.sha256()
        for file, opened in self._files.items():
            size = (self.folder / file).stat().st_size
            digest.update(f"{file}\0{size}\0".encode() + opened.header())
        return digest.hexdigest()[:16]


def _will_need(view: Tensor) -> None:
    """Start reading the part of a mapped file that a tensor is a view of; return at once."""
    if sys.platform != "linux" or not view.numel():
        return
    storage = view.untyped_storage()
    first = view.data_ptr()
    # A strided view reaches to its last element, and no further than its storage.
    reach = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
    stop = min(first + reach * view.element_size(), storage.data_ptr() + storage.nbytes())
    first -= first % mmap.PAGESIZE
    _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_WILLNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_LAYER = re.compile(r"^(.*?\.|)(\d+)(\..+)$")


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split `model.layers.7.mlp.up.weight` at its first number; None where it has none."""
    match = _LAYER.match(name)
    return (match[1], int(match[2]), match[3]) if match else None
