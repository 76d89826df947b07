"""Answers of /v1: OpenAI's, with what served them as a field of its own."""

from typing import Literal

from pydantic import BaseModel, Field

from adapters.config import AdapterKind
from service.http.adapters.schemas import QualityOut
from service.http.error_table import KINDS
from service.http.schemas import ServedBy, is_none

StopReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and made; those of best_of's other answers among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, each list with one entry a token."""

    tokens: list[str] = Field(description="What each token adds to the text; joined they are the text.")
    token_logprobs: list[float | None] = Field(description="Null for the first token of the prompt, with echo.")
    top_logprobs: list[dict[str, float] | None] | None = Field(description="Null with logprobs 0.")
    text_offset: list[int] = Field(description="Where each begins, in characters.")


class CompletionChoice(BaseModel):
    """One completion, or a piece of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: StopReason | None = Field(description="Null in all but the last piece of a stream.")


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Of its text in UTF-8.")


class TokenLogprob(TopLogprob):
    """A chosen token."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: StopReason


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: StopReason | None = None


class Envelope(BaseModel):
    """What every answer and chunk says."""

    id: str
    created: int = Field(description="Unix time.")
    model: str = Field(description="The adapter, or the base model.")
    system_fingerprint: str = Field(
        description="Stands for the server's version, the base model and how it runs, the adapter's content and the rank: "
        "where it is the same, so is the text of a seed."
    )
    lora: ServedBy | None = Field(default=None, exclude_if=is_none, description="What served it; in a stream, with the end.")


class Completion(Envelope):
    """A whole answer of /v1/completions."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Envelope):
    """An event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, description="With include_usage, in the last chunk, or in each.")


class ChatCompletion(Envelope):
    """A whole answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Envelope):
    """An event of its stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(default=None, description="With include_usage, in the last chunk, or in each.")


class Model(BaseModel):
    """What `model` may name: the base, or an adapter with its ranks and measured quality."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time: when it came, or when the server started.")
    owned_by: str
    parent: str | None = Field(default=None, description="The base model of an adapter.")
    max_model_len: int = Field(description="Tokens of prompt and answer.")
    kind: AdapterKind | None = None
    ranks: list[int] = []
    quality: QualityOut | None = None


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None = Field(description="The field that is to blame.")
    code: str = Field(description=f"One of {', '.join(sorted({kind.openai_code for kind in KINDS}))}.")


class OpenAIError(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail
