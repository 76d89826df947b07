"""Logs: one line per event, text or JSON. No prompt, no generated text and no key ever goes in."""

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime

from service.settings import LogFormat, LogLevel

logger = logging.getLogger("dylora")
"""The service's own logger; `configure` decides where it goes."""

_PLAIN = re.compile(r"[\w.:/@+\-]+", re.ASCII)


class Entry:
    """What a line tells: a few constant words, and fields. To be logged as it is: `logger.info(entry(...))`."""

    def __init__(self, words: str, fields: Mapping[str, object]) -> None:
        self.words = words
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return " ".join((self.words, *(f"{name}={_quoted(value)}" for name, value in self.fields.items())))


def entry(words: str, /, **fields: object) -> Entry:
    """An entry; fields that are None are left out."""
    return Entry(words, fields)


def _quoted(value: object) -> str:
    """A value of a text line; what is not plain becomes JSON, so that no value can forge a line or a field."""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = record.msg if isinstance(record.msg, Entry) else Entry(record.getMessage().strip(), {})
        if record.exc_info and record.exc_info[0] is not None:
            # Without the exception's own message: that of a library may quote what it was given, a prompt.
            frames = "".join(traceback.format_tb(record.exc_info[2]))
            said = Entry(said.words, {**said.fields, "exception": record.exc_info[0].__qualname__, "traceback": frames})
        return self.line(at, record.levelname.lower(), said)

    def line(self, at: str, level: str, said: Entry) -> str:
        return f"{at} {level} {said}"


class _JsonFormatter(_Formatter):
    def line(self, at: str, level: str, said: Entry) -> str:
        return json.dumps({"time": at, "level": level, "message": said.words, **said.fields}, default=str)


def configure(level: LogLevel, form: LogFormat = LogFormat.TEXT) -> None:
    """Write the messages of the service, of uvicorn and of tracing to stderr, and the warnings of other libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if form is LogFormat.JSON else _Formatter())
    for name in ("dylora", "uvicorn", "opentelemetry"):
        each = logging.getLogger(name)
        each.handlers = [handler]
        each.setLevel(level.upper())
        each.propagate = False
    if level is LogLevel.INFO:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop are told in our own words
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)
    for name in ("transformers", "huggingface_hub"):
        each = logging.getLogger(name)  # they come with handlers of their own
        each.handlers, each.propagate = [], True
