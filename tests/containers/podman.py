"""Podman with a storage of its own: nothing of the user's is touched, and nothing is left behind.

It runs as root, or rootless, without systemd: runtime runc, cgroups by cgroupfs, limits that need no privilege to set.
"""

import ast
import os
import resource
import ssl
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile={nofile}:{nofile}", "nproc={nproc}:{nproc}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{root}/tmp"
[network]
network_config_dir = "{root}/networks"
"""

_STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{root}/storage"
runroot = "{root}/run"
"""

_MAX_NOFILE = 20_000
_MAX_NPROC = 4096
_BUILD_S = 2400
_PIP_KEYS = ("index-url", "extra-index-url", "find-links", "trusted-host", "timeout")


class Podman:
    """Runs podman, buildah's builds and podman-compose. `remove_all` at the end.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("tmp", "networks"):
            (root / name).mkdir()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        nofile = _MAX_NOFILE if allowed == resource.RLIM_INFINITY else min(_MAX_NOFILE, allowed)
        files = {
            "CONTAINERS_CONF": ("containers.conf", _CONTAINERS_CONF.format(root=root, nofile=nofile, nproc=_MAX_NPROC)),
            "CONTAINERS_STORAGE_CONF": ("storage.conf", _STORAGE_CONF.format(root=root)),
        }
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("DYLORA_")}
        for variable, (name, content) in files.items():
            (root / name).write_text(content)
            self._environment[variable] = str(root / name)

    def __call__(self, *arguments: str, timeout_s: float = 120, may_fail: bool = False) -> str:
        """What `podman ARGUMENTS` prints to stdout, and to stderr if it fails."""
        return self._run(("podman", *arguments), {}, timeout_s, may_fail)

    def logs(self, container: str) -> str:
        """What a container has printed, to stdout and stderr."""
        return self._run(("podman", "logs", container), {}, 60, False, stderr=subprocess.STDOUT)

    def compose(self, file: Path, *arguments: str, environment: Mapping[str, str], timeout_s: float = 180) -> str:
        """What `podman-compose -f FILE ARGUMENTS` prints."""
        command = (sys.executable, "-m", "podman_compose", "-f", str(file), *arguments)
        return self._run(command, environment, timeout_s, False)

    def build(self, context: Path, tag: str, build_args: Mapping[str, str] = MappingProxyType({})) -> None:
        """Build an image with this machine's pip settings and CA certificates, which stay out of its layers."""
        pip = PipSettings.of_this_machine()
        (self._root / "pip.conf").write_text(pip.conf)
        command = ["build", "--isolation", "chroot", "--format", "docker", "--tag", tag]
        command += ["--secret", f"id=pip_conf,src={self._root / 'pip.conf'}"]
        if pip.ca_bundle is not None:
            command += ["--secret", f"id=ca_bundle,src={pip.ca_bundle}"]
        for folder in pip.folders:
            command += ["--volume", f"{folder}:{folder}:ro"]
        for name, value in build_args.items():
            command += ["--build-arg", f"{name}={value}"]
        self(*command, str(context), timeout_s=_BUILD_S)

    def remove_all(self) -> None:
        """End and remove every container and image of this storage, and what is still mounted of it."""
        self("system", "reset", "--force", may_fail=True)
        mounted = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
        for folder in reversed([each for each in mounted if Path(each).is_relative_to(self._root)]):
            subprocess.run(["umount", "--lazy", folder], check=False)

    def _run(
        self,
        command: tuple[str, ...],
        environment: Mapping[str, str],
        timeout_s: float,
        may_fail: bool,
        stderr: int = subprocess.PIPE,
    ) -> str:
        everything = {**self._environment, **environment}
        pipe = subprocess.PIPE
        done = subprocess.run(command, env=everything, stdout=pipe, stderr=stderr, text=True, timeout=timeout_s, check=False)
        if done.returncode == 0:
            return done.stdout
        output = done.stdout + (done.stderr or "")
        assert may_fail, f"{' '.join(command)}: {done.returncode}\n{output[-8000:]}"
        return output


@dataclass(frozen=True)
class PipSettings:
    """Where pip finds packages on this machine.

    Attributes:
        conf: its settings, as a pip.conf.
        folders: local folders that they name.
        ca_bundle: the certificates it trusts, if there are any.
    """

    conf: str
    folders: tuple[str, ...]
    ca_bundle: str | None

    @classmethod
    def of_this_machine(cls) -> "PipSettings":
        """What `pip config list` says, files and environment together."""
        command = (sys.executable, "-m", "pip", "config", "list")
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        settings = {}
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            settings[name.rpartition(".")[2]] = str(ast.literal_eval(value)).split()
        found = {name: settings[name] for name in _PIP_KEYS if name in settings}
        conf = "[global]\n" + "".join(f"{name} = {' '.join(values)}\n" for name, values in found.items())
        places = [Path(each) for each in found.get("find-links", [])]
        for index in (*found.get("index-url", []), *found.get("extra-index-url", [])):
            if index.startswith("file://"):
                places.append(Path(index.removeprefix("file://")).parent)  # its pages point to files beside it
        folders = tuple(dict.fromkeys(str(place) for place in places if place.is_absolute() and place.is_dir()))
        return cls(conf, folders, next(iter(settings.get("cert", [])), ssl.get_default_verify_paths().cafile))
