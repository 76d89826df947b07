"""What every loading of a transformers model shares: one line for what it raises, and no chatter."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers.utils import logging

from adapters.errors import AdapterError

LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)
"""What transformers is known to raise for files that it can't use."""


def first_line(error: Exception) -> str:
    """What an error says in its first line that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a model that it can't use into an AdapterError: `what`, and why, in one line."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise AdapterError(f"{what}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of a new classifier, whose weights the adapter brings; bars on a terminal only."""
    before, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if has_bars:
            logging.enable_progress_bar()
