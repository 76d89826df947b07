"""Logs as one line of key=value pairs per event. No prompt and no generated text ever goes in."""

import json
import logging
import re
import sys
from datetime import UTC, datetime

from service.settings import LogLevel

logger = logging.getLogger("dylora")
"""The service's own logger; `configure` decides where it goes."""

_PLAIN = re.compile(r"[\w.:/@+\-]+", re.ASCII)


def pairs(**fields: object) -> str:
    """`key=value` pairs; whatever is not plain is quoted as JSON, so that no value can forge a line or a field."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)


def _quoted(value: object) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{at} {record.levelname.lower()} {record.getMessage()}"
        if record.exc_info:
            line += " " + pairs(trace=self.formatException(record.exc_info))
        return line


def configure(level: LogLevel) -> None:
    """Write the service's and uvicorn's messages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    for name in ("dylora", "uvicorn"):
        each = logging.getLogger(name)
        each.handlers = [handler]
        each.setLevel(level.upper())
        each.propagate = False
    if level is LogLevel.INFO:
        logging.getLogger("uvicorn").setLevel(logging.WARNING)  # its start and stop are told in our own words
