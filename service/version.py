"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("dylora-serve")
    except PackageNotFoundError:
        return "0+source"  # run from a checkout that was never installed


VERSION = _installed()
