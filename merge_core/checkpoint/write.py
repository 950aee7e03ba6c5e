"""Writing a model folder: sharded safetensors, and the folder appears only when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from merge_core.checkpoint.read import INDEX
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
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "generation_config.json")
DEFAULT_SHARD_BYTES = 5_000_000_000


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer that Transformers can load."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation defaults, those that exist."""
    for file in (*TOKENIZER_FILES, *TEMPLATE_FILES):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that would lose somebody's files.

    Raises:
        OutputError: it exists and is not empty, or is a file.
    """
    if folder.is_file():
        raise OutputError(f"OUT is {folder}, which is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"OUT is {folder}, which exists and is not empty; add --overwrite to replace it"
        )


@contextmanager
def complete_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside `folder` and rename it into place at the end.

    Whatever happens inside, `folder` is either as it was or complete.
    """
    from safetensors import SafetensorError

    check_output(folder, overwrite)
    folder = folder.resolve()  # a symbolic link stays one
    part = folder.parent / f"{folder.name}.part-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        if folder.is_dir():
            old = folder.parent / f"{folder.name}.part-old-{os.getpid()}"
            folder.rename(old)
            part.rename(folder)
            shutil.rmtree(old)
        else:
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"OUT {folder} could not be written ({error}); nothing was left there"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name, so that no reader sees half of it."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_shards(
    stream: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> int:
    """Write a stream of tensors as safetensors shards with an index.

    Args:
        stream: names and tensors; each is written once.
        folder: an existing folder.
        shard_bytes: a shard closes before it would exceed this; <= 0 means one shard.

    Returns:
        How many bytes of tensors were written.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in stream:
        n_bytes = tensor.numel() * tensor.element_size()
        if pending and 0 < shard_bytes < size + n_bytes:
            shards.append(_write_shard(folder, len(shards), pending))
            pending, size = {}, 0
        pending[name] = tensor.contiguous()
        size += n_bytes
        total += n_bytes
    shards.append(_write_shard(folder, len(shards), pending))
    if len(shards) == 1:
        (folder / _part_name(0)).rename(folder / "model.safetensors")
        return total
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part_name(i)).rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _part_name(number: int) -> str:
    return f"shard-{number}.safetensors.part"


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    from safetensors.torch import save_file

    path = folder / _part_name(number)
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    return list(tensors)
