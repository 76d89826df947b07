"""The HTTP application: routes, errors and life cycle around one engine and one store."""

import asyncio
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
from service.errors import ServiceError
from service.http import routes_adapters, routes_generate, routes_ops
from service.http.error_table import error_body, kind_of
from service.http.metrics import Metrics
from service.http.middleware import REQUEST_ID_HEADER, BodyLimit, RequestIds
from service.http.registry import AdapterRegistry, ServedAdapter
from service.http.services import Services
from service.http.validation_text import describe
from service.log import logger, pairs
from service.settings import Settings
from service.version import VERSION


def create_app(settings: Settings, engine: EngineProtocol, store: AdapterStore, metrics: Metrics) -> FastAPI:
    """Make the application. Its lifespan starts and stops the engine; who opened the store closes it.

    Args:
        engine: made, not started, with `metrics` as its observer.
        store: open, of this process alone.
    """
    registry = AdapterRegistry(store, engine, metrics)
    services = Services(settings, engine, registry, metrics, settings.policy_book())
    metrics.watch(engine.stats, registry.counts)
    app = FastAPI(
        title="dylora-serve",
        version=VERSION,
        summary="LLM inference where the LoRA rank is a run-time choice.",
        lifespan=_lifespan,
        redoc_url=None,
    )
    app.state.services = services
    for router in (routes_generate.router, routes_adapters.router, routes_ops.router):
        app.include_router(router)
    app.add_exception_handler(ServiceError, _on_error)
    app.add_exception_handler(AdapterError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_adapter_bytes)
    app.add_middleware(RequestIds)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    services.engine.start()
    # In the background, so that /health and /ready answer meanwhile and the base model serves at once.
    loading = asyncio.create_task(asyncio.to_thread(_load, services))
    try:
        yield
    finally:
        services.draining.set()
        await asyncio.to_thread(services.engine.stop)
        await loading


def _load(services: Services) -> None:
    try:
        services.registry.load_all(_log_loaded, services.draining.is_set)
    except Exception:
        # /ready stays 503 and names no adapter as served: an operator sees it there and here.
        logger.exception("loading the stored adapters failed")


def _log_loaded(served: ServedAdapter, done: int, of: int) -> None:
    line = pairs(adapter=served.name, done=done, of=of, state=served.state, problem=served.problem)
    (logger.warning if served.problem else logger.info)("%s", "adapter loaded " + line)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    kind = kind_of(error)
    headers = {} if kind.retry_after_s is None else {"Retry-After": str(kind.retry_after_s)}
    return _answer(request, kind.status, error_body(error), headers)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(request, 422, {"error": describe(error.errors()), "error_type": "validation"})


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        # FastAPI's word for a body that Python's JSON reader gives up on: not UTF-8, or nested too deep.
        body = {"error": "body: not JSON: not UTF-8, or nested too deep", "error_type": "validation"}
        return _answer(request, 422, body)
    kinds = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    body = {"error": str(error.detail), "error_type": kinds.get(error.status_code, "validation")}
    return _answer(request, error.status_code, body, dict(error.headers or {}))


async def _on_disconnect(request: Request, error: Exception) -> JSONResponse:
    return _answer(request, routes_generate.NOBODY_TO_ANSWER, {"error": "client disconnected", "error_type": "client"})


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    request_id = request.state.request_id
    body = {"error": f"internal error; the server's log has it under {request_id}", "error_type": "internal"}
    logger.error("%s", "bug " + pairs(request_id=request_id, path=request.url.path, error=type(error).__name__))
    # Outside the middleware that adds the id to every other answer.
    return _answer(request, 500, body, {REQUEST_ID_HEADER: request_id})


def _answer(request: Request, status: int, body: dict[str, str], headers: dict[str, str] | None = None) -> JSONResponse:
    is_generating = request.method == "POST" and request.url.path in routes_generate.GENERATING_PATHS
    if is_generating and not routes_generate.is_submitted(request):  # else its terminal event is counted
        request.app.state.services.metrics.refused()
    return JSONResponse(body, status, headers)
