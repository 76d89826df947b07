"""A whole server around FakeEngine: in process for most tests, behind a real socket where the network matters."""

import io
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.testclient import TestClient

from adapters.adapter import Adapter
from adapters.checkpoint import CONFIG_FILE, TENSORS_FILE, write_peft
from adapters.config import AdapterKind
from adapters.limits import CheckpointLimits
from adapters.quality import QUALITY_FILE, Metric, QualityProfile
from adapters.store.store import AdapterStore
from service.http.app import create_app
from service.http.metrics import Metrics
from service.http.server import DrainingServer
from service.http.services import Services
from service.http.tracing import Tracing
from service.settings import Settings
from tests.checkpoints import random_adapter
from tests.fake_engine import FakeEngine

PROFILE = QualityProfile((Metric("bleu", True, {1: 40.0, 2: 59.0, 3: 59.8, 4: 60.0}),), "a made-up set")
"""Within one percent of the best from rank 3 on."""


def adapter(kind: AdapterKind = AdapterKind.DYLORA, *, seed: int = 0, quality: QualityProfile | None = PROFILE) -> Adapter:
    """An adapter of rank 4."""
    return replace(random_adapter(kind, r=4, seed=seed), quality=quality)


def folder_of(adapter: Adapter, folder: Path) -> Path:
    """The adapter's PEFT checkpoint, in a folder."""
    write_peft(adapter, folder)
    return folder


def files_of(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    """A checkpoint as the files of a multipart upload."""
    names = {"config": CONFIG_FILE, "model": TENSORS_FILE, "quality": QUALITY_FILE}
    kind = "application/octet-stream"
    return {part: (n, (folder / n).read_bytes(), kind) for part, n in names.items() if (folder / n).exists()}


def zip_of(folder: Path) -> bytes:
    """A checkpoint as a zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return buffer.getvalue()


@dataclass
class Server:
    """A running server and what is behind it."""

    client: httpx.Client
    engine: FakeEngine
    services: Services
    store: AdapterStore

    def generate(self, inputs: str = "hello", headers: dict[str, str] | None = None, **parameters: Any) -> httpx.Response:
        """POST /generate."""
        return self.client.post("/generate", json={"inputs": inputs, "parameters": parameters}, headers=headers)

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a series now."""
        return self.services.metrics.registry.get_sample_value(name, labels)


@contextmanager
def parts(
    root: Path,
    *,
    engine: FakeEngine | None = None,
    stored: dict[str, Adapter] | None = None,
    tracing: Tracing | None = None,
    **settings: Any,
) -> Iterator[tuple[FastAPI, FakeEngine, AdapterStore]]:
    """An application with some adapters in its store."""
    configured = Settings.load({"adapters_dir": root / "store", "latency_sweep_s": 0, **settings})
    metrics = Metrics(configured.metrics_max_adapters)
    engine = engine or FakeEngine(metrics)
    limits = CheckpointLimits(max_rank=configured.max_rank, max_bytes=configured.max_adapter_bytes)
    with AdapterStore(
        configured.adapters_dir,
        max_adapters=configured.max_adapters,
        max_total_bytes=configured.max_store_bytes,
        limits=limits,
        is_shared=configured.adapters_shared,
    ) as store:
        for name, each in ({"demo": adapter()} if stored is None else stored).items():
            store.put(name, folder_of(each, root / "made" / name))
        yield create_app(configured, engine, store, metrics, tracing=tracing), engine, store


@contextmanager
def in_process(root: Path, *, wait: bool = True, **options: Any) -> Iterator[Server]:
    """A server without a socket."""
    with parts(root, **options) as (app, engine, store), TestClient(app, raise_server_exceptions=False) as client:
        services = app.state.services
        assert not wait or services.registry.wait_loaded(10)
        yield Server(client, engine, services, store)  # type: ignore[arg-type]


@contextmanager
def on_socket(root: Path, *, drain_timeout_s: float = 10, **options: Any) -> Iterator[tuple[Server, DrainingServer]]:
    """A server behind a real socket, in a thread."""
    with parts(root, **options) as (app, engine, store):
        server = DrainingServer(app, "127.0.0.1", 0, drain_timeout_s)
        started = threading.Event()
        startup = server.startup

        async def tell(*args: Any, **kwargs: Any) -> None:
            await startup(*args, **kwargs)
            started.set()

        server.startup = tell  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert started.wait(10)
            assert app.state.services.registry.wait_loaded(10)
            with httpx.Client(base_url=f"http://127.0.0.1:{server.bound_port()}", timeout=20) as client:
                yield Server(client, engine, app.state.services, store), server
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@contextmanager
def unread(url: str | httpx.URL, route: str, body: object) -> Iterator[None]:
    """A client that has sent a request and goes away, at the end of the block, without having read anything."""
    url, content = httpx.URL(url), json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((url.host, url.port or 0), timeout=20) as connection:
        connection.sendall(head.encode() + content)
        yield
