"""From events to LoRAX's and TGI's answers: the body, the stream, and the headers that say what served them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from service.core import Event, Failed, Finished, Mode, PromptToken, SamplingParams, Token, TokenEvent
from service.errors import ServiceError
from service.http.error_table import error_body
from service.http.generation import Submitted
from service.http.measurement import Measurement
from service.http.schemas import (
    AlternativeToken,
    BestOfSequence,
    Details,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    PredictedTimes,
    PrefillToken,
    SequenceTokens,
    SloOut,
    StreamDetails,
    StreamResponse,
    TokenOut,
)
from service.http.stream import EventStream
from service.rank_policy import RankReason

BASE = "base"
"""Adapter and version, in headers, of an answer by the base model alone."""


class ClientGone(Exception):
    """The client disconnected, and its request was aborted: there is nobody to answer."""


def serving_headers(submitted: Submitted, mode: Mode) -> dict[str, str]:
    """What served the request."""
    adapter, decision, measured = submitted.adapter, submitted.decision, submitted.measurement
    predicted = {"X-Predicted-Latency-Ms": f"{measured.predicted.latency_ms:.1f}"} if measured.predicted else {}
    met = {} if measured.is_met is None else {"X-SLO-Met": str(measured.is_met).lower()}
    return {
        "X-LoRA-Adapter": adapter.name if adapter else BASE,
        "X-LoRA-Adapter-Version": adapter.version if adapter else BASE,
        "X-LoRA-Rank": str(decision.rank if decision else 0),
        "X-LoRA-Rank-Reason": decision.reason if decision else RankReason.DEFAULT,
        "X-LoRA-Mode": mode,
        **predicted,
        **met,
    }


def timing_headers(end: Finished) -> dict[str, str]:
    """LoRAX's headers: times in whole milliseconds."""
    usage = end.usage
    inference_s = usage.total_s - usage.queue_s
    return {
        "x-total-time": _ms(usage.total_s),
        "x-queue-time": _ms(usage.queue_s),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / max(usage.generated_tokens, 1)),
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.generated_tokens),
        "x-total-tokens": str(usage.prompt_tokens + usage.generated_tokens),
    }


@dataclass(frozen=True)
class _Sequence:
    """One sequence that has ended."""

    sampling: SamplingParams
    tokens: list[Token]
    end: Finished

    @property
    def mean_logprob(self) -> float:
        """What TGI ranks the answers of best_of by."""
        return sum(token.logprob for token in self.tokens) / max(len(self.tokens), 1)


async def collect(submitted: Submitted, body: GenerateRequest) -> tuple[GenerateResponse, Finished]:
    """The whole answer, and the event it ended with: the best of several, the first among equals.

    Raises:
        ServiceError: a sequence failed.
        ClientGone: it was aborted.
    """
    sequences = [
        await _collect(events, sampling)
        for events, sampling in zip(submitted.sequences.streams, submitted.samplings, strict=True)
    ]
    best = max(sequences, key=lambda each: each.mean_logprob)
    details = None
    if body.parameters.wants_details:
        prompt = sequences[0].end.prompt
        others = [_other(each, prompt, body) for each in sequences if each is not best]
        details = Details(
            **dict(_facts(submitted, best.sampling, best.end)),
            **dict(_tokens(best, prompt, body)),
            best_of_sequences=others or None,
        )
    return GenerateResponse(generated_text=_text(body, best.end), details=details), best.end


async def _collect(events: EventStream, sampling: SamplingParams) -> _Sequence:
    tokens: list[Token] = []
    async for event in events:
        if isinstance(event, TokenEvent):
            tokens.append(event.token)
        else:
            end = finished_or_raise(event)
    return _Sequence(sampling, tokens, end)


