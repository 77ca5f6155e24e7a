"""The Hugging Face Hub: pinned revisions, its cache first, nothing that could run code.

`huggingface_hub`'s own mixin is not used: it loads weights that do not fit without a word
(`strict=False` is its default), reads pickles, and asks the network for 23 s when there is none.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# What a bundle or a Hugging Face model folder is made of. Pickles and code are never fetched.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.md", "*.txt", "*.jinja"]
INDEX_FILE = "index.json"


def fits(name: str) -> bool:
    """Whether a file is of a kind that bundles hold."""
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


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


class HubMixin:
    """`push_to_hub` for what has a `save_pretrained`."""

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the files into a folder."""
        raise AssertionError("given by the class that this is mixed into")

    def push_to_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str = "Upload with unimm",
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload this part of a bundle; see `unimm.push_to_hub`, which uploads a whole, sealed one.

        The repository's `index.json`, which names the hashes of other files, is removed.

        Returns:
            The commit's id.

        Raises:
            ValueError: the Hub refuses, or can't be reached.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return upload(folder, repository, revision, private, message, [INDEX_FILE])
