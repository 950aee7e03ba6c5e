"""A file of weights that torch.save wrote (`pytorch_model.bin`): a pickle, read without running it.

`torch.load(weights_only=True)` rebuilds tensors and plain containers and refuses everything else.
Zip files (torch >= 1.6) are mapped, so that opening one reads names and shapes only; older files are
read as a whole into private memory, since their format allows nothing else.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.checkpoint.safetensors_file import ITEM_BYTES, TensorInfo
from merge_core.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import Tensor

_ZIP_MAGIC = b"PK\x03\x04"
# How torch names what a pickle asks to call and may not.
_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


class BinFile:
    """One .bin file, opened.

    Attributes:
        tensors: name to TensorInfo, in the order of the file.

    Raises:
        CheckpointError: the file is damaged, or holds something besides tensors.
    """

    def __init__(self, reference: str, path: Path) -> None:
        self._path = path
        where = f"model {reference!r}: {path}"
        self._views = _checked(_load(path, where), where)
        self.tensors = {
            name: TensorInfo(path.name, _dtype_name(view), tuple(view.shape))
            for name, view in self._views.items()
        }

    def view(self, name: str) -> Tensor:
        """Return a tensor as it lies in the file, maybe strided; never write into it."""
        return self._views[name]

    def header(self) -> bytes:
        """Return what tells this file from another of the same size: checksums of its contents."""
        if _is_zip(self._path):
            with zipfile.ZipFile(self._path) as archive:
                return repr([(r.filename, r.CRC, r.file_size) for r in archive.infolist()]).encode()
        with self._path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").digest()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _can_be_mapped(path: Path) -> bool:
    """Tell whether the tensors' bytes lie in the file as they are, neither old nor compressed."""
    if not _is_zip(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def _load(path: Path, where: str) -> Any:
    """Return what the file holds, whatever it is."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a file is TorchScript, before it is refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # a damaged pickle can end in any exception
        refused = _REFUSED.search(str(error))
        if refused:
            raise CheckpointError(
                f"{where} asks to run {refused[1]}, and nothing in a .bin file is ever "
                f"run; name a model stored as safetensors, or save its plain state_dict"
            ) from None
        # torch's messages go on for a page, and the first sentence is the same for all.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"{where} is damaged or no file of weights ({type(error).__name__}: {reason:.120}); "
            f"download it again"
        ) from None


def _checked(loaded: Any, where: str) -> dict[str, Tensor]:
    """Accept a flat mapping of names to tensors and nothing else."""
    import torch

    flat = "save the flat one, torch.save(model.state_dict(), path)"
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where} holds a {type(loaded).__name__} and not a state_dict; {flat}")
    views = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where}: entry {shown(name)} is a {type(value).__name__}, and a state_dict has "
                f"names and tensors only; {flat}"
            )
        is_dense = value.layout == torch.strided and value.device.type == "cpu"
        if not is_dense or _dtype_name(value) not in ITEM_BYTES:
            raise CheckpointError(
                f"{where}: tensor {name} is {value.dtype}, {value.layout} on {value.device}, which "
                f"cannot be merged; name a model with plain dense weights"
            )
        views[name] = value.detach()
    return views


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
