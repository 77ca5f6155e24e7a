"""The allocator's setting is taken where it exists."""

from __future__ import annotations

import platform

import pytest

from unimm.memory import keep_freed_memory


def test_the_setting_is_taken_by_the_gnu_library() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
