"""One tiny model, its adapters, and one server of it that the gentle stories share."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtests.server_process import ServerProcess
from tests.e2e.tiny_server import SMALL, Client, write_adapter, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Four plain LoRAs of rank 16 that say different things."""
    root = tmp_path_factory.mktemp("adapters")
    return tuple(write_adapter(root / str(seed), seed=seed) for seed in range(4))


@pytest.fixture(scope="session")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The shared server. A story leaves it running, and without adapters of its own."""
    root = tmp_path_factory.mktemp("server")
    settings = {**SMALL, "model": model_folder, "adapters_dir": root / "adapters", "max_adapter_bytes": "1MiB"}
    with ServerProcess(settings, root / "log") as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield Client(http)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server as `make serve` starts it, but for its port, its folder and the sweep. A story leaves it as it found it."""
    root = tmp_path_factory.mktemp("demo")
    with ServerProcess({"adapters_dir": root / "adapters", "threads": 1, "latency_sweep_s": 0}, root / "log") as server:
        yield server
