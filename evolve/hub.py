"""Publishing a merged model on the Hub, with the login that huggingface_hub finds.

Whether that can work is asked before a merge begins, so that hours of merging are not lost to a
missing login; and the folder stays where it is, whatever happens to the upload.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from evolve.errors import PushError
from merge_core.errors import HubUnreachableError, OutputError


def check_push(repo: str) -> str:
    """Ask the Hub, without writing, whether an upload may succeed.

    Args:
        repo: `organisation/name`, or a name of one's own.

    Returns:
        The repository's full id.

    Raises:
        OutputError: not a repository's name, no login, or no permission to write there.
        HubUnreachableError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    api = HfApi()
    field = f"--push-to-hub is {repo!r}"
    try:
        validate_repo_id(repo)
        user = api.whoami()
    except errors.HFValidationError:
        raise OutputError(f"{field}, which is not a Hub id; write organisation/name") from None
    except errors.LocalTokenNotFoundError:
        raise OutputError(
            f"{field}, but there is no login; run `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise OutputError(f"{field}, but HF_HUB_OFFLINE is set; unset it to upload") from None
    except Exception as error:
        if _status(error) in (401, 403):
            raise OutputError(
                f"{field}, but the Hub refuses the login; renew it with `hf auth login` or HF_TOKEN"
            ) from None
        _unreachable(field, error)
    owner, _, name = repo.rpartition("/")
    owner = owner or user["name"]
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OutputError(f"{field}, but the login may only read; make a token that may write")
    if owner not in {user["name"], *(org["name"] for org in user.get("orgs", ()))}:
        try:
            api.repo_info(f"{owner}/{name}")
        except errors.RepositoryNotFoundError:
            raise OutputError(
                f"{field}, which {user['name']} may neither see nor make; use {user['name']}/{name}, or "
                f"log in as a member of {owner}"
            ) from None
        except Exception as error:
            _unreachable(field, error)
    return f"{owner}/{name}"


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder as a model repository, made if need be.

    Returns:
        Address of the repository.

    Raises:
        PushError: the upload failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # An existing repository stays as private or public as it is.
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload merged model")
    except Exception as error:
        raise PushError(
            f"--push-to-hub is {repo!r}, and the upload failed ({_reason(error)}); the merged model is "
            f"in {folder}, upload it with `hf upload {repo} {folder}`"
        ) from None
    return str(url)


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _unreachable(field: str, error: Exception) -> NoReturn:
    raise HubUnreachableError(
        f"{field}, but the Hub could not be asked ({_reason(error)}); nothing was merged, try again "
        f"with a connection to the Hub"
    ) from None
