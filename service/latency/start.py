"""The latency model at start-up: from what an earlier start measured, else from a sweep."""

import time
from collections.abc import Callable

from service.core import EngineProtocol
from service.latency.cache import cache_path, read_statistics, write_statistics
from service.latency.sweep import sweep
from service.log import entry, logger
from service.rank.latency_model import LatencyModel
from service.settings import Settings


def prepare(model: LatencyModel, engine: EngineProtocol, settings: Settings, should_stop: Callable[[], bool]) -> None:
    """Give the model something to predict by before the first request; without a sweep it learns from requests alone.

    Args:
        model: an observer of the engine.
        engine: started.
        should_stop: ends the sweep early.
    """
    if not settings.latency_sweep_s:
        return
    path = cache_path(settings, engine.model)
    try:
        known = read_statistics(path)
    except ValueError as error:
        logger.warning(entry("the measured latencies can't be read, and are measured again", error=error))
        known = None
    if known is not None:
        model.adopt(known)
        logger.info(entry("latencies read", file=path))
        return
    started = time.monotonic()
    done = sweep(
        engine,
        max_running=settings.max_running_requests,
        seconds=settings.latency_sweep_s,
        should_stop=should_stop,
        progress=_log_progress,
    )
    statistics = model.statistics()
    model.adopt(statistics)
    steps = int(sum(each.steps for each in statistics.values()))
    logger.info(entry("latencies measured", waves=done, steps=steps, seconds=time.monotonic() - started))
    if should_stop() or not model.is_ready:
        return
    try:
        write_statistics(path, statistics)
    except OSError as error:
        logger.warning(entry("the measured latencies can't be kept", error=error))


def _log_progress(done: int, of: int) -> None:
    if done % 6 == 0:
        logger.info(entry("measuring latencies", waves=done, of=of))
