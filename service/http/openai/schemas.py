"""Bodies of /v1/completions and /v1/chat/completions: OpenAI's schema, vLLM's further parameters, and the rank."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from service.http.not_served import NotServed
from service.http.schemas import (
    MAX_ALTERNATIVES,
    MAX_STOP_CHARACTERS,
    Biases,
    Body,
    Finite,
    Milliseconds,
    Name,
    OnSwitch,
    Penalty,
    PlainText,
    PositiveInt,
    Rank,
    StopTokens,
    Switch,
    Temperature,
    Text,
    few_keys,
    whole_text,
)
from service.slo import Slo

MAX_STOPS = 4
MAX_LABELS = 16
MAX_CHOICES = 128
"""Sequences of one request: its prompts times the answers drawn for each."""
DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
_LABELS = "Accepted for OpenAI's clients, where it labels requests; it is neither kept nor read here."
_TOOLS = "tools are not served"
_TEXT_ONLY = "only text is served"


def _top_k(value: object) -> object:
    """vLLM's ways to say all: -1 and 0."""
    return None if value in (-1, 0) and not isinstance(value, bool) else value


def _stops(value: object) -> object:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Prompt = str | tuple[int, ...]
"""A text, or token ids."""


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (whole_text(value),)
    items = value if isinstance(value, list) else []
    if items and all(map(_is_token_id, items)):
        return (tuple(items),)
    if len(items) > MAX_CHOICES:
        raise ValueError(f"{len(items)} prompts; legal: up to {MAX_CHOICES}")
    if items and all(isinstance(each, str) for each in items):
        return tuple(map(whole_text, items))
    if items and all(isinstance(each, list) and each and all(map(_is_token_id, each)) for each in items):
        return tuple(map(tuple, items))
    raise ValueError("must be a text, a list of token ids, or a list of several of one of these kinds; none of them empty")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise ValueError("must be a text, or a list of parts")


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_SEVERAL = {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES}
_PROMPT_SCHEMA = {"anyOf": [_TEXT_SCHEMA, _IDS_SCHEMA, {**_SEVERAL, "items": _TEXT_SCHEMA}, {**_SEVERAL, "items": _IDS_SCHEMA}]}
_STOP_SCHEMA = {**_TEXT_SCHEMA, "maxLength": MAX_STOP_CHARACTERS}
_STOPS_SCHEMA = {"anyOf": [_STOP_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_SCHEMA}, {"type": "null"}]}

