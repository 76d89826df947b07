"""The HTTP application: routes, errors and life cycle around one engine and one store."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adapters.errors import AdapterError
from adapters.store.store import AdapterStore
from service.core import EngineProtocol
from service.errors import InvalidRequest, ServiceError
from service.http.adapters.calibration import Calibrations
from service.http.adapters.following import Following
from service.http.adapters.registry import AdapterRegistry
from service.http.adapters.served_adapter import ServedAdapter
from service.http.asgi.auth import Authentication
from service.http.asgi.middleware import REQUEST_ID_HEADER, BodyLimit, CutOff, HeadAsGet, RequestIds
from service.http.asgi.refusals import refuse, refuse_error
from service.http.asgi.request_log import RequestLog
from service.http.asgi.request_spans import RequestSpans
from service.http.asgi.validation_text import describe, first_field, known_fields
from service.http.error_table import BUG, CLIENT_GONE, ERROR_TABLE, kind_of_status
from service.http.latencies import Latencies
from service.http.metrics import Metrics
from service.http.routes import adapters, generate, openai, ops, pages, quality, vllm
from service.http.scrapes import Scrapes
from service.http.services import Services
from service.http.shadow import ShadowScorer
from service.http.tenants import Tenants
from service.http.tracing import Tracing
from service.latency.start import prepare
from service.log import entry, logger
from service.rank.auto_rank import AutoRank
from service.settings import Settings
from service.version import VERSION


def create_app(
    settings: Settings,
    engine: EngineProtocol,
    store: AdapterStore,
    metrics: Metrics,
    tenants: Tenants | None = None,
    tracing: Tracing | None = None,
    auto_rank: AutoRank | None = None,
    scrapes: Scrapes | None = None,
) -> FastAPI:
    """Make the application. Its lifespan starts and stops the engine; who opened the store closes it.

    Args:
        engine: made, not started, with `metrics` and `auto_rank` as its observers.
        store: open; shared if the settings say so.
        tenants: those of the settings, unless given.
        tracing: makes a trace of each request; who made it closes it.
        auto_rank: chooses by latency; a new one, which predicts nothing unless the engine tells it, if not given.
        scrapes: tells Prometheus of other servers as well, where one route leads to them all.

    Raises:
        SettingsError: the API keys can't be read.
    """
    tenants = tenants or Tenants.of(settings)
    registry = AdapterRegistry(store, engine, metrics)
    auto_rank = auto_rank or AutoRank.of(settings)
    shadow = ShadowScorer(engine, metrics, settings.shadow_share)
    calibrations = Calibrations(engine, registry)
    latencies = Latencies()
    services = Services(
        settings,
        engine,
        registry,
        metrics,
        settings.policy_book(),
        tenants,
        auto_rank,
        shadow,
        calibrations,
        latencies,
        Following(registry, latencies.forget) if settings.adapters_shared else None,
        scrapes,
    )
    metrics.watch(engine.stats, registry.counts)
    app = FastAPI(
        title="dylora-serve",
        version=VERSION,
        summary="LLM inference where the LoRA rank is a run-time choice.",
        lifespan=_lifespan,
        docs_url=None,  # both would load scripts from elsewhere: routes.pages has a page of ours
        redoc_url=None,
    )
    app.state.services = services
    for routes in (generate, openai, vllm, adapters, quality, ops, pages):
        app.include_router(routes.router)
    app.add_exception_handler(ServiceError, _on_error)
    app.add_exception_handler(AdapterError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    # The last one added is the outermost: whoever has no key is told so before a byte of the body is read.
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Authentication, tenants=tenants)
    app.add_middleware(CutOff)
    app.add_middleware(RequestLog)
    if tracing is not None:
        app.add_middleware(RequestSpans, tracing=tracing)
    app.add_middleware(RequestIds)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.engine.start()
    # In the background, so that /health and /ready answer meanwhile and the base model serves at once.
    loading = asyncio.create_task(asyncio.to_thread(_load, services))
    following = asyncio.create_task(services.following.run()) if services.following is not None else None
    try:
        yield
    finally:
        services.draining.set()
        if following is not None:
            following.cancel()
            await asyncio.wait([following])
        await services.calibrations.stop()
        await asyncio.to_thread(services.engine.stop)
        await loading


def _load(services: Services) -> None:
    try:
        prepare(services.auto_rank.model, services.engine, services.settings, services.draining.is_set)
    except Exception as error:
        logger.exception(entry("measuring latencies failed; they are learned from requests", error=error))
    try:
        services.registry.load_all(_log_loaded, services.draining.is_set)
    except Exception as error:
        # /ready stays 503 and names no adapter as served: an operator sees it there and here.
        logger.exception(entry("loading the stored adapters failed", error=error))


def _log_loaded(served: ServedAdapter, done: int, of: int) -> None:
    line = entry("adapter loaded", adapter=served.name, done=done, of=of, state=served.state, problem=served.problem)
    (logger.warning if served.problem else logger.info)(line)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return refuse_error(request.scope, error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    findings = error.errors()
    known = known_fields(request.url.path)
    return refuse(request.scope, ERROR_TABLE[InvalidRequest], describe(findings, known), param=first_field(findings))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        # FastAPI's word for a body that Python's JSON reader gives up on: not UTF-8, or nested too deep.
        return refuse(request.scope, ERROR_TABLE[InvalidRequest], "body: not JSON: not UTF-8, or nested too deep")
    headers, message = dict(error.headers or {}), str(error.detail)
    where = f"{request.method[:20]} {request.url.path[:200]!r}"
    if error.status_code == 404:
        message = f"{where}: there is no such route; /docs has them all"
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        message = f"{where}: this route has no such method; legal: {headers['Allow']}"
    return refuse(request.scope, kind_of_status(error.status_code), message, headers)


def _allowed(request: Request) -> list[str]:
    """The methods of a path; a router knows those of one of its routes only."""
    paths = request.app.openapi()["paths"]
    matches = (re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path)), request.url.path) for path in paths)
    found = (methods for match, methods in zip(matches, paths.values(), strict=True) if match)
    names = {method.upper() for methods in found for method in methods} or {"GET"}  # the pages are not in the document
    return sorted(names | ({"HEAD"} if "GET" in names else set()))


async def _on_disconnect(request: Request, error: Exception) -> JSONResponse:
    return refuse(request.scope, CLIENT_GONE, "client disconnected")


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    request_id = request.state.request_id
    logger.error(entry("bug", request_id=request_id, path=request.url.path, error=type(error).__name__))
    message = f"internal error; the server's log has it under {request_id}"
    # Outside the middleware that adds the id to every other answer.
    return refuse(request.scope, BUG, message, {REQUEST_ID_HEADER: request_id})
