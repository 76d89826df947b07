"""Issue story: the image as a newcomer runs it, and as a careful operator does."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.containers.podman import Podman
from tests.e2e.tiny_server import wait_until
from tests.http_keys import make_key, write_keys

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3000)]

ROOT = Path(__file__).resolve().parents[2]
LOCKED_DOWN = ("--cap-drop", "all", "--security-opt", "no-new-privileges", "--read-only", "--read-only-tmpfs=false")
"""Nothing but the volume can be written, not even /tmp."""
START_S = 180
"""The longest that a start on a busy machine may take."""


@dataclass(frozen=True)
class Container:
    """A running container of the image."""

    podman: Podman
    id: str
    http: httpx.Client

    def log(self) -> str:
        """What it has printed."""
        return self.podman.logs(self.id)

    def execute(self, *command: str) -> str:
        """What a command inside of it prints."""
        return self.podman("exec", self.id, *command, may_fail=True).strip()

    def is_ready(self) -> bool:
        """Whether /ready says so."""
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def running(podman: Podman, image: str, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> Iterator[Container]:
    """A container whose server is ready; it is removed with its anonymous volumes."""
    id_ = podman("run", "--detach", "--publish", "127.0.0.1::8000", *options, image, *arguments).strip()
    try:
        port = podman("port", id_, "8000").strip().rpartition(":")[2]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            container = Container(podman, id_, http)
            wait_until(container.is_ready, START_S)
            yield container
    finally:
        podman("rm", "--force", "--volumes", "--time", "0", id_)


def generated(container: Container, **parameters: object) -> httpx.Response:
    body = {"inputs": "name[The Vaults], food[Thai]", "parameters": {"max_new_tokens": 8, **parameters}}
    return container.http.post("/generate", json=body)


def test_the_demo_starts_with_nothing_but_a_port(podman: Podman, server_image: str) -> None:
    with running(podman, server_image) as container:
        answer = generated(container, adapter_id="mr-to-text", rank=4)
        assert (answer.status_code, answer.headers["x-lora-rank"]) == (200, "4")
        assert "everybody who can connect may do everything" in container.log()
        healthcheck = json.loads(podman("inspect", "--format", "{{json .HealthCheck.Test}}", server_image))
        assert container.execute(*healthcheck[1:]) == ""


def test_it_runs_with_nothing_but_its_volume(podman: Podman, server_image: str, tmp_path: Path) -> None:
    key = make_key("operator")
    keys = write_keys(tmp_path / "keys.json", key)
    tmp_path.chmod(0o755)
    keys.chmod(0o644)
    options = (*LOCKED_DOWN, "--volume", "adapters:/data", "--volume", f"{keys}:/keys.json:ro")
    settings = ("--env", "DYLORA_API_KEYS_FILE=/keys.json", "--env", "DYLORA_THREADS=1")
    adapter = ROOT / "adapters/demo/artifacts/adapters/mr-to-text-lora"
    with running(podman, server_image, (*options, *settings)) as container:
        assert generated(container).status_code == 401
        container.http.headers.update(key.headers)
        files = {name: (adapter / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
        assert container.http.put("/adapters/mine", files={n: (n, data) for n, data in files.items()}).status_code == 201
        assert generated(container, adapter_id="mine", rank=2).status_code == 200
        assert container.execute("id", "-u") == "10001"
        status = container.execute("cat", "/proc/1/status")
        assert "CapBnd:\t0000000000000000" in status
        assert "NoNewPrivs:\t1" in status
        assert "Read-only file system" in container.execute("touch", "/opt/dylora/x")
        assert "Read-only file system" in container.execute("touch", "/tmp/x")
        assert key.token not in container.log()
        podman("stop", "--time", "30", container.id)
        assert podman("inspect", "--format", "{{.State.ExitCode}}", container.id).strip() == "0"
    with running(podman, server_image, (*options, *settings)) as container:
        container.http.headers.update(key.headers)
        assert generated(container, adapter_id="mine", rank=2).status_code == 200


def test_another_model_is_served_with_keys_only(podman: Podman, server_image: str) -> None:
    told = podman("run", "--rm", server_image, "--model", "/models/mine", may_fail=True)
    assert "there are no API keys" in told
    told = podman("run", "--rm", "--env", "DYLORA_MODEL=/models/mine", server_image, may_fail=True)
    assert "there are no API keys" in told


def test_a_model_can_be_mounted(podman: Podman, server_image: str) -> None:
    demo = ROOT / "adapters/demo/artifacts/base"
    options = (*LOCKED_DOWN, "--volume", f"{demo}:/models/mine:ro")
    with running(podman, server_image, options, ("--model", "/models/mine", "--allow-open")) as container:
        assert container.http.get("/info").json()["model_id"] == "/models/mine"
        assert container.http.get("/adapters").json() == []
        assert generated(container).status_code == 200


def test_the_kernels_are_in_the_image_and_no_compiler(podman: Podman, server_image: str) -> None:
    script = "from service.engine.native.kernels import kernels; print(kernels() is not None)"
    assert podman("run", "--rm", "--entrypoint", "python", server_image, "-c", script).strip() == "True"


def test_no_layer_holds_pips_settings_or_a_tool_to_install(podman: Podman, server_image: str) -> None:
    history = podman("history", "--no-trunc", server_image)
    assert "index-url=" not in history
    script = "ls /etc/pip.conf /run/secrets /src; command -v pip gcc g++ curl; find / -xdev -name pip.conf; true"
    found = podman("run", "--rm", "--entrypoint", "sh", server_image, "-c", f"({script}) 2>/dev/null")
    assert found.split() == []
