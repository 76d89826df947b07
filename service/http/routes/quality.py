"""What a rank costs and brings: the trade-off that the server has measured, and calibration on a client's own texts."""

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.core import EngineProtocol
from service.errors import AdapterUnfit, InvalidRequest
from service.http.adapters.calibration import METRIC, Job, JobState, MeasuredText
from service.http.generation.submit import tokenizing
from service.http.latencies import Percentiles
from service.http.routes.common import ONLY_KNOWN_QUERIES, AdapterName, TheCaller, TheServices, errors, needs
from service.http.schemas import Body, PlainText, PositiveInt, Text
from service.keys import Scope

router = APIRouter(
    prefix="/adapters", tags=["quality"], dependencies=[ONLY_KNOWN_QUERIES], responses=errors(401, 403, 404, 422, 429, 503)
)
MAX_EXAMPLES = 1000
_MAX_DEFAULT_RANKS = 16


class RankTradeoff(BaseModel):
    """One rank. Times are percentiles over the last requests that ended well, in milliseconds; null where none has."""

    rank: int
    requests: int = Field(description="Ended well since the adapter came or the server started.")
    request_ms: Percentiles | None = Field(description="From arrival to the last token.")
    time_to_first_token_ms: Percentiles | None
    inter_token_ms: Percentiles | None = Field(description="Over the requests' mean times between tokens.")
    quality: float | None = Field(description="In the metric; null where it was not measured.")
    parameters: int = Field(description="Numbers in the factors at this rank: what each token is multiplied with.")
    bytes: int = Field(description="Memory of these. The server keeps one copy of the largest rank for all.")


class Tradeoff(BaseModel):
    """What each rank of an adapter costs and brings."""

    id: str
    version: str
    metric: str | None
    higher_is_better: bool | None
    base_quality: float | None = Field(description="Of the base model without the adapter, if it was measured.")
    source: str | None
    ranks: list[RankTradeoff]


def _example(value: object) -> object:
    return {"completion": value} if isinstance(value, str) else value


class Example(Body):
    """A text to measure, or a completion after its prompt."""

    prompt: PlainText = ""
    completion: Text


_EXAMPLES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_EXAMPLES,
    "items": {"anyOf": [{"type": "string", "minLength": 1}, Example.model_json_schema()]},
}


class CalibrationRequest(Body):
    """Texts, and the ranks to measure them at."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"examples": [{"prompt": "food[Thai] =>", "completion": " It serves Thai food."}], "ranks": [1, 4]}]
        },
    )

    examples: Annotated[
        list[Annotated[Example, BeforeValidator(_example)]],
        Field(min_length=1, max_length=MAX_EXAMPLES, fail_fast=True),
        WithJsonSchema(_EXAMPLES_SCHEMA),
    ] = Field(description="Texts, or prompts with completions, whose tokens alone are then measured.")
    ranks: Annotated[list[PositiveInt], Field(min_length=1, fail_fast=True)] | None = Field(
        None, description="Unless given all, or the powers of two and the largest where there are many."
    )
    source: Annotated[PlainText, Field(max_length=500)] | None = Field(
        None, description="What the texts are, for readers of the profile."
    )


class JobOut(BaseModel):
    """A calibration as it stands."""

    id: str
    adapter: str
    version: str = Field(description="Of the adapter that is measured. The profile makes a new one, with the same tensors.")
    state: JobState
    done: int = Field(description="Texts measured so far, at any rank and by the base model.")
    total: int
    metric: str
    values: dict[int, float] = Field(description="By rank, as far as they are complete; rank 0 is the base model.")
    problem: str | None = Field(description="Why it failed.")


@router.get("/{name}/tradeoff", dependencies=[needs(Scope.ADAPTERS_READ)])
async def tradeoff(name: AdapterName, services: TheServices, caller: TheCaller) -> Tradeoff:
    """Per rank: measured latency, measured quality, memory, requests."""
    served = services.registry.get(name, caller.name)
    if served.stored is None:
        raise AdapterUnfit(name, served.problem or "its files can't be read")
    profile = served.stored.quality
    metric = profile.primary if profile else None
    ranks = []
    for rank in served.facts.ranks:
        measured = services.latencies.of(name, rank)
        ranks.append(
            RankTradeoff(
                rank=rank,
                requests=measured.requests,
                request_ms=measured.total,
                time_to_first_token_ms=measured.time_to_first_token,
                inter_token_ms=measured.inter_token,
                quality=metric.values.get(rank) if metric else None,
                parameters=served.facts.parameters.get(rank, 0),
                bytes=served.bytes_at.get(rank, 0),
            )
        )
    return Tradeoff(
        id=name,
        version=served.version,
        metric=metric.name if metric else None,
        higher_is_better=metric.higher_is_better if metric else None,
        base_quality=metric.base if metric else None,
        source=profile.source if profile else None,
        ranks=ranks,
    )


@router.post(
    "/{name}/calibration", status_code=202, dependencies=[needs(Scope.ADAPTERS_WRITE)], responses=errors(408, 409, 413)
)
async def calibrate(
    name: AdapterName, body: CalibrationRequest, response: Response, services: TheServices, caller: TheCaller
) -> JobOut:
    """Measure each rank on texts, in the background. The result becomes the adapter's quality profile, which policies use."""
    services.check_accepting()
    served = services.registry.resolve(name, caller.name)
    ranks = _ranks(body.ranks, served.facts.ranks)
    for rank in ranks:
        served.choice(rank)
    characters = sum(len(each.prompt) + len(each.completion) for each in body.examples)
    texts = await tokenizing(partial(_measured_texts, body.examples), services.engine, characters)
    source = body.source or f"calibration on {len(texts)} texts, {datetime.now(UTC):%Y-%m-%d}"
    job = services.calibrations.start(name, ranks, texts, source, caller)
    response.headers["Location"] = f"/adapters/{name}/calibration/{job.id}"
    return _out(job)


