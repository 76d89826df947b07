"""From events to LoRAX's and TGI's answers, whole and streamed."""

from collections.abc import AsyncIterator

from service.core import Event, Finished, PromptToken, SamplingParams, Token, TokenEvent
from service.errors import ServiceError
from service.http.error_table import error_body
from service.http.generation.served import (
    ClientGone,
    EndedSequence,
    WholeAnswer,
    collect_sequences,
    finished_or_raise,
    served_by,
)
from service.http.generation.submit import Submitted
from service.http.schemas import (
    AlternativeToken,
    BestOfSequence,
    Details,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    PrefillToken,
    SequenceTokens,
    StreamDetails,
    StreamResponse,
    TokenOut,
)


async def collect(submitted: Submitted, body: GenerateRequest) -> WholeAnswer:
    """The whole answer: the best of several, the first among equals.

    Raises:
        ServiceError: a sequence failed.
        ClientGone: it was aborted.
    """
    sequences = await collect_sequences(submitted)
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
    answer = GenerateResponse(generated_text=_text(body, best.end), details=details)
    text = answer.model_dump_json(exclude={"details"} if details is None else None)
    return WholeAnswer(text, best.end.mode, best.end.usage)


async def stream(submitted: Submitted, body: GenerateRequest, first: tuple[int, Event]) -> AsyncIterator[str]:
    """Server-sent events. The last token's comes with text and details, as TGI's clients expect it.

    Args:
        first: what was read already.
    """
    last: Token | None = None
    _, event = first
    while isinstance(event, TokenEvent):
        if event.is_last:
            last = event.token
        else:
            yield _sse(_event(event.token, body))
        _, event = await submitted.sequences.next()
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


def _facts(submitted: Submitted, sampling: SamplingParams, end: Finished) -> StreamDetails:
    return StreamDetails(
        **dict(served_by(submitted, end.mode, end.usage)),
        finish_reason=end.reason,
        prompt_tokens=end.usage.prompt_tokens,
        generated_tokens=end.usage.generated_tokens,
        seed=sampling.seed if sampling.do_sample else None,
    )


def _text(body: GenerateRequest, end: Finished) -> str:
    return body.inputs + end.text if body.parameters.return_full_text else end.text


def _tokens(sequence: EndedSequence, prompt: tuple[PromptToken, ...], body: GenerateRequest) -> SequenceTokens:
    top_n = body.parameters.top_n_tokens
    return SequenceTokens(
        prefill=[PrefillToken(id=each.id, text=each.text, logprob=each.logprob) for each in prompt],
        tokens=[_token(each, body) for each in sequence.tokens],
        top_tokens=[_top(each, top_n) for each in sequence.tokens] if top_n else None,
    )


def _other(sequence: EndedSequence, prompt: tuple[PromptToken, ...], body: GenerateRequest) -> BestOfSequence:
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
