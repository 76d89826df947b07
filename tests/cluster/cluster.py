"""docker/serve.yaml on this machine: a small Ray with two replicas of the demo."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml

from loadtests.server_process import free_port
from tests.documents import ROOT
from tests.e2e.tiny_server import wait_until

CONFIG = ROOT / "docker" / "serve.yaml"
REPLICAS = 2
_START_S = 120


@dataclass(frozen=True)
class Proxy:
    """What stands before the replicas, told as the page says to keep requests together that name an adapter in the header.

    Attributes:
        environment: of Ray's processes.
        deployment: what the config says of the deployment besides.
    """

    environment: Mapping[str, str]
    deployment: Mapping[str, object]


PROXIES = {
    "Serve's own": Proxy(
        {"RAY_SERVE_SESSION_ID_HEADER_KEY": "X-LoRA-Adapter"},
        {
            "request_router_config": {
                "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
            }
        },
    ),
    "HAProxy": Proxy(
        {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "hdr(X-LoRA-Adapter)"},
        {},
    ),
}


class Cluster:
    """The config with other settings, run until the `with` block ends.

    Args:
        proxy: what stands before the replicas.
        folder: for the config and Ray's output.
        settings: arguments of the application.
        headers: of a request that may do everything.
    """

    def __init__(self, proxy: Proxy, folder: Path, settings: Mapping[str, object], headers: Mapping[str, str]) -> None:
        self.port = free_port()
        self._proxy = proxy
        self._folder = folder
        self._config = yaml.safe_load(CONFIG.read_text())
        self._config["http_options"] = {"host": "127.0.0.1", "port": self.port}
        self._config["applications"][0]["args"] |= settings
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, headers=dict(headers))

    def __enter__(self) -> Self:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("DYLORA_", "RAY_", "OMP_"))}
        environment |= {
            "HOME": str(self._folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # HAProxy is told of a replica's end in less
            **self._proxy.environment,
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.ray_process"],
                cwd=ROOT,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            self.deploy()
            wait_until(lambda: len(self.replicas()) == REPLICAS, _START_S)
        except BaseException as error:
            self._end()
            error.add_note((self._folder / "log").read_text(errors="replace")[-8000:])
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def deploy(self, settings: Mapping[str, object] | None = None, user_config: object = None) -> None:
        """Hand Serve the config, with some settings changed; it is not in force yet."""
        config = copy.deepcopy(self._config)
        application = config["applications"][0]
        application["args"] |= settings or {}
        application["deployments"][0] |= {**self._proxy.deployment, "user_config": user_config}
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.strip() == "deployed":
                return
        raise RuntimeError(f"Ray ended with {process.wait()}")

    def replicas(self) -> set[str]:
        """Names of those that answer."""
        with suppress(httpx.TransportError):
            return set(re.findall(r'dylora_kv_blocks\{replica="(\w+)"', self.http.get("/metrics").text))
        return set()

    def from_each(self, ask: Callable[[], httpx.Response]) -> dict[str, httpx.Response]:
        """The first answer of each replica, once every one has given one."""
        answers: dict[str, httpx.Response] = {}

        def all_have_answered() -> bool:
            answer = ask()
            answers.setdefault(answer.headers["x-replica"], answer)
            return len(answers) == REPLICAS

        wait_until(all_have_answered, 30)
        return answers

    def generate(self, inputs: str, headers: Mapping[str, str] | None = None, **parameters: Any) -> httpx.Response:
        """POST /generate."""
        return self.http.post("/generate", json={"inputs": inputs, "parameters": parameters}, headers=dict(headers or {}))

    def processes(self) -> list[psutil.Process]:
        """Those of the replicas."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [each for each in children if "".join(each.cmdline()[:1]).startswith("ray::ServeReplica")]

    def _end(self) -> None:
        self.http.close()
        children = psutil.Process(self._process.pid).children(recursive=True)
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
