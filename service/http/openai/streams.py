"""From events to OpenAI's streams: one chunk for each token of any choice, and `[DONE]` at the end."""

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel

from service.core import EngineProtocol, Event, Finished, Token, TokenEvent
from service.errors import ServiceError
from service.http.error_table import kind_of, openai_body
from service.http.generation.served import ClientGone, finished_or_raise, served_by
from service.http.generation.submit import Submitted
from service.http.openai.answer_schemas import ChatChunk, ChatChunkChoice, CompletionChoice, CompletionChunk, Delta, Usage
from service.http.openai.answers import prompt_texts, stop_reason, told_usage, total_usage
from service.http.openai.heading import Heading
from service.http.openai.logprobs import chat_logprobs, completion_logprobs
from service.http.openai.schemas import ChatRequest, CompletionRequest, OpenAIRequest

First = tuple[int, Event]
"""What was read already: an event with the number of its sequence."""


@dataclass(frozen=True)
class _Piece:
    """A token of one choice, the `number`-th of it; `end` with its last."""

    index: int
    token: Token
    number: int
    end: Finished | None = None

    @property
    def is_first(self) -> bool:
        """Whether its choice begins with it."""
        return self.number == 1


async def stream_completion(
    submitted: Submitted, body: CompletionRequest, heading: Heading, engine: EngineProtocol, first: First
) -> AsyncIterator[str]:
    """The events of /v1/completions."""
    texts = await prompt_texts(submitted, body, engine)
    offsets = [0] * len(submitted.samplings)

    def choice(piece: _Piece) -> CompletionChoice:
        index, text = piece.index, piece.token.text
        logprobs = None
        if body.logprobs is not None:
            logprobs = completion_logprobs([piece.token], body.logprobs, offsets[index])
            offsets[index] += len(text)
        echoed = texts[index // body.drawn] if piece.is_first else ""
        return CompletionChoice(
            index=index,
            text=echoed + text,
            logprobs=logprobs,
            finish_reason=stop_reason(piece.end) if piece.end else None,
        )

    async for event in _events(submitted, body, partial(CompletionChunk, **heading.fields), choice, first):
        yield event


async def stream_chat(submitted: Submitted, body: ChatRequest, heading: Heading, first: First) -> AsyncIterator[str]:
    """The events of /v1/chat/completions."""

    def choice(piece: _Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=piece.index,
            delta=Delta(role="assistant" if piece.is_first else None, content=piece.token.text),
            logprobs=chat_logprobs([piece.token], body.top_logprobs or 0) if body.logprobs else None,
            finish_reason=stop_reason(piece.end) if piece.end else None,
        )

    async for event in _events(submitted, body, partial(ChatChunk, **heading.fields), choice, first):
        yield event


async def _events(
    submitted: Submitted,
    body: OpenAIRequest,
    chunk: Callable[..., BaseModel],
    choice: Callable[[_Piece], BaseModel],
    first: First,
) -> AsyncIterator[str]:
    """The events of either route: a `chunk` with one `choice` for each piece, and what follows the last."""
    ends: list[Finished] = []
    try:
        async for piece in _pieces(submitted, first):
            served = None
            if piece.end is not None:
                ends.append(piece.end)
                served = served_by(submitted, piece.end.mode, piece.end.usage)
            usage = _usage_so_far(submitted, piece) if body.counts_in_chunks else None
            yield _sse(chunk(lora=served, choices=[choice(piece)], usage=usage))
    except ServiceError as error:
        yield f"data: {json.dumps(openai_body(str(error), kind_of(error)))}\n\n"
        return
    except ClientGone:
        return
    if body.includes_usage:
        yield _sse(chunk(choices=[], usage=told_usage(total_usage(submitted, ends))))
    yield "data: [DONE]\n\n"


async def _pieces(submitted: Submitted, first: First) -> AsyncIterator[_Piece]:
    """The tokens of all choices as they come; the last of each waits for its end, which follows at once."""
    left = len(submitted.samplings)
    numbers: Counter[int] = Counter()
    waiting: dict[int, _Piece] = {}
    index, event = first
    while True:
        if isinstance(event, TokenEvent):
            numbers[index] += 1
            piece = _Piece(index, event.token, numbers[index])
            if event.is_last:
                waiting[index] = piece
            else:
                yield piece
        else:
            end = finished_or_raise(event)
            piece = waiting.pop(index)
            yield _Piece(index, piece.token, piece.number, end)
            left -= 1
            if not left:
                return
        index, event = await submitted.sequences.next()


def _usage_so_far(submitted: Submitted, piece: _Piece) -> Usage:
    """Of the piece's own choice, as vLLM counts."""
    prompt = submitted.prompts[piece.index * len(submitted.prompts) // len(submitted.samplings)]
    return Usage(prompt_tokens=len(prompt), completion_tokens=piece.number, total_tokens=len(prompt) + piece.number)


def _sse(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"
