"""Environments for what can not be installed beside this project."""

import subprocess
import venv
from pathlib import Path


def own_environment(folder: Path, package: str) -> Path:
    """Make one with a package, from the registry that pip is set up for; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package], check=True)
    return python
