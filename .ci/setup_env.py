"""Make .venv: the pinned dependencies, the torch build that fits the machine, and this project in place.

Run by `make setup`. Needs nothing but the standard library. It may be run at any time and by several at once: they take
turns, what is done is not done again, and what an interruption left undone is completed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
READY = VENV / ".ready"
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())
UV = "uv==0.13.9"  # only fetched where pip does not find a CPU build of torch
BUILD_BACKEND = ("hatchling", "editables")

LOCK_HEADER = """\
# Every package of the environment and of the extra `ray`, at the version that is tested. Made by `make lock`; torch is
# raised here by hand, without a local label such as +cpu, because .ci/setup_env.py picks the build.
"""


def main() -> None:
    """Bring .venv up to date, or with --lock bring constraints.txt up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--lock", action="store_true", help="write the newest fitting versions to constraints.txt")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever names PYTHON by hand may name an old one)
        sys.exit(f"Python 3.11 or later is needed; {sys.executable} is {sys.version.split()[0]}")
    if options.lock:
        lock()
        return
    with (ROOT / "pyproject.toml").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        setup(options.torch)


def setup(torch_choice: str) -> None:
    """Run the steps that are not done yet."""
    digest = hashlib.sha256(b"\0".join([p.read_bytes() for p in INPUTS] + [torch_choice.encode()])).hexdigest()
    if is_ready(digest):
        READY.touch()
        return
    started = time.monotonic()
    READY.unlink(missing_ok=True)
    make_venv()
    install_torch(with_gpu=has_gpu() if torch_choice == "auto" else torch_choice == "gpu")
    say("3/4 the other pinned packages")
    pip("install", "-c", str(CONSTRAINTS), *BUILD_BACKEND)
    pip("install", "-c", str(CONSTRAINTS), "--no-build-isolation", "-e", f"{ROOT}[dev]")
    say("4/4 checking that they fit together")
    pip("check")
    partial = READY.with_suffix(".partial")
    partial.write_text(digest)
    partial.replace(READY)
    say(f"done in {time.monotonic() - started:.0f} s: {VENV}")


def is_ready(digest: str) -> bool:
    """True if .venv was completed from exactly these inputs."""
    return READY.is_file() and READY.read_text() == digest and is_sound()


def is_sound() -> bool:
    """True if .venv runs, with a pip, on the Python version that runs this script."""
    program = "import sys, pip; print(sys.version_info[:2])"
    try:
        done = subprocess.run([VENV_PYTHON, "-c", program], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == str(sys.version_info[:2])


def make_venv() -> None:
    """A virtual environment with pip in it; one that is broken or of another Python is made anew."""
    if is_sound():
        return
    say(f"1/4 virtual environment of Python {sys.version.split()[0]}")
    if VENV.exists():
        shutil.rmtree(VENV)
    if subprocess.run([sys.executable, "-m", "venv", VENV], check=False).returncode != 0:
        sys.exit(f"{sys.executable} could not make a virtual environment (Debian and Ubuntu: install python3-venv)")


def has_gpu() -> bool:
    """True if the NVIDIA driver lists a device."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install_torch(*, with_gpu: bool) -> None:
    """The pinned torch: its CPU build where there is no GPU, because the other one is ten times the size."""
    version = pinned("torch")
    installed = installed_torch()
    if installed is not None and installed.split("+")[0] == version and not (with_gpu and installed.endswith("+cpu")):
        return
    if with_gpu:
        say(f"2/4 torch {version} for the GPU")
        pip("install", "-c", str(CONSTRAINTS), f"torch=={version},!={version}+cpu")
        return
    say(f"2/4 torch {version}, CPU build (no GPU found)")
    if pip("install", "-c", str(CONSTRAINTS), f"torch=={version}+cpu", may_fail=True):
        return
    say("    not where pip looks; asking uv, which knows where torch's CPU builds are")
    target = ("--python", str(VENV_PYTHON), "--torch-backend=cpu", "--no-deps", f"torch=={version}")
    if pip("install", UV, may_fail=True) and run([str(VENV / "bin" / "uv"), "pip", "install", *target], may_fail=True):
        return
    say("    not there either; taking the general build, which is large but runs on the CPU too")
    pip("install", "-c", str(CONSTRAINTS), f"torch=={version}")


def installed_torch() -> str | None:
    """Version of the torch in .venv with its local label, None if there is none."""
    program = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([VENV_PYTHON, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"{CONSTRAINTS} does not pin {package}")
    return found[1]


def lock() -> None:
    """Write what pip would choose for this project today to constraints.txt, without changing .venv."""
    torch = f"torch=={pinned('torch')}"
    command = (VENV_PYTHON, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-")
    wanted = (torch, *BUILD_BACKEND, f"{ROOT}[dev,ray]")
    report = json.loads(subprocess.run([*command, *wanted], check=True, stdout=subprocess.PIPE).stdout)
    chosen = (entry["metadata"] for entry in report["install"])
    found = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in chosen}
    # The general build of torch names its own GPU libraries exactly; where the lock is made must not matter.
    of_torch = re.compile(r"nvidia-|cuda-|triton")
    pins = [f"{name}=={version}" for name, version in found.items() if not of_torch.match(name)]
    pins = [torch if pin.startswith("torch==") else pin for pin in pins if not pin.startswith("dylora-serve==")]
    CONSTRAINTS.write_text(LOCK_HEADER + "\n".join(sorted(pins)) + "\n")
    say(f"{len(pins)} packages pinned in {CONSTRAINTS.name}; `make test` sets them up and tries them")


def pip(*arguments: str, may_fail: bool = False) -> bool:
    """Run .venv's pip, with its progress bars only where a person looks on."""
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    return run([str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", *quiet, *arguments], may_fail=may_fail)


def run(command: list[str], *, may_fail: bool) -> bool:
    """Run a command; True if it succeeded. A failure that may not be ends this script."""
    hidden = subprocess.DEVNULL if may_fail else None
    environment = {**os.environ, "PIP_NO_INPUT": "1"}
    returncode = subprocess.run(command, check=False, stderr=hidden, env=environment).returncode
    if returncode != 0 and not may_fail:
        sys.exit(f"[setup] failed: {' '.join(command)}")
    return returncode == 0


def say(text: str) -> None:
    """Tell the person who waits."""
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    main()
