"""Issue story: the pages work in a browser that reaches nothing but the server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loadtests.server_process import ServerProcess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def rendered(url: str, profile: Path) -> str:
    """The page after its scripts have run, with every other host unknown; what goes to the console is an error."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=15000"),
        *("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--dump-dom", url),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert complaints == []
    return done.stdout


def test_the_docs_show_every_operation(demo: ServerProcess, tmp_path: Path) -> None:
    page = rendered(f"{demo.url}/docs", tmp_path)
    operations = re.findall(r'data-path="([^"]+)"', page)
    assert {"/generate", "/v1/chat/completions", "/adapters/{name}"} <= {path.replace("\u200b", "") for path in operations}


def test_the_playground_lists_the_adapters_and_draws_their_quality(demo: ServerProcess, tmp_path: Path) -> None:
    page = rendered(f"{demo.url}/", tmp_path)
    assert re.findall(r'<option value="([^"]+)">[\w-]+ \(', page) == ["mr-to-text", "mr-to-text-lora", "text-to-mr"]
    assert "16 of 16" in page
    assert page.count("<circle") == 16
    assert "name[The Golden Palace]" in page
