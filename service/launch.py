"""Puts a server together from its settings, and runs it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fastapi import FastAPI
from transformers.utils import logging as transformers_logging

from adapters.limits import CheckpointLimits
from adapters.store.store import AdapterStore
from service import allocator, demo, log
from service.core import EngineObserver, EngineProtocol
from service.engine.engine import Engine
from service.engine.model import load_model
from service.engine.observers import EngineObservers
from service.engine.options import EngineOptions
from service.http import server
from service.http.app import create_app
from service.http.metrics import Metrics
from service.http.scrapes import Scrapes
from service.http.tenants import Tenants
from service.http.tracing import Tracing
from service.rank.auto_rank import AutoRank
from service.settings import DEMO_MODEL, Device, Dtype, Settings, SettingsError, variable

EngineFactory = Callable[[Settings, EngineObserver], EngineProtocol]


def serve(settings: Settings, make_engine: EngineFactory) -> int:
    """Serve until a signal; the exit status. Raises what `application` raises."""
    with application(settings, make_engine) as app:
        return server.run(app, host=settings.host, port=settings.port, drain_timeout_s=settings.drain_timeout_s)


@contextmanager
def application(settings: Settings, make_engine: EngineFactory, scrapes: Scrapes | None = None) -> Iterator[FastAPI]:
    """Load the model, open the store and put an application together, whose lifespan has not begun; all closed at the end.

    Args:
        settings: of this server.
        make_engine: makes the engine.
        scrapes: as `create_app` has it.

    Raises:
        ModelRefused: the model can't be served.
        SettingsError: the adapters' folder, the API keys or what OTEL_ variables ask for can't be used.
        AdapterError: another process owns it.
    """
    allocator.share_one_heap()
    log.configure(settings.log_level, settings.log_format)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # it would be a line of the log
    tenants, tracing = Tenants.of(settings), Tracing.from_environment()
    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        signal.signal(signal.SIGHUP, lambda number, frame: tenants.reload())  # until the server sets its own
    if tenants.is_open:
        log.logger.info(log.entry("no API keys: everybody who can connect may do everything", host=settings.host))
    with _open_store(settings) as store:
        metrics = Metrics(settings.metrics_max_adapters)
        log.logger.info(log.entry("loading model", model=settings.model))
        auto_rank = AutoRank.of(settings)
        engine = make_engine(settings, EngineObservers(metrics, auto_rank))
        model = engine.model
        log.logger.info(log.entry("model loaded", parameters=model.parameters, device=model.device, dtype=model.dtype))
        if settings.demo_adapters and settings.model == DEMO_MODEL:
            demo.preload(store, settings.adapters_dir, demo.demo_adapter_folders())
        try:
            yield create_app(settings, engine, store, metrics, tenants, tracing, auto_rank, scrapes)
        finally:
            engine.stop()
            if tracing is not None:
                tracing.close()


def _open_store(settings: Settings) -> AdapterStore:
    limits = CheckpointLimits(max_rank=settings.max_rank, max_bytes=settings.max_adapter_bytes)
    try:
        return AdapterStore(
            settings.adapters_dir,
            max_adapters=settings.max_adapters,
            max_total_bytes=settings.max_store_bytes,
            limits=limits,
            is_shared=settings.adapters_shared,
        )
    except OSError as error:
        raise SettingsError(f"adapters_dir ({variable('adapters_dir')}): {error}") from None


def real_engine(settings: Settings, observer: EngineObserver) -> EngineProtocol:
    """The engine that runs the settings' model.

    Raises:
        ModelRefused: the model can't be served.
        SettingsError: there is no such folder or device, or a revision of what has none.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.model.startswith(("/", "./", "../")) and not Path(settings.model).is_dir():
        raise SettingsError(f"model ({variable('model')}): there is no folder {settings.model!r}")
    if settings.revision is not None and (settings.model == DEMO_MODEL or Path(settings.model).is_dir()):
        raise SettingsError(
            f"revision ({variable('revision')}): {settings.revision!r} is not legal: {settings.model!r} is no model of "
            "the hub, and only these have revisions"
        )
    device = _device(settings.device)
    loaded = load_model(
        str(demo.demo_model_folder()) if settings.model == DEMO_MODEL else settings.model,
        display_name=settings.model,
        revision=settings.revision,
        dtype=_dtype(settings.dtype, device),
        device=device,
        max_context_tokens=settings.max_context_tokens,
    )
    options = EngineOptions(
        max_running=settings.max_running_requests,
        max_waiting=settings.max_waiting_requests,
        max_batch_tokens=settings.max_batch_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_block_tokens=settings.kv_block_tokens,
        prefix_cache=settings.prefix_cache,
        merged_cache_bytes=settings.merged_cache_bytes,
        merge_after_steps=settings.merge_after_steps,
        compile=settings.compile,
    )
    return Engine(loaded, options, observer)


def _device(wanted: Device) -> str:
    if wanted is Device.AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted is Device.CUDA and not torch.cuda.is_available():
        raise SettingsError(f"device ({variable('device')}): 'cuda' is not legal here: torch finds no GPU")
    return wanted.value


def _dtype(wanted: Dtype, device: str) -> torch.dtype | None:
    """None stands for the model's own."""
    if wanted is Dtype.AUTO:
        return torch.float32 if device == "cpu" else None
    dtype: torch.dtype = getattr(torch, wanted.value)
    return dtype
