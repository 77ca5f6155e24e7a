"""The two errors of files that can't be used: before and after it is known where they stand."""

from __future__ import annotations


class Damaged(Exception):
    """Why a file can't be used, said by a reader that does not know where the file stands."""


class MediaError(ValueError):
    """A file that can't be used.

    Args:
        where: shard and key, or path.
        reason: what is wrong.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        # Exceptions are rebuilt from their message otherwise, which fails between processes.
        return type(self), (self.where, self.reason)
