"""Adapters on the Hugging Face Hub: up, down, and its errors in one line."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Never

from rheostat.errors import AdapterError

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LOG_IN = "log in with `hf auth login`"


def is_id(name: str) -> bool:
    """Whether ``name`` looks like ``owner/name``."""
    return _ID.fullmatch(name) is not None


def download(files: Sequence[str], repo_id: str, revision: str | None = None) -> Path:
    """The folder of the Hub's own cache that holds ``files`` of a repository; those it lacks are left out.

    Raises:
        AdapterError: not found, not allowed, or neither reachable nor cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        what = f"its owner asks you to accept terms: do so on its Hub page, then {_LOG_IN}"
        raise AdapterError(f"adapter '{repo_id}': {what}") from error
    except RepositoryNotFoundError as error:
        what = f"neither a folder here nor on the Hub; if it is private, {_LOG_IN}"
        raise AdapterError(f"adapter '{repo_id}': {what}") from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"adapter '{repo_id}': the Hub has no revision '{revision}' of it") from error
    except Exception as error:  # whatever the layers of the network below may raise
        _unreachable(repo_id, error, "neither a folder here nor in the Hub's cache, and the Hub cannot be reached")


def upload(
    folder: Path, files: Sequence[str], repo_id: str, private: bool, endpoint: str | None, token: str | None
) -> str:
    """Commit ``files`` of ``folder`` to a repository, which is created if need be; its address.

    Raises:
        AdapterError: no token, a token that may not write there, no valid id, or a Hub out of reach.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = token or get_token()
    if token is None:
        raise AdapterError(f"cannot push to '{repo_id}': no token for the Hub: {_LOG_IN}, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=token, library_name="rheostat")
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message="Upload a decoding adapter with Rheostat",
        )
    except HFValidationError as error:
        raise AdapterError(f"cannot push to '{repo_id}': write it as owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            what = f"the Hub refused the token (401): {_LOG_IN} again"
        elif status == 403:
            what = "the token may not write there (403): use one with write permission for that owner"
        else:
            what = f"the Hub answered {status}: {_first_line(error)}"
        raise AdapterError(f"cannot push to '{repo_id}': {what}") from error
    except Exception as error:  # whatever the layers of the network below may raise
        _unreachable(repo_id, error, "the Hub cannot be reached")
    return str(address)


def _unreachable(repo_id: str, error: Exception, what: str) -> Never:
    raise AdapterError(
        f"adapter '{repo_id}': {what}: check the network (and HF_HUB_OFFLINE): {_first_line(error)}"
    ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
