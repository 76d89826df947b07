"""The images that the stories run: ours, built from the Dockerfile, and a Prometheus from the machine's own."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.podman import Podman

ROOT = Path(__file__).resolve().parents[2]
BASE, SERVER, PROMETHEUS = "localhost/dylora-base", "localhost/dylora-serve", "localhost/prometheus"

_NEEDED = {"podman": "podman", "runc": "runc", "prometheus": "prometheus", "promtool": "prometheus", "mmdebstrap": "mmdebstrap"}
"""Programs, and the Debian packages that bring them."""
_FOR_NETWORKS = "containernetworking-plugins golang-github-containernetworking-plugin-dnsname"
_PROMETHEUS_FILE = f"""\
FROM {BASE}
COPY prometheus promtool /usr/bin/
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534
ENTRYPOINT ["/usr/bin/prometheus"]
"""


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman with an empty storage. Fails with what is missing: who asks for these tests wants them run."""
    missing = {package for program, package in _NEEDED.items() if shutil.which(program) is None}
    if missing - ({"mmdebstrap"} if "BASE_IMAGE" in os.environ else set()):
        packages = " ".join([*sorted(missing), _FOR_NETWORKS])
        pytest.fail(f"these tests need programs that are not here; Debian has them: apt-get install {packages}", pytrace=False)
    if importlib.util.find_spec("podman_compose") is None:
        pytest.fail("not installed: podman-compose (`make setup` does)", pytrace=False)
    podman = Podman(tmp_path_factory.mktemp("podman"))
    try:
        yield podman
    finally:
        podman.remove_all()


@pytest.fixture(scope="session")
def base_image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    """BASE_IMAGE from a registry if that is set, else a Debian made here from its packages."""
    if reference := os.environ.get("BASE_IMAGE"):
        podman("pull", reference, timeout_s=600)
        podman("tag", reference, BASE)
        return BASE
    tar = tmp_path_factory.mktemp("base") / "base.tar"
    include = "--include=python3,python3-venv,ca-certificates"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", str(tar)], check=True, timeout=900)
    podman("import", str(tar), BASE)
    tar.unlink()
    return BASE


@pytest.fixture(scope="session")
def server_image(podman: Podman, base_image: str) -> str:
    """The Dockerfile's image."""
    podman.build(ROOT, SERVER, {"BASE_IMAGE": base_image})
    return SERVER


@pytest.fixture(scope="session")
def prometheus_image(podman: Podman, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The machine's Prometheus, for where no registry has the official image."""
    context = tmp_path_factory.mktemp("prometheus")
    for name in ("prometheus", "promtool"):
        shutil.copy(str(shutil.which(name)), context / name)
    (context / "Dockerfile").write_text(_PROMETHEUS_FILE)
    podman.build(context, PROMETHEUS)
    return PROMETHEUS
