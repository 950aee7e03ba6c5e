"""Writing a model folder: safetensors shards as a stream, and a folder that appears when complete.

Names, dtypes and shapes are known before the first tensor is, so shards and headers are too: each
tensor's bytes go straight to their place, and no more than one tensor is held.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoint.locate import has_tokenizer as has_tokenizer
from merge_core.checkpoint.read import INDEX
from merge_core.checkpoint.safetensors_file import ITEM_BYTES, lay_out
from merge_core.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
GENERATION = "generation_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", GENERATION)
DEFAULT_SHARD_BYTES = 5_000_000_000

# What is known of a tensor before it is there: name, torch dtype name, shape.
Announced = tuple[str, str, tuple[int, ...]]


def tokenizer_digest(folder: Path) -> str:
    """Hash a folder's tokenizer and templates."""
    digest = hashlib.sha256()
    for file in (*TOKENIZER_FILES, *TEMPLATE_FILES):
        if (folder / file).is_file():
            digest.update(f"{file}\0".encode() + (folder / file).read_bytes())
    return digest.hexdigest()[:16]


def copy_tokenizer(source: Path, target: Path, model: Path | None = None) -> None:
    """Copy tokenizer, chat template and generation defaults, those that exist.

    Args:
        model: where the generation defaults are if `source` is an adapter's folder without any.
    """
    if model is not None and (model / GENERATION).is_file():
        shutil.copyfile(model / GENERATION, target / GENERATION)
    for file in (*TOKENIZER_FILES, *TEMPLATE_FILES):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def check_output(folder: Path, overwrite: bool, keep: Iterable[Path] = ()) -> None:
    """Refuse an output folder that would lose somebody's files.

    Args:
        keep: files and folders that are read for it. One of them may be named to be replaced; none
            goes with a folder around it.

    Raises:
        OutputError: it exists and is not empty, is a file, or holds what must be kept.
    """
    if folder.is_file():
        raise OutputError(f"OUT is {folder}, which is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"OUT is {folder}, which exists and is not empty; add --overwrite to replace it"
        )
    for path in keep:
        if folder.is_dir() and folder.resolve() in path.resolve().parents:
            raise OutputError(
                f"OUT is {folder}, and --overwrite would delete {path}, which is read for it; name "
                f"another folder"
            )


@contextmanager
def complete_folder(folder: Path, overwrite: bool, keep: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a temporary folder beside `folder` and rename it into place at the end.

    Whatever happens inside, `folder` is either as it was or complete. A process that is killed
    leaves its temporary folder, which the next one that writes to `folder` removes.

    Args:
        keep: see `check_output`.

    Raises:
        OutputError: `folder` may not or cannot be written.
    """
    check_output(folder, overwrite, keep)
    folder = folder.resolve()  # a symbolic link stays one
    part = folder.parent / f"{folder.name}.part-{os.getpid()}"
    old = folder.parent / f"{folder.name}.part-old-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(folder)
        check_output(folder, overwrite)  # again: an interrupted overwrite may have been undone
        part.mkdir()
        yield part
        if folder.is_dir():
            folder.rename(old)
            part.rename(folder)
            old.rename(part)  # what is to be put back has the other name, so that half of it never is
        else:
            part.rename(folder)
    except OSError as error:
        raise OutputError(
            f"OUT {folder} could not be written ({error}); nothing was left there, make room or name "
            f"another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if old.is_dir() and not folder.exists():
            old.rename(folder)


def _clear_stale(folder: Path) -> None:
    """Remove what killed processes left beside `folder`; put back what one was about to replace."""
    name = re.compile(re.escape(folder.name) + r"\.part-(old-)?(\d+)")
    for path in list(folder.parent.iterdir()):
        found = name.fullmatch(path.name)
        if not found or _is_alive(int(found[2])):
            continue
        if found[1] and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Tell whether another process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name, so that no reader sees half of it."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_shards(
    layout: Sequence[Announced],
    stream: Iterable[tuple[str, Tensor]],
    folder: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> int:
    """Write a stream of tensors as safetensors shards with an index, or as one file without.

    The files' bytes follow from the layout and the tensors alone.

    Args:
        layout: what will come, in the order of the stream.
        stream: names and tensors, on any device; each is written as it comes and then let go.
        folder: an existing folder.
        shard_bytes: a shard closes before its tensors would exceed this; <= 0 means one shard.

    Returns:
        How many bytes of tensors were written.

    Raises:
        RuntimeError: the stream is not what the layout says.
        OSError: a file cannot be written.
    """
    shards = _shards(layout, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    tensors = iter(stream)
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb", buffering=0) as f:
            head, places = lay_out(shard)
            _write_at(f, 0, memoryview(head))
            for announced in shard:
                name, tensor = next(tensors, (None, None))
                _write_at(f, places[announced[0]], _checked_bytes(announced, name, tensor))
                del tensor  # before the next one is made
    surplus = next(tensors, None)
    if surplus is not None:
        raise RuntimeError(f"tensor {surplus[0]} came after the last one announced")
    total = sum(map(_n_bytes, layout))
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name, _, _ in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _n_bytes(announced: Announced) -> int:
    _, dtype, shape = announced
    return math.prod(shape) * ITEM_BYTES[dtype]


def _shards(layout: Sequence[Announced], shard_bytes: int) -> list[list[Announced]]:
    """Divide the tensors among files, in order; a tensor larger than a shard has one of its own."""
    shards: list[list[Announced]] = [[]]
    size = 0
    for announced in layout:
        n_bytes = _n_bytes(announced)
        if shards[-1] and 0 < shard_bytes < size + n_bytes:
            shards.append([])
            size = 0
        shards[-1].append(announced)
        size += n_bytes
    return shards


def _checked_bytes(announced: Announced, name: str | None, tensor: Tensor | None) -> memoryview:
    """Return a tensor's bytes in row-major order, without a copy where they already lie so."""
    import torch

    came = None
    if name is not None and tensor is not None:
        came = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if tensor is None or came != announced:
        raise RuntimeError(f"{came or 'nothing'} came where {announced} was announced")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_at(f: FileIO, place: int, data: memoryview) -> None:
    f.seek(place)
    while data:  # the system takes at most 2 GiB at a time
        data = data[f.write(data) :]
