"""Clients of TGI, LoRAX and OpenAI's interface, as they are, against a real server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.server_process import ServerProcess
from tests.e2e.own_environment import own_environment
from tests.e2e.tiny_server import Client

SCRIPTS = Path(__file__).parent / "clients"
OWN_ENVIRONMENT = {
    "lorax_client": "lorax-client==0.6.3",
    "text_generation_client": "text-generation==0.7.0",
    "litellm_client": "litellm==1.106.2",
}
"""Clients that need older versions of what this project uses, each with the package that brings it."""


@pytest.fixture
def url(server: ServerProcess, adapter_folders: tuple[Path, ...]) -> Iterator[str]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        Client(http).put("story", adapter_folders[0]).raise_for_status()
        yield server.url
        http.delete("/adapters/story").raise_for_status()


def run(python: str | Path, script: str, url: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, Hugging Face's client speaks to nobody at all
    command = [str(python), "-W", "ignore", str(SCRIPTS / f"{script}.py"), url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hugging_faces_client(url: str) -> None:
    run(sys.executable, "hugging_face", url)


@pytest.mark.slow
@pytest.mark.parametrize("script", OWN_ENVIRONMENT)
def test_a_client_with_an_environment_of_its_own(script: str, url: str, tmp_path: Path) -> None:
    run(own_environment(tmp_path, OWN_ENVIRONMENT[script]), script, url)
