"""From events to LoRAX's and TGI's answers: the body, the stream, and the headers that say what served them."""

from collections.abc import AsyncIterator

from service.core import Event, Failed, Finished, Mode, Token, TokenEvent
from service.errors import ServiceError
from service.http.error_table import error_body
from service.http.generation import Submitted
from service.http.schemas import (
    Details,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    StreamDetails,
    StreamResponse,
    TokenOut,
)
from service.rank_policy import RankReason

BASE = "base"
"""Adapter and version, in headers, of an answer by the base model alone."""


class ClientGone(Exception):
    """The client disconnected, and its request was aborted: there is nobody to answer."""


def serving_headers(submitted: Submitted, mode: Mode) -> dict[str, str]:
    """What served the request."""
    adapter, decision = submitted.adapter, submitted.decision
    return {
        "X-LoRA-Adapter": adapter.name if adapter else BASE,
        "X-LoRA-Adapter-Version": adapter.version if adapter else BASE,
        "X-LoRA-Rank": str(decision.rank if decision else 0),
        "X-LoRA-Rank-Reason": decision.reason if decision else RankReason.DEFAULT,
        "X-LoRA-Mode": mode,
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


async def collect(submitted: Submitted, body: GenerateRequest) -> tuple[GenerateResponse, Finished]:
    """The whole answer, and the event it ended with.

    Raises:
        ServiceError: the request failed.
        ClientGone: it was aborted.
    """
    tokens: list[TokenOut] = []
    async for event in submitted.events:
        if isinstance(event, TokenEvent):
            if body.parameters.details:
                tokens.append(_token(event.token))
        else:
            end = finished_or_raise(event)
    details = Details(**dict(_facts(submitted, end)), tokens=tokens) if body.parameters.details else None
    return GenerateResponse(generated_text=_text(body, end), details=details), end


async def stream(submitted: Submitted, body: GenerateRequest, first: Event) -> AsyncIterator[str]:
    """Server-sent events. The last token's comes with text and details, as TGI's clients expect it.

    A token that may be the last is held until the next event says whether it is; any other is sent at once.

    Args:
        first: the event taken from `submitted.events` already.
    """
    follow = _LastToken(submitted.sampling.max_new_tokens, submitted.sampling.stop)
    held: Token | None = None
    event = first
    while isinstance(event, TokenEvent):
        if held is not None:
            yield _sse(StreamResponse(token=_token(held)))
            held = None
        if follow.may_be(event.token):
            held = event.token
        else:
            yield _sse(StreamResponse(token=_token(event.token)))
        event = await submitted.events.next()
    try:
        end = finished_or_raise(event)
    except ServiceError as error:
        yield f"data:{ErrorResponse(**error_body(error)).model_dump_json()}\n\n"
        return
    except ClientGone:
        return
    # An engine that ends for a reason unknown here still gets its text and details across.
    token = _token(held) if held is not None else TokenOut(id=0, text="", logprob=0.0, special=True)
    yield _sse(StreamResponse(token=token, generated_text=_text(body, end), details=_facts(submitted, end)))


def finished_or_raise(event: Event) -> Finished:
    """A terminal event that is a success. Raises ServiceError or ClientGone."""
    match event:
        case Finished():
            return event
        case Failed():
            raise event.error
        case _:
            raise ClientGone


class _LastToken:
    """Tells from the request alone whether a token may be its last."""

    def __init__(self, max_new_tokens: int, stops: tuple[str, ...]) -> None:
        self._left = max_new_tokens
        self._stops = stops
        self._tail_characters = max(map(len, stops), default=0)
        self._tail = ""

    def may_be(self, token: Token) -> bool:
        """Follow one more token."""
        self._left -= 1
        text = self._tail + token.text
        self._tail = text[-self._tail_characters :] if self._tail_characters else ""
        return self._left <= 0 or token.special or any(stop in text for stop in self._stops)


def _facts(submitted: Submitted, end: Finished) -> StreamDetails:
    adapter, decision = submitted.adapter, submitted.decision
    return StreamDetails(
        finish_reason=end.reason,
        prompt_tokens=end.usage.prompt_tokens,
        generated_tokens=end.usage.generated_tokens,
        seed=submitted.sampling.seed if submitted.sampling.do_sample else None,
        adapter_id=adapter.name if adapter else None,
        adapter_version=adapter.version if adapter else None,
        rank=decision.rank if decision else 0,
        rank_reason=decision.reason if decision else RankReason.DEFAULT,
        rank_policy=decision.policy if decision else None,
        mode=end.mode,
    )


def _text(body: GenerateRequest, end: Finished) -> str:
    return body.inputs + end.text if body.parameters.return_full_text else end.text


def _token(token: Token) -> TokenOut:
    return TokenOut(id=token.id, text=token.text, logprob=token.logprob, special=token.special)


def _sse(event: StreamResponse) -> str:
    return f"data:{event.model_dump_json()}\n\n"


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
