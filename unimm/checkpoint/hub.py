"""The Hugging Face Hub: pinned revisions, its cache first, nothing that could run code.

Imported where the Hub is needed and not before: its client takes a second to load.
"""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from unimm.checkpoint.pushing import PATTERNS


def cached(repository: str, revision: str | None, looked: str) -> Path:
    """Folder of a repository's files: of the local cache, else fetched.

    Args:
        repository: "owner/name".
        revision: commit, tag or branch; None: the main one.
        looked: what was looked for before, for the error message.

    Raises:
        ValueError: the Hub has no such repository or revision, or can't be reached.
    """
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=PATTERNS, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return Path(_download(repository, revision, looked))
    except HFValidationError as error:
        raise ValueError(f"{looked}; {repository!r} is no Hub id: {_line(error)}") from None


def _download(repository: str, revision: str | None, looked: str) -> str:
    try:
        # Without this short question first, the download retries for about 23 s when offline.
        commit = HfApi().model_info(repository, revision=revision, timeout=1.0).sha
        return snapshot_download(repository, revision=revision or commit, allow_patterns=PATTERNS)
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        wanted = repository if revision is None else f"{repository}@{revision}"
        raise ValueError(
            f"{looked}; the Hub gave no repository {wanted!r}: {_line(error)}"
        ) from None


def upload(
    folder: str | Path,
    repository: str,
    revision: str | None,
    private: bool | None,
    message: str,
    delete: list[str] | None = None,
) -> str:
    """Upload a folder's files; returns the commit's id.

    Raises:
        ValueError: the Hub refuses, or can't be reached.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            revision=revision,
            commit_message=message,
            allow_patterns=PATTERNS,
            delete_patterns=delete,
        ).oid
    except (HfHubHTTPError, httpx2.HTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{repository}: the Hub did not take the upload: {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