async def stream(submitted: Submitted, body: GenerateRequest, first: Event) -> AsyncIterator[str]:
    """Server-sent events. The last token's comes with text and details, as TGI's clients expect it.

    Args:
        first: the event taken from `submitted.events` already.
    """
    last: Token | None = None
    event = first
    while isinstance(event, TokenEvent):
        if event.is_last:
            last = event.token
        else:
            yield _sse(_event(event.token, body))
        event = await submitted.events.next()
    try:
        end = finished_or_raise(event)
    except ServiceError as error:
        yield f"data:{ErrorResponse(**error_body(error)).model_dump_json()}\n\n"
        return
    except ClientGone:
        return
    assert last is not None, "an answer ends with its last token"
    facts = _facts(submitted, submitted.samplings[0], end)
    yield _sse(_event(last, body).model_copy(update={"generated_text": _text(body, end), "details": facts}))


def finished_or_raise(event: Event) -> Finished:
    """A terminal event that is a success. Raises ServiceError or ClientGone."""
    match event:
        case Finished():
            return event
        case Failed():
            raise event.error
        case _:
            raise ClientGone


def _facts(submitted: Submitted, sampling: SamplingParams, end: Finished) -> StreamDetails:
    adapter, decision = submitted.adapter, submitted.decision
    return StreamDetails(
        finish_reason=end.reason,
        prompt_tokens=end.usage.prompt_tokens,
        generated_tokens=end.usage.generated_tokens,
        seed=sampling.seed if sampling.do_sample else None,
        adapter_id=adapter.name if adapter else None,
        adapter_version=adapter.version if adapter else None,
        rank=decision.rank if decision else 0,
        rank_reason=decision.reason if decision else RankReason.DEFAULT,
        rank_policy=decision.policy if decision else None,
        predicted=_predicted(submitted.measurement),
        slo=_slo(submitted.measurement),
        mode=end.mode,
    )


def _predicted(measurement: Measurement) -> PredictedTimes | None:
    times = measurement.predicted
    return None if times is None else PredictedTimes(**{name: round(ms, 2) for name, ms in times._asdict().items()})


def _slo(measurement: Measurement) -> SloOut | None:
    slo = measurement.slo
    if slo.is_empty:
        return None
    return SloOut(latency_slo_ms=slo.latency_ms, ttft_slo_ms=slo.ttft_ms, itl_slo_ms=slo.itl_ms, met=measurement.is_met)


def _text(body: GenerateRequest, end: Finished) -> str:
    return body.inputs + end.text if body.parameters.return_full_text else end.text


def _tokens(sequence: _Sequence, prompt: tuple[PromptToken, ...], body: GenerateRequest) -> SequenceTokens:
    top_n = body.parameters.top_n_tokens
    return SequenceTokens(
        prefill=[PrefillToken(**each._asdict()) for each in prompt],
        tokens=[_token(each, body) for each in sequence.tokens],
        top_tokens=[_top(each, top_n) for each in sequence.tokens] if top_n else None,
    )


def _other(sequence: _Sequence, prompt: tuple[PromptToken, ...], body: GenerateRequest) -> BestOfSequence:
    end = sequence.end
    return BestOfSequence(
        **dict(_tokens(sequence, prompt, body)),
        generated_text=_text(body, end),
        finish_reason=end.reason,
        generated_tokens=end.usage.generated_tokens,
        seed=sequence.sampling.seed,
    )


def _event(token: Token, body: GenerateRequest) -> StreamResponse:
    top_n = body.parameters.top_n_tokens
    return StreamResponse(token=_token(token, body), top_tokens=_top(token, top_n) if top_n else None)


def _token(token: Token, body: GenerateRequest) -> TokenOut:
    count = body.parameters.return_k_alternatives
    alternatives = [AlternativeToken(id=each.id, text=each.text, logprob=each.logprob) for each in token.alternatives[:count]]
    return TokenOut(
        id=token.id,
        text=token.text,
        logprob=token.logprob,
        special=token.special,
        alternative_tokens=alternatives if count else None,
    )


def _top(token: Token, count: int) -> list[TokenOut]:
    return [TokenOut(**each._asdict()) for each in token.alternatives[:count]]


def _sse(event: StreamResponse) -> str:
    return f"data:{event.model_dump_json()}\n\n"


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