@router.get("/{name}/calibration/{job}", dependencies=[needs(Scope.ADAPTERS_READ)])
async def calibration(
    name: AdapterName, job: Annotated[str, Path(max_length=64)], services: TheServices, caller: TheCaller
) -> JobOut:
    """How a calibration stands."""
    services.registry.get(name, caller.name)
    return _out(services.calibrations.get(name, job))


@router.delete("/{name}/calibration/{job}", dependencies=[needs(Scope.ADAPTERS_WRITE)], responses=errors(409))
async def cancel_calibration(
    name: AdapterName, job: Annotated[str, Path(max_length=64)], services: TheServices, caller: TheCaller
) -> JobOut:
    """End a calibration, and how it ended: one that was over before stays as it was. The quality profile is left as it is."""
    services.registry.get(name, caller.name)
    services.registry.check_may_change(name, caller)
    found = services.calibrations.get(name, job)
    await services.calibrations.cancel(found)
    return _out(found)


def _ranks(asked: Sequence[int] | None, legal: Sequence[int]) -> list[int]:
    if asked is not None:
        return sorted(set(asked))
    if len(legal) <= _MAX_DEFAULT_RANKS:
        return list(legal)
    return [rank for rank in legal if rank & (rank - 1) == 0 or rank == legal[-1]]


def _measured_texts(examples: Sequence[Example], engine: EngineProtocol) -> list[MeasuredText]:
    return [_measured(engine, example, f"examples.{number}") for number, example in enumerate(examples)]


def _measured(engine: EngineProtocol, example: Example, where: str) -> MeasuredText:
    """Token ids of an example.

    A server sees the prompt alone, so its tokens are those that it has alone. The completion's are those that follow where
    both are tokenised together or, where a token would straddle the seam, those that it has alone: as in training.
    """
    prompt = engine.encode(example.prompt) if example.prompt else ()
    ids = engine.encode(example.prompt + example.completion)
    if ids[: len(prompt)] != prompt:
        ids = prompt + engine.encode(example.completion, with_special=False)
    context = engine.model.max_context_tokens
    if len(ids) - max(len(prompt), 1) < 1:
        raise InvalidRequest(where, "has no token to measure; the first of a text, which follows nothing, is not")
    if len(ids) >= context:
        raise InvalidRequest(where, f"has {len(ids)} tokens; legal: up to {context - 1}")
    return MeasuredText(ids, len(prompt))


def _out(job: Job) -> JobOut:
    return JobOut(
        id=job.id,
        adapter=job.adapter,
        version=job.version,
        state=job.state,
        done=job.done,
        total=job.total,
        metric=METRIC,
        values=dict(job.losses),
        problem=job.problem,
    )
