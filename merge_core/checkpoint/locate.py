"""From a model reference as written in a recipe to a folder on this machine.

A reference is a local path or a Hub id with an optional `@revision`, and may have a LoRA adapter of
the same form behind a `+`. Only the files a merge needs are downloaded, templates included, through
huggingface_hub's own cache and login; weights as .bin only where there are none as safetensors.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from merge_core.errors import CheckpointError, HubUnreachableError

_TEXTS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.tiktoken"]
PATTERNS = [*_TEXTS, "*.safetensors", "*.py"]
BIN_PATTERNS = ["pytorch_model*.bin"]
# An adapter's repository may hold the whole model, too.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Second copies of the weights (Mistral's and Meta's own format, subfolders of other runtimes).
IGNORED = ["consolidated*", "*/*.safetensors", "*/*.json"]


# A model may also be one such file: a state_dict by itself.
STATE_DICT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def state_dict_file(reference: str) -> Path | None:
    """Return the file that a reference names, where it is one of weights and not a folder."""
    try:
        path = Path(reference).expanduser()
        return path if path.suffix in STATE_DICT_SUFFIXES and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # no path, which `locate` says
        return None


def split_adapter(reference: str) -> tuple[str, str | None]:
    """Split `model+adapter`; without an adapter the second part is None.

    A folder or file whose own name has a '+' is taken for what it is.

    Raises:
        CheckpointError: there are several '+', and which one stands before the adapter cannot be told.
    """
    if "+" not in reference or os.path.exists(os.path.expanduser(reference)):
        return reference, None
    parts = reference.split("+")
    ways = [("+".join(parts[:i]), "+".join(parts[i:])) for i in range(1, len(parts))]
    if len(ways) > 1:
        ways = [way for way in ways if all(os.path.exists(os.path.expanduser(end)) for end in way)]
    if len(ways) != 1 or not all(ways[0]):
        raise CheckpointError(
            f"model {reference!r} must be MODEL+ADAPTER with one '+'; merge several adapters as models "
            f"of their own (MODEL+ONE, MODEL+OTHER), and name existing folders"
        )
    return ways[0]


@cache
def locate(reference: str, is_adapter: bool = False) -> Path:
    """Return the folder that holds a model, or an adapter alone.

    Raises:
        CheckpointError: no such folder, or no such repository, or no access to it.
        HubUnreachableError: the Hub did not answer.
    """
    try:
        path = Path(reference).expanduser()
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"model {reference:.80}: not a path ({error!s:.80}); correct it") from None
    if is_dir:
        return path
    if exists:
        if is_adapter:
            raise CheckpointError(
                f"adapter {reference!r} is a file; name the folder that holds adapter_config.json"
            )
        raise CheckpointError(
            f"model {reference!r} is a file; name the folder that holds config.json, or a file "
            f"of weights ({', '.join(STATE_DICT_SUFFIXES)})"
        )
    name, _, revision = reference.partition("@")
    if _can_only_be_a_path(name):
        raise CheckpointError(
            f"model {reference!r}: no such folder; correct the path (relative paths start at "
            f"{Path.cwd()})"
        )
    return _download(reference, name, revision or None, is_adapter)


def tokenizer_folder(reference: str) -> Path:
    """Return the folder of a model's tokenizer: its adapter's where that has one, else the model's."""
    model, adapter = split_adapter(reference)
    if adapter is not None and has_tokenizer(folder := locate(adapter, is_adapter=True)):
        return folder
    return locate(model)


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer that Transformers can load."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def refuse_links_out(reference: str, folder: Path) -> None:
    """Refuse a model whose files are links to others elsewhere: a merge would copy what they lead to.

    In the Hub's cache files are links to `blobs`, beside the snapshots.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    inside = [folder.resolve()]
    if folder.parent.name == "snapshots":
        inside.append(folder.parent.parent.resolve() / "blobs")
    try:
        links = [path for path in sorted(folder.iterdir()) if path.is_symlink()]
        leads = {path: path.resolve() for path in links}
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"model {reference!r}: {folder} cannot be read ({error}); correct it"
        ) from None
    for path, target in leads.items():
        if not any(target.is_relative_to(place) for place in inside):
            raise CheckpointError(
                f"model {reference!r}: {path.name} is a link to {target}, outside of its folder; put "
                f"the file itself into {folder}"
            )


def _can_only_be_a_path(name: str) -> bool:
    """Tell paths from Hub ids (`name` or `organisation/name`)."""
    parts = name.split("/")
    if name.startswith((".", "~", "/")) or len(parts) > 2 or "" in parts or os.sep != "/":
        return True
    return len(parts) == 2 and Path(parts[0]).is_dir()


def _download(reference: str, name: str, revision: str | None, is_adapter: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    where = f"model {reference!r}: no folder of that name here, and on the Hub"
    try:
        # Each call returns the same folder, which then holds what was asked for so far.
        wanted = (PATTERNS, BIN_PATTERNS)
        if is_adapter:
            wanted = ([*_TEXTS, ADAPTER_FILES[0]], [ADAPTER_FILES[1]])
        for patterns in wanted:
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=patterns, ignore_patterns=IGNORED
                )
            )
            if any(folder.glob("*.safetensors")):
                break
        return folder
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{where} it is gated; accept its terms on its page and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{where} it has no revision {revision!r}; name a branch, tag or commit that exists"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{where} there is none that you may read; correct the name, or for a private one "
            f"log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HFValidationError:
        raise CheckpointError(
            f"model {reference!r}: no such folder, and not a Hub id (organisation/name); correct it"
        ) from None
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        if offline or "/" not in name:
            raise CheckpointError(
                f"model {reference!r}: no such folder, and not in the Hub's local cache; correct "
                f"the path or download it first"
            ) from None
        reason = " ".join(str(error).split())
        raise HubUnreachableError(
            f"{where} it could not be looked up ({type(error).__name__}: {reason:.200}); "
            f"correct the path, or try again with a connection to the Hub"
        ) from error