Stops = Annotated[
    list[Annotated[Text, Field(max_length=MAX_STOP_CHARACTERS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_stops),
    WithJsonSchema(_STOPS_SCHEMA),
]
Label = Annotated[str, Field(strict=True, max_length=512)]


class StreamOptions(Body):
    """How to stream."""

    model_config = ConfigDict(frozen=True)

    include_usage: Switch = Field(False, description="Send the counts of tokens in a last chunk, without choices.")
    continuous_usage_stats: Switch = Field(
        False, description="With include_usage: send the counts so far with every chunk, those of its own choice. vLLM's."
    )
    include_obfuscation: Annotated[Any, NotServed(False)] = None

    @model_validator(mode="after")
    def _usage_is_included(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats: true is only legal with include_usage true")
        return self


class OpenAIRequest(Body):
    """What both routes share.

    Tokens are drawn with temperature 1 unless `temperature` says otherwise; 0 is greedy. Log-probabilities are the model's
    own: before penalties, bias, temperature and filters.
    """

    model_config = ConfigDict(frozen=True)

    model: Name | None = Field(
        None,
        description="The base model by its id (or `base`), or an adapter; `name@8`, `name@max` and `name@auto` also give the "
        "rank. Null, 'dummy' and 'tgi', which Hugging Face's clients send, leave it open.",
    )
    rank: Rank = Field(None, description="Rank to serve at: an integer, 'max' or 'auto' (the server's policy).")
    rank_policy: Name | None = Field(None, description="Policy that chooses the rank, by its name in the server.")
    stream: Switch = Field(False, description="Send tokens as they are made, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(None, description="Most new tokens.")
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Draw this many answers, each a choice."
    )
    temperature: Temperature | None = Field(None, description="Divides the logits; 0 is greedy. 1 unless given.")
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        None, description="Draw among the fewest tokens that have this probability together; 0 leaves the most probable one."
    )
    presence_penalty: Penalty | None = Field(None, description="Taken once from the logits of tokens in the answer.")
    frequency_penalty: Penalty | None = Field(
        None, description="Taken from the logits of tokens in the answer, once for each time that they occur."
    )
    logit_bias: Biases = Field(default_factory=dict, description="Token id to what is added to its logit, -100 to 100.")
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**64)] | None = Field(
        None, description="The same seed and system_fingerprint give the same text; drawn at random unless given."
    )
    stop: Stops = Field(default_factory=list, description="Generation ends before any of these; a text or up to four.")

    top_k: Annotated[PositiveInt | None, BeforeValidator(_top_k)] = Field(
        None, description="vLLM: draw among this many most probable tokens; -1 and 0 are all."
    )
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = Field(
        None, description="vLLM: draw among the tokens at least this fraction as probable as the most probable one."
    )
    repetition_penalty: Annotated[Finite, Field(gt=0, le=100)] | None = Field(
        None, description="vLLM: above 1, makes tokens of prompt and answer less probable."
    )
    stop_token_ids: StopTokens = Field(default_factory=list, description="vLLM: generation ends after any of these tokens.")
    include_stop_str_in_output: Switch = Field(False, description="vLLM: keep the stop text in the answer.")
    ignore_eos: Switch = Field(False, description="vLLM: go on after the end-of-sequence token.")
    min_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(
        None, description="vLLM: fewest new tokens."
    )
    truncate_prompt_tokens: PositiveInt | None = Field(None, description="vLLM: keep only this many last tokens of the prompt.")

    user: Label | None = Field(None, description=_LABELS)
    metadata: Annotated[dict[Label, Label], Field(max_length=MAX_LABELS), few_keys(MAX_LABELS)] | None = Field(
        None, description=_LABELS
    )
    safety_identifier: Label | None = Field(None, description=_LABELS)
    prompt_cache_key: Label | None = Field(None, description=_LABELS)

    latency_slo_ms: Milliseconds | None = Field(None, description="Objective: from arrival to the last token.")
    ttft_slo_ms: Milliseconds | None = Field(None, description="Objective: from arrival to the first token.")
    itl_slo_ms: Milliseconds | None = Field(None, description="Objective: between two tokens, in the mean over the answer.")
    store: Annotated[Any, NotServed(False, instead="nothing is kept here")] = None
    service_tier: Annotated[Any, NotServed("auto", "default")] = None
    response_format: Annotated[Any, NotServed({"type": "text"})] = None
    use_beam_search: Annotated[Any, NotServed(False)] = None
    length_penalty: Annotated[Any, NotServed(1.0)] = None
    skip_special_tokens: Annotated[Any, NotServed(True)] = None
    spaces_between_special_tokens: Annotated[Any, NotServed(True)] = None
    prompt_logprobs: Annotated[Any, NotServed()] = None
    allowed_token_ids: Annotated[Any, NotServed()] = None
    bad_words: Annotated[Any, NotServed([])] = None
    priority: Annotated[Any, NotServed(0)] = None

    @property
    def slo(self) -> Slo:
        """The objectives that the body names."""
        return Slo(self.latency_slo_ms, self.ttft_slo_ms, self.itl_slo_ms)

    @property
    def choices(self) -> int:
        """How many answers each prompt is to have."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_in_chunks(self) -> bool:
        """Whether every chunk of a stream has the counts so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(OpenAIRequest):
    """Prompts and how to go on from them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "mr-to-text@8",
                    "prompt": "name[Blue Spice], eatType[coffee shop], area[city centre] =>",
                    "max_tokens": 64,
                    "temperature": 0,
                    "stop": "\n",
                }
            ]
        }
    )

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        description="A text, a list of token ids, or several of one of these; the choices follow in their order."
    )
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)] | None = Field(
        None, description=f"Most new tokens; {DEFAULT_MAX_TOKENS} unless given. 0, with echo, only tells of the prompt."
    )
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        None, description="Tell log-probabilities, and those of this many most probable tokens at every place."
    )
    echo: Switch = Field(False, description="Put the prompt before the text; with logprobs, those of its tokens too.")
    best_of: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] | None = Field(
        None,
        description="Draw this many answers and take the `n` with the highest mean log-probability of their tokens. In a "
        "stream only as many as `n`.",
    )
    suffix: Annotated[Any, NotServed("")] = None
    add_special_tokens: OnSwitch = Field(
        True, description="vLLM: with what the tokenizer puts around a text (a beginning of sequence, say)."
    )

    @property
    def drawn(self) -> int:
        """How many answers are drawn for each prompt."""
        return self.best_of or self.choices


class TextPart(Body):
    """A part of a message's content; OpenAI's other kinds are refused."""

    model_config = ConfigDict(frozen=True)

    type: Literal["text"] = Field(description=f"OpenAI's other types are refused: {_TEXT_ONLY}.")
    text: PlainText


_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": TextPart.model_json_schema()}]}


class Message(Body):
    """One message of a conversation. Null fields, which clients send back with an assistant's message, ask for nothing."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="`developer` is OpenAI's newer word for system."
    )
    content: Annotated[
        list[TextPart], Field(min_length=1, fail_fast=True), BeforeValidator(_parts), WithJsonSchema(_CONTENT_SCHEMA)
    ] = Field(description="Text, or a list of parts, which are joined by newlines.")
    name: Annotated[PlainText, Field(max_length=64)] | None = Field(
        None, description="Given to the chat template, which may use it."
    )
    refusal: Annotated[Any, NotServed()] = None
    audio: Annotated[Any, NotServed(instead=_TEXT_ONLY)] = None
    annotations: Annotated[Any, NotServed([])] = None
    function_call: Annotated[Any, NotServed(instead=_TOOLS)] = None
    tool_calls: Annotated[Any, NotServed([], instead=_TOOLS)] = None
    tool_call_id: Annotated[Any, NotServed(instead=_TOOLS)] = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it."""
        content = "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(OpenAIRequest):
    """A conversation to go on with, through the model's chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "my-chat-adapter@auto",
                    "messages": [{"role": "user", "content": "Where can I eat well by the river?"}],
                    "max_completion_tokens": 64,
                }
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: PositiveInt | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: PositiveInt | None = Field(
        None, description="Most new tokens; unless given, as many as the context leaves."
    )
    logprobs: Switch = Field(False, description="Tell the log-probability of every token.")
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_ALTERNATIVES)] | None = Field(
        None, description="With logprobs: tell this many most probable tokens at every place."
    )
    add_generation_prompt: OnSwitch = Field(True, description="vLLM: with the opening of the assistant's answer.")
    continue_final_message: Switch = Field(
        False, description="vLLM: go on from the last message; add_generation_prompt must then be false."
    )

    tools: Annotated[Any, NotServed([], instead=_TOOLS)] = None
    tool_choice: Annotated[Any, NotServed("none", instead=_TOOLS)] = None
    functions: Annotated[Any, NotServed([], instead=_TOOLS)] = None
    function_call: Annotated[Any, NotServed("none", instead=_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, NotServed(False, True, instead=_TOOLS)] = None
    modalities: Annotated[Any, NotServed(["text"], instead=_TEXT_ONLY)] = None
    audio: Annotated[Any, NotServed(instead=_TEXT_ONLY)] = None
    prediction: Annotated[Any, NotServed()] = None
    reasoning_effort: Annotated[Any, NotServed("none")] = None
    verbosity: Annotated[Any, NotServed("medium")] = None
    web_search_options: Annotated[Any, NotServed()] = None
    echo: Annotated[Any, NotServed(False, instead="/v1/completions has it")] = None
    add_special_tokens: Annotated[Any, NotServed(False, instead="the chat template writes them")] = None
    documents: Annotated[Any, NotServed()] = None
    chat_template: Annotated[Any, NotServed(instead="the model's own is used")] = None
    chat_template_kwargs: Annotated[Any, NotServed({})] = None

    @property
    def most_tokens(self) -> int | None:
        """The largest number of new tokens, by either name."""
        return self.max_completion_tokens or self.max_tokens
