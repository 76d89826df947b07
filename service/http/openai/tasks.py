"""What the bodies of /v1 ask for."""

from collections.abc import Callable, Sequence

from service.core import EngineProtocol, SamplingParams
from service.errors import InvalidRequest
from service.http.adapters.registry import UNNAMED
from service.http.generation.fan_out import drawn_seed
from service.http.generation.submit import Task
from service.http.generation.token_limits import TokenFields, TokenLimits
from service.http.openai.schemas import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_TEMPERATURE,
    MAX_CHOICES,
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
)
from service.http.schemas import given_or

IsKnown = Callable[[str], bool]
"""Whether there is an adapter of a name, for the caller."""

_COMPLETION_FIELDS = TokenFields("prompt", "max_tokens", "min_tokens", "truncate_prompt_tokens")
_CHAT_FIELDS = TokenFields("messages", "max_completion_tokens", "min_tokens", "truncate_prompt_tokens")


def completion_task(body: CompletionRequest, base: str, is_known: IsKnown) -> Task:
    """The task of a checked body; `base` is the base model's name.

    Raises:
        InvalidRequest: fields that contradict each other.
    """
    _check_completion(body)
    # A generation makes a token at least; where none is asked for, it is made and not told.
    asked = max(body.max_tokens, 1) if body.max_tokens is not None else None

    def encode(engine: EngineProtocol, limits: TokenLimits) -> tuple[tuple[int, ...], ...]:
        for prompt in body.prompt:
            if isinstance(prompt, str) and not body.truncate_prompt_tokens:
                limits.check_text(prompt, _COMPLETION_FIELDS)
        prompts = (
            engine.encode(prompt, with_special=body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompt
        )
        return tuple(_truncated(body, ids) for ids in prompts)

    def sampling(prompt: Sequence[int], limits: TokenLimits) -> SamplingParams:
        new_tokens = limits.new_tokens(prompt, asked, DEFAULT_MAX_TOKENS, body.min_tokens or 0, _COMPLETION_FIELDS)
        tells_prompt = body.echo and body.logprobs is not None
        return _sampling(body, new_tokens, alternatives=body.logprobs or 0, prompt_logprobs=tells_prompt)

    return Task(
        adapter=_adapter(body, base, is_known),
        rank=body.rank,
        policy=body.rank_policy,
        encode=encode,
        sampling=sampling,
        characters=sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str)),
        prompts=len(body.prompt),
        copies=body.drawn,
        slo=body.slo,
        adapter_field="model",
        copies_field="n" if body.best_of is None else "best_of",
        how_to_sample="temperature above 0",
    )


def chat_task(body: ChatRequest, base: str, is_known: IsKnown) -> Task:
    """The task of a checked body; `base` is the base model's name.

    Raises:
        InvalidRequest: fields that contradict each other.
    """
    _check_chat(body)

    def encode(engine: EngineProtocol, limits: TokenLimits) -> tuple[tuple[int, ...], ...]:
        text = engine.chat_text(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
        if not body.truncate_prompt_tokens:
            limits.check_text(text, _CHAT_FIELDS)
        return (_truncated(body, engine.encode(text, with_special=False)),)

    def sampling(prompt: Sequence[int], limits: TokenLimits) -> SamplingParams:
        new_tokens = limits.new_tokens(prompt, body.most_tokens, None, body.min_tokens or 0, _CHAT_FIELDS)
        return _sampling(body, new_tokens, alternatives=body.top_logprobs or 0)

    return Task(
        adapter=_adapter(body, base, is_known),
        rank=body.rank,
        policy=body.rank_policy,
        encode=encode,
        sampling=sampling,
        characters=sum(len(part.text) for message in body.messages for part in message.content),
        copies=body.choices,
        slo=body.slo,
        adapter_field="model",
        copies_field="n",
        how_to_sample="temperature above 0",
    )


def _adapter(body: OpenAIRequest, base: str, is_known: IsKnown) -> str | None:
    """The adapter that `model` names: "" for the base, None where it leaves it open."""
    if body.model in UNNAMED and not is_known(body.model):
        return None
    return "" if body.model == base else body.model


def _truncated(body: OpenAIRequest, ids: tuple[int, ...]) -> tuple[int, ...]:
    return ids[-body.truncate_prompt_tokens :] if body.truncate_prompt_tokens else ids


def _sampling(body: OpenAIRequest, new_tokens: int, *, alternatives: int, prompt_logprobs: bool = False) -> SamplingParams:
    temperature = given_or(body.temperature, DEFAULT_TEMPERATURE)
    return SamplingParams(
        max_new_tokens=new_tokens,
        min_new_tokens=body.min_tokens or 0,
        repetition_penalty=given_or(body.repetition_penalty, 1.0),
        presence_penalty=given_or(body.presence_penalty, 0.0),
        frequency_penalty=given_or(body.frequency_penalty, 0.0),
        logit_bias=tuple(body.logit_bias.items()),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=body.top_k,
        top_p=given_or(body.top_p, 1.0),
        min_p=given_or(body.min_p, 0.0),
        seed=drawn_seed() if body.seed is None else body.seed % 2**64,
        is_repeatable=body.seed is not None,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        alternatives=alternatives,
        prompt_logprobs=prompt_logprobs,
    )


def _check_common(body: OpenAIRequest) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "only legal with stream true")


def _check_completion(body: CompletionRequest) -> None:
    _check_common(body)
    prompts = len(body.prompt)
    if body.drawn < body.choices:
        raise InvalidRequest("best_of", f"{body.best_of} is less than n, {body.choices}; legal: {body.choices} or more")
    if body.stream and body.drawn > body.choices:
        raise InvalidRequest("best_of", f"{body.best_of} answers can't be streamed as {body.choices}; legal: {body.choices}")
    if prompts * body.drawn > MAX_CHOICES:
        message = f"{prompts} prompts with {body.drawn} answers each are more than {MAX_CHOICES} sequences"
        raise InvalidRequest("prompt", message)
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("max_tokens", "0 is only legal with echo true")
    if body.stream and body.echo and (body.logprobs is not None or body.max_tokens == 0):
        raise InvalidRequest("echo", "true is not available in a stream with logprobs or with max_tokens 0")


def _check_chat(body: ChatRequest) -> None:
    _check_common(body)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest("max_tokens", f"{body.max_tokens} contradicts max_completion_tokens; give one of the two")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", f"{body.top_logprobs} is only legal with logprobs true")
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidRequest("continue_final_message", "true is only legal with add_generation_prompt false")
