# pyright: strict

"""What may stand on the Hub, and `push_to_hub` for what has a `save_pretrained`.

`huggingface_hub`'s own mixin is not used: it loads weights that do not fit without a word
(`strict=False` is its default), reads pickles, and asks the network for 23 s when there is none.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

# What a bundle or a Hugging Face model folder is made of. Pickles and code are never fetched.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.md", "*.txt", "*.jinja"]
INDEX_FILE = "index.json"


def fits(name: str) -> bool:
    """Whether a file is of a kind that bundles hold."""
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


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
        from unimm.checkpoint.hub import upload

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return upload(folder, repository, revision, private, message, [INDEX_FILE])
