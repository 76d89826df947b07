"""From events to OpenAI's answers, complete."""

from collections.abc import Sequence

from service.core import EngineProtocol, Finished, FinishReason
from service.core import Usage as EngineUsage
from service.http.generation.served import EndedSequence, WholeAnswer, collect_sequences, common_mode, served_by
from service.http.generation.submit import Submitted, tokenizing
from service.http.openai.answer_schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    StopReason,
    Usage,
)
from service.http.openai.heading import Heading
from service.http.openai.logprobs import chat_logprobs, completion_logprobs
from service.http.openai.schemas import ChatRequest, CompletionRequest


async def collect_completion(
    submitted: Submitted, body: CompletionRequest, heading: Heading, engine: EngineProtocol
) -> WholeAnswer:
    """A whole answer of /v1/completions. Raises what `collect_sequences` raises."""
    sequences = await collect_sequences(submitted)
    texts = await prompt_texts(submitted, body, engine)
    choices: list[CompletionChoice] = []
    for number, text in enumerate(texts):
        drawn = sequences[number * body.drawn : (number + 1) * body.drawn]
        choices += [_completion(each, drawn[0].end, text, body) for each in _best(drawn, body.choices)]
    choices = [choice.model_copy(update={"index": index}) for index, choice in enumerate(choices)]
    ends = [each.end for each in sequences]
    mode, total = common_mode(ends), total_usage(submitted, ends, tells_tokens=body.max_tokens != 0)
    answer = Completion(**heading.fields, lora=served_by(submitted, mode, total), choices=choices, usage=told_usage(total))
    return WholeAnswer(answer.model_dump_json(), mode, total)


async def collect_chat(submitted: Submitted, body: ChatRequest, heading: Heading) -> WholeAnswer:
    """A whole answer of /v1/chat/completions. Raises what `collect_sequences` raises."""
    sequences = await collect_sequences(submitted)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=each.end.text),
            logprobs=chat_logprobs(each.tokens, body.top_logprobs or 0) if body.logprobs else None,
            finish_reason=stop_reason(each.end),
        )
        for index, each in enumerate(sequences)
    ]
    ends = [each.end for each in sequences]
    mode, total = common_mode(ends), total_usage(submitted, ends)
    answer = ChatCompletion(**heading.fields, lora=served_by(submitted, mode, total), choices=choices, usage=told_usage(total))
    return WholeAnswer(answer.model_dump_json(), mode, total)


async def prompt_texts(submitted: Submitted, body: CompletionRequest, engine: EngineProtocol) -> list[str]:
    """What `echo` puts before the choices of each prompt; "" without it."""
    if not body.echo:
        return [""] * len(submitted.prompts)

    def texts(engine: EngineProtocol) -> list[str]:
        return [
            prompt if isinstance(prompt, str) and body.truncate_prompt_tokens is None else engine.decode(ids)
            for prompt, ids in zip(body.prompt, submitted.prompts, strict=True)
        ]

    return await tokenizing(texts, engine, sum(map(len, submitted.prompts)))


def total_usage(submitted: Submitted, ends: Sequence[Finished], *, tells_tokens: bool = True) -> EngineUsage:
    """What all sequences took together: each prompt counts once, times are those of the longest."""
    usages = [end.usage for end in ends]
    return EngineUsage(
        prompt_tokens=sum(map(len, submitted.prompts)),
        generated_tokens=sum(usage.generated_tokens for usage in usages) if tells_tokens else 0,
        queue_s=max(usage.queue_s for usage in usages),
        time_to_first_token_s=min(usage.time_to_first_token_s for usage in usages),
        total_s=max(usage.total_s for usage in usages),
    )


def told_usage(usage: EngineUsage) -> Usage:
    """By OpenAI's names."""
    prompt, generated = usage.prompt_tokens, usage.generated_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


def stop_reason(end: Finished) -> StopReason:
    """Why a generation ended, in OpenAI's words."""
    return "length" if end.reason is FinishReason.LENGTH else "stop"


def _best(drawn: Sequence[EndedSequence], count: int) -> Sequence[EndedSequence]:
    """The most probable ones a token, the first among equals; all, as they were drawn, where none is to be left out."""
    return drawn if len(drawn) == count else sorted(drawn, key=lambda each: -each.mean_logprob)[:count]


def _completion(sequence: EndedSequence, prompted: Finished, echoed: str, body: CompletionRequest) -> CompletionChoice:
    """One choice, its index still to come; `prompted` has the prompt's tokens where they were asked for."""
    tokens, text = (sequence.tokens, sequence.end.text) if body.max_tokens != 0 else ([], "")
    logprobs = None
    if body.logprobs is not None:
        logprobs = completion_logprobs([*prompted.prompt, *tokens], body.logprobs)
    reason: StopReason = stop_reason(sequence.end) if body.max_tokens != 0 else "length"
    return CompletionChoice(index=0, text=echoed + text, logprobs=logprobs, finish_reason=reason)
