"""What a log line looks like; what goes into it is tested where it is logged."""

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from service.log import configure, entry, logger
from service.settings import LogFormat, LogLevel

SECRET = "a secret prompt"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """`configure` changes loggers of this process."""
    names = ("dylora", "uvicorn", "opentelemetry", "transformers", "huggingface_hub")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    yield
    logging.captureWarnings(False)
    for name, (handlers, propagates) in before.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagates
        logging.getLogger(name).setLevel(logging.NOTSET)


def logged(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> str:
    configure(LogLevel.INFO, form)
    logger.debug(entry("not told"))
    logger.info(entry("request", adapter="x y=1\nz", rank=4, seconds=0.51234, absent=None, note='"'))
    try:
        raise KeyError(SECRET)
    except KeyError:
        logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=sys.exc_info())
    return capsys.readouterr().err


def test_a_line_of_text_can_not_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = logged(LogFormat.TEXT, capsys).splitlines()
    assert first.partition(" ")[2] == r'info request adapter="x y=1\nz" rank=4 seconds=0.5123 note="\""'
    assert " exception=KeyError traceback=" in second


def test_a_line_of_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (json.loads(line) for line in logged(LogFormat.JSON, capsys).splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info", "message": "request", "adapter": "x y=1\nz", "rank": 4, "seconds": 0.51234, "note": '"'
    }  # fmt: skip
    assert (second["message"], second["exception"]) == ("Exception in ASGI application", "KeyError")
    assert "test_log.py" in second["traceback"]


@pytest.mark.parametrize("form", LogFormat)
def test_an_exception_is_told_without_what_it_quotes(form: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    assert "secret" not in logged(form, capsys)
