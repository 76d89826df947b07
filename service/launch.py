"""Puts a server together from its settings, and runs it."""

import importlib
from collections.abc import Callable

from adapters.limits import CheckpointLimits
from adapters.store import AdapterStore
from service import demo, log, server
from service.app import create_app
from service.core import EngineObserver, EngineProtocol
from service.metrics import Metrics
from service.settings import DEMO_MODEL, Settings, SettingsError, variable

EngineFactory = Callable[[Settings, EngineObserver], EngineProtocol]


def serve(settings: Settings, make_engine: EngineFactory) -> int:
    """Load the model, open the store, serve until a signal; the exit status.

    Raises:
        ModelRefused: the model can't be served.
        SettingsError: the adapters' folder can't be used.
        AdapterError: another process owns it.
    """
    log.configure(settings.log_level)
    with _open_store(settings) as store:
        metrics = Metrics(settings.metrics_max_adapters)
        log.logger.info("%s", "loading model " + log.pairs(model=settings.model))
        engine = make_engine(settings, metrics)
        facts = log.pairs(parameters=engine.model.parameters, device=engine.model.device, dtype=engine.model.dtype)
        log.logger.info("%s", "model loaded " + facts)
        if settings.demo_adapters and settings.model == DEMO_MODEL:
            demo.preload(store, settings.adapters_dir, demo.demo_adapter_folders())
        app = create_app(settings, engine, store, metrics)
        try:
            return server.run(app, host=settings.host, port=settings.port, drain_timeout_s=settings.drain_timeout_s)
        finally:
            engine.stop()


def _open_store(settings: Settings) -> AdapterStore:
    limits = CheckpointLimits(max_rank=settings.max_rank, max_bytes=settings.max_adapter_bytes)
    try:
        return AdapterStore(
            settings.adapters_dir,
            max_adapters=settings.max_adapters,
            max_total_bytes=settings.max_store_bytes,
            limits=limits,
        )
    except OSError as error:
        raise SettingsError(f"adapters_dir ({variable('adapters_dir')}): {error}") from None


def real_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
    """The engine that runs the settings' model. Raises ModelRefused."""
    engine: EngineProtocol = importlib.import_module("service.engine").Engine.from_settings(settings, observer)
    return engine
