"""What operators look at: liveness, readiness, facts, metrics."""

from anyio import to_thread
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

from service.errors import NotReady
from service.http.error_table import ERROR_TABLE, retry_after
from service.http.routes.common import TheServices, errors, needs, plain_text
from service.http.schemas import MAX_BEST_OF, MAX_STOPS
from service.http.scrapes import joined
from service.keys import Scope
from service.version import VERSION

router = APIRouter(tags=["operations"])


class Info(BaseModel):
    """Facts of the server, under TGI's names where it has them."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None = Field(description="The revision of a hub model, where one was set.")
    model_pipeline_tag: str = "text-generation"
    model_type: str
    model_dtype: str
    model_device_type: str
    model_parameters: int
    model_bytes: int
    max_input_tokens: int
    max_total_tokens: int
    max_best_of: int = MAX_BEST_OF
    max_stop_sequences: int = MAX_STOPS
    max_client_batch_size: int = 1
    max_concurrent_requests: int
    max_queued_requests: int
    max_batch_tokens: int
    policies: list[str]
    default_policy: str
    router: str = "dylora-serve"
    version: str


@router.get("/health", responses=errors(503))
async def health(services: TheServices) -> dict[str, str]:
    """The process lives, its event loop turns, and its engine has not failed."""
    services.check_alive()
    return {"status": "ok"}


@router.get("/ready", responses=errors(503))
async def ready(services: TheServices) -> Response:
    """The server takes requests: adapters are loaded, it is not shutting down, and its engine has not failed."""
    services.check_alive()
    if services.is_ready:
        return JSONResponse({"status": "ready"})
    why, kind = "draining" if services.draining.is_set() else "loading", ERROR_TABLE[NotReady]
    return JSONResponse({"error": f"the server is {why}", "error_type": kind.type}, kind.status, retry_after(kind))


@router.get("/info", responses=errors(401, 429))
async def info(services: TheServices) -> Info:
    """What is served, and its limits."""
    model, settings = services.engine.model, services.settings
    return Info(
        model_id=model.name,
        model_sha=settings.revision,
        model_type=model.model_type,
        model_dtype=model.dtype,
        model_device_type=model.device,
        model_parameters=model.parameters,
        model_bytes=model.nbytes,
        max_input_tokens=min(settings.max_prompt_tokens or model.max_context_tokens, model.max_context_tokens - 1),
        max_total_tokens=model.max_context_tokens,
        max_concurrent_requests=settings.max_running_requests,
        max_queued_requests=settings.max_waiting_requests,
        max_batch_tokens=settings.max_batch_tokens,
        policies=sorted(services.policies.policies),
        default_policy=services.policies.default,
        version=VERSION,
    )


@router.get(
    "/metrics",
    response_model=None,
    dependencies=[needs(Scope.METRICS)],
    responses={**plain_text("Prometheus' text format."), **errors(401, 403, 429)},
)
async def metrics(services: TheServices) -> Response:
    """Prometheus' text format; of a cluster, of all replicas, each by its label."""
    if services.scrapes is not None:
        text = joined(await services.scrapes())
    else:
        text = await to_thread.run_sync(services.metrics.exposition)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
