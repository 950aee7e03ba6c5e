"""The safetensors format: a file's header, read and checked or laid out, and its tensors as views.

The format is https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, the
header as JSON, then the tensors' bytes without holes, little-endian and in row-major order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# safetensors' own limit for a header.
MAX_HEADER_BYTES = 100_000_000
# Bytes of the number that stands before the header, and what the header's end is padded to.
_WORD = 8
# safetensors' name of each dtype: torch's name and bytes an element.
_DTYPES = {
    "C64": ("complex64", 8),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F32": ("float32", 4),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}
_FLOATING = ("float64", "float32", "float16", "bfloat16")
# Bytes an element of every dtype that can be stored, by torch's name, and safetensors' name of it.
ITEM_BYTES = dict(_DTYPES.values())
_STORED_AS = {name: stored for stored, (name, _) in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor: its file, torch dtype name and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        """Whether a merge computes with it; integer and boolean buffers are only copied."""
        return self.dtype in _FLOATING

    @property
    def n_bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """One safetensors file, mapped when its first tensor is asked for.

    Attributes:
        tensors: name to TensorInfo, in the header's order.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, reference: str, path: Path) -> None:
        self._damaged = f"model {reference!r}: {path} is damaged"
        self._path = path
        self._handle: Any = None
        self.tensors = self._read_header()

    def view(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file; never write into it.

        Raises:
            CheckpointError: the file is no longer what it was when its header was read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            if self._handle is None:
                self._handle = safe_open(self._path, framework="pt", device="cpu")
            tensor: Tensor = self._handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._damaged}: tensor {name} cannot be read ({error}); download it again"
            ) from error
        return tensor

    def header(self) -> bytes:
        """Return what tells this file from another of the same size: its header."""
        with self._path.open("rb") as f:
            return f.read(int.from_bytes(f.read(_WORD), "little"))

    def _read_header(self) -> dict[str, TensorInfo]:
        size = self._path.stat().st_size
        with self._path.open("rb") as f:
            length = int.from_bytes(f.read(_WORD), "little")
            if size < _WORD or length > min(size - _WORD, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{self._damaged}: its header does not fit its {size} bytes; download it again"
                )
            try:
                header = json.loads(f.read(length))
                header.pop("__metadata__", None)
                spans = {name: _span(info) for name, info in header.items()}
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                raise CheckpointError(
                    f"{self._damaged}: its header cannot be read; download it again"
                ) from None
        end = max((stop for _, stop in spans.values()), default=0)
        if _WORD + length + end != size:
            raise CheckpointError(
                f"{self._damaged}: it has {size} bytes where its header says {_WORD + length + end}; "
                f"download it again"
            )
        reached = 0
        for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
            if start != reached:
                what = "overlap" if start < reached else "are apart from"
                raise CheckpointError(
                    f"{self._damaged}: the bytes of tensor {name} {what} those before them; "
                    f"download it again"
                )
            reached = stop
        return {name: self._info(name, info) for name, info in header.items()}

    def _info(self, name: str, info: dict[str, Any]) -> TensorInfo:
        if info["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{self._damaged[: -len(' is damaged')]} holds {name} as {info['dtype']!r}, which "
                f"cannot be read; name a model stored as one of: {', '.join(_DTYPES)}"
            )
        return TensorInfo(self._path.name, _DTYPES[info["dtype"]][0], tuple(info["shape"]))


def _span(info: dict[str, Any]) -> tuple[int, int]:
    """Check what a header says of one tensor and return where its bytes begin and end.

    Raises:
        ValueError, KeyError, TypeError: it is not a tensor.
    """
    dtype, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError("not a tensor")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("not a number")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype][1] != stop - start:
        raise ValueError("shape and bytes differ")
    return start, stop


def lay_out(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, int]]:
    """Lay out a file of tensors: (name, torch dtype name, shape) each.

    Returns:
        All bytes before the tensors', and where in the file each tensor begins.
    """
    spans = {}
    end = 0
    # The widest elements first: each tensor then begins at a multiple of its element's size, which
    # readers that map the file rely on. In a file of one dtype this is the order given.
    for name, dtype, shape in sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor[1]]):
        spans[name] = (end, end + math.prod(shape) * ITEM_BYTES[dtype])
        end = spans[name][1]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape in tensors:
        header[name] = {
            "dtype": _STORED_AS[dtype],
            "shape": list(shape),
            "data_offsets": list(spans[name]),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _WORD)
    begin = _WORD + len(text)
    return (
        len(text).to_bytes(_WORD, "little") + text,
        {name: begin + start for name, (start, _) in spans.items()},
    )
