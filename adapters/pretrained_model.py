"""What every loading of a transformers model shares: only safetensors are read, no code that comes with a model is run, what
its files lack is known by name, and what transformers raises is one line.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from adapters.adapter import Adapter
from adapters.errors import AdapterError, InvalidAdapter

LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)
"""What transformers is known to raise for files that it can't use."""


def first_line(error: Exception) -> str:
    """What an error says in its first line that says something, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Loaded:
    """A model from its files.

    Attributes:
        missing: names of the parameters that they lack, so that they are random now.
        mismatched: of those that they hold in another shape, which are random as well.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]

    @property
    def random(self) -> tuple[str, ...]:
        """Names of all parameters that did not come from the files."""
        return (*self.missing, *self.mismatched)


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a model, by its folder or its name on the hub."""
    return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by its folder or its name on the hub."""
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)


def load_pretrained(loader: Any, name: str, **options: Any) -> Loaded:
    """A model, by its folder or its name on the hub.

    Args:
        loader: transformers' class that has the head it needs.
        options: further ones of `from_pretrained`.
    """
    model, info = loader.from_pretrained(
        name,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    mismatched = tuple(sorted(str(key[0]) for key in info["mismatched_keys"]))
    return Loaded(model, tuple(sorted(info["missing_keys"])), mismatched)


def load_for(adapter: Adapter, loader: Any, name: str, config: Any, dtype: torch.dtype | None = None) -> Loaded:
    """A base in eval mode, for an adapter that may bring what the base lacks: the head of a classifier, as a rule.

    Args:
        config: its own, perhaps changed.
        dtype: of the weights; as they are stored if None.

    Raises:
        InvalidAdapter: there are weights that neither of them has.
    """
    loaded = load_pretrained(loader, name, config=config, dtype="auto" if dtype is None else dtype)
    lacking = sorted({*loaded.random} - set(adapter.saved_modules))
    if lacking:
        raise InvalidAdapter([f"{key}: neither the base model {name} nor the adapter has it trained" for key in lacking])
    loaded.model.train(False).requires_grad_(False)
    return loaded


@contextmanager
def refused(what: str, kind: type[AdapterError] = AdapterError) -> Iterator[None]:
    """Turn whatever transformers raises for a model that it can't use into an error of ours: `what`, and why, in one line."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise kind(f"{what}: {first_line(error)}") from error


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
