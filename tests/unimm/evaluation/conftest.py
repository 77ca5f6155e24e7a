import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Browse = Callable[[Path], subprocess.CompletedProcess[str]]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Opens a page in headless Chromium: its elements as they stand then, and what it logged."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")

    def opened(page: Path) -> subprocess.CompletedProcess[str]:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        return subprocess.run(
            [chromium, *options, profile, "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    return opened
